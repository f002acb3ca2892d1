"""Attention of packed dialogues, each by itself: no mask, and no score that a mask would throw away.

A batch is one line of dialogues, shape (1, N). On a GPU torch's variable-length flash kernel takes it as it is. On a
CPU that kernel does not exist, and the backward of the flash kernel that does is slow on short lines, so dialogues of
like length are computed together by plain matrix products, and long ones one by one by torch's own attention.

The borders travel to the attention layers as `cu_seq_lens_q` and `max_length_q`, the arguments of transformers' flash
attention. A forward without them (generation, say) goes through transformers' SDPA attention.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftchat.models.load import PER_DIALOGUE

# Up to here the scores of a dialogue, kept for the backward pass, are smaller than its other activations.
_SHORT = 256
# A dialogue joins a group of longer ones if padding it to their length costs less than computing it apart.
_SMALLEST_SHARE = 0.75


def register(longest: int) -> None:
    """Make the implementation known to transformers as `per_dialogue`.

    Args:
        longest: tokens of the longest dialogue. Attention windows of at least that many never close.
    """
    AttentionInterface.register(PER_DIALOGUE, per_dialogue_attention)
    AttentionMaskInterface.register(PER_DIALOGUE, functools.partial(_mask, longest=longest))


def _mask(*args: Any, longest: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for lines of whole dialogues; transformers' own where rows are padded or a window closes."""
    window = kwargs.get("local_size")
    starts_empty = kwargs.get("q_length") == kwargs.get("kv_length")
    if attention_mask is None and starts_empty and (window is None or window >= longest):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def per_dialogue_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each dialogue of a line.

    Args:
        module: the attention layer.
        query: float, shape (1, H, N, D).
        key: float, shape (1, K, N, D); K divides H.
        value: float, shape (1, K, N, D).
        attention_mask: a mask sends the call to transformers' SDPA attention.
        dropout: share of the weights dropped; where it is not 0, dialogues are computed one by one.
        scaling: factor on the scores; 1 / sqrt(D) without it.
        cu_seq_lens_q: borders of the dialogues with 0 in front and N behind, int32, shape (dialogues + 1,).
        max_length_q: tokens of the longest dialogue.

    Returns:
        Shape (1, N, H, D), and None in place of the weights.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    with_autocast = torch.is_autocast_enabled(device)
    # Rotary positions in float32 leave queries and keys in another dtype than values.
    dtype = torch.get_autocast_dtype(device) if with_autocast else value.dtype
    q, k, v = (tensor[0].to(dtype) for tensor in (query, key, value))
    with torch.autocast(device, enabled=False):
        if dropout:
            spans = _spans(tuple(cu_seq_lens_q.tolist()))
            output = torch.cat([_alone(q, k, v, scale, span, dropout) for span in spans])
        elif q.is_cuda:
            output = _by_flash_kernel(q, k, v, scale, cu_seq_lens_q, max_length_q)
        else:
            output = _by_groups(q, k, v, scale, tuple(cu_seq_lens_q.tolist()))
    return output[None], None


def _by_flash_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, borders: Tensor, longest: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert longest is not None
    query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (q, k, v))
    output = varlen_attn(
        query, key, value, borders, borders, longest, longest,
        scale=scale, window_size=(-1, 0), enable_gqa=len(k) != len(q),
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output


@dataclass(frozen=True, slots=True)
class _Group:
    """Dialogues that are computed together, each padded to the longest.

    Attributes:
        count: dialogues.
        length: tokens of the longest.
        tokens: their tokens' places in the line, int64, shape (n,).
        slots: the same tokens' places in the padded block, int64, shape (n,); None without padding.
        block: for each slot of the block the token it holds, int64, shape (count * length,); padding repeats a token.
        padding: slots that are padding, int64.
    """

    count: int
    length: int
    tokens: Tensor
    slots: Tensor | None
    block: Tensor
    padding: Tensor


@dataclass(frozen=True, slots=True)
class _Plan:
    groups: tuple[_Group, ...]
    long: tuple[tuple[int, int], ...]


def _spans(borders: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in itertools.pairwise(borders) if stop > start]


# Every layer of a forward pass asks for the same plan.
@functools.lru_cache(maxsize=8)
def _plan(borders: tuple[int, ...]) -> _Plan:
    spans = _spans(borders)
    long = tuple(span for span in spans if span[1] - span[0] > _SHORT)
    short = sorted((span for span in spans if span[1] - span[0] <= _SHORT), key=lambda span: span[0] - span[1])
    groups: list[list[tuple[int, int]]] = []
    for start, stop in short:
        if groups:
            first = groups[-1][0]
            if stop - start >= _SMALLEST_SHARE * (first[1] - first[0]):
                groups[-1].append((start, stop))
                continue
        groups.append([(start, stop)])
    return _Plan(tuple(_group(spans) for spans in groups), long)


def _group(spans: list[tuple[int, int]]) -> _Group:
    length = spans[0][1] - spans[0][0]
    offsets = torch.arange(length)
    starts = torch.tensor([start for start, _ in spans])[:, None]
    lengths = torch.tensor([stop - start for start, stop in spans])[:, None]
    real = (offsets < lengths).flatten()
    block = (starts + torch.minimum(offsets, lengths - 1)).flatten()
    padding = torch.nonzero(~real)[:, 0]
    return _Group(
        count=len(spans),
        length=length,
        tokens=block[real],
        slots=torch.nonzero(real)[:, 0] if len(padding) else None,
        block=block,
        padding=padding,
    )


def _by_groups(q: Tensor, k: Tensor, v: Tensor, scale: float, borders: tuple[int, ...]) -> Tensor:
    plan = _plan(borders)
    output: Tensor = _Grouped.apply(q, k, v, scale, plan.groups)
    if not plan.long:
        return output
    parts = [output, *(_alone(q, k, v, scale, span) for span in plan.long)]
    return torch.cat(parts).index_select(0, _places(borders))


def _alone(q: Tensor, k: Tensor, v: Tensor, scale: float, span: tuple[int, int], dropout: float = 0.0) -> Tensor:
    """Attention of one dialogue by torch: shape (its tokens, H, D)."""
    query, key, value = (tensor[None, :, span[0] : span[1]] for tensor in (q, k, v))
    output = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=len(k) != len(q)
    )
    return output[0].transpose(0, 1)


@functools.lru_cache(maxsize=8)
def _places(borders: tuple[int, ...]) -> Tensor:
    """Where each token of the line stands in the short dialogues' output with the long ones' behind it."""
    places = torch.arange(borders[-1])
    behind = borders[-1]
    for start, stop in _plan(borders).long:
        places[start:stop] = torch.arange(behind, behind + stop - start)
        behind += stop - start
    return places


class _Grouped(torch.autograd.Function):
    """Softmax attention of the grouped dialogues, and zeros for every other token.

    Shapes: q (H, N, D), k and v (K, N, D), output (N, H, D).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, groups: tuple[_Group, ...]) -> Tensor:
        heads, tokens, _ = q.shape
        output = q.new_zeros(tokens, heads, v.shape[-1])
        saved = []
        for group in groups:
            queries, keys, values = _blocks(q, group, 1), _blocks(k, group, heads), _blocks(v, group, heads)
            scores = torch.baddbmm(_causal(group.length, q.dtype), queries, keys.transpose(1, 2), alpha=scale)
            # In bfloat16 this reads and writes bfloat16 but adds up in float32.
            weights = torch.softmax(scores, dim=-1)
            _put(output, torch.bmm(weights, values), group)
            saved.append(weights)
        ctx.groups, ctx.scale = groups, scale
        ctx.save_for_backward(q, k, v, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        heads = len(q)
        slope = outputs[0].transpose(0, 1)
        found = [tensor.new_zeros(tensor.shape[1], len(tensor), tensor.shape[2]) for tensor in (q, k, v)]
        for group, weights in zip(ctx.groups, saved, strict=True):
            queries, keys, values = _blocks(q, group, 1), _blocks(k, group, heads), _blocks(v, group, heads)
            of_output = _blocks(slope, group, 1)
            if len(group.padding):
                of_output.view(heads, -1, of_output.shape[-1]).index_fill_(1, group.padding, 0.0)
            of_weights = torch.bmm(of_output, values.transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_scores *= ctx.scale
            _put(found[0], torch.bmm(of_scores, keys), group)
            _put(found[1], _sum_heads(torch.bmm(of_scores.transpose(1, 2), queries), len(k), group), group)
            _put(found[2], _sum_heads(torch.bmm(weights.transpose(1, 2), of_output), len(v), group), group)
        of_q, of_k, of_v = (tensor.transpose(0, 1) for tensor in found)
        return of_q, of_k, of_v, None, None


@functools.lru_cache(maxsize=64)
def _causal(length: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores: minus infinity on what comes later; shape (1, length, length)."""
    return torch.full((1, length, length), float("-inf"), dtype=dtype).triu_(1)


def _blocks(tensor: Tensor, group: _Group, heads: int) -> Tensor:
    """A group's rows of a (H, N, D) tensor, its heads repeated up to `heads`: shape (heads * count, length, D)."""
    block = tensor.index_select(1, group.block)
    own, slots, width = block.shape
    if heads > own:
        block = block[:, None].expand(own, heads // own, slots, width).reshape(heads, slots, width)
    return block.reshape(-1, group.length, width)


def _put(line: Tensor, block: Tensor, group: _Group) -> None:
    """Write the real rows of a (H * count, length, D) block into a (N, H, D) line."""
    rows = block.reshape(line.shape[1], -1, block.shape[-1])
    if group.slots is not None:
        rows = rows.index_select(1, group.slots)
    line.index_copy_(0, group.tokens, rows.transpose(0, 1))


def _sum_heads(block: Tensor, heads: int, group: _Group) -> Tensor:
    """Add up what the query heads of each of the `heads` key heads found."""
    width = block.shape[-1]
    summed: Tensor = block.view(heads, -1, group.count * group.length, width).sum(1)
    return summed.view(-1, group.length, width)
