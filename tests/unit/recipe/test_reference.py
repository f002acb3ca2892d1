"""One source for every key: the shipped schema, the manual and the recipes follow from the types."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from peftchat.cli.init import command
from peftchat.errors import UserError
from peftchat.recipe import Recipe, TrainingSection, load_recipe, training_arguments
from peftchat.recipe.error_messages import RENAMED, UNSUPPORTED_KEYS, all_keys, section_of
from peftchat.recipe.reference import SCHEMA_FILE, manual, schema_text
from peftchat.recipe.schema import OWN_KEYS
from tests.support.cli import PROJECT

RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))


def test_schema_and_manual_are_fresh() -> None:
    hint = "run scripts/make_recipe_docs.py"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), hint
    assert (PROJECT / "docs" / "recipe.md").read_text(encoding="utf-8") == manual(), hint


def test_every_key_has_a_meaning_and_all_but_the_required_a_default() -> None:
    models = [Recipe, *filter(None, (section_of(info.annotation) for info in Recipe.model_fields.values()))]
    required = {
        f"{model.__name__}.{name}"
        for model in models
        for name, info in model.model_fields.items()
        if info.is_required()
    }
    assert required == {
        "Recipe.model",
        "Recipe.method",
        "Recipe.data",
        "Recipe.output_dir",
        "ModelSection.name",
        "DataSection.train",
    }
    assert all(info.description for model in models for info in model.model_fields.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_open_with_their_schema_and_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    lines = path.read_text(encoding="utf-8").splitlines()
    schema = lines[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == SCHEMA_FILE.resolve()
    assert f"peftchat train recipes/{path.name}" in lines[2]
    load_recipe(path)


def test_the_large_recipe_takes_a_small_model_and_two_processes() -> None:
    flags = ["model.name=m", "data.train=[{path: f}]", "distributed.processes=2", "training.max_steps=3"]
    recipe = load_recipe(PROJECT / "recipes" / "zero3_full.yaml", flags).recipe
    assert (recipe.distributed.processes, recipe.distributed.strategy) == (2, "zero3")
    assert (recipe.training.lr_scheduler_type, recipe.training.learning_rate) == ("cosine", 2e-5)
    assert recipe.data.train[0].path == "f"


def test_every_training_argument_is_a_key_or_explained() -> None:
    transformers = pytest.importorskip("transformers")
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert set(TrainingSection.model_fields) - set(OWN_KEYS) <= names
    assert names <= set(TrainingSection.model_fields) | set(RENAMED) | set(UNSUPPORTED_KEYS)


def test_training_arguments_are_accepted_as_they_are(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    recipe = load_recipe(PROJECT / "recipes" / "demo_cpu.yaml").recipe
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **training_arguments(recipe))
    assert arguments.learning_rate == recipe.training.learning_rate
    assert arguments.report_to == []


def test_names_from_elsewhere_lead_to_keys_that_exist() -> None:
    known = {f"{home}.{name}".lstrip(".") for name, homes in all_keys().items() for home in homes}
    assert set(RENAMED.values()) <= known
    assert not (set(RENAMED) | set(UNSUPPORTED_KEYS)) & set(TrainingSection.model_fields)


def test_the_schema_judges_recipes_as_the_loader_does() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
    least = {"model": {"name": "m"}, "method": "lora", "data": {"train": [{"path": "d"}]}, "output_dir": "o"}
    assert validator.is_valid(least)
    assert validator.is_valid({"extends": "x.yaml", "data": {"max_length": 10}, "adapter": None})
    assert validator.is_valid({**least, "training": {"report_to": "wandb", "save_steps": None}})
    assert not validator.is_valid({**least, "model": {}})
    assert not validator.is_valid({**least, "trainng": {}})
    assert not validator.is_valid({**least, "adapter": {"r": "8"}})
    without_method = {key: value for key, value in least.items() if key != "method"}
    assert not validator.is_valid(without_method)
    assert validator.is_valid({**without_method, "model": {"adapter": "runs/first"}})
    assert not validator.is_valid({"model": {"adapter": "runs/first"}, "output_dir": "o"})


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_init_writes_a_recipe_that_loads(method: str, tmp_path: Path) -> None:
    target = tmp_path / "my recipe.yaml"
    filled = ["--method", method, "--model", "a/b", "--data", "it's.jsonl", "-o", str(target)]
    assert CliRunner().invoke(command, filled).exit_code == 0
    recipe = load_recipe(target).recipe
    assert (recipe.method, recipe.model.name, recipe.data.train[0].path) == (method, "a/b", "it's.jsonl")
    assert isinstance(CliRunner().invoke(command, filled).exception, UserError), "a file is never overwritten"


def test_init_says_what_is_to_be_filled_in(tmp_path: Path) -> None:
    target = tmp_path / "recipe.yaml"
    assert CliRunner().invoke(command, ["-o", str(target)]).exit_code == 0
    with pytest.raises(UserError, match=r"model\.name: missing(.|\n)*data\.train: missing"):
        load_recipe(target)
    load_recipe(target, ["model.name=m", "data.train=[{path: d}]"])


def test_init_shows_true_defaults(tmp_path: Path) -> None:
    """Taking every comment sign off gives the same recipe."""
    target = tmp_path / "recipe.yaml"
    CliRunner().invoke(command, ["--method", "qlora", "--model", "m", "--data", "d", "-o", str(target)])
    keys = set(TrainingSection.model_fields) | set(all_keys())
    lines = []
    for line in target.read_text(encoding="utf-8").splitlines():
        bare = line.replace("# ", "", 1)
        lines.append(bare if bare.strip().partition(":")[0] in keys and line.startswith("  #") else line)
    opened = tmp_path / "opened.yaml"
    # These have no effect beside other defaults, so they cannot be written out.
    kept = [line for line in lines if not line.strip().startswith(("eval_steps:", "optim_args:", "chat_template:"))]
    opened.write_text("\n".join(kept), encoding="utf-8")
    assert load_recipe(opened).recipe == load_recipe(target).recipe


def test_import_is_light() -> None:
    code = "import sys, peftchat.recipe, peftchat.cli.init; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy", "peft", "trl"}
    assert "pydantic" in loaded
    assert not heavy & set(loaded)


def test_the_script_writes_what_the_tests_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROJECT / "scripts")
    spec = importlib.util.spec_from_file_location("make_recipe_docs", PROJECT / "scripts" / "make_recipe_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (PROJECT / "docs" / "recipe.md").resolve() == (module.DOCS / "recipe.md").resolve()
