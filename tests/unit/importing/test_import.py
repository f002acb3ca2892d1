"""What becomes of another tool's lines: each has one outcome, and what is kept means the same."""

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.importing.detection import TOOLS
from peftchat.importing.draft import shown
from peftchat.importing.importing import Imported, import_file
from peftchat.importing.shown_import import as_json
from peftchat.importing.source_file import read_source
from peftchat.importing.writing import recipe_text
from peftchat.recipe import load_recipe

AXOLOTL = """\
base_model: org/base
load_in_4bit: true
adapter: qlora
datasets:
  - path: talks.jsonl
    type: chat_template
    field_messages: talk
    message_property_mappings: {role: who, content: says}
    roles: {assistant: [bot], user: [person]}
val_set_size: 0.1
sequence_len: 1024
sample_packing: true
lora_r: 8
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 3
micro_batch_size: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: "3e-4"
warmup_ratio: 0.05
bf16: yes
evals_per_epoch: 1
wandb_project:
output_dir: out
"""

LLAMAFACTORY = """\
model_name_or_path: org/base
stage: dpo
pref_loss: simpo
pref_beta: 2.5
simpo_gamma: 1.2
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: pairs
template: llama3
cutoff_len: 512
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""

TRL = """\
# trl dpo --config this.yaml
model_name_or_path: org/base
dataset_name: org/pairs
use_peft: true
lora_r: 32
beta: 0.2
loss_type: ipo
learning_rate: 2.0e-6
max_length: 700
"""

TORCHTUNE = """\
output_dir: out
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_attn_modules: [q_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 8
  lora_alpha: 16
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, max_seq_len: 900}
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: org/base
  output_dir: ${output_dir}/weights
dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset, packed: true, split: "train[:95%]"}
dataset_val: {_component_: torchtune.datasets.alpaca_cleaned_dataset, split: "train[95%:]"}
batch_size: 2
batch_size_val: ${batch_size}
epochs: 1
optimizer: {_component_: torch.optim.AdamW, lr: 3e-4, fused: true}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 10}
gradient_accumulation_steps: 8
clip_grad_norm: null
dtype: bf16
"""

EXAMPLES = {"axolotl": AXOLOTL, "llamafactory": LLAMAFACTORY, "trl": TRL, "torchtune": TORCHTUNE}


def read(folder: Path, text: str, tool: str | None = None, name: str = "other.yaml") -> Imported:
    path = folder / name
    path.write_text(dedent(text), encoding="utf-8")
    return import_file(path, tool)


def written(folder: Path, imported: Imported) -> dict[str, Any]:
    """The recipe's keys after it was written and read back by peftchat's own loader."""
    path = folder / "recipe.yaml"
    path.write_text(recipe_text(imported, path), encoding="utf-8")
    return load_recipe(path, to_train=False).recipe.model_dump(mode="json")


@pytest.mark.parametrize("tool", EXAMPLES)
def test_every_line_has_one_outcome_and_the_recipe_says_what_the_table_says(tool: str, tmp_path: Path) -> None:
    imported = read(tmp_path, EXAMPLES[tool])
    assert imported.tool.name == tool
    outcomes = [line.source.keys for line in imported.lines if line.source.key != "command"]
    assert len(outcomes) == len(set(outcomes))
    for line in read_source(tmp_path / "other.yaml").lines():
        assert [keys for keys in outcomes if line.keys[: len(keys)] == keys], f"{line.key} is missing"
    for line in imported.lines:
        assert line.why or line.status == "kept", line.source.key
    assert not imported.refused
    recipe = written(tmp_path, imported)
    for line in imported.lines:
        for key, value in line.becomes.items():
            held: Any = recipe
            steps = key.split(".")
            for step in steps:
                held = held[int(step)] if isinstance(held, list) else held[step]
            assert held == value, key


def test_axolotl_keeps_batch_rate_adapter_and_fields(tmp_path: Path) -> None:
    recipe = written(tmp_path, read(tmp_path, AXOLOTL))
    assert recipe["method"] == "qlora"
    assert recipe["quantization"]["bits"] == 4
    assert recipe["model"]["dtype"] == "bfloat16", "`yes` is true in YAML 1.1"
    assert recipe["data"]["train"][0]["columns"] == {"messages": "talk", "role": "who", "content": "says"}
    assert recipe["data"]["train"][0]["roles"] == {"bot": "assistant", "person": "user"}
    training = recipe["training"]
    assert training["learning_rate"] == 3e-4
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (4, 3)
    assert training["warmup_steps"] == 0.05
    assert training["optim"] == "adamw_8bit"
    assert recipe["data"]["truncation"] == "drop"
    assert recipe["chat"]["template"] == "model"


def test_llamafactory_objective_and_defaults(tmp_path: Path) -> None:
    recipe = written(tmp_path, imported := read(tmp_path, LLAMAFACTORY))
    assert recipe["objective"] == "simpo"
    assert recipe["simpo"] == {"beta": 2.5, "gamma": 1.2}
    assert recipe["adapter"]["alpha"] == 8, "twice the rank"
    assert recipe["adapter"]["target_modules"] == ["q_proj", "v_proj"]
    assert "data.train.0.path" in imported.to_give, "a name is no file"


def test_llamafactory_reads_the_names_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    entry = '{"pairs": {"file_name": "p.json", "ranking": true, "columns": {"prompt": "ask", "chosen": "good"}}}'
    (tmp_path / "data" / "dataset_info.json").write_text(entry, encoding="utf-8")
    imported = read(tmp_path, LLAMAFACTORY)
    assert imported.values["data.train.0.path"] == str(tmp_path / "data" / "p.json")
    assert imported.values["data.train.0.columns.prompt"] == "ask"
    assert imported.values["data.train.0.columns.chosen"] == "good"


def test_torchtune_follows_references_and_parts_of_a_split(tmp_path: Path) -> None:
    recipe = written(tmp_path, read(tmp_path, TORCHTUNE))
    assert recipe["training"]["per_device_eval_batch_size"] == 2
    assert recipe["adapter"]["target_modules"] == ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert recipe["data"]["eval_fraction"] == 0.05
    assert recipe["data"]["train"][0]["split"] == "train"
    assert recipe["training"]["max_grad_norm"] == 0, "torchtune clips nothing without a norm"
    assert recipe["training"]["weight_decay"] == 0.01, "AdamW's own default"
    assert recipe["chat"]["loss_on"] == "everything", "the default of its Alpaca data"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("adapter: null", "cannot be trained without an adapter"),
        ("load_in_8bit: true", "one or the other"),
        ("optimizer: muon", "optimizers"),
        ("neftune_noise_alpha: 5", "noise"),
        ("lr_scheduler: rex", "schedules"),
        ("sequnce_len: 100", "did you mean `sequence_len`"),
        ("learning_rate: $RATE", "filled in elsewhere"),
        ("learning_rate: fast", "a finite number"),
        ("lora_modules_to_save: [lm_head]", "whole modules"),
        ("context_parallel_size: 2", "batch per step"),
        ("val_set_size: 500", "eval_fraction"),
    ],
)
def test_what_changes_training_and_cannot_be_said_is_refused(line: str, why: str, tmp_path: Path) -> None:
    key = line.partition(":")[0]
    kept = "".join(f"{one}\n" for one in AXOLOTL.splitlines() if not one.startswith(f"{key}:"))
    imported = read(tmp_path, f"{kept}{line}\n")
    assert any(why in refused.why for refused in imported.refused), [one.why for one in imported.refused]
    assert not imported.blocking
    assert "REFUSED" in recipe_text(imported, tmp_path / "recipe.yaml")
    written(tmp_path, imported)


@pytest.mark.parametrize("line", ["rl: grpo", "pretraining_dataset: [{path: x}]", "processor_type: AutoProcessor"])
def test_another_kind_of_training_is_no_recipe(line: str, tmp_path: Path) -> None:
    assert read(tmp_path, AXOLOTL + line).blocking


def test_what_a_setting_makes_idle_is_left_out_with_the_reason(tmp_path: Path) -> None:
    text = AXOLOTL.replace("lr_scheduler: cosine", "lr_scheduler: constant").replace("val_set_size: 0.1\n", "")
    imported = read(tmp_path, text)
    outcome = {line.source.key: line for line in imported.lines}
    assert outcome["warmup_ratio"].status == "left out"
    assert "constant" in outcome["warmup_ratio"].why
    assert outcome["evals_per_epoch"].status == "left out"


def test_anchors_keep_their_lines_and_flags_of_a_script_count_as_lines(tmp_path: Path) -> None:
    text = AXOLOTL.replace("lora_r: 8\nlora_alpha: 16", "lora_r: &rank 8\nlora_alpha: *rank")
    assert read(tmp_path, text).values["adapter.alpha"] == 8
    script = """\
        MODEL=org/base
        trl sft \\
            --model_name_or_path $MODEL \\
            --dataset_name org/talks \\
            --lora_target_modules q_proj v_proj \\
            --use_peft --learning_rate=1e-4
        """
    imported = read(tmp_path, script, name="run.sh")
    assert imported.tool.name == "trl"
    lines = {line.source.key: line.source.line for line in imported.lines}
    assert (lines["model_name_or_path"], lines["learning_rate"]) == (3, 6)
    assert imported.values["model.name"] == "org/base"
    assert imported.values["adapter.target_modules"] == ["q_proj", "v_proj"]
    assert imported.values["method"] == "lora"


@pytest.mark.parametrize(
    "launcher",
    [
        "accelerate launch --num_processes 4 trl sft",
        "accelerate launch --num_processes=4 --multi_gpu trl sft",
        "accelerate launch --multi_gpu --num_processes 4 trl/scripts/sft.py",
        "torchrun --nproc_per_node 4 sft.py",
    ],
)
def test_a_launchers_flags_end_where_its_program_begins(tmp_path: Path, launcher: str) -> None:
    flags = "--model_name_or_path org/base --dataset_name org/talks --use_peft"
    imported = read(tmp_path, f"{launcher} {flags}\n", name="run.sh")
    assert imported.tool.name == "trl"
    assert imported.values["distributed.processes"] == 4
    assert [line.source.key for line in imported.refused] in ([], ["multi_gpu"])


def test_a_program_is_not_run_to_read_its_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a program"):
        read(tmp_path, "from trl import SFTTrainer\n", name="train.py")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty"),
        ("- a\n- b\n", "a list"),
        ("model: {name: m}\nmethod: full\n", "a recipe of peftchat already"),
        ("compute_environment: LOCAL\ndistributed_type: FSDP\n", "accelerate"),
        ("zero_optimization: {stage: 2}\n", "DeepSpeed"),
        ("version: 3\nservices: {}\n", "no file of Axolotl"),
        ("base_model: a\nbase_model: b\n", "duplicate key"),
        ("model_name_or_path: a\nexport_dir: b\n", "trains nothing"),
    ],
)
def test_other_files_are_refused_in_one_message(text: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what) as refused:
        read(tmp_path, text)
    assert "other.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.sh", "NPROC=2 swift sft --model org/base --train_type lora --lora_rank 8 --max_length 2048\n"),
        ("args.json", '{"model": "org/base", "tuner_type": "lora", "lora_rank": 8, "max_length": 2048}'),
    ],
)
def test_a_tool_whose_keys_only_look_like_anothers_is_named(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file of ms-swift"):
        read(tmp_path, text, name=name)


def test_a_key_of_a_service_is_neither_shown_nor_written(tmp_path: Path) -> None:
    key = "hf_" + "a1B2" * 9
    imported = read(tmp_path, f"{AXOLOTL}hub_token: {key}\n")
    assert not imported.refused
    assert [line.status for line in imported.lines if line.source.key == "hub_token"] == ["left out"]
    assert key not in recipe_text(imported, tmp_path / "recipe.yaml") + str(as_json(imported))


@pytest.mark.parametrize(
    ("part", "is_refused"),
    [
        ('"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}', True),
        ('"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}', True),
        ('"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}', False),
    ],
)
def test_a_deepspeed_file_that_overrules_the_other_lines_is_refused(
    part: str, is_refused: bool, tmp_path: Path
) -> None:
    (tmp_path / "zero.json").write_text(f'{{"zero_optimization": {{"stage": 3}}, {part}}}', encoding="utf-8")
    imported = read(tmp_path, f"{AXOLOTL}deepspeed: zero.json\n")
    assert ["deepspeed"] * is_refused == [line.source.key for line in imported.refused]


def test_a_byte_order_mark_and_json_are_read(tmp_path: Path) -> None:
    plain = read(tmp_path, AXOLOTL)
    (tmp_path / "mark.yaml").write_bytes(b"\xef\xbb\xbf" + AXOLOTL.encode())
    assert import_file(tmp_path / "mark.yaml").values == plain.values


@pytest.mark.parametrize("tool", TOOLS)
def test_no_pattern_is_shadowed_and_every_reason_is_one_phrase(tool: str) -> None:
    patterns = [pattern.split(".") for pattern in TOOLS[tool].table]
    for pattern in patterns:
        assert all(step == "*" or step.strip("*") == step for step in pattern), pattern
    assert TOOLS[tool].marks, tool


def test_values_are_shown_as_yaml_on_one_line() -> None:
    assert shown([True, None, 1e-5, {"a": "b\nc"}]) == "[true, null, 1e-05, {a: b\\nc}]"
