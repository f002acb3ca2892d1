"""Models whose layers hand a state from token to token: no packs, and no adapter that the model would pass by."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peftchat.errors import UserError
from peftchat.models.base_check import check_base
from peftchat.models.base_config import carries_state
from peftchat.models.peft_model import model_shape
from peftchat.models.read_weights import layers_not_called, layers_not_quantized
from peftchat.recipe import load_recipe
from peftchat.recipe.schema import validate_adapter
from tests.support.data import write_small_talk
from tests.support.models import random_model, small_config, small_model
from tests.support.recipes import write_training_recipe

WITH_STATE = ("mamba", "mamba2", "falcon_h1", "jamba", "lfm2", "qwen3_5_text", "granitemoehybrid")
ATTENTION = (
    "llama",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "gemma3_text",
    "opt",
    "falcon",
    "bloom",
    "granitemoehybrid-dense",
)
FUSED = {"x_proj", "out_proj"}
"""Layers whose weights only the kernels for GPUs read."""


def prompts(vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(5, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))


def never_called(model: Any) -> set[str]:
    """The linear layers that a forward pass does not call, by hooks."""
    called: set[str] = set()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linear.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(input_ids=prompts(), use_cache=False)
    # An expert that no token passes is not called either; the parameters of fused ones are no layers.
    return set(linear) - called


@pytest.mark.parametrize("kind", [*WITH_STATE, *ATTENTION])
def test_layers_that_a_forward_pass_does_not_call_are_found(kind: str) -> None:
    model = random_model(kind, 96)
    found = set(layers_not_called(model))
    missed = never_called(model)
    assert missed <= found
    assert {name.rpartition(".")[2] for name in found - missed} <= FUSED
    assert carries_state(model.config) is (kind in WITH_STATE)
    assert not found or kind in WITH_STATE


@pytest.mark.parametrize("kind", WITH_STATE)
def test_every_layer_with_an_adapter_learns(kind: str) -> None:
    model = random_model(kind, 96)
    shape = model_shape(model)
    config = validate_adapter({"variant": "lora"}).peft_config(shape)
    assert config is not None
    config.task_type = "CAUSAL_LM"
    wrapped = get_peft_model(model, config)
    ids = prompts()
    logits = wrapped(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if "lora_B" in name}
    assert gradients
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


@pytest.mark.parametrize("kind", WITH_STATE)
def test_padding_on_the_right_changes_nothing(kind: str) -> None:
    model = random_model(kind, 96)
    ids = prompts()[:1]
    padded = F.pad(ids, (0, 5))
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
    alone = model(input_ids=ids, use_cache=False).logits
    beside = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, : ids.shape[1]]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["out_proj", "dt_proj"])
def test_a_layer_that_is_not_called_is_refused_by_name(name: str) -> None:
    shape = model_shape(random_model("mamba", 96))
    with pytest.raises(UserError, match=rf"`{name}` would have no effect"):
        validate_adapter({"variant": "lora", "target_modules": ["in_proj", name]}).peft_config(shape)


def test_quantization_leaves_out_what_is_read() -> None:
    left_out = layers_not_quantized(small_config("mamba"))
    assert left_out is not None
    assert {"x_proj", "dt_proj", "out_proj", "lm_head"} <= {name.rpartition(".")[2] for name in left_out}
    assert not any("in_proj" in name for name in left_out)
    assert layers_not_quantized(small_config("llama")) is None


@pytest.mark.parametrize(("kind", "refused"), [("qwen3_5_text", True), ("granitemoehybrid-dense", False)])
def test_packs_of_a_model_with_a_state_are_refused_by_its_config(kind: str, refused: bool, tmp_path: Path) -> None:
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", small_model(kind), write_small_talk(tmp_path / "talk.jsonl"), None, tmp_path / "run"
    )
    packed = load_recipe(recipe, ["data.packing=true", "data.max_length=256"])
    if refused:
        with pytest.raises(UserError, match=r"cannot be kept apart.*qwen3_5_text"):
            check_base(packed)
    else:
        check_base(packed)
    check_base(load_recipe(recipe, ["data.packing=false", "data.max_length=256"]))


def test_peft_still_takes_such_layers_for_its_own() -> None:
    """Once this fails, PEFT leaves out layers that are not called, and our own list can go."""
    model = AutoModelForCausalLM.from_config(small_config("jamba", width=32))
    adapter = validate_adapter({"variant": "lora", "target_modules": ["in_proj"]}).peft_config(model_shape(model))
    assert adapter is not None
    adapter.target_modules, adapter.task_type = "all-linear", "CAUSAL_LM"
    wrapped = get_peft_model(model, adapter)
    assert any("dt_proj" in name and "lora_B" in name for name, _ in wrapped.named_parameters())
