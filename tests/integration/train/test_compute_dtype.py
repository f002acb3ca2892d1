"""The compute dtype: chosen where the CPU is slow in 16 bits, overridden by the recipe, kept by a resumed run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftchat.errors import UserError
from peftchat.planning.auto_settings import resolve_auto_settings
from peftchat.planning.compute_dtype import KEY, choose_compute_dtype, product_flops
from peftchat.planning.hardware import Device, this_machine
from peftchat.recipe import load_recipe
from peftchat.training.distributed import DistributedSetup
from peftchat.training.train import train
from tests.support.data import read_json_lines, write_small_talk
from tests.support.models import small_config, small_model
from tests.support.recipes import write_training_recipe

ALONE = DistributedSetup(strategy="single", processes=1, nodes=1, gpus=0, launcher="none")
RATE = {"learning_rate": 1e-3}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_talk(tmp_path_factory.mktemp("data") / "train.jsonl", 12)


def recipe_of(folder: Path, conversations: Path, **sections: Any) -> Path:
    folder.mkdir()
    return write_training_recipe(
        folder / "recipe.yaml", small_model(tied=True), conversations, None, folder / "run", **sections
    )


def test_float32_is_chosen_only_where_it_is_faster(tmp_path: Path, conversations: Path) -> None:
    path = recipe_of(tmp_path / "a", conversations, model={"dtype": "bfloat16"}, training=RATE)
    recipe = load_recipe(path, to_train=False).recipe
    machine, config = this_machine(1), small_config("llama-tied")

    def chosen(device: Device = "cpu", memory: int = machine.memory, sharded: bool = False, **model: str) -> str | None:
        given = recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})
        setting = choose_compute_dtype(given, config, replace(machine, memory=memory, device=device), sharded=sharded)
        return None if setting is None else setting.value

    slow = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    faster = slow and product_flops("float32") > product_flops("bfloat16")
    assert chosen() == ("float32" if faster else None)
    # What would not fit stays as it is, and the run says so.
    assert chosen(memory=1000) == ("bfloat16" if faster else None)
    assert chosen(compute_dtype="bfloat16") is None
    assert chosen(dtype="float32") is None
    assert chosen("cuda") is None
    assert chosen(sharded=True) is None


def test_computing_in_float32_trains_as_float32_and_saves_as_asked(tmp_path: Path, conversations: Path) -> None:
    """The base is stored in float32, so nothing may be rounded on the way."""
    losses, dtypes = [], []
    for number, model in enumerate(({"dtype": "float32"}, {"dtype": "bfloat16", "compute_dtype": "float32"})):
        path = recipe_of(tmp_path / str(number), conversations, method="full", model=model, training=RATE)
        summary = train(load_recipe(path))
        run = path.parent / "run"
        losses.append([line["loss"] for line in read_json_lines(run / "metrics.jsonl")])
        dtypes.append({tensor.dtype for tensor in load_file(str(run / "model.safetensors")).values()})
        assert summary.steps == 4
    assert losses[0] == losses[1]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("started", ["float32", "bfloat16"])
def test_a_resumed_run_computes_as_it_was_started(started: str, tmp_path: Path, conversations: Path) -> None:
    model = {"dtype": "bfloat16"}
    path = recipe_of(tmp_path / "a", conversations, model=model, training=RATE)
    run = path.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    written = recipe_of(tmp_path / "b", conversations, model={**model, "compute_dtype": started}, training=RATE)
    (run / "recipe.yaml").write_text(written.read_text(encoding="utf-8"), encoding="utf-8")
    loaded, settings = resolve_auto_settings(load_recipe(path), ALONE, resume=True)
    assert loaded.recipe.model.computed_in == started
    assert [one.value for one in settings if one.key == KEY] == (["float32"] if started == "float32" else [])


def test_sharded_runs_refuse_another_compute_dtype(tmp_path: Path, conversations: Path) -> None:
    model = {"dtype": "bfloat16", "compute_dtype": "float32"}
    path = recipe_of(tmp_path / "a", conversations, model=model, distributed={"strategy": "zero3"})
    with pytest.raises(UserError, match="computes in the dtype of the weights"):
        load_recipe(path, to_train=False)
