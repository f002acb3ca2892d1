"""A variant is one class: found by itself, with its own words for what it lacks and for its former names."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peftchat.errors import UserError
from peftchat.models.peft_model import model_shape
from peftchat.recipe import load_recipe
from peftchat.recipe.schema import validate_adapter
from peftchat.variants import ADAPTERS
from peftchat.variants.base import Formerly
from tests.support.models import small_config

NEW_VARIANT = '''\
"""A variant that is nowhere else."""

from typing import Literal

from peftchat.variants.base import Dropout, Paper, TargetedAdapter


class Newest(TargetedAdapter):
    """HiRA by another name."""

    title = "Newest"
    paper = Paper("Nobody", 2026, None)
    learning_rate = 3e-3
    peft_class = "HiraConfig"
    peft_dropout = "hira_dropout"

    variant: Literal["newest"] = "newest"
    r: int = 4
    dropout: Dropout = 0.25
'''

USE_IT = """\
import sys
import peftchat.variants
peftchat.variants.__path__.append(sys.argv[1])
from peftchat.variants.model_shape import ModelShape
from peftchat.variants.registry import find_variants
found = {variant.name: variant for variant in find_variants(peftchat.variants.__path__)}
assert list(found).index("newest") < list(found).index("full"), list(found)
assert set(peftchat.variants.VARIANTS) == set(found) - {"newest"}
assert found["newest"].summary == "HiRA by another name."
shape = ModelShape("some", 8, 1, {"layers.0.attn.q": (8, 8)}, (), False)
config = found["newest"](target_modules="attention").peft_config(shape)
assert (config.r, config.hira_dropout, config.target_modules) == (4, 0.25, {"attn.q"}), config
"""


def test_a_file_in_the_package_is_a_variant(tmp_path: Path) -> None:
    (tmp_path / "newest.py").write_text(NEW_VARIANT, encoding="utf-8")
    subprocess.run([sys.executable, "-c", USE_IT, str(tmp_path)], check=True)


RENAMED = [
    (adapter.name, mark.name, setting)
    for adapter in ADAPTERS.values()
    for setting in adapter.setting_names()
    for mark in adapter.model_fields[setting].metadata
    if isinstance(mark, Formerly)
]


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_a_former_name_is_answered_with_the_new_one(name: str, old: str, new: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: m/m}}\nmethod: lora\nadapter:\n  variant: {name}\n  {old}: 1\n"
        "data: {train: [{path: d/d}]}\noutput_dir: runs/x\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError) as found:
        load_recipe(recipe, to_train=False)
    assert f"{recipe}:5: adapter.{old}: `{old}` is called `{new}` here" in str(found.value)


def test_names_that_changed_are_known() -> None:
    assert {("loraplus", "rate_ratio", "loraplus_lr_ratio"), ("adalora", "interval", "deltaT")} <= set(RENAMED)
    assert len(RENAMED) == len({(name, old) for name, old, _ in RENAMED}) >= 15


@pytest.mark.parametrize("name", [name for name, adapter in ADAPTERS.items() if not adapter.supports_conv1d])
def test_conv1d_is_refused_where_peft_has_no_such_layer(name: str) -> None:
    model = AutoModelForCausalLM.from_config(small_config("gpt2", vocabulary=64, width=32))
    shape = model_shape(model)
    adapter = validate_adapter({"variant": name})
    with pytest.raises(UserError, match=f"PEFT has no `{name}` for Conv1D"):
        adapter.peft_config(shape)
    type(adapter).supports_conv1d = True
    try:
        config = adapter.peft_config(shape)
    finally:
        type(adapter).supports_conv1d = False
    # What is refused is what PEFT would refuse.
    with pytest.raises((ValueError, TypeError, AttributeError, NotImplementedError, AssertionError)):
        get_peft_model(model, config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"variant": "oft", "oft_block_size": 7}, "adapter.oft_block_size: 7 does not divide the 32 inputs"),
        ({"variant": "boft", "boft_block_size": 5}, "adapter.boft_block_size: 5 does not divide the 32 inputs"),
        ({"variant": "boft", "boft_n_butterfly_factor": 2}, "adapter.boft_n_butterfly_factor: 2: PEFT's kernel"),
    ],
)
def test_what_peft_would_change_with_a_warning_is_refused(
    settings: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    model = AutoModelForCausalLM.from_config(small_config("llama", vocabulary=64, width=32))
    with pytest.raises(UserError) as refused:
        validate_adapter(settings).peft_config(model_shape(model))
    assert expected in str(refused.value)


def test_ia3_scales_the_inputs_of_the_modules_that_the_recipe_names() -> None:
    modules = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    adapter = validate_adapter({"variant": "ia3", **modules})
    model = AutoModelForCausalLM.from_config(small_config("llama", vocabulary=64, width=32))
    assert adapter.peft_config(model_shape(model)).feedforward_modules == {"down_proj"}
