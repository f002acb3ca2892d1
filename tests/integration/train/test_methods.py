"""Every method, tied and untied, in one process: new tokens train, nothing else does, stock libraries agree."""

from pathlib import Path

import pytest

from tests.support.checks import check_run
from tests.support.cli import peftchat
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_stock_libraries_see_what_was_trained(
    method: str, tied: bool, conversations: Path, held_out: Path, tmp_path: Path
) -> None:
    base, run = small_model(tied=tied), tmp_path / "run"
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", base, conversations, held_out, run,
        method=method, distributed={"strategy": "single", "processes": 1},
        training={"gradient_checkpointing": None},
    )  # fmt: skip
    done = peftchat("train", recipe)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    check_run(run, base, held_out, method=method, tied=tied, processes=1)
