"""GGUF architectures: the supported ones, with their metadata.

Names of tensors and keys are the `gguf` library's. llama.cpp's loader determines which keys an architecture needs
(https://github.com/ggml-org/llama.cpp, `src/llama-model.cpp`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftchat.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SCALINGS = ("default", "linear", "llama3")
_HINT = "Convert the merged folder with llama.cpp's convert_hf_to_gguf.py, which supports more."


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture that can be written as GGUF.

    Attributes:
        arch: its name in the `gguf` library's `MODEL_ARCH`.
        write_metadata: writes its metadata.
        activations: the names of the activation that llama.cpp computes for it.
        interleaved_rotary: its rotary embedding rotates neighboring pairs in llama.cpp, halves in transformers.
    """

    arch: str
    write_metadata: Callable[["GGUFWriter", Any], None]
    activations: tuple[str, ...]
    interleaved_rotary: bool = False

    def reorder_heads(self, name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
        """Return a weight with query and key heads in llama.cpp's row order.

        Any other weight is returned unchanged.
        """
        if not self.interleaved_rotary:
            return weight
        if ".q_proj." in name:
            return _interleave(weight, config.num_attention_heads)
        if ".k_proj." in name:
            return _interleave(weight, config.num_key_value_heads)
        return weight


def architecture_of(config: Any, where: str) -> Architecture:
    """Return the architecture of a transformers config.

    Raises:
        UserError: it is not supported, or llama.cpp computes it in another way.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UserError(
            f"the architecture {config.model_type} is not exported to GGUF (supported: {', '.join(ARCHITECTURES)})",
            where=where,
            hint=_HINT,
        )
    activation = getattr(config, "hidden_act", None) or config.activation_function
    if activation not in found.activations:
        raise UserError(
            f"llama.cpp does not compute {config.model_type} with {activation} (supported: {found.activations[0]})",
            where=where,
        )
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling not in _SCALINGS:
        raise UserError(f"rotary embeddings scaled by `{scaling}` are not exported to GGUF", where=where, hint=_HINT)
    if config.model_type == "gpt_bigcode" and not config.multi_query:
        raise UserError("llama.cpp computes gpt_bigcode with multi-query attention only", where=where)
    return found


def rope_factors(config: Any) -> np.ndarray | None:
    """Return the divisors of the rotary frequencies for Llama 3's scaling.

    Returns:
        float32, shape (D / 2,) for heads of width D; None without that scaling.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None)
    if not rope or rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled)))
    factors: np.ndarray = (plain / scaled).numpy().astype(np.float32)
    return factors


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _write_rotary(writer: "GGUFWriter", config: Any) -> None:
    """Write the metadata of decoders such as Llama.

    They have rotary embeddings, RMS norm and gated feed-forward layers.
    """
    from gguf import RopeScalingType

    rope = config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _write_starcoder(writer: "GGUFWriter", config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _context(config: Any) -> int:
    """Return the context length at which llama.cpp computes what the model does.

    llama.cpp ignores sliding windows, so the context must not be longer than one.
    """
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return min(longest, int(window)) if window else longest


ARCHITECTURES = {
    "llama": Architecture("LLAMA", _write_rotary, ("silu",), interleaved_rotary=True),
    "mistral": Architecture("LLAMA", _write_rotary, ("silu",), interleaved_rotary=True),
    "qwen2": Architecture("QWEN2", _write_rotary, ("silu",)),
    "qwen3": Architecture("QWEN3", _write_rotary, ("silu",)),
    "gpt_bigcode": Architecture("STARCODER", _write_starcoder, ("gelu_pytorch_tanh",)),
}
"""transformers' `model_type` -> its architecture."""
