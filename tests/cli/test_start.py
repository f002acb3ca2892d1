"""The start of a command: what is refused is refused at once, and nothing is imported that is not needed."""

import json
import sys
from pathlib import Path

from peftchat.late_imports import _compile_later
from tests.support.cli import PROJECT, true_peftchat
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


def test_bad_data_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    said = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]} for text in "ab"]
    said.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]})
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in said), encoding="utf-8")
    recipe = write_training_recipe(tmp_path / "recipe.yaml", small_model(), data, None, tmp_path / "run")
    done = true_peftchat("train", recipe, PYTHONPROFILEIMPORTTIME="1", PYTHONPATH=str(PROJECT))
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    said_lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert "train.jsonl:3" in "".join(said_lines)
    assert "peftchat.recipe" in imported
    assert not imported & {"torch", "transformers", "peft", "trl"}
    assert not (tmp_path / "run").exists()


def test_a_function_is_compiled_at_its_first_call_and_once() -> None:
    compiled: list[object] = []

    def compile_now(function, **options):
        compiled.append(options)
        return lambda value: function(value) + 100

    later = _compile_later(compile_now, lambda value: value + 1, dynamic=True)
    assert not compiled
    assert [later(1), later(2)] == [102, 103]
    assert compiled == [{"dynamic": True}]


def test_the_list_of_packages_is_read_once() -> None:
    import importlib.metadata

    # The suite has called `quiet_libraries` by now, or does so here.
    from peftchat.logging_setup import quiet_libraries

    quiet_libraries()
    quiet_libraries()
    assert importlib.metadata.packages_distributions() is importlib.metadata.packages_distributions()
    assert sum(type(finder).__module__ == "peftchat.late_imports" for finder in sys.meta_path) <= 1
