"""Keys and values of older versions: an error that names today's, and recipes of old runs that still load."""

from pathlib import Path

import pytest

from peftchat.errors import UserError
from peftchat.recipe import load_recipe

RECIPE = """\
model: {{name: base{model}}}
method: lora
chat: {{{chat}}}
data: {{train: [{{path: d.jsonl{source}}}]{data}}}
training: {{{training}}}
output_dir: runs/x
"""
FORMER = [
    ("model", "attention", "per_dialogue", "attention", "varlen"),
    ("chat", "special_text", "refuse", "special_token_text", "error"),
    ("chat", "special_text", "text", "special_token_text", "escape"),
    ("chat", "empty_rows", "refuse", "untrainable_examples", "error"),
    ("data", "truncation", "turns_leading", "truncation", "drop_first_turns"),
    ("data", "truncation", "refuse", "truncation", "error"),
    ("data", "max_train_rows", "5", "max_train_samples", "5"),
    ("data", "max_eval_rows", "5, eval_fraction: 0.1", "max_eval_samples", "5"),
    ("training", "rows_per_step", "8", "global_batch_size", "8"),
    ("training", "max_tokens", "1000", "max_train_tokens", "1000"),
    ("training", "max_minutes", "2.5", "max_train_minutes", "2.5"),
    ("source", "top_k", "2", "oasst_top_k", "2"),
]


def write(folder: Path, section: str, key: str, value: str) -> Path:
    comma = "" if section in ("chat", "training") else ", "
    parts = dict.fromkeys(("model", "chat", "source", "data", "training"), "") | {section: f"{comma}{key}: {value}"}
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(**parts), encoding="utf-8")
    return path


@pytest.mark.parametrize(("section", "former", "value", "key", "current"), FORMER)
def test_a_former_name_is_an_error_that_names_the_current_one(
    tmp_path: Path, section: str, former: str, value: str, key: str, current: str
) -> None:
    path = write(tmp_path, section, former, value)
    with pytest.raises(UserError) as error:
        load_recipe(path, to_train=False)
    line = 1 + [part.split(":")[0] for part in RECIPE.splitlines()].index("data" if section == "source" else section)
    place = "data.train.0" if section == "source" else section
    home = "" if section == "source" else f"{section}."
    told = f"`{former}` is called `{home}{key}` here" if former != key else f"`{value}` is called `{current}` here"
    assert str(error.value) == f"{path}:{line}: {place}.{former}: {told}"


@pytest.mark.parametrize(("section", "former", "value", "key", "current"), FORMER)
def test_the_recipe_of_an_old_run_still_loads(
    tmp_path: Path, section: str, former: str, value: str, key: str, current: str
) -> None:
    loaded = load_recipe(write(tmp_path, section, former, value), to_train=False, upgrade=True)
    holder = loaded.recipe.data.train[0] if section == "source" else getattr(loaded.recipe, section)
    assert str(getattr(holder, key)) == current
