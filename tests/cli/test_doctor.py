"""`peftchat doctor`: every finding with its cure, and a status that says whether there is a problem."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from peftchat.cli.main import cli
from peftchat.errors import UserError, VerificationError
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_recipe


def doctor(*arguments: object) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(cli, ["doctor", *map(str, arguments)], standalone_mode=False)
    return done.stdout, done.exception


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data = write_small_talk(tmp_path / "data.jsonl")
    return write_recipe(tmp_path / "recipe.yaml", small_model(tied=True), data, data={"max_length": 128})


def test_a_recipe_that_can_run_has_no_problem(recipe: Path) -> None:
    output, error = doctor(recipe, "--quick", "--json")
    assert error is None
    examined = json.loads(output)
    of_recipe = {one["subject"]: one for one in examined["findings"][-6:]}
    assert of_recipe.keys() == {"packages and settings", "processes", "data", "base model", "memory", "disk"}
    assert {one["status"] for one in of_recipe.values()} == {"ok"}
    assert examined["status"] in ("ok", "note", "warning")


@pytest.mark.parametrize(
    ("override", "found", "cure"),
    [
        ("data.train=[{path: gone.jsonl}]", "there is no such file or folder", "Check the path."),
        ("model.name=gone", "gone: the model's config cannot be loaded", "name a folder"),
        ("training.report_to=[wandb]", "the package `wandb` is not installed", "pip install wandb"),
        ("training.per_device_train_batch_size=1000000", "predicted for each process", "The cheapest change"),
    ],
)
def test_what_a_recipe_lacks_is_found(recipe: Path, override: str, found: str, cure: str) -> None:
    output, error = doctor(recipe, "--quick", "--set", override)
    assert isinstance(error, VerificationError) and str(error).startswith("problems found: ")
    problem, line_of_cure = next(
        pair for pair in zip(output.splitlines(), output.splitlines()[1:], strict=False) if "problem" in pair[0]
    )
    assert found in problem and cure in line_of_cure


def test_overrides_need_a_recipe() -> None:
    _, error = doctor("--set", "method=full")
    assert isinstance(error, UserError)
    assert str(error) == "--set: overrides a recipe, and none is given. Give a recipe."
