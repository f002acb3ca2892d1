"""Attention conversation by conversation against torch's own attention under a mask."""

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from peftchat.dataset.collator import cu_seqlens
from peftchat.models import varlen_attention as varlen
from peftchat.models.varlen_attention import varlen_attention
from tests.support.cli import peftchat
from tests.support.data import read_json, write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


@dataclass
class Layer:
    num_key_value_groups: int = 1
    is_causal: bool = True
    training: bool = True


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Torch's attention under the mask of the whole line; shape (1, N, H, D)."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(200, 330)), min_size=1, max_size=7),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    products=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_output_and_gradients_are_those_of_masked_attention(lengths, heads, products, seed):
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    shapes = [(1, heads[0], count, 8), (1, heads[1], count, 8), (1, heads[1], count, 8)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    slope = torch.randn(1, count, heads[0], 8, generator=generator, dtype=torch.float64)
    found = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        if ours:
            # Which way is faster depends on the CPU.
            with patch.object(varlen, "_products_are_faster", lambda _: products):
                output, _ = varlen_attention(Layer(heads[0] // heads[1]), *leaves, None, **cu_seqlens(lengths))
        else:
            output = masked(*leaves, lengths)
        output.backward(slope)
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_dropped_weights_stay_within_the_conversation():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 30, 4)
    other = torch.cat([torch.randn(1, 2, 10, 4), value[:, :, 10:]], dim=2)
    seen = []
    for values in (value, other):
        torch.manual_seed(1)
        output, _ = varlen_attention(Layer(), query, key, values, None, dropout=0.5, **cu_seqlens([10, 20]))
        seen.append(output[:, 10:])
    assert torch.equal(*seen)


def test_under_autocast_dtypes_may_differ() -> None:
    """Rotary positions in float32 leave queries and keys in another dtype than values."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 30, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = varlen_attention(Layer(), query, key, value.bfloat16(), None, **cu_seqlens([10, 20]))
    assert output.dtype == torch.bfloat16
    assert (output.float() - masked(query, key, value, [10, 20])).abs().max() < 0.05


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_in_bfloat16_uses_it(method: str, tmp_path: Path) -> None:
    base, train = small_model(), write_small_talk(tmp_path / "train.jsonl")
    model = {"name": str(base), "dtype": "bfloat16"}
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml",
        base,
        train,
        None,
        tmp_path / "run",
        model=model,
        method=method,
        training={"max_steps": 1},
    )
    done = peftchat("train", str(recipe))
    assert done.returncode == 0, done.stderr
    summary = read_json(tmp_path / "run" / "run.json")
    assert summary["attention"] == "varlen"
    assert summary["padding_fraction"] == 0
    assert summary["memory_bytes"]["optimizer"] >= 2 * summary["memory_bytes"]["trained_weights"]
    assert sum(summary["memory_bytes"].values()) == summary["peak_memory_bytes"]


def test_a_mask_or_no_borders_means_plain_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 9, 4)
    output, _ = varlen_attention(Layer(), query, key, value, None)
    torch.testing.assert_close(
        output, F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    )


@pytest.mark.parametrize("lengths", [[5, 0, 3], [4]])
def test_borders_leave_out_empty_conversations(lengths):
    given = cu_seqlens(lengths)
    assert given["cu_seq_lens_q"].tolist() == [0, *torch.tensor([n for n in lengths if n]).cumsum(0).tolist()]
    assert given["max_length_q"] == max(lengths)
