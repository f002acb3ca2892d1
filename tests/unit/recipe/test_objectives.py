"""Objectives in a recipe: what they imply, what does not go with them, each in one message."""

from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.recipe import dump_recipe, load_recipe
from tests.support.recipes import write_recipe


def write(folder: Path, **sections: Any) -> Path:
    return write_recipe(folder / "recipe.yaml", Path("base"), Path("pairs.jsonl"), **sections)


def test_an_objective_fills_in_what_it_implies(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, objective="dpo")).recipe
    assert recipe.dpo is not None and (recipe.dpo.beta, recipe.dpo.loss_type) == (0.1, "sigmoid")
    assert recipe.adapter is not None and recipe.adapter.dropout == 0.0
    assert (recipe.data.packing, recipe.data.truncation) == (False, "drop")
    assert recipe.training.torch_compile is False
    assert load_recipe(write(tmp_path, objective="dpo", adapter={"dropout": 0.1})).recipe.adapter.dropout == 0.1  # type: ignore[union-attr]
    plain = load_recipe(write(tmp_path)).recipe
    assert plain.objective == "sft" and plain.dpo is None and plain.data.packing


def test_a_resolved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, objective="dpo", dpo={"loss_type": "robust", "label_smoothing": 0.1})).recipe
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    again = load_recipe(path).recipe
    assert dump_recipe(again) == dump_recipe(recipe) and again.dpo == recipe.dpo


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"objective": "dop"}, "expected one of `sft`, `dpo`, .*Did you mean `dpo`"),
        ({"objective": "simpo", "dpo": {"beta": 0.2}}, "dpo: has no effect: `objective: simpo` has no such options"),
        ({"objective": "orpo", "orpo": {"gamma": 0.2}}, "`gamma` belongs in the section `simpo`"),
        ({"dpo": {"beta": 0.2}}, "dpo: has no effect: `objective: sft` has no such options"),
        ({"objective": "dpo", "dpo": {"tau": 1.0}}, "unknown key.*`beta`, `loss_type`, `label_smoothing`"),
        ({"objective": "dpo", "dpo": {"beta": 0}}, "must be greater than 0"),
        ({"objective": "dpo", "dpo": {"label_smoothing": 0.1}}, "only `loss_type: robust` smooths labels"),
        ({"objective": "dpo", "data": {"packing": True}}, "one line without padding already"),
        ({"objective": "dpo", "data": {"truncation": "turns"}}, "take turns from one answer of a pair"),
        ({"objective": "dpo", "chat": {"loss_on": "everything"}}, "`everything` selects other text too"),
        ({"objective": "dpo", "training": {"torch_compile": True}}, "layers are not compiled"),
        ({"objective": "dpo", "training": {"global_batch_size": 8}}, "counts pairs"),
        ({"beta": 0.1}, "`beta` belongs in the section `dpo`"),
        ({"rl": "dpo"}, "`rl` is called `objective` here"),
    ],
)
def test_what_does_not_go_with_an_objective_is_one_message(
    sections: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_recipe(write(tmp_path, **sections))
    assert "problems" not in str(error.value)


def test_an_objective_on_top_of_a_recipe_removes_what_it_does_not_read(tmp_path: Path) -> None:
    """As the recipes that come with the package are taken over: `--set objective=dpo`."""
    path = write(tmp_path, data={"packing": True, "truncation": "turns"}, training={"torch_compile": True})
    recipe = load_recipe(path, ["objective=dpo"]).recipe
    assert (recipe.data.packing, recipe.data.truncation, recipe.training.torch_compile) == (False, "drop", False)
