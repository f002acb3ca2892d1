"""The learning rate by rule: its numbers, what it is invariant to, and what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.planning.auto_settings import choose_rate
from peftchat.recipe import Recipe
from peftchat.recipe.sections import DataEntry
from peftchat.training.hints import RunSize, find_hints
from peftchat.training.rate_rule import ModelWidth, rule_rate, width_of
from peftchat.variants import VARIANTS
from peftchat.variants.low_rank import LoraAdapter

Make = Callable[..., Recipe]


def make(adapter: dict[str, Any] | None = None, method: str = "lora", **training: Any) -> Recipe:
    """A recipe on a model that is not there."""
    values: dict[str, Any] = {"model": {"name": "org/m"}, "method": method, "output_dir": "runs/x"}
    values |= {"data": {"train": [{"path": "d.jsonl"}]}, "training": training}
    return Recipe.model_validate(values if adapter is None else {**values, "adapter": adapter})


def rate(recipe: Recipe, size: int = 2000, model_type: str = "llama") -> float:
    return rule_rate(recipe, lambda _: ModelWidth(model_type, size)).value


@pytest.mark.parametrize(
    ("model_type", "size", "published"),
    [("llama", 576, 1.3e-3), ("llama", 960, 8.9e-4), ("smollm3", 2048, 4.9e-4), ("llama", 3072, 3.6e-4),
     ("llama", 4096, 2.9e-4), ("qwen2", 3584, 4.8e-4), ("qwen3", 4096, 4.7e-4)],
)  # fmt: skip
def test_the_published_rates(model_type: str, size: int, published: float) -> None:
    assert rate(make(), size, model_type) == published
    assert rate(make(method="qlora"), size, model_type) == published
    assert rate(make(method="full"), size, model_type) == pytest.approx(published / 10, rel=0.04)


@pytest.mark.parametrize("rank", [1, 8, 64, 256])
def test_at_fixed_alpha_the_rate_does_not_depend_on_the_rank(rank: int) -> None:
    assert rate(make({"r": rank, "alpha": 32})) == 5e-4
    # With the square root of the rank the scale is higher, and the rate lower by as much.
    root = rate(make({"variant": "rslora", "r": rank, "alpha": 32}))
    assert root == pytest.approx(5e-4 / rank**0.5, rel=0.05)


@pytest.mark.parametrize("alpha", [8, 16, 64, 128])
def test_the_rate_times_alpha_is_constant(alpha: int) -> None:
    assert rate(make({"alpha": alpha})) * alpha == pytest.approx(5e-4 * 32, rel=0.05)
    assert rate(make({"variant": "pissa", "alpha": alpha})) * alpha == pytest.approx(2.5e-4 * 32, rel=0.05)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_keeps_its_ratio_to_lora_or_its_own_rate(name: str) -> None:
    variant = VARIANTS[name]
    if name == "full":
        assert rate(make(method="full")) == 5e-5
    elif not issubclass(variant, LoraAdapter):
        method = "qlora" if "unquantized" in variant.incompatible_with else "lora"
        assert rate(make({"variant": name}, method)) == variant.learning_rate
        assert "no rule by width is known" in rule_rate(make({"variant": name}, method)).reason
    elif name != "rslora":
        assert variant.auto_factor == variant.learning_rate / VARIANTS["lora"].learning_rate


def test_the_rate_of_pairs_is_written_with_two_digits() -> None:
    pairs = make().model_copy(update={"objective": "dpo"})
    assert repr(rule_rate(pairs).value) == "1e-05" and "TRL's default for `dpo`" in rule_rate(pairs).reason


def test_short_runs_and_the_highest_rate() -> None:
    assert rate(make(max_steps=99)) == 7.5e-4
    assert rate(make(max_steps=100)) == rate(make(max_steps=-1)) == 5e-4
    assert rate(make(method="full", max_steps=10)) == 5e-5
    assert rate(make({"alpha": 1})) == 1e-2
    reason = rule_rate(make({"alpha": 1}, max_steps=9), lambda _: ModelWidth("gpt2", 64)).reason
    for part in ("highest rate", "0.781", "width", "extrapolation", "times 32 for the scale", "fewer than 100 steps"):
        assert part in reason


CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4},
    {"model_type": "gpt2", "n_embd": 48},
    {"model_type": "mpt", "d_model": 48},
    {"model_type": "gemma3", "text_config": {"hidden_size": 48}, "vision_config": {"hidden_size": 96}},
    {"model_type": "llava", "text_config": {"model_type": "qwen2", "hidden_size": 48}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_the_width_is_that_of_the_text_model(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert width_of(AutoConfig.from_pretrained(tmp_path)) == 48


def test_a_width_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 0, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = make()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(tmp_path)})})
    with pytest.raises(UserError, match="states no width") as found:
        choose_rate(recipe)
    assert "learning_rate=2e-4" in str(found.value.hint)
    given = recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": 1e-3})})
    assert choose_rate(given) == (given, ())
    assert find_hints(given, RunSize(10, attention_only=False)) == ()


def test_hints_have_the_numbers_and_the_source() -> None:
    size = RunSize(1000, attention_only=True, supervised_tokens=5000, conversations_per_step=300.0)
    capacity, batch, targets = find_hints(make(), size)
    assert "1,000" in capacity or "1 k" in capacity or "1.0 k" in capacity
    assert "300 conversations" in batch and "all-linear" in targets
    assert all("https://" in line for line in (capacity, batch, targets))
    assert find_hints(make(method="full"), size) == ()
    enough = RunSize(5000, attention_only=False, supervised_tokens=5000, conversations_per_step=32.0)
    assert find_hints(make(), enough) == ()


def test_a_source_that_is_listed_twice_is_told() -> None:
    size = RunSize(9, attention_only=False)
    recipe = make()
    (entry,) = recipe.data.train
    other = entry.model_copy(update={"split": "other"})

    def hints(*entries: DataEntry) -> tuple[str, ...]:
        data = recipe.data.model_copy(update={"train": entries})
        return find_hints(recipe.model_copy(update={"data": data}), size)

    assert hints(entry) == hints(entry, other) == ()
    (line,) = hints(entry, other, entry.model_copy(update={"weight": 0.5}), entry)
    assert f"lists {entry.path} 3 times" in line and "`weight: 2.5`" in line


@pytest.mark.parametrize(("given", "told"), [(5e-2, "10 times"), (1.1e-2, None), (2e-3, None), (5e-4, "1/10 of")])
def test_a_rate_far_from_the_rule_is_told(given: float, told: str | None) -> None:
    lines = find_hints(make({"variant": "ia3"}, learning_rate=given), RunSize(9, attention_only=False))
    assert [told is not None and told in line for line in lines] == [True] * (told is not None)
