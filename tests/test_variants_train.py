"""Every variant learns, and what it leaves behind is what was trained: in stock peft, and folded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import small_model, write_conversations
from transformers import AutoModelForCausalLM
from variants_helpers import held_out_loss, method_of, stock_variant, train_variant

from peftchat.errors import UserError
from peftchat.merging import MergeOptions, merge_run
from peftchat.models.loading import quantization_config
from peftchat.recipe import load_recipe
from peftchat.variants import VARIANTS


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("conversations")
    return write_conversations(folder / "train.jsonl"), write_conversations(folder / "held_out.jsonl", 6, seed=1)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("untied"), tied=False)


def check_run(name: str, base: Path, held_out: Path, run: Path, told: dict[str, Any]) -> None:
    assert told["eval_loss"] < told["eval_loss_before"]
    if name == "full":
        stock = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    else:
        recipe = load_recipe(run / "recipe.yaml", to_train=False).recipe
        quantized = quantization_config(recipe) if method_of(name) == "qlora" else None
        stock = stock_variant(run, base, quantized)
    assert held_out_loss(stock, run, held_out) == pytest.approx(told["eval_loss"], rel=2e-5)
    if not VARIANTS[name].mergeable:
        with pytest.raises(UserError):
            merge_run(run, MergeOptions())
        return
    merged = merge_run(run, MergeOptions())
    assert merged.report.verification is not None and merged.report.verification.passed
    model = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
    assert held_out_loss(model, run, held_out) == pytest.approx(told["eval_loss"], rel=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains_reloads_and_folds(
    name: str, stories: Path, conversations: tuple[Path, Path], tmp_path: Path
) -> None:
    told = train_variant(name, stories, *conversations, tmp_path / "run")
    check_run(name, stories, conversations[1], tmp_path / "run", told)


@pytest.mark.parametrize("name", ["ia3", "trainable_tokens", "prompt_tuning", "adalora"])
def test_new_rows_of_an_untied_head(name: str, untied: Path, conversations: tuple[Path, Path], tmp_path: Path) -> None:
    told = train_variant(name, untied, *conversations, tmp_path / "run")
    assert all(token["input_moved"] > 0 and token["output_moved"] > 0 for token in told["new_tokens"][1:])
    check_run(name, untied, conversations[1], tmp_path / "run", told)


@pytest.mark.parametrize("name", ["lora", "ia3", "oft", "vera"])
def test_variants_on_a_4_bit_base(name: str, stories: Path, conversations: tuple[Path, Path], tmp_path: Path) -> None:
    told = train_variant(name, stories, *conversations, tmp_path / "run", method="qlora")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", to_train=False).recipe
    model = stock_variant(tmp_path / "run", stories, quantization_config(recipe))
    assert held_out_loss(model, tmp_path / "run", conversations[1]) == pytest.approx(told["eval_loss"], rel=2e-5)


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga", "eva"])
def test_a_start_changes_nothing_but_the_way(
    name: str, stories: Path, conversations: tuple[Path, Path], tmp_path: Path
) -> None:
    told = train_variant(name, stories, *conversations, tmp_path / "run", training={"max_steps": 1})
    plain = train_variant("lora", stories, *conversations, tmp_path / "plain", training={"max_steps": 1})
    assert told["eval_loss_before"] == pytest.approx(plain["eval_loss_before"], rel=1e-6)
    assert told["eval_loss"] != plain["eval_loss"]


def test_loftq_undoes_part_of_the_quantization(stories: Path, conversations: tuple[Path, Path], tmp_path: Path) -> None:
    # At such a rate the run holds the start.
    settings: dict[str, Any] = {"training": {"max_steps": 1, "learning_rate": 1e-6}, "method": "qlora"}
    train_variant("loftq", stories, *conversations, tmp_path / "loftq", **settings, adapter={"r": 16, "alpha": 32})
    train_variant("lora", stories, *conversations, tmp_path / "lora", **settings)
    recipe = load_recipe(tmp_path / "lora" / "recipe.yaml", to_train=False).recipe
    ids = torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)(ids).logits
        apart = {
            name: (stock_variant(tmp_path / name, stories, quantization_config(recipe))(ids).logits[..., :512] - exact)
            .square()
            .mean()
            for name in ("loftq", "lora")
        }
    assert apart["loftq"] < 0.7 * apart["lora"]


@pytest.mark.parametrize("name", ["pissa", "eva", "ia3", "trainable_tokens"])
def test_a_resumed_run_ends_where_a_whole_one_does(
    name: str, stories: Path, conversations: tuple[Path, Path], tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    train_variant(name, stories, *conversations, tmp_path / "whole", training=saving)
    train_variant(name, stories, *conversations, tmp_path / "cut", training={**saving, "max_steps": 2})
    train_variant(name, stories, *conversations, tmp_path / "cut", training=saving, resume=True)
    for file in sorted((tmp_path / "whole").rglob("*.safetensors")):
        relative = file.relative_to(tmp_path / "whole")
        if relative.parts[0] != "checkpoints":
            whole, resumed = load_file(file), load_file(tmp_path / "cut" / relative)
            assert whole.keys() == resumed.keys()
            for key, tensor in whole.items():
                torch.testing.assert_close(resumed[key], tensor, rtol=1e-4, atol=1e-6)


def test_adalora_goes_on_moving_ranks_where_it_was(
    stories: Path, conversations: tuple[Path, Path], tmp_path: Path
) -> None:
    # The schedule is laid over all steps, so a run that is to be cut cannot be planned shorter: it is killed.
    saving = {"save_strategy": "steps", "save_steps": 2}
    train_variant("adalora", stories, *conversations, tmp_path / "run", training=saving)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for gone in ("run.json", "adapter_model.safetensors"):
        (tmp_path / "run" / gone).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    train_variant("adalora", stories, *conversations, tmp_path / "run", training=saving, resume=True)
    resumed = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for key, tensor in whole.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=1e-4, atol=1e-6)


def test_loraplus_moves_one_side_faster(stories: Path, conversations: tuple[Path, Path], tmp_path: Path) -> None:
    training = {"max_steps": 1, "learning_rate": 1e-4, "adam_epsilon": 1e-12}
    train_variant(
        "loraplus",
        stories,
        *conversations,
        tmp_path / "run",
        training=training,
        adapter={"loraplus_lr_ratio": 8.0, "dropout": 0.0},
    )
    state = load_file(tmp_path / "run" / "adapter_model.safetensors")
    # Adam's first step moves every number by its learning rate, and these began at zero.
    moved = torch.cat([value.abs().flatten() for name, value in state.items() if ".lora_B." in name])
    assert moved.median().item() == pytest.approx(8e-4, rel=1e-2)


def test_adalora_ends_at_its_target(stories: Path, conversations: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"init_r": 6, "target_r": 2}
    train_variant("adalora", stories, *conversations, tmp_path / "run", training={"max_steps": 10}, adapter=options)
    state = load_file(tmp_path / "run" / "adapter_model.safetensors")
    values = [value for name, value in state.items() if name.endswith("lora_E")]
    assert sum(int((value != 0).sum()) for value in values) == 2 * len(values)
    assert all(len(value) == 6 for value in values)


def test_frozen_layers_stay_as_they_are(stories: Path, conversations: tuple[Path, Path], tmp_path: Path) -> None:
    train_variant("full", stories, *conversations, tmp_path / "run", model={"freeze_layers": "0-1,4"})
    before = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).state_dict()
    after = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in after.items():
        if ".layers." in name:
            frozen = name.split(".layers.")[1].split(".")[0] in ("0", "1", "4")
            assert torch.equal(value, before[name]) == frozen, name


def test_an_adapter_that_brings_its_rows_beside_it_names_both_in_its_card(
    stories: Path, conversations: tuple[Path, Path], tmp_path: Path
) -> None:
    from peftchat.reports.model_card import model_card
    from peftchat.runs.run_folder import RunFolder
    from peftchat.runs.run_summary import RunSummary

    train_variant("ia3", stories, *conversations, tmp_path / "run")
    card = model_card(RunSummary.read(RunFolder(tmp_path / "run")), (tmp_path / "run" / "recipe.yaml").read_text())
    assert 'PeftModel.from_pretrained(model, f"{run}/token_rows").merge_and_unload()' in card


def test_chat_loads_rows_that_lie_beside_the_adapter(
    stories: Path, conversations: tuple[Path, Path], tmp_path: Path
) -> None:
    from peftchat.serving.chat_model import load_for_chat

    told = train_variant("road", stories, *conversations, tmp_path / "run")
    model = load_for_chat(str(tmp_path / "run")).model
    assert held_out_loss(model.float(), tmp_path / "run", conversations[1]) == pytest.approx(
        told["eval_loss"], rel=2e-5
    )
