"""A recipe is read strictly: every mistake is told with its place and its hint, all of them at once."""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest

from peftchat.errors import UserError
from peftchat.recipe import LoadedRecipe, load_recipe, training_arguments
from peftchat.recipe.sections import Schedule
from peftchat.recipe.validation import SCHEDULE_OPTIONS

GOOD = """\
model:
  name: base
method: lora
adapter:
  r: 8
chat:
  template: starchat
data:
  train:
    - path: rows.jsonl
  eval_fraction: 0.1
training:
  learning_rate: 1e-4
  save_steps: 10
distributed:
  strategy: auto
output_dir: runs/x
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "r.yaml") -> Path:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
        return Path(name)

    return write


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def load(path: Path, *overrides: str) -> LoadedRecipe:
    return load_recipe(path, overrides)


def test_values_defaults_and_places(write: Write) -> None:
    loaded = load(write(GOOD), "adapter.alpha=64", "data.train.0.path=other.jsonl")
    recipe = loaded.recipe
    assert (recipe.adapter.r, recipe.adapter.alpha) == (8, 64)
    assert recipe.training.learning_rate == 1e-4
    assert recipe.data.train[0].path == "other.jsonl"
    assert recipe.quantization is None
    assert loaded.where("training", "learning_rate") == "r.yaml:13: training.learning_rate"
    assert loaded.where("adapter", "alpha") == "--set adapter.alpha"
    assert loaded.where("data", "train", 0, "path") == "--set data.train.0.path"
    assert loaded.where("training", "seed") == "r.yaml:12: training.seed", "a default has its section's line"
    assert loaded.where("output_dir") == "r.yaml:17: output_dir"


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_method_brings_its_sections(write: Write, method: str) -> None:
    text = f"model: {{name: b}}\nmethod: {method}\ndata: {{train: [{{path: d}}]}}\noutput_dir: o\n"
    recipe = load(write(text)).recipe
    assert (recipe.adapter is None) == (method == "full")
    assert (recipe.quantization is None) == (method != "qlora")
    assert recipe.training.learning_rate == "auto"


@pytest.mark.parametrize(
    ("section", "line", "typo", "meant"),
    [
        ("model", 2, "nam", "name"),
        ("adapter", 5, "alhpa", "alpha"),
        ("chat", 7, "templte", "template"),
        ("data", 9, "max_lenght", "max_length"),
        ("training", 13, "learning_rte", "learning_rate"),
        ("distributed", 16, "proceses", "processes"),
    ],
)
def test_a_typo_in_any_section_names_line_key_and_nearest(
    write: Write, section: str, line: int, typo: str, meant: str
) -> None:
    lines = GOOD.splitlines()
    lines.insert(line - 1, f"  {typo}: 1")
    message = error_of(write("\n".join(lines)))
    assert message == f"r.yaml:{line}: {section}.{typo}: unknown key. Did you mean `{meant}`?"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("metod=lora", "--set metod: unknown key. Did you mean `method`?"),
        ("data.learning_rate=1", "`learning_rate` belongs in the section `training`"),
        ("training.output_dir=x", "It stands at the top level"),
        ("training.method=full", "`method` belongs at the top level, not in `training`"),
        ("learning_rte=1", "Did you mean `training.learning_rate`?"),
        ("data.train=[{pth: x, path: y}]", "data.train.0.pth: unknown key. Did you mean `path`?"),
        ("training.zzzz=1", "Here can stand: `learning_rate`"),
        ("training.warmup_ratio=0.1", "below 1 it is a share of all steps"),
        ("training.evaluation_strategy=no", "is called `training.eval_strategy` here"),
        ("training.bf16=true", "`model.dtype` decides"),
        ("lora_alpha=16", "is called `adapter.alpha` here"),
        ("adapter.r='4'", "expected a whole number, got the text `4`. Remove the quotes."),
        ("adapter.r=4.5", "expected a whole number, got the number 4.5"),
        ("adapter.r=0", "must be at least 1, got the number 0"),
        ("adapter.r=true", "expected a whole number, got true"),
        ("adapter.dropout=1.0", "must be less than 1, got the number 1.0"),
        ("data.packing=yes", "expected true or false, got the text `yes`. Write `true`"),
        ("model.name=7", "expected text, got the number 7. Put it in quotes."),
        ("model=base", "expected keys with values, got the text `base`"),
        ("model.dtype=bf16", "got the text `bf16`. Did you mean `bfloat16`?"),
        ("chat.template=startchat", "expected one of `starchat`, `chatml`"),
        ("adapter.variant=doraa", "Did you mean `dora`?"),
        ("adapter.target_modules=attn", "expected `all-linear` or a list of module names"),
        ("data.train=rows.jsonl", "expected a list, got the text `rows.jsonl`. Write `train: [{path: rows.jsonl}]`."),
        ("data.train=[rows.jsonl]", "Write `{path: rows.jsonl}`."),
        ("data.train=[]", "--set data.train: is empty"),
        ("data.train=null", "--set data.train: missing. Add for example `train: [{path: conversations.jsonl}]`"),
        ("output_dir=null", "--set output_dir: missing. Add for example `output_dir: runs/my-assistant`"),
        ("training.report_to=wandbb", "Did you mean `wandb`?"),
        ("training.learning_rate=.inf", "expected `auto` or a finite number above 0"),
        ("training.max_steps=0", "must be above 0 or -1, got 0"),
        ("training.num_train_epochs=0", "must be greater than 0"),
        ("training.warmup_steps=10.5", "a number of steps must be whole"),
        ("training.lr_scheduler_type=cosine_with_min_lr", "needs one of: min_lr, min_lr_rate"),
        ("data.max_length=2020-01-01", "expected a whole number, got the text `2020-01-01`"),
        ("data.max_length=!!binary aGk=", "Put it in quotes if it is meant as text"),
        ("training.max_steps=99999999999999999999", "a whole number of more than 64 bits"),
        ("training.seed=4294967296", "must be at most 4294967295"),
        ("chat={template: model, template_date: 2024-02-30}", "chat.template_date: is no date (day is out of range"),
        ("chat={template: model, template_date: 2024-2-3}", "chat.template_date: is not of the right form"),
        (
            "training.lr_scheduler_kwargs={min_lr_rate: 0.1}",
            "`cosine` has no option `min_lr_rate`. It takes",
        ),
        ("orpo.beta=1", "--set orpo.beta: orpo: has no effect"),
        ("adapter={variant: adalora, init_r: 8, target_r: 8}", "adapter.target_r: must be below `init_r` (8)"),
        ("adapter={variant: vblora, num_vectors: 1}", "adapter.topk: must be at most `num_vectors` (1)"),
        ("adapter={variant: gralora, r: 5}", "adapter.gralora_k: must divide `r` (5)"),
        ("adapter={variant: lokr, decompose_factor: 0}", "adapter.decompose_factor: must be -1 or above 0"),
        (
            "adapter={variant: ia3, target_modules: [q_proj], feedforward_modules: [fc]}",
            "adapter.feedforward_modules: `fc` is not in `target_modules`",
        ),
        ("chat.system=!!python/object:os.system x", "which no key takes"),
    ],
)
def test_one_mistake_one_message(write: Write, change: str, expected: str) -> None:
    message = error_of(write(GOOD), change)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["method=full", "adapter.r=4"], "`method: full` trains all weights and has no adapter"),
        (["quantization.bits=4"], "by `method: qlora`"),
        (["method=qlora", "quantization={bits: 8, type: nf4}"], "only `quantization.bits: 4` has such a setting"),
        (["method=qlora", "quantization={bits: 8, double: true}"], "only `quantization.bits: 4` has such a setting"),
        (["chat.template=model", "chat.new_token_init=mean"], "adds no tokens"),
        (["data.eval=[{path: e}]", "data.eval_fraction=0.2"], "held-out sources in `data.eval` already"),
        (["data.eval_fraction=null", "training.eval_steps=5"], "there is nothing to evaluate on"),
        (["training.eval_strategy=epoch", "training.eval_steps=5"], "`eval_strategy` is `epoch`"),
        (["training.save_strategy=no", "training.save_steps=5"], "`save_strategy` is `no`"),
        (
            ["training.gradient_checkpointing_kwargs={use_reentrant: true}"],
            "`gradient_checkpointing` is not switched on",
        ),
        (["training.lr_scheduler_type=constant", "training.warmup_steps=5"], "has no warm-up"),
        (["training.optim_args=a=1"], "does not read it"),
        (["training.max_steps=5", "training.warmup_steps=10"], "longer than the run"),
        (["distributed.offload=optimizer"], "only the strategies `zero2` and `zero3`"),
        (["distributed.strategy=zero2", "distributed.offload=all"], "`zero3` can offload them"),
        (["distributed.strategy=single", "distributed.processes=2"], "is one process"),
        (["distributed.deepspeed_config=ds.json"], "only the strategies `zero2` and `zero3`"),
        (["model.dtype=float32", "model.attention=flash_attention_2"], "computes in 16 bits"),
        (["method=qlora", "quantization.bits=8", "distributed.strategy=zero3"], "cannot shard 8-bit weights"),
    ],
)
def test_settings_side_by_side_that_exclude_each_other(write: Write, changes: list[str], expected: str) -> None:
    message = error_of(write(GOOD), *changes)
    assert expected in message
    assert message.startswith(("--set ", "r.yaml:"))


@pytest.mark.parametrize(
    "change",
    [
        "method=full",
        "training.save_strategy=no",
        "data.eval_fraction=null",
        "data.eval=[{path: e.jsonl}]",
        "adapter=null",
        "chat.template=model",
    ],
)
def test_what_is_laid_on_top_wins(write: Write, change: str) -> None:
    load(write(GOOD), change)


def test_a_date_is_text_as_in_yaml_1_2(write: Write) -> None:
    recipe = load(write(GOOD), "chat.template=model", "chat.template_date=2024-02-29", "output_dir=2024-01-01").recipe
    assert (recipe.chat.template_date, recipe.output_dir) == ("2024-02-29", "2024-01-01")


def test_what_the_first_step_would_reject_is_rejected_with_the_recipe(write: Write) -> None:
    checkpointing = "training.gradient_checkpointing=true"
    options = "training.gradient_checkpointing_kwargs={use_reentrant: %s}"
    load(write(GOOD), checkpointing, options % "false")
    assert "expected true or false for `use_reentrant`" in error_of(Path("r.yaml"), checkpointing, options % "maybe")
    unknown = error_of(Path("r.yaml"), checkpointing, "training.gradient_checkpointing_kwargs={reentrant: true}")
    assert "expected the options `use_reentrant`" in unknown
    assert "must not end before it begins" in error_of(Path("r.yaml"), "method=full", "model.freeze_layers=0,5-2")


def test_the_options_of_schedules_are_those_of_transformers() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(SCHEDULE_OPTIONS) == set(get_args(Schedule))
    for name, options in SCHEDULE_OPTIONS.items():
        function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        assert set(options) == set(signature(function).parameters) - given


def test_a_losing_key_goes_back_to_its_default(write: Write) -> None:
    recipe = load(write(GOOD), "method=full", "training.save_strategy=epoch").recipe
    assert recipe.adapter is None
    assert recipe.training.save_steps != 10
    assert "save_steps" not in training_arguments(recipe)


def test_eval_steps_alone_mean_steps(write: Write) -> None:
    assert load(write(GOOD), "training.eval_steps=5").recipe.training.eval_strategy == "steps"


def test_without_held_out_examples_nothing_is_evaluated(write: Write) -> None:
    arguments = training_arguments(load(write(GOOD), "data.eval_fraction=null").recipe)
    assert (arguments["eval_strategy"], arguments["eval_on_start"]) == ("no", False)


def test_all_problems_are_told_in_the_order_of_their_lines(write: Write) -> None:
    text = GOOD.replace("r: 8", "r: eight").replace("base", "7").replace("save_steps", "sve_steps")
    lines = error_of(write(text)).splitlines()
    assert lines[0] == "r.yaml: 3 problems"
    assert [line.split()[0] for line in lines[1:]] == ["r.yaml:2:", "r.yaml:5:", "r.yaml:14:"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml: the recipe is empty"),
        ("# nothing\n", "r.yaml: the recipe is empty"),
        ("- a\n", "a recipe is keys with values"),
        ("a: 1\nb: [1\n", "r.yaml:3:1: not valid YAML"),
        ("a: b: c\n", "r.yaml:1:5: not valid YAML"),
        ("a:\n\tb: 1\n", "r.yaml:2:1: not valid YAML"),
        ("method: lora\nmethod: full\n", "r.yaml:2:1: not valid YAML: found duplicate key"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a: *x\n", "undefined alias"),
        ("a: \x00\n", "not valid YAML"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
        ), "Check its aliases"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe(write: Write, text: str, expected: str) -> None:
    assert expected in error_of(write(text))


def test_files_that_cannot_be_read(write: Write) -> None:
    Path("folder").mkdir()
    assert error_of(Path("folder")) == "folder: is a folder, not a recipe. Give the YAML file."
    Path("folder/recipe.yaml").write_text(GOOD)
    assert error_of(Path("folder")) == "folder: is a folder, not a recipe. Give the YAML file: folder/recipe.yaml."
    Path("talks.jsonl").write_text('{"messages": []}\n' * 2)
    what = "talks.jsonl: is a file of conversations, not a recipe. `peftchat init --data talks.jsonl`"
    assert what in error_of(Path("talks.jsonl"))
    assert "no such file" in error_of(Path("absent.yaml"))
    Path("latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    assert error_of(Path("latin.yaml")).startswith("latin.yaml:2: not UTF-8")
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(Path("bom.yaml")).recipe.method == "lora"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("seed", "not of the form KEY=VALUE"),
        ("=3", "not of the form KEY=VALUE"),
        ("training..seed=3", "not of the form KEY=VALUE"),
        ("extends=x.yaml", "can only stand in a file"),
        ("method.x=3", "`method` holds a single value"),
        ("data.train.1.path=x", "`data.train` is a list of 1"),
        ("data.train.first.path=x", "`data.train` is a list of 1"),
        ("chat.system=a: b: c", "--set chat.system:1:5: not valid YAML"),
    ],
)
def test_a_flag_that_leads_nowhere(write: Write, flag: str, expected: str) -> None:
    assert expected in error_of(write(GOOD), flag)


def test_extends_merges_mappings_replaces_lists_and_keeps_places(write: Write) -> None:
    write(GOOD, "base/base.yaml")
    write("extends: base.yaml\ntraining:\n  seed: 7\n", "base/middle.yaml")
    path = write("extends: base/middle.yaml\ndata:\n  train: [{path: a}, {path: b}]\nadapter: null\nmethod: full\n")
    loaded = load(path)
    recipe = loaded.recipe
    assert (recipe.method, recipe.adapter, recipe.training.seed) == ("full", None, 7)
    assert [entry.path for entry in recipe.data.train] == ["a", "b"]
    assert recipe.data.eval_fraction == 0.1
    assert recipe.training.learning_rate == 1e-4
    assert loaded.where("training", "seed") == "base/middle.yaml:3: training.seed"
    assert loaded.where("training", "learning_rate") == "base/base.yaml:13: training.learning_rate"
    assert loaded.where("data", "train", 1, "path") == "r.yaml:3: data.train.1.path"


def test_extends_that_cannot_be_followed(write: Write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    assert "b.yaml:1: extends: `a.yaml` extends this recipe in turn" in error_of(Path("a.yaml"))
    assert "`gone.yaml` does not exist" in error_of(write("extends: gone.yaml\n"))
    assert "expected the path of one recipe" in error_of(write("extends: [a, b]\n"))


def test_a_path_is_found_beside_the_recipe_unless_it_is_here(write: Write) -> None:
    path = write(GOOD, "deep/r.yaml")
    assert load(path).recipe.data.train[0].path == "rows.jsonl"
    write("", "deep/rows.jsonl")
    assert load(path).recipe.data.train[0].path == "deep/rows.jsonl"
    assert load(path, "data.train.0.path=rows.jsonl").recipe.data.train[0].path == "rows.jsonl"
    write("", "rows.jsonl")
    assert load(path).recipe.data.train[0].path == "rows.jsonl"


def test_a_tracker_must_be_installed_to_train(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftchat.recipe.validation.find_spec", lambda name: None)
    path = write(GOOD)
    message = error_of(path, "training.report_to=mlflow")
    assert message.startswith("--set training.report_to: the package `mlflow` is not installed. Run `pip install")
    looked_at = load_recipe(path, ["training.report_to=mlflow"], to_train=False)
    assert looked_at.recipe.training.report_to == ("mlflow",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"zero_optimization": {"stage": 3}, "scheduler": {"type": "WarmupLR"}}, "overrules"),
        ({"zero_optimization": {"stage": 2}}, "sets ZeRO stage 2"),
        ({}, "sets ZeRO stage None"),
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": False}}, "`bf16.enabled` to false"),
        ({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.3}, "`gradient_clipping` to 0.3"),
        (
            {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            "`optimizer.params.lr` to 0.1",
        ),
        ([], "does not hold a JSON object"),
    ],
)
def test_a_deepspeed_file_that_contradicts(write: Write, content: object, expected: str) -> None:
    write(json.dumps(content), "ds.json")
    message = error_of(write(GOOD), "distributed.strategy=zero3", "distributed.deepspeed_config=ds.json")
    assert expected in message
    assert message.startswith("--set distributed.deepspeed_config")


def test_a_deepspeed_file_that_agrees(write: Write) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}}
    content = {"zero_optimization": {"stage": 3}, "optimizer": optimizer, "gradient_accumulation_steps": "auto"}
    write(json.dumps(content), "ds.json")
    load(write(GOOD), "distributed.strategy=zero3", "distributed.deepspeed_config=ds.json")
    assert "is not JSON" in error_of(
        write(GOOD), "distributed.strategy=zero3", f"distributed.deepspeed_config={write('{', 'bad.json')}"
    )
    assert "cannot read" in error_of(
        write(GOOD), "distributed.strategy=zero3", "distributed.deepspeed_config=gone.json"
    )


def test_surrogate_pairs_are_joined_and_halves_are_rejected(tmp_path: Path) -> None:
    rest = "model: {name: base}\nmethod: full\ndata: {train: [{path: a.jsonl}]}\noutput_dir: run\n"
    text = rest + 'chat: {system: "%s"}\n'
    path = tmp_path / "recipe.yaml"
    path.write_text(text % r"\ud83d\ude00", encoding="utf-8")
    assert load_recipe(path).recipe.chat.system == "😀"
    path.write_text(text % r"\ud83d", encoding="utf-8")
    with pytest.raises(UserError, match="half of a surrogate pair"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], "error"),
        (["chat.template=model"], "keep"),
        (["chat.template=my.jinja"], "keep"),
        (["chat.template=model", "data.consecutive=error"], "error"),
        (["data.consecutive=merge"], "merge"),
    ],
)
def test_templates_of_others_decide_which_turns_they_take(settings: list[str], expected: str, write: Write) -> None:
    loaded = load_recipe(write(GOOD), settings, to_train=False)
    assert loaded.recipe.data.consecutive == expected
