"""Presets of target modules find the right layers in every family."""

from typing import Any

import pytest
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from peftchat.models.peft_model import model_shape
from peftchat.recipe.schema import validate_adapter
from peftchat.variants import VARIANTS, get_variant
from tests.support.models import small_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "gpt2", "gpt_bigcode", "falcon", "opt", "gpt_neox")
CONV1D = ("gpt2",)
NO_CONV1D = ("shira", "oft", "boft", "c3a", "loha", "lokr", "hra", "road", "miss", "delora")
"""Variants that PEFT does not have for GPT-2's transposed layers."""


def wrapped(family: str, **section: Any) -> tuple[Any, list[str]]:
    """The model with a variant around it, and the layers that have become the variant's."""
    model = AutoModelForCausalLM.from_config(small_config(family, vocabulary=64, width=32))
    variant = get_variant(section["variant"])
    assert variant.build is not None
    config = variant.build(validate_adapter(section), model_shape(model))
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(model, config)
    names = [name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
    return model, names


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_feed_forward_are_all_linear(family: str) -> None:
    _, attention = wrapped(family, variant="lora", target_modules="attention")
    _, forward = wrapped(family, variant="lora", target_modules="feed-forward")
    _, everything = wrapped(family, variant="lora")
    assert attention and forward and not set(attention) & set(forward)
    assert {*attention, *forward} == set(everything)
    assert all("attn" in name or "attention" in name for name in attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_scales_keys_values_and_the_second_feed_forward_layer(family: str) -> None:
    model, names = wrapped(family, variant="ia3")
    layers = {name: model.get_base_model().get_submodule(name) for name in names}
    inside = [name for name, layer in layers.items() if layer.is_feedforward]
    assert inside and len(inside) == model.config.num_hidden_layers
    assert not any("q_proj" in name for name in names)
    assert len(names) > len(inside)


@pytest.mark.parametrize("family", FAMILIES)
def test_ln_tuning_finds_every_norm(family: str) -> None:
    model, names = wrapped(family, variant="ln_tuning")
    assert len(names) > model.config.num_hidden_layers
    assert all("norm" in name.rsplit(".")[-1] or "ln" in name.rsplit(".")[-1] for name in names)


TARGETED = [name for name, variant in VARIANTS.items() if variant.build and "target_modules" in variant.keys]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (name, family)
        for name in TARGETED
        for family in ("llama", "gpt2", "falcon")
        if family not in CONV1D or name not in NO_CONV1D
    ],
)
def test_sizes_left_to_the_variant_fit_the_model(name: str, family: str) -> None:
    section: dict[str, Any] = {"variant": name}
    if VARIANTS[name].start in ("pissa", "olora", "corda", "lora_ga"):
        section["r"] = 4
    _, names = wrapped(family, **section)
    assert names
