"""Counted operations of a step beside those that torch counts while it runs one."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from peftchat.models.base_config import attention_shape
from peftchat.training.throughput import attention_flops, training_flops
from tests.support.models import small_config


@pytest.mark.parametrize("tokens", [16, 48])
def test_the_operations_of_a_step_are_those_that_torch_counts(tokens: int) -> None:
    # Heads wider than the hidden size, as Gemma has.
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    head = model.lm_head.weight.numel()
    body = sum(one.numel() for one in model.model.layers.parameters() if one.dim() == 2)
    layers, width = attention_shape(config, tokens)
    expected = training_flops(
        body=body, head=head, trained_body=body, trains_head=True, tokens=tokens, supervised=tokens
    ) + attention_flops(layers=layers, width=width, pairs=tokens * tokens)
    # Eager attention computes the pairs with later tokens too.
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    ("kind", "changes", "longest", "layers"),
    [
        ("llama", {}, 4096, 2),
        ("mistral", {"sliding_window": 64}, 64, 2),
        ("mistral", {"sliding_window": 64}, 65, 0),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, 65, 2),
        ("gemma3_text", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}, 65, 1),
        ("gemma3_text", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}, 64, 2),
        ("mamba", {}, 64, 0),
    ],
)
def test_layers_that_attend_to_all_tokens_are_counted(
    kind: str, changes: dict[str, Any], longest: int, layers: int
) -> None:
    config = small_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    assert attention_shape(config, longest)[0] == layers


def test_latent_attention_counts_the_widths_of_scores_and_values() -> None:
    config = small_config("deepseek_v3")
    layers, width = attention_shape(config, 64)
    assert layers == config.num_hidden_layers
    assert 2 * width == config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
