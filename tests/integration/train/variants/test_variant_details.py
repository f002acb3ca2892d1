"""What single variants promise of their initialization, their schedule, and of being resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.variants import VariantTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2}


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a finished run, by file and name."""
    files = [file for file in run.rglob("*.safetensors") if "checkpoints" not in file.parts]
    return {f"{file.relative_to(run)} {name}": value for file in files for name, value in load_file(file).items()}


def assert_same_tensors(run: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors_of(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.xdist_group("initializations")
@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga", "eva"])
def test_an_initialization_changes_nothing_but_the_way(name: str, train: VariantTrainer) -> None:
    initialized = train(name, training={"max_steps": 1}).summary
    plain = train("lora", training={"max_steps": 1}).summary
    assert initialized["eval_loss_before"] == pytest.approx(plain["eval_loss_before"], rel=1e-6)
    assert initialized["eval_loss"] != plain["eval_loss"]


def test_loftq_undoes_part_of_the_quantization(train: VariantTrainer) -> None:
    # At such a learning rate the run holds the initialization.
    settings: dict[str, Any] = {"training": {"max_steps": 1, "learning_rate": 1e-6}, "method": "qlora"}
    runs = {
        "loftq": train("loftq", **settings, adapter={"r": 16, "alpha": 32}).run,
        "lora": train("lora", **settings).run,
    }
    ids = torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(train.base, dtype=torch.float32)(ids).logits
        errors = {
            name: (train.stock_model(run)(ids).logits[..., :512] - exact).square().mean() for name, run in runs.items()
        }
    assert errors["loftq"] < 0.7 * errors["lora"]


@pytest.mark.parametrize(
    "name", ["pissa", "eva", "ia3", "trainable_tokens", "adalora", "prompt_tuning", "p_tuning", "prefix_tuning"]
)
def test_a_killed_run_resumed_ends_where_a_whole_one_does(name: str, train: VariantTrainer, tmp_path: Path) -> None:
    run = train.train(name, tmp_path / "run", training=SAVING).run
    whole = tensors_of(run)
    # What a run leaves that is killed in its third step.
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    (run / "run.json").unlink()
    for file in run.rglob("*.safetensors"):
        if "checkpoints" not in file.parts:
            file.unlink()
    train.train(name, run, training=SAVING, resume=True)
    assert_same_tensors(run, whole)


def test_a_finished_run_with_more_steps_ends_where_a_whole_one_does(train: VariantTrainer, tmp_path: Path) -> None:
    whole = train("lora", training=SAVING).run
    train.train("lora", tmp_path / "run", training={**SAVING, "max_steps": 2})
    train.train("lora", tmp_path / "run", training=SAVING, resume=True)
    assert_same_tensors(tmp_path / "run", tensors_of(whole))


def test_loraplus_moves_one_side_faster(train: VariantTrainer) -> None:
    training = {"max_steps": 1, "learning_rate": 1e-4, "adam_epsilon": 1e-12}
    run = train("loraplus", training=training, adapter={"loraplus_lr_ratio": 8.0, "dropout": 0.0}).run
    state = load_file(run / "adapter_model.safetensors")
    # Adam's first step moves every number by its learning rate, and these began at zero.
    moved = torch.cat([value.abs().flatten() for name, value in state.items() if ".lora_B." in name])
    assert moved.median().item() == pytest.approx(8e-4, rel=1e-2)


def test_adalora_ends_at_its_target(train: VariantTrainer) -> None:
    run = train("adalora", training={"max_steps": 10}, adapter={"init_r": 6, "target_r": 2}).run
    state = load_file(run / "adapter_model.safetensors")
    values = [value for name, value in state.items() if name.endswith("lora_E")]
    assert sum(int((value != 0).sum()) for value in values) == 2 * len(values)
    assert all(len(value) == 6 for value in values)


def test_frozen_layers_stay_as_they_are(train: VariantTrainer) -> None:
    run = train("full", model={"freeze_layers": "0-0,2"}).run
    before = AutoModelForCausalLM.from_pretrained(train.base, dtype=torch.float32).state_dict()
    after = load_file(run / "model.safetensors")
    for name, value in after.items():
        if ".layers." in name:
            frozen = name.split(".layers.")[1].split(".")[0] in ("0", "2")
            assert torch.equal(value, before[name]) == frozen, name
