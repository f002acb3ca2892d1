"""Presets of target modules find the right layers in every family."""

from typing import Any

import pytest
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from peftchat.errors import UserError
from peftchat.models.peft_model import model_shape
from peftchat.recipe.schema import validate_adapter
from peftchat.variants import ADAPTERS
from tests.support.models import small_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "gpt2", "gpt_bigcode", "falcon", "opt", "gpt_neox")
CONV1D = ("gpt2",)
NO_CONV1D = tuple(name for name, adapter in ADAPTERS.items() if not adapter.supports_conv1d)
"""Variants that PEFT does not have for GPT-2's transposed layers."""


def wrapped(family: str, **section: Any) -> tuple[Any, list[str]]:
    """The model with a variant around it, and the layers that have become the variant's."""
    model = AutoModelForCausalLM.from_config(small_config(family, vocabulary=64, width=32))
    config = validate_adapter(section).peft_config(model_shape(model))
    assert config is not None
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


@pytest.mark.parametrize(("family", "name"), [("llama", "k_porj"), ("gpt2", "q_proj"), ("llama", "proj")])
def test_a_name_of_no_layer_is_refused_beside_names_that_fit(family: str, name: str) -> None:
    first = {"llama": "q_proj", "gpt2": "c_attn"}[family]
    with pytest.raises(UserError, match=f"no layer with the name `{name}`") as caught:
        wrapped(family, variant="lora", target_modules=(first, name))
    assert first in str(caught.value.hint)


def test_layers_may_be_named_by_their_place_and_embeddings_too() -> None:
    _, names = wrapped("llama", variant="lora", target_modules=("layers.1.mlp.up_proj", "embed_tokens"))
    assert names == ["model.embed_tokens", "model.layers.1.mlp.up_proj"]


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize(
    "name", [name for name, adapter in ADAPTERS.items() if "target_modules" in adapter.setting_names()]
)
def test_sizes_left_to_the_variant_fit_the_model(name: str, family: str) -> None:
    if family in CONV1D and name in NO_CONV1D:
        pytest.skip("peft has no such layer for transposed weights")
    section: dict[str, Any] = {"variant": name}
    if name in ("pissa", "olora", "corda", "lora_ga"):
        section["r"] = 4
    _, names = wrapped(family, **section)
    assert names
