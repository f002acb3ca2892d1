"""The registry: what each variant takes is accepted, what it does not take is an error that says so."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from peftchat.errors import UserError
from peftchat.recipe import Recipe, load_recipe
from peftchat.variants import ADAPTERS, VARIANTS, get_variant
from peftchat.variants.base import Mark, Setting
from tests.support.cli import peftchat


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A recipe with a LoRA's settings written out."""
    file = tmp_path / "plain.yaml"
    file.write_text(
        "model: {name: some/model}\n"
        "method: lora\n"
        "adapter: {variant: lora, r: 8, alpha: 8, dropout: 0.1, target_modules: all-linear}\n"
        "data:\n  train: [{path: some/data}]\n"
        "output_dir: runs/x\n",
        encoding="utf-8",
    )
    return file


def load(file: Path, *flags: str) -> Recipe:
    return load_recipe(file, flags, to_train=False).recipe


def needs_quantized(name: str) -> tuple[str, ...]:
    return ("method=qlora",) if "unquantized" in VARIANTS[name].incompatible_with else ()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_variant_laid_on_top_takes_along_what_it_can_use(name: str, plain: Path) -> None:
    section = load(plain, f"adapter.variant={name}", *needs_quantized(name)).adapter
    assert section is not None and section.variant == name
    for key, value in {"r": 8, "alpha": 8, "dropout": 0.1}.items():
        info = type(section).model_fields.get(key)
        if info is not None:
            inherited = not type(section).has_mark(key, Mark.TYPE_SPECIFIC)
            assert getattr(section, key) == (value if inherited else info.default)


@pytest.mark.parametrize("name", ADAPTERS)
def test_settings_of_others_are_refused_with_those_it_has(name: str, plain: Path) -> None:
    others = {key for variant in VARIANTS.values() for key in variant.setting_names()}
    others -= set(VARIANTS[name].setting_names())
    # A former name is answered with the new one (test_variants_interface).
    for key in (key for key in others if not VARIANTS[name].new_name(key)):
        with pytest.raises(UserError) as found:
            load(plain, f"adapter={{variant: {name}, {key}: 1}}", *needs_quantized(name))
        assert f"adapter.{key}" in str(found.value) or "--set adapter" in str(found.value)
        assert f"`{name}` has no such setting" in str(found.value)
        assert all(f"`{taken}`" in str(found.value) for taken in VARIANTS[name].setting_names())


def test_a_refused_setting_is_told_by_file_and_line(plain: Path) -> None:
    plain.write_text(plain.read_text().replace("variant: lora", "variant: ia3"), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{plain}:3: adapter.r: `ia3` has no such setting")):
        load(plain)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_example_is_a_recipe(name: str, tmp_path: Path) -> None:
    from peftchat.variants.describe import example

    file = tmp_path / "recipe.yaml"
    rest = "\nmodel: {name: m/m}\ndata: {train: [{path: d/d}]}\noutput_dir: runs/x\n"
    file.write_text(example(VARIANTS[name]) + rest, encoding="utf-8")
    recipe = load(file)
    assert recipe.adapter is not None and recipe.adapter.variant == name
    assert recipe.training.learning_rate == "auto"
    assert recipe.data.packing == ("packing" not in VARIANTS[name].incompatible_with)


REFUSED: list[tuple[str, Setting]] = [
    (name, setting)
    for name in ADAPTERS
    for setting in VARIANTS[name].incompatible_with
    if setting not in ("unquantized", "checkpointing")
]
FLAGS: dict[Setting, tuple[str, ...]] = {
    "4 bits": ("method=qlora",),
    "8 bits": ("method=qlora", "quantization.bits=8"),
    "zero2": ("distributed.strategy=zero2",),
    "zero3": ("distributed.strategy=zero3",),
    "ddp": ("distributed.strategy=ddp",),
    "packing": ("data.packing=true",),
    "budget": ("training.max_train_tokens=1000",),
}


@pytest.mark.parametrize(("name", "setting"), REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(name: str, setting: Setting, plain: Path) -> None:
    flags = needs_quantized(name) if "bits" not in setting else ()
    with pytest.raises(UserError) as found:
        load(plain, f"adapter.variant={name}", *flags, *FLAGS[setting])
    assert VARIANTS[name].incompatible_with[setting] in str(found.value)


def test_an_unquantised_base_is_refused_where_there_is_nothing_to_undo(plain: Path) -> None:
    with pytest.raises(UserError, match="Use `method: qlora`"):
        load(plain, "adapter.variant=loftq")


@pytest.mark.parametrize(("alias", "name"), [("lora+", "loraplus"), ("bone", "miss"), ("LoRA-GA", "lora_ga")])
def test_other_names(alias: str, name: str, plain: Path) -> None:
    assert get_variant(alias).name == name
    section = load(plain, f"adapter.variant={alias}").adapter
    assert section is not None and section.variant == name


def test_freezing_belongs_to_full(plain: Path) -> None:
    assert load(plain, "method=full", "model.freeze_layers=0-3").model.freeze_layers == "0-3"
    with pytest.raises(UserError, match="an adapter leaves every layer of the base as it is"):
        load(plain, "model.freeze_layers=0-3")


def test_the_entries_are_complete() -> None:
    for name, variant in VARIANTS.items():
        assert variant.name == name
        assert variant.summary.endswith(".")
        assert variant.mergeable or variant.merge_hint
        assert variant.paper is not None or name in ("full", "trainable_tokens")
        assert set(variant.incompatible_with) <= set(get_args(Setting))
        assert name == "full" or variant.model_fields["variant"].default == name


def test_the_list_needs_no_heavy_library() -> None:
    heavy = ("torch", "peft", "transformers")
    program = f"import sys, peftchat.variants; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_verb_lists_everything_and_tells_about_one() -> None:
    listed = json.loads(peftchat("variants", "--json").stdout)
    assert list(listed) == list(VARIANTS)
    for name, told in listed.items():
        assert set(told["settings"]) == set(VARIANTS[name].setting_names())
        assert set(told["works_with"]) == set(get_args(Setting))
    shown = peftchat("variants", "corda").stdout
    assert "2406.05223" in shown and "calibration_samples" in shown
    unknown = peftchat("variants", "lore")
    assert unknown.returncode == 2 and "there is no variant `lore`" in unknown.stderr
