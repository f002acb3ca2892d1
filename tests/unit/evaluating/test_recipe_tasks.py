"""Tasks that a recipe names: checked before training, asked after it, of the run and its base."""

import importlib.util
import json
from pathlib import Path

import pytest

from peftchat import api
from peftchat.errors import UserError
from peftchat.recipe import load_recipe
from peftchat.runs.run_folder import RunFolder
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{ask}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"ask": f"{a} + 1", "options": [str(a + 1), "a cat"]}) + "\n" for a in range(6)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/sums.yaml").write_text(TASK.format(data=rows))
    data = write_small_talk(tmp_path / "talk.jsonl")
    evaluation = {"tasks": ["sums"], "include": str(tmp_path / "tasks"), "limit": 5}
    return write_training_recipe(
        tmp_path / "recipe.yaml", small_model(tied=True), data, None, tmp_path / "run", evaluation=evaluation
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.tasks=3", "expected a list of tasks"),
        ("evaluation.tasks=[a b]", "'a b' is not the name of a task; expected `NAME` or `NAME@SHOTS`"),
        ("evaluation.tasks=[arc@x]", "'arc@x' is not the name of a task"),
    ],
)
def test_a_name_that_no_task_can_have_is_one_message(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        load_recipe(recipe, [override])
    assert message in str(found.value) and "\n" not in str(found.value)


def test_settings_of_tasks_need_tasks(recipe: Path) -> None:
    text = json.loads(recipe.read_text())
    del text["evaluation"]["tasks"]
    recipe.write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"evaluation\.limit: has no effect: no task is named in `evaluation\.tasks`"):
        load_recipe(recipe)
    assert load_recipe(recipe, ["evaluation.tasks=sums, other@3"]).recipe.evaluation.tasks == ("sums", "other@3")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra `evaluate` is installed")
def test_the_missing_harness_is_told_before_training(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.tasks: tasks are evaluated by EleutherAI's harness"):
        api.train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_run_and_its_base_are_asked_after_training(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")
    with pytest.raises(UserError, match=r"evaluation\.tasks: there is no task 'sum'\. The nearest are .*sums"):
        api.train(recipe, overrides=["evaluation.tasks=[sum]"])
    assert not (tmp_path / "run").exists()
    api.train(recipe)
    (results,) = RunFolder(tmp_path / "run").path.glob("evaluations/*/results.json")
    found = json.loads(results.read_text())
    assert [model["name"] for model in found["models"]] == [str(tmp_path / "run"), "base"]
    assert found["settings"]["limit"] == 5
    assert "model-index" in (tmp_path / "run/README.md").read_text()
