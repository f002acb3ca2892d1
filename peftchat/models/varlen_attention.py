"""Variable-length attention: packed conversations attend each to itself, without a mask.

A batch is one line of conversations, shape (1, N). On a GPU torch's variable-length flash kernel takes it as it is.
That kernel does not exist on a CPU, and the backward of the CPU's flash kernel is slow on short sequences. There,
conversations of similar length are computed together by plain matrix products, and long ones alone, in query blocks.

The attention layers get the boundaries as `cu_seq_lens_q` and `max_length_q`, the arguments of transformers' flash
attention. A forward without them, such as generation, runs transformers' SDPA attention.

A conversation may have more keys than queries, by `cu_seq_lens_k`: it is a branch, which goes on from the first tokens
of the conversation before it. Both answers of a pair share their prompt in this way.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftchat.models.attention_line import Line, gather_index, line_of, padded_groups
from peftchat.models.loading import VARLEN

# Queries of a long conversation that are computed together. Keys behind the block are never computed, so smaller blocks
# compute less. Their products are less efficient, which counts where products are fast.
_QUERY_BLOCK = 256
_QUERY_BLOCK_OF_FLOAT32 = 128


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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
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
        cu_seq_lens_k: the same of their keys, which are more in a branch; as `cu_seq_lens_q` by default.
        max_length_q: tokens of the longest conversation.
        max_length_k: its keys.

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
    keys = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    with torch.autocast(device, enabled=False):
        if dropout:
            output = _attend_one_by_one(q, k, v, scale, line_of(cu_seq_lens_q, keys), dropout)
        elif q.is_cuda:
            longest = max_length_q, max_length_k or max_length_q
            output = _attend_by_flash_kernel(q, k, v, scale, cu_seq_lens_q, keys, longest)
        else:
            output = _attend(q, k, v, cu_seq_lens_q, keys, scale)
    return output[None], None


def _attend_by_flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor, cu_keys: Tensor,
    longest: tuple[int | None, int | None],
) -> Tensor:  # fmt: skip
    """Run torch's variable-length kernel: shape (N, H, D). It aligns queries with the last ones of their keys."""
    from torch.nn.attention.varlen import varlen_attn

    most_queries, most_keys = longest
    assert most_queries is not None and most_keys is not None
    query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (q, k, v))
    if cu_keys is not cu_seqlens:
        line = line_of(cu_seqlens, cu_keys)
        if line.branches:
            places = line.key_places().to(k.device)
            key, value = key.index_select(0, places), value.index_select(0, places)
    output = varlen_attn(
        query, key, value, cu_seqlens, cu_keys, most_queries, most_keys,
        scale=scale, window_size=(-1, 0), enable_gqa=len(k) != len(q),
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output


def _attend_one_by_one(q: Tensor, k: Tensor, v: Tensor, scale: float, line: Line, dropout: float) -> Tensor:
    """Run SDPA on each conversation: shape (N, H, D)."""
    outputs = []
    for own, shared in line.conversations:
        query, key, value = (tensor[None, :, own] for tensor in (q, k, v))
        mask = None
        if shared is not None:
            key, value = (torch.cat([tensor[None, :, shared], tensor[None, :, own]], 2) for tensor in (k, v))
            rows, columns = query.shape[2], key.shape[2]
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        outputs.append(
            F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale,
                enable_gqa=len(k) != len(q),
            )[0].transpose(0, 1)
        )  # fmt: skip
    return torch.cat(outputs)


@torch.library.custom_op("peftchat::varlen_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, scale: float) -> Tensor:
    """Compute softmax attention within each conversation of a line.

    It is one operator, so that compiled layers have no graph break here.

    Shapes: q (H, N, D), k and v (K, N, D), cu_seqlens and cu_keys (conversations + 1,), output (N, H, D).
    """
    line, heads, key_heads = line_of(cu_seqlens, cu_keys), len(q), len(k)
    query_index, key_index = gather_index(line, heads), gather_index(line, key_heads)
    queries, keys, values = query_index.gather(q), key_index.gather(k), key_index.gather(v)
    padded = padded_groups(line)
    outputs = []
    for group in padded.groups:
        query, key, value = group.view(queries, heads), group.view(keys, key_heads), group.view(values, key_heads)
        if _products_are_faster(q.dtype):
            shared = query.unflatten(1, (key_heads, -1)).flatten(0, 1)
            output = _attend_in_blocks(shared, key.flatten(0, 1), value.flatten(0, 1), scale).view_as(query)
        else:
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    found = torch.cat(outputs).index_select(0, padded.slots)
    for own, shared in line.branches:
        found[own] = _attend_branch(q[:, own], _joined(k, shared, own), _joined(v, shared, own), scale)
    return found


def _query_block(dtype: torch.dtype) -> int:
    """Return how many queries of a long conversation are computed together."""
    return _QUERY_BLOCK_OF_FLOAT32 if dtype == torch.float32 else _QUERY_BLOCK


def _joined(tensor: Tensor, shared: slice, own: slice) -> Tensor:
    """Return the keys or values of a branch: shape (K, n, D)."""
    return torch.cat([tensor[:, shared], tensor[:, own]], dim=1)


@functools.cache
def _products_are_faster(dtype: torch.dtype) -> bool:
    """Return whether plain matrix products are faster than the CPU's flash kernel.

    In bfloat16 they were by a third, on a CPU with AVX-512 and without AMX; in float32 that kernel was.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return dtype == torch.bfloat16 and capability == "AVX512" and not torch.cpu._is_amx_tile_supported()


def _attend_branch(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Compute the attention of a branch.

    Shapes: q (H, rows, D), keys and values (K, n, D), output (rows, H, D).
    """
    output = _attend_in_blocks(q.unflatten(0, (len(keys), -1)), keys, values, scale)
    return output.flatten(0, 1).transpose(0, 1)


def _attend_in_blocks(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Compute causal attention by matrix products, in query blocks. The queries are the last ones of n tokens.

    Shapes: queries and output (B, G, rows, D) for B key heads that G heads share each, keys and values (B, n, D).
    """
    rows, output = queries.shape[2], torch.empty_like(queries, memory_format=torch.contiguous_format)
    block = _query_block(queries.dtype)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        end = keys.shape[1] - rows + stop
        weights = _attention_weights(queries[:, :, start:stop].flatten(1, 2), keys[:, :end], scale, stop - start)
        output[:, :, start:stop] = torch.bmm(weights, values[:, :end]).view_as(output[:, :, start:stop])
    return output


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], v.shape[2])


@torch.library.custom_op("peftchat::varlen_attention_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v from that of the output. The attention weights are recomputed.

    The backward of torch's kernel is slow on a CPU. Here the query heads that share a key head form one taller matrix.
    """
    line, heads, key_heads = line_of(cu_seqlens, cu_keys), len(q), len(k)
    query_index, key_index = gather_index(line, heads), gather_index(line, key_heads)
    queries, keys, values = query_index.gather(q), key_index.gather(k), key_index.gather(v)
    grad_outputs = query_index.gather(grad_output.transpose(0, 1))
    if len(query_index.padding):
        grad_outputs.index_fill_(0, query_index.padding, 0.0)
    grad_queries, grad_keys, grad_values = (torch.empty_like(matrix) for matrix in (queries, keys, values))
    for group in padded_groups(line).groups:
        _GroupBackward(
            *(
                group.view(matrix, heads).unflatten(1, (key_heads, -1)).flatten(0, 1)
                for matrix in (queries, grad_outputs, grad_queries)
            ),
            *(group.view(matrix, key_heads).flatten(0, 1) for matrix in (keys, values, grad_keys, grad_values)),
        ).run(scale)
    grad_q = query_index.restore(grad_queries, heads)
    grad_k, grad_v = key_index.restore(grad_keys, key_heads), key_index.restore(grad_values, key_heads)
    for own, shared in line.branches:
        keys, values = _joined(k, shared, own), _joined(v, shared, own)
        queries, grads = (
            tensor.unflatten(0, (key_heads, -1)) for tensor in (q[:, own], grad_output[own].transpose(0, 1))
        )
        # Contiguous, whatever the layout of the queries: `run` writes into views.
        grad_queries, grad_keys, grad_values = (tensor.new_empty(tensor.shape) for tensor in (queries, keys, values))
        _GroupBackward(queries, grads, grad_queries, keys, values, grad_keys, grad_values).run(scale)
        grad_q[:, own] = grad_queries.flatten(0, 1)
        for grad, part in ((grad_k, grad_keys), (grad_v, grad_values)):
            number = shared.stop - shared.start
            grad[:, shared] += part[:, :number]
            grad[:, own] = part[:, number:]
    return grad_q, grad_k, grad_v


@_attend_backward.register_fake
def _(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (tensor.new_empty(tensor.transpose(0, 1).shape).transpose(0, 1) for tensor in (q, k, v))
    return grad_q, grad_k, grad_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad_output, *ctx.saved_tensors, ctx.scale), None, None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True, slots=True)
class _GroupBackward:
    """The backward pass of a group of conversations of n tokens, of which the last `rows` are queries.

    Attributes:
        queries: for each of B key heads the G heads that share it, shape (B, G, rows, D).
        grad_output: gradient of the output, shape (B, G, rows, D).
        grad_queries: written by `run`, shape (B, G, rows, D).
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
        if self.queries.shape[2] <= _query_block(self.queries.dtype):
            self._run_at_once(scale)
        else:
            self._run_in_blocks(scale)

    def _run_at_once(self, scale: float) -> None:
        weights, grad_scores, queries, grad_output = self._block(0, self.queries.shape[2], scale)
        _scaled_bmm(grad_scores, self.keys, scale, out=self.grad_queries.flatten(1, 2))
        _scaled_bmm(grad_scores.transpose(1, 2), queries, scale, out=self.grad_keys)
        torch.bmm(weights.transpose(1, 2), grad_output, out=self.grad_values)

    def _run_in_blocks(self, scale: float) -> None:
        """Run one block of queries at a time, which computes no scores of later keys and takes little memory."""
        length = self.queries.shape[2]
        # Sums over blocks are kept in float32 at least, as those within a block are.
        dtype = torch.promote_types(self.keys.dtype, torch.float32)
        grad_keys, grad_values = (torch.zeros_like(tensor, dtype=dtype) for tensor in (self.keys, self.values))
        block = _query_block(self.queries.dtype)
        for start in range(0, length, block):
            stop = min(start + block, length)
            weights, grad_scores, queries, grad_output = self._block(start, stop, scale)
            grad_queries, end = self.grad_queries[:, :, start:stop], self._end(stop)
            grad_queries.copy_(_scaled_bmm(grad_scores, self.keys[:, :end], scale).view_as(grad_queries))
            grad_keys[:, :end] += _scaled_bmm(grad_scores.transpose(1, 2), queries, scale)
            grad_values[:, :end] += torch.bmm(weights.transpose(1, 2), grad_output)
        self.grad_keys.copy_(grad_keys)
        self.grad_values.copy_(grad_values)

    def _end(self, stop: int) -> int:
        """Return the number of keys that the queries before `stop` have."""
        return self.keys.shape[1] - self.queries.shape[2] + stop

    def _block(self, start: int, stop: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weights, gradient of the scores, queries and gradient of the output for a block of queries.

        Shapes: (B, rows, keys) twice, (B, rows, D) twice. The rows are those of G heads, one head after the other.
        """
        end = self._end(stop)
        queries, grad_output = (tensor[:, :, start:stop].flatten(1, 2) for tensor in (self.queries, self.grad_output))
        weights = _attention_weights(queries, self.keys[:, :end], scale, stop - start)
        grad_weights = torch.bmm(grad_output, self.values[:, :end].transpose(1, 2))
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
