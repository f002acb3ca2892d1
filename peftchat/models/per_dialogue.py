"""Attention of packed dialogues, each by itself: no mask, and no score that a mask would throw away.

A batch is one line of dialogues, shape (1, N). On a GPU torch's variable-length flash kernel takes it as it is. On a
CPU that kernel does not exist, and the backward of the flash kernel that does is slow on short lines, so dialogues of
like length are computed together by plain matrix products, and long ones alone, some queries at a time.

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

# Longer dialogues are computed alone: together they would only need more memory at once.
_SHORT = 256
# Queries of a long dialogue that are computed together: what lies behind them is never computed.
_STRETCH = 256
# Matrix kernels run best on lengths of whole registers.
_ALIGNED = 32
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
            output = _one_by_one(q, k, v, scale, _spans(tuple(cu_seq_lens_q.tolist())), dropout)
        elif q.is_cuda:
            output = _by_flash_kernel(q, k, v, scale, cu_seq_lens_q, max_length_q)
        else:
            output = _attend(q, k, v, cu_seq_lens_q, scale)
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
    """Dialogues that are computed together, each padded to the same length.

    Attributes:
        first: their first slot.
        count: dialogues.
        length: slots of each.
    """

    first: int
    count: int
    length: int

    def of(self, rows: Tensor) -> Tensor:
        """Its slots of a (slots, ...) tensor: shape (count, length, ...)."""
        return rows[self.first : self.first + self.count * self.length].view(self.count, self.length, *rows.shape[1:])


@dataclass(frozen=True, slots=True)
class _Plan:
    """The line of dialogues as groups of slots.

    Attributes:
        groups: in the order of their slots.
        tokens: for each slot the token it holds, int64, shape (slots,); padding repeats a dialogue's last token.
        slots: for each token the slot that holds it, int64, shape (N,).
        padding: slots that are padding, int64.
    """

    groups: tuple[_Group, ...]
    tokens: Tensor
    slots: Tensor
    padding: Tensor


def _spans(borders: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in itertools.pairwise(borders) if stop > start]


# Every layer of a forward pass asks for the same plan.
@functools.lru_cache(maxsize=8)
def _plan(borders: tuple[int, ...]) -> _Plan:
    spans = sorted(_spans(borders), key=lambda span: span[0] - span[1])
    groups: list[_Group] = []
    tokens = []
    first = 0
    for together in _alike(spans):
        longest = together[0][1] - together[0][0]
        length = -(-longest // _ALIGNED) * _ALIGNED if longest > _ALIGNED else longest
        starts = torch.tensor([start for start, _ in together])[:, None]
        lengths = torch.tensor([stop - start for start, stop in together])[:, None]
        tokens.append((starts + torch.minimum(torch.arange(length), lengths - 1)).flatten())
        groups.append(_Group(first, len(together), length))
        first += len(together) * length
    held = torch.cat(tokens)
    real = torch.ones(len(held), dtype=torch.bool)
    # A token's first slot is its own; those that repeat it follow at once.
    real[1:] = held[1:] != held[:-1]
    slots = torch.empty(borders[-1], dtype=torch.int64)
    slots[held[real]] = torch.nonzero(real)[:, 0]
    return _Plan(tuple(groups), held, slots, torch.nonzero(~real)[:, 0])


def _alike(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Dialogues of like length together, the longest of each group first; long ones stay alone."""
    groups: list[list[tuple[int, int]]] = []
    for start, stop in spans:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        if groups and longest <= _SHORT and stop - start >= _SMALLEST_SHARE * longest:
            groups[-1].append((start, stop))
        else:
            groups.append([(start, stop)])
    return groups


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: list[tuple[int, int]], dropout: float) -> Tensor:
    """Attention of each dialogue by torch: shape (N, H, D)."""
    parts = []
    for start, stop in spans:
        query, key, value = (tensor[None, :, start:stop] for tensor in (q, k, v))
        parts.append(
            F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=len(k) != len(q)
            )[0].transpose(0, 1)
        )
    return torch.cat(parts)


@torch.library.custom_op("peftchat::attend_by_dialogue", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float) -> Tensor:
    """Softmax attention within each dialogue of a line: an operator of its own, so that compiled layers keep whole.

    Shapes: q (H, N, D), k and v (K, N, D), borders (dialogues + 1,), output (N, H, D).
    """
    plan = _plan(tuple(borders.tolist()))
    rows = [_in_slots(tensor, plan) for tensor in (q, k, v)]
    output = []
    for group in plan.groups:
        query, key, value = (group.of(tensor).transpose(1, 2) for tensor in rows)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        output.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(output).index_select(0, plan.slots)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], v.shape[2])


@torch.library.custom_op("peftchat::attend_by_dialogue_backward", mutates_args=())
def _attend_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output; the weights are computed again.

    The backward of torch's kernel is slow on a CPU. Here the query heads that share a key head are one taller matrix.
    """
    plan, heads = _plan(tuple(borders.tolist())), len(k)
    q, k, v = (_in_slots(tensor, plan) for tensor in (q, k, v))
    slope = slope.index_select(0, plan.tokens)
    if len(plan.padding):
        slope.index_fill_(0, plan.padding, 0.0)
    of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # Sums over stretches are kept in float32 at least, as those within a stretch are.
    exact = torch.promote_types(k.dtype, torch.float32)
    for group in plan.groups:
        queries, of_output = group.of(q), group.of(slope)
        keys, values = _by_head(group.of(k), heads), _by_head(group.of(v), heads)
        sums = [torch.zeros_like(tensor, dtype=exact) for tensor in (keys, values)]
        for start in range(0, group.length, _STRETCH):
            stop = min(start + _STRETCH, group.length)
            asking, wanted = _by_head(queries[:, start:stop], heads), _by_head(of_output[:, start:stop], heads)
            seen = keys[:, :stop]
            weights = _weights(asking, seen, scale, stop - start)
            of_weights = torch.bmm(wanted, values[:, :stop].transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            _put(_scaled(of_scores, seen, scale), group.of(of_q)[:, start:stop], heads)
            sums[0][:, :stop] += _scaled(of_scores.transpose(1, 2), asking, scale)
            sums[1][:, :stop] += torch.bmm(weights.transpose(1, 2), wanted)
        _put(sums[0], group.of(of_k), heads)
        _put(sums[1], group.of(of_v), heads)
    of_q, of_k, of_v = (found.index_select(0, plan.slots).transpose(0, 1) for found in (of_q, of_k, of_v))
    return of_q, of_k, of_v


@_attend_backward.register_fake
def _(slope: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (tensor.new_empty(tensor.transpose(0, 1).shape).transpose(0, 1) for tensor in (q, k, v))
    return of_q, of_k, of_v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *ctx_tensors, ctx.scale = inputs
    ctx.save_for_backward(*ctx_tensors)


def _gradients(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(slope, *ctx.saved_tensors, ctx.scale), None, None


_attend.register_autograd(_gradients, setup_context=_keep)


def _in_slots(tensor: Tensor, plan: _Plan) -> Tensor:
    """Rows of a (H, N, D) tensor in the plan's slots: shape (slots, H, D)."""
    return tensor.transpose(0, 1).index_select(0, plan.tokens)


def _scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """The product of two batches of matrices, times a factor."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scale)


def _weights(queries: Tensor, keys: Tensor, scale: float, length: int) -> Tensor:
    """What each query takes of each key: shape (B, rows, n), for queries that are the last `length` of n tokens.

    Args:
        queries: shape (B, rows, D); rows are those of several heads, each `length` tokens.
        keys: shape (B, n, D).
    """
    many, rows, seen = len(queries), queries.shape[1], keys.shape[1]
    scores = _scaled(queries, keys.transpose(1, 2), scale)
    scores.view(many, rows // length, length, seen)[..., seen - length :].add_(_causal(length, scores.dtype))
    # In bfloat16 this reads and writes bfloat16 but adds up in float32.
    return torch.softmax(scores, dim=-1)


@functools.lru_cache(maxsize=64)
def _causal(length: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores: minus infinity on what comes later; shape (length, length)."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """Dialogues' rows as matrices, one for each of the `heads` key heads.

    Args:
        rows: shape (count, length, H, D).

    Returns:
        Shape (count * heads, H / heads * length, D).
    """
    count, length, own, width = rows.shape
    parted = rows.view(count, length, heads, own // heads, width).permute(0, 2, 3, 1, 4)
    return parted.reshape(count * heads, -1, width)


def _put(block: Tensor, rows: Tensor, heads: int) -> None:
    """Write matrices as `_by_head` makes them into rows of shape (count, length, H, D)."""
    count, length, own, width = rows.shape
    parted = block.view(count, heads, own // heads, length, width).permute(0, 3, 1, 2, 4)
    rows.view(count, length, heads, own // heads, width).copy_(parted)
