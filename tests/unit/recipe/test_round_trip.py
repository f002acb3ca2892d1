"""The resolved recipe is the recipe: written out and read back, nothing changes, wherever it is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftchat.errors import UserError
from peftchat.recipe import Recipe, TrainingSection, dump_recipe, load_recipe

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)
RATE = st.floats(1e-12, 1, allow_subnormal=False)
ENTRY = st.fixed_dictionaries(
    {"path": TEXT.map(lambda text: f"/data/{text.replace('/', '_')}")},
    optional={"format": st.sampled_from(["auto", "oasst"]), "split": TEXT, "weight": RATE},
)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Plain values of any recipe that loads."""
    values: dict[str, Any] = {
        "model": {"name": draw(st.sampled_from(["org/model", "/models/x"])), "trust_remote_code": draw(st.booleans())},
        "method": draw(st.sampled_from(["full", "lora", "qlora"])),
        "chat": {
            "template": draw(st.sampled_from(["starchat", "chatml", "model"])),
            "system": draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)),
        },
        "data": {"train": draw(st.lists(ENTRY, min_size=1, max_size=3)), "packing": draw(st.booleans())},
        "training": {
            "learning_rate": draw(st.none() | RATE),
            "adam_epsilon": draw(RATE),
            "save_strategy": draw(st.sampled_from(["no", "steps", "epoch"])),
            "report_to": draw(st.sampled_from(["none", []])),
            "gradient_checkpointing": draw(st.booleans()),
            "seed": draw(st.integers(0, 2**32 - 1)),
        },
        "distributed": {"strategy": draw(st.sampled_from(["auto", "single", "ddp", "zero2", "zero3"]))},
        "output_dir": "/runs/" + draw(TEXT).replace("/", "_"),
    }
    if values["method"] != "full":
        values["adapter"] = {"target_modules": draw(st.just("all-linear") | st.lists(TEXT, min_size=1, max_size=3))}
    if values["method"] == "qlora":
        values["quantization"] = {"bits": draw(st.sampled_from([4, 8] if "zero" not in str(values) else [4]))}
    if draw(st.booleans()):
        values["data"]["eval_fraction"] = draw(st.floats(0.001, 0.999))
        values["training"]["eval_steps"] = draw(st.none() | st.integers(1, 1000))
    return values


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=recipes())
def test_dump_then_load_is_identity(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.model_validate(values)
    path = tmp_path / "recipe.yaml"
    text = dump_recipe(recipe)
    path.write_text(text, encoding="utf-8")
    again = load_recipe(path).recipe
    assert again == recipe
    assert dump_recipe(again) == text


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("lora"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
WAY = st.sampled_from(
    [
        *Recipe.model_fields,
        *(f"training.{name}" for name in TrainingSection.model_fields),
        *("model.name", "data.train", "data.eval", "data.train.0", "data.train.0.path", "adapter.target_modules"),
        *("quantization.bits", "distributed.processes", "distributed.deepspeed_config", "chat.system", "nonsense"),
    ]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(WAY, ANY), min_size=1, max_size=3))
def test_any_value_anywhere_is_taken_or_refused_in_words(changes: list[tuple[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: m}\nmethod: qlora\ndata: {train: [{path: d}]}\noutput_dir: o\n", encoding="utf-8")
    flags = [f"{way}={json.dumps(value)}" for way, value in changes]
    try:
        recipe = load_recipe(path, flags).recipe
    except UserError as error:
        assert error.where
    else:
        dump_recipe(recipe)


def test_local_paths_become_absolute_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "rows.jsonl").touch()
    monkeypatch.chdir(here)
    text = "model: {name: org/model}\nmethod: lora\ndata: {train: [{path: rows.jsonl}]}\noutput_dir: runs/x\n"
    (here / "r.yaml").write_text(text, encoding="utf-8")
    dumped = dump_recipe(load_recipe(Path("r.yaml")).recipe)
    monkeypatch.chdir(there)
    (there / "r.yaml").write_text(dumped, encoding="utf-8")
    recipe = load_recipe(Path("r.yaml")).recipe
    assert recipe.model.name == "org/model"
    assert recipe.data.train[0].path == str(here / "rows.jsonl")
    assert recipe.output_dir == str(here / "runs" / "x")
