"""Lily shares its matrices as its settings say, and PEANuT's update follows from the weight."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peftchat.models.peft_model import model_shape
from peftchat.recipe.schema import validate_adapter
from tests.support.models import small_config


def wrapped(**section: Any) -> Any:
    config = small_config("llama", vocabulary=64, width=32)
    config.num_hidden_layers = 4
    model = AutoModelForCausalLM.from_config(config)
    adapter = validate_adapter(section)
    peft_config = adapter.peft_config(model_shape(model))
    assert peft_config is not None
    return adapter.wrap(model, peft_config)


def test_neighboring_layers_share_the_input_side_and_all_share_the_output_side() -> None:
    model = wrapped(variant="lily", r=4, stride_A=2, num_B=3)
    layers = [layer.self_attn.q_proj for layer in model.get_base_model().model.layers]
    inputs = [layer.lily_A["default"].weight.data_ptr() for layer in layers]
    assert inputs[0] == inputs[1] != inputs[2] == inputs[3]
    assert len({layer.lily_B["default"].weight.data_ptr() for layer in layers}) == 1
    assert len({layer.lily_router["default"].weight.data_ptr() for layer in layers}) == 4


def test_the_update_is_computed_from_the_weight() -> None:
    layer = wrapped(variant="peanut", r=4, depth=1).get_base_model().model.layers[0].self_attn.q_proj
    assert not layer.get_delta_weight("default").any()
    torch.nn.init.ones_(layer.peanut_B["default"].weight)
    before = layer.get_delta_weight("default")
    layer.get_base_layer().weight.data.mul_(2)
    after = layer.get_delta_weight("default")
    # Without biases a ReLU network is homogeneous: twice the weight gives twice the update.
    torch.testing.assert_close(after, 2 * before)
    assert before.any()
