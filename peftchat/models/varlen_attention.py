"""Variable-length attention: packed conversations attend each to itself, without a mask.

A batch is one line of conversations, shape (1, N). On a GPU torch's variable-length flash kernel takes it as it is.
That kernel does not exist on a CPU, and the backward of the CPU's flash kernel is slow on short sequences. There,
conversations of similar length are computed together by plain matrix products, and long ones alone, in query blocks.

The attention layers get the boundaries as `cu_seq_lens_q` and `max_length_q`, the arguments of transformers' flash
attention. A forward without them, such as generation, runs transformers' SDPA attention.
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

# Longer conversations are computed alone. Computing several together would only take more memory.
_MAX_GROUPED_LENGTH = 256
# Queries of a long conversation that are computed together. Keys behind the block are never computed.
_QUERY_BLOCK = 256
# Matrix kernels are fastest on lengths that fill their registers.
_ALIGNMENT = 32
# A conversation joins a group of longer ones if padding it to their length costs less than computing it apart.
_MIN_LENGTH_RATIO = 0.75


def register(longest: int) -> None:
    """Register the implementation with transformers under the name `varlen`.

    Args:
        longest: tokens of the longest conversation. Sliding windows of at least that many tokens have no effect.
    """
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, functools.partial(_mask, longest=longest))


def _mask(*args: Any, longest: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Return no mask for lines of full conversations; transformers' own for padded rows or an effective window."""
    window = kwargs.get("local_size")
    has_empty_cache = kwargs.get("q_length") == kwargs.get("kv_length")
    if attention_mask is None and has_empty_cache and (window is None or window >= longest):
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
    """Compute causal attention within each conversation of a line.

    Args:
        module: the attention layer.
        query: float, shape (1, H, N, D).
        key: float, shape (1, K, N, D); K divides H.
        value: float, shape (1, K, N, D).
        attention_mask: a mask sends the call to transformers' SDPA attention.
        dropout: probability of dropping an attention weight. With dropout, conversations are computed one by one.
        scaling: factor on the scores; 1 / sqrt(D) by default.
        cu_seq_lens_q: cumulative lengths of the conversations, from 0 to N, int32, shape (conversations + 1,).
        max_length_q: tokens of the longest conversation.

    Returns:
        Shape (1, N, H, D), and None in place of the attention weights.
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
            output = _attend_one_by_one(q, k, v, scale, _spans(tuple(cu_seq_lens_q.tolist())), dropout)
        elif q.is_cuda:
            output = _attend_by_flash_kernel(q, k, v, scale, cu_seq_lens_q, max_length_q)
        else:
            output = _attend(q, k, v, cu_seq_lens_q, scale)
    return output[None], None


def _attend_by_flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor, max_length: int | None
) -> Tensor:
    """Run torch's variable-length kernel: shape (N, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    assert max_length is not None
    query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (q, k, v))
    output = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_length, max_length,
        scale=scale, window_size=(-1, 0), enable_gqa=len(k) != len(q),
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output


def _attend_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, spans: list[tuple[int, int]], dropout: float
) -> Tensor:
    """Run SDPA on each conversation: shape (N, H, D)."""
    outputs = []
    for start, stop in spans:
        query, key, value = (tensor[None, :, start:stop] for tensor in (q, k, v))
        outputs.append(
            F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=len(k) != len(q)
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


@dataclass(frozen=True, slots=True)
class _Group:
    """Conversations that are computed together, each padded to the same length.

    Attributes:
        first: their first slot.
        count: conversations.
        length: slots of each conversation.
    """

    first: int
    count: int
    length: int

    def view(self, rows: Tensor, heads: int) -> Tensor:
        """Return the group's part of gathered rows: shape (count, heads, length, D)."""
        stop = self.first + self.count * self.length
        return rows[self.first * heads : stop * heads].view(self.count, heads, self.length, rows.shape[1])


@dataclass(frozen=True, slots=True)
class _PaddedGroups:
    """A line of conversations as groups of slots. A slot holds one token or padding.

    Attributes:
        groups: in the order of their slots.
        tokens: for each slot the index of its token, int64, shape (slots,). Padding repeats a conversation's last one.
        slots: for each token the index of its slot, int64, shape (N,).
        padding: whether a slot is padding, bool, shape (slots,).
    """

    groups: tuple[_Group, ...]
    tokens: Tensor
    slots: Tensor
    padding: Tensor


@dataclass(frozen=True, slots=True)
class _GatherIndex:
    """Indices between (heads, N, D) tensors and matrices in which the heads and slots of a group are contiguous.

    Attributes:
        sources: for each row of the matrix the index of its vector among (N, heads), int32, shape (slots * heads,).
        rows: for each vector of (N, heads) the index of its row, int32, shape (N * heads,).
        padding: indices of the rows that are padding, int64.
    """

    sources: Tensor
    rows: Tensor
    padding: Tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the matrix of a (heads, N, D) tensor: shape (slots * heads, D)."""
        return tensor.transpose(0, 1).reshape(-1, tensor.shape[2]).index_select(0, self.sources)

    def restore(self, matrix: Tensor, heads: int) -> Tensor:
        """Return the (heads, N, D) tensor of such a matrix."""
        return matrix.index_select(0, self.rows).view(-1, heads, matrix.shape[1]).transpose(0, 1)


def _spans(cu_seqlens: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (first token, one past the last) of each conversation that has any."""
    return [(start, stop) for start, stop in itertools.pairwise(cu_seqlens) if stop > start]


# Every layer of a forward pass needs the same groups.
@functools.lru_cache(maxsize=8)
def _padded_groups(cu_seqlens: tuple[int, ...]) -> _PaddedGroups:
    longest_first = sorted(_spans(cu_seqlens), key=lambda span: span[0] - span[1])
    groups: list[_Group] = []
    tokens_of_groups = []
    first = 0
    for spans in _group_by_length(longest_first):
        longest = spans[0][1] - spans[0][0]
        length = -(-longest // _ALIGNMENT) * _ALIGNMENT if longest > _ALIGNMENT else longest
        starts = torch.tensor([start for start, _ in spans])[:, None]
        lengths = torch.tensor([stop - start for start, stop in spans])[:, None]
        tokens_of_groups.append((starts + torch.minimum(torch.arange(length), lengths - 1)).flatten())
        groups.append(_Group(first, len(spans), length))
        first += len(spans) * length
    tokens = torch.cat(tokens_of_groups)
    real = torch.ones(len(tokens), dtype=torch.bool)
    # The first slot with a token is its own. The slots right behind it that repeat the token are padding.
    real[1:] = tokens[1:] != tokens[:-1]
    slots = torch.empty(cu_seqlens[-1], dtype=torch.int64)
    slots[tokens[real]] = torch.nonzero(real)[:, 0]
    return _PaddedGroups(tuple(groups), tokens, slots, ~real)


def _group_by_length(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group conversations of similar length, given and returned longest first. Long ones stay alone."""
    groups: list[list[tuple[int, int]]] = []
    for start, stop in spans:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        if groups and longest <= _MAX_GROUPED_LENGTH and stop - start >= _MIN_LENGTH_RATIO * longest:
            groups[-1].append((start, stop))
        else:
            groups.append([(start, stop)])
    return groups


# One for queries and one for keys, of this batch and the next. They are large.
@functools.lru_cache(maxsize=4)
def _gather_index(cu_seqlens: tuple[int, ...], heads: int) -> _GatherIndex:
    padded = _padded_groups(cu_seqlens)
    # For each group a (count, heads, length) block of vectors, each identified by slot * heads + head.
    vectors = torch.arange(len(padded.tokens) * heads).view(-1, heads)
    blocks = [
        vectors[group.first : group.first + group.count * group.length]
        .view(group.count, group.length, heads)
        .transpose(1, 2)
        .flatten()
        for group in padded.groups
    ]
    order = torch.cat(blocks)
    slot, head = order // heads, order % heads
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order))
    return _GatherIndex(
        sources=(padded.tokens[slot] * heads + head).int(),
        rows=rows.view(-1, heads)[padded.slots].flatten().int(),
        padding=torch.nonzero(padded.padding[slot])[:, 0],
    )


@torch.library.custom_op("peftchat::varlen_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Compute softmax attention within each conversation of a line.

    It is one operator, so that compiled layers have no graph break here.

    Shapes: q (H, N, D), k and v (K, N, D), cu_seqlens (conversations + 1,), output (N, H, D).
    """
    lengths, heads, key_heads = tuple(cu_seqlens.tolist()), len(q), len(k)
    query_index, key_index = _gather_index(lengths, heads), _gather_index(lengths, key_heads)
    queries, keys, values = query_index.gather(q), key_index.gather(k), key_index.gather(v)
    padded = _padded_groups(lengths)
    outputs = []
    for group in padded.groups:
        query, key, value = group.view(queries, heads), group.view(keys, key_heads), group.view(values, key_heads)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, padded.slots)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], v.shape[2])


@torch.library.custom_op("peftchat::varlen_attention_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v from that of the output. The attention weights are recomputed.

    The backward of torch's kernel is slow on a CPU. Here the query heads that share a key head form one taller matrix.
    """
    lengths, heads, key_heads = tuple(cu_seqlens.tolist()), len(q), len(k)
    query_index, key_index = _gather_index(lengths, heads), _gather_index(lengths, key_heads)
    queries, keys, values = query_index.gather(q), key_index.gather(k), key_index.gather(v)
    grad_outputs = query_index.gather(grad_output.transpose(0, 1))
    if len(query_index.padding):
        grad_outputs.index_fill_(0, query_index.padding, 0.0)
    grad_queries, grad_keys, grad_values = (torch.empty_like(matrix) for matrix in (queries, keys, values))
    for group in _padded_groups(lengths).groups:
        _GroupBackward(
            *(
                group.view(matrix, heads).unflatten(1, (key_heads, -1)).flatten(0, 1)
                for matrix in (queries, grad_outputs, grad_queries)
            ),
            *(group.view(matrix, key_heads).flatten(0, 1) for matrix in (keys, values, grad_keys, grad_values)),
        ).run(scale)
    return (
        query_index.restore(grad_queries, heads),
        key_index.restore(grad_keys, key_heads),
        key_index.restore(grad_values, key_heads),
    )


@_attend_backward.register_fake
def _(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (tensor.new_empty(tensor.transpose(0, 1).shape).transpose(0, 1) for tensor in (q, k, v))
    return grad_q, grad_k, grad_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad_output, *ctx.saved_tensors, ctx.scale), None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True, slots=True)
class _GroupBackward:
    """The backward pass of a group of conversations of n tokens.

    Attributes:
        queries: for each of B key heads the G heads that share it, shape (B, G, n, D).
        grad_output: gradient of the output, shape (B, G, n, D).
        grad_queries: written by `run`, shape (B, G, n, D).
        keys, values: shape (B, n, D).
        grad_keys, grad_values: written by `run`, shape (B, n, D).
    """

    queries: Tensor
    grad_output: Tensor
    grad_queries: Tensor
    keys: Tensor
    values: Tensor
    grad_keys: Tensor
    grad_values: Tensor

    def run(self, scale: float) -> None:
        """Compute the gradients and write them."""
        if self.keys.shape[1] <= _QUERY_BLOCK:
            self._run_at_once(scale)
        else:
            self._run_in_blocks(scale)

    def _run_at_once(self, scale: float) -> None:
        weights, grad_scores, queries, grad_output = self._block(0, self.keys.shape[1], scale)
        _scaled_bmm(grad_scores, self.keys, scale, out=self.grad_queries.flatten(1, 2))
        _scaled_bmm(grad_scores.transpose(1, 2), queries, scale, out=self.grad_keys)
        torch.bmm(weights.transpose(1, 2), grad_output, out=self.grad_values)

    def _run_in_blocks(self, scale: float) -> None:
        """Run one block of queries at a time, which computes no scores of later keys and takes little memory."""
        length = self.keys.shape[1]
        # Sums over blocks are kept in float32 at least, as those within a block are.
        dtype = torch.promote_types(self.keys.dtype, torch.float32)
        grad_keys, grad_values = (torch.zeros_like(tensor, dtype=dtype) for tensor in (self.keys, self.values))
        for start in range(0, length, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, length)
            weights, grad_scores, queries, grad_output = self._block(start, stop, scale)
            grad_queries = self.grad_queries[:, :, start:stop]
            grad_queries.copy_(_scaled_bmm(grad_scores, self.keys[:, :stop], scale).view_as(grad_queries))
            grad_keys[:, :stop] += _scaled_bmm(grad_scores.transpose(1, 2), queries, scale)
            grad_values[:, :stop] += torch.bmm(weights.transpose(1, 2), grad_output)
        self.grad_keys.copy_(grad_keys)
        self.grad_values.copy_(grad_values)

    def _block(self, start: int, stop: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weights, gradient of the scores, queries and gradient of the output for a block of queries.

        Shapes: (B, rows, stop) twice, (B, rows, D) twice. The rows are those of G heads, one head after the other.
        """
        queries, grad_output = (tensor[:, :, start:stop].flatten(1, 2) for tensor in (self.queries, self.grad_output))
        weights = _attention_weights(queries, self.keys[:, :stop], scale, stop - start)
        grad_weights = torch.bmm(grad_output, self.values[:, :stop].transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        return weights, grad_scores, queries, grad_output


def _scaled_bmm(one: Tensor, other: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Return the product of two batches of matrices, times a factor."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scale, out=out)


def _attention_weights(queries: Tensor, keys: Tensor, scale: float, length: int) -> Tensor:
    """Return the causal attention weights of queries that are the last `length` of n tokens.

    Args:
        queries: shape (B, rows, D); the rows are those of several heads, each `length` tokens.
        keys: shape (B, n, D).

    Returns:
        Shape (B, rows, n).
    """
    batch, rows, n = len(queries), queries.shape[1], keys.shape[1]
    scores = _scaled_bmm(queries, keys.transpose(1, 2), scale)
    scores.view(batch, rows // length, length, n)[..., n - length :].add_(_causal_mask(length, scores.dtype))
    # In bfloat16 this reads and writes bfloat16 but sums in float32.
    return torch.softmax(scores, dim=-1)


@functools.lru_cache(maxsize=64)
def _causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    """Return minus infinity where a key comes after the query, else 0: shape (length, length)."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
