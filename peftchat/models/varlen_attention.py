"""Attention of packed conversations, each by itself: no mask, and no score that a mask would throw away.

A batch is one line of conversations, shape (1, N). On a GPU torch's variable-length flash kernel takes it as it is. On
a CPU that kernel does not exist, and the backward of the flash kernel that does is slow on short lines, so
conversations of like length are computed together by plain matrix products, and long ones alone, some queries at a
time.

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

from peftchat.models.loading import VARLEN

# Longer conversations are computed alone: together they would only need more memory at once.
_SHORT = 256
# Queries of a long conversation that are computed together: what lies behind them is never computed.
_STRETCH = 256
# Matrix kernels run best on lengths of whole registers.
_ALIGNED = 32
# A conversation joins a group of longer ones if padding it to their length costs less than computing it apart.
_SMALLEST_SHARE = 0.75


def register(longest: int) -> None:
    """Make the implementation known to transformers as `varlen`.

    Args:
        longest: tokens of the longest conversation. Attention windows of at least that many never close.
    """
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, functools.partial(_mask, longest=longest))


def _mask(*args: Any, longest: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for lines of whole conversations; transformers' own where rows are padded or a window closes."""
    window = kwargs.get("local_size")
    starts_empty = kwargs.get("q_length") == kwargs.get("kv_length")
    if attention_mask is None and starts_empty and (window is None or window >= longest):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def varlen_attention(
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
    """Causal attention within each conversation of a line.

    Args:
        module: the attention layer.
        query: float, shape (1, H, N, D).
        key: float, shape (1, K, N, D); K divides H.
        value: float, shape (1, K, N, D).
        attention_mask: a mask sends the call to transformers' SDPA attention.
        dropout: share of the weights dropped; where it is not 0, conversations are computed one by one.
        scaling: factor on the scores; 1 / sqrt(D) without it.
        cu_seq_lens_q: borders of the conversations with 0 in front and N behind, int32, shape (conversations + 1,).
        max_length_q: tokens of the longest conversation.

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
    """Conversations that are computed together, each padded to the same length.

    Attributes:
        first: their first slot.
        count: conversations.
        length: slots of each.
    """

    first: int
    count: int
    length: int

    def of(self, rows: Tensor, heads: int) -> Tensor:
        """Its part of what `_Places.pick` picked: shape (count, heads, length, D)."""
        stop = self.first + self.count * self.length
        return rows[self.first * heads : stop * heads].view(self.count, heads, self.length, rows.shape[1])


@dataclass(frozen=True, slots=True)
class _Plan:
    """The line of conversations as groups of slots.

    Attributes:
        groups: in the order of their slots.
        tokens: for each slot the token it holds, int64, shape (slots,); padding repeats a conversation's last token.
        slots: for each token the slot that holds it, int64, shape (N,).
        padding: whether a slot is padding, bool, shape (slots,).
    """

    groups: tuple[_Group, ...]
    tokens: Tensor
    slots: Tensor
    padding: Tensor


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the plan puts vectors of some heads: as matrices, so that a group's heads and slots follow each other.

    Attributes:
        picked: for each row of the matrices its vector among (N, heads) ones, int32, shape (slots * heads,).
        back: for each of the (N, heads) vectors its row, int32, shape (N * heads,).
        padding: rows that are padding, int64.
    """

    picked: Tensor
    back: Tensor
    padding: Tensor

    def pick(self, tensor: Tensor) -> Tensor:
        """The rows of a (heads, N, D) tensor: shape (slots * heads, D)."""
        return tensor.transpose(0, 1).reshape(-1, tensor.shape[2]).index_select(0, self.picked)

    def put_back(self, rows: Tensor, heads: int) -> Tensor:
        """The (heads, N, D) tensor of such rows."""
        return rows.index_select(0, self.back).view(-1, heads, rows.shape[1]).transpose(0, 1)


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
    return _Plan(tuple(groups), held, slots, ~real)


# Those of queries and of keys, of this batch and the next; they are long.
@functools.lru_cache(maxsize=4)
def _places(borders: tuple[int, ...], heads: int) -> _Places:
    plan = _plan(borders)
    # For each group a (count, heads, length) block of vectors, each named by slot * heads + head.
    named = torch.arange(len(plan.tokens) * heads).view(-1, heads)
    blocks = [
        named[group.first : group.first + group.count * group.length]
        .view(group.count, group.length, heads)
        .transpose(1, 2)
        .flatten()
        for group in plan.groups
    ]
    order = torch.cat(blocks)
    slot, head = order // heads, order % heads
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order))
    return _Places(
        picked=(plan.tokens[slot] * heads + head).int(),
        back=rows.view(-1, heads)[plan.slots].flatten().int(),
        padding=torch.nonzero(plan.padding[slot])[:, 0],
    )


def _alike(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Conversations of like length together, the longest of each group first; long ones stay alone."""
    groups: list[list[tuple[int, int]]] = []
    for start, stop in spans:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        if groups and longest <= _SHORT and stop - start >= _SMALLEST_SHARE * longest:
            groups[-1].append((start, stop))
        else:
            groups.append([(start, stop)])
    return groups


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: list[tuple[int, int]], dropout: float) -> Tensor:
    """Attention of each conversation by torch: shape (N, H, D)."""
    parts = []
    for start, stop in spans:
        query, key, value = (tensor[None, :, start:stop] for tensor in (q, k, v))
        parts.append(
            F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=len(k) != len(q)
            )[0].transpose(0, 1)
        )
    return torch.cat(parts)


@torch.library.custom_op("peftchat::attend_by_conversation", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float) -> Tensor:
    """Softmax attention within each conversation of a line: an operator of its own, so that compiled layers keep whole.

    Shapes: q (H, N, D), k and v (K, N, D), borders (conversations + 1,), output (N, H, D).
    """
    known, heads, key_heads = tuple(borders.tolist()), len(q), len(k)
    own, shared = _places(known, heads), _places(known, key_heads)
    queries, keys, values = own.pick(q), shared.pick(k), shared.pick(v)
    plan = _plan(known)
    output = []
    for group in plan.groups:
        asking, seen, taken = group.of(queries, heads), group.of(keys, key_heads), group.of(values, key_heads)
        found = F.scaled_dot_product_attention(asking, seen, taken, is_causal=True, scale=scale, enable_gqa=True)
        output.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(output).index_select(0, plan.slots)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], v.shape[2])


@torch.library.custom_op("peftchat::attend_by_conversation_backward", mutates_args=())
def _attend_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output; the weights are computed again.

    The backward of torch's kernel is slow on a CPU. Here the query heads that share a key head are one taller matrix.
    """
    known, heads, key_heads = tuple(borders.tolist()), len(q), len(k)
    own, shared = _places(known, heads), _places(known, key_heads)
    queries, keys, values = own.pick(q), shared.pick(k), shared.pick(v)
    wanted = own.pick(slope.transpose(0, 1))
    if len(own.padding):
        wanted.index_fill_(0, own.padding, 0.0)
    of_queries, of_keys, of_values = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for group in _plan(known).groups:
        _Gradients(
            *(
                group.of(rows, heads).unflatten(1, (key_heads, -1)).flatten(0, 1)
                for rows in (queries, wanted, of_queries)
            ),
            *(group.of(rows, key_heads).flatten(0, 1) for rows in (keys, values, of_keys, of_values)),
        ).find(scale)
    return own.put_back(of_queries, heads), shared.put_back(of_keys, key_heads), shared.put_back(of_values, key_heads)


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


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Conversations of n tokens whose gradients are to be found and written.

    Attributes:
        queries: for each of B key heads the G heads that share it, shape (B, G, n, D).
        wanted: the gradient of the output, shape (B, G, n, D).
        of_queries: to be written, shape (B, G, n, D).
        keys, values: shape (B, n, D).
        of_keys, of_values: to be written, shape (B, n, D).
    """

    queries: Tensor
    wanted: Tensor
    of_queries: Tensor
    keys: Tensor
    values: Tensor
    of_keys: Tensor
    of_values: Tensor

    def find(self, scale: float) -> None:
        """Find and write them."""
        if self.keys.shape[1] <= _STRETCH:
            self._at_once(scale)
        else:
            self._by_stretches(scale)

    def _at_once(self, scale: float) -> None:
        weights, of_scores, asking, owed = self._of_stretch(0, self.keys.shape[1], scale)
        _scaled(of_scores, self.keys, scale, self.of_queries.flatten(1, 2))
        _scaled(of_scores.transpose(1, 2), asking, scale, self.of_keys)
        torch.bmm(weights.transpose(1, 2), owed, out=self.of_values)

    def _by_stretches(self, scale: float) -> None:
        """Some queries at a time: no scores of what comes later, and little memory."""
        length = self.keys.shape[1]
        # Sums over stretches are kept in float32 at least, as those within a stretch are.
        exact = torch.promote_types(self.keys.dtype, torch.float32)
        of_keys, of_values = (torch.zeros_like(tensor, dtype=exact) for tensor in (self.keys, self.values))
        for start in range(0, length, _STRETCH):
            stop = min(start + _STRETCH, length)
            weights, of_scores, asking, owed = self._of_stretch(start, stop, scale)
            of_queries = self.of_queries[:, :, start:stop]
            of_queries.copy_(_scaled(of_scores, self.keys[:, :stop], scale).view_as(of_queries))
            of_keys[:, :stop] += _scaled(of_scores.transpose(1, 2), asking, scale)
            of_values[:, :stop] += torch.bmm(weights.transpose(1, 2), owed)
        self.of_keys.copy_(of_keys)
        self.of_values.copy_(of_values)

    def _of_stretch(self, start: int, stop: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The queries from start to stop: weights, the gradient of their scores, they, and what is wanted of them.

        Shapes: (B, rows, stop) twice, (B, rows, D) twice; the rows are those of G heads, one after the other.
        """
        asking, owed = (tensor[:, :, start:stop].flatten(1, 2) for tensor in (self.queries, self.wanted))
        weights = _weights(asking, self.keys[:, :stop], scale, stop - start)
        of_weights = torch.bmm(owed, self.values[:, :stop].transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        return weights, of_scores, asking, owed


def _scaled(one: Tensor, other: Tensor, scale: float, into: Tensor | None = None) -> Tensor:
    """The product of two batches of matrices, times a factor; written where there is a place for it."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scale, out=into)


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
