"""Training from Python: one process gets its summary back, and is told when it is not enough."""

from pathlib import Path

import pytest
import torch

from peftchat.errors import UserError
from peftchat.recipe import LoadedRecipe, load_recipe
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary
from peftchat.training.context import TrainOptions
from peftchat.training.throughput import measure_matmul_flops
from peftchat.training.train import train
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


def recipe(tmp_path: Path, *settings: str) -> LoadedRecipe:
    base, data = small_model(), write_small_talk(tmp_path / "train.jsonl", 8)
    return load_recipe(write_training_recipe(tmp_path / "recipe.yaml", base, data, data, tmp_path / "run"), settings)


def test_train_returns_what_it_writes(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "training.max_steps=2", "distributed.strategy=single")
    summary = train(loaded, TrainOptions(prompts=("Hello",), command="from Python"))
    folder = RunFolder(Path(loaded.recipe.output_dir))
    assert summary == RunSummary.read(folder)
    assert (summary.steps, summary.command) == (2, "from Python")
    assert [answer.prompt for answer in (*summary.samples_before, *summary.samples_after)] == ["Hello", "Hello"]
    assert folder.is_run and not folder.report.exists()
    with pytest.raises(UserError, match="another run"):
        train(loaded)


def test_a_recipe_for_several_processes_needs_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 processes, and this is a single one"):
        train(recipe(tmp_path, "distributed.processes=2", "distributed.strategy=ddp"))
    assert not (tmp_path / "run").exists()


def test_matrix_products_are_measured_once_per_process() -> None:
    measure_matmul_flops.cache_clear()
    first = measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.01)
    assert measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.01) == first
    assert measure_matmul_flops.cache_info().hits == 1
