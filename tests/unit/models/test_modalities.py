"""Of a base with a vision tower, the language model alone is trained: by each kind of variant, and in full."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from peftchat.models.peft_model import freeze_layers, model_shape, other_modalities
from peftchat.recipe.schema import validate_adapter
from tests.support.models import random_model, seeing_model


def trained_by_text(model: Any) -> set[str]:
    """The parameters that a conversation gives a gradient."""
    ids = torch.randint(10, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    return seeing_model("gemma3")


def test_what_text_does_not_pass_is_found(gemma: PreTrainedModel) -> None:
    others = other_modalities(gemma)
    assert others == ("model.vision_tower", "model.multi_modal_projector")
    assert other_modalities(random_model("llama", 96)) == ()


@pytest.mark.parametrize("layers", [None, "0"])
def test_full_fine_tuning_trains_what_gets_a_gradient(layers: str | None) -> None:
    model = seeing_model("gemma3")
    freeze_layers(model, layers)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == trained_by_text(model)
    assert any("language_model.layers.1" in name for name in trainable)
    # The vision tower has as many layers.
    assert any("language_model.layers.0" in name for name in trainable) is (layers is None)


SECTIONS: list[dict[str, Any]] = [
    {"variant": "lora"},
    {"variant": "lora", "target_modules": "attention"},
    {"variant": "lora", "target_modules": ["q_proj", "down_proj"]},
    {"variant": "ia3"},
    {"variant": "ln_tuning"},
    {"variant": "vera"},
    {"variant": "pissa", "r": 4},
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: "-".join(map(str, section.values())))
def test_no_variant_adapts_the_vision_tower(section: dict[str, Any]) -> None:
    model = seeing_model("gemma3")
    config = validate_adapter(section).peft_config(model_shape(model))
    assert config is not None
    config.task_type = "CAUSAL_LM"
    names = [name for name, one in get_peft_model(model, config).named_modules() if isinstance(one, BaseTunerLayer)]
    assert names
    assert all("language_model" in name for name in names)
    # Each kind of layer is adapted in both layers of the text model.
    assert len(names) % 2 == section["variant"].startswith("ln")
