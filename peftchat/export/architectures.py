"""What llama.cpp needs to know about an architecture, for those that can be written as GGUF.

Names of tensors and keys are the `gguf` library's; which keys an architecture needs is llama.cpp's loader
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
_ELSEWHERE = "Convert the merged folder with llama.cpp's own convert_hf_to_gguf.py, which knows more."


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    Attributes:
        arch: its name in the `gguf` library's `MODEL_ARCH`.
        describe: writes its metadata.
        activation: the activation that llama.cpp computes for it.
        interleaved_rotation: its rotary embedding turns neighboring pairs in llama.cpp, halves in transformers.
    """

    arch: str
    describe: Callable[["GGUFWriter", Any], None]
    activation: tuple[str, ...]
    interleaved_rotation: bool = False

    def rotated(self, name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
        """A weight with the rows of query and key heads in llama.cpp's order; every other weight as it is."""
        if not self.interleaved_rotation:
            return weight
        if ".q_proj." in name:
            return _interleaved(weight, config.num_attention_heads)
        if ".k_proj." in name:
            return _interleaved(weight, config.num_key_value_heads)
        return weight


def architecture_of(config: Any, where: str) -> Architecture:
    """The entry for a transformers config.

    Raises:
        UserError: GGUF for it is not written here, or it differs from what llama.cpp computes.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UserError(
            f"the architecture {config.model_type} is not exported to GGUF (these are: {', '.join(ARCHITECTURES)})",
            where=where,
            hint=_ELSEWHERE,
        )
    activation = getattr(config, "hidden_act", None) or config.activation_function
    if activation not in found.activation:
        raise UserError(f"llama.cpp does not compute {config.model_type} with {activation}", where=where)
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling not in _SCALINGS:
        raise UserError(
            f"rotary embeddings scaled by `{scaling}` are not exported to GGUF", where=where, hint=_ELSEWHERE
        )
    if config.model_type == "gpt_bigcode" and not config.multi_query:
        raise UserError("llama.cpp computes gpt_bigcode with multi-query attention only", where=where)
    return found


def rope_factors(config: Any) -> np.ndarray | None:
    """By what each rotary frequency is divided under Llama 3's long-context scaling, float32, shape (D / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None)
    if not rope or rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled)))
    factors: np.ndarray = (plain / scaled).numpy().astype(np.float32)
    return factors


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _describe_rotary(writer: "GGUFWriter", config: Any) -> None:
    """Decoders with rotary embeddings, RMS norm and gated feed-forward layers: Llama and its kin."""
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


def _describe_starcoder(writer: "GGUFWriter", config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _context(config: Any) -> int:
    """Tokens up to which llama.cpp, which attends to all of them, computes what the model does."""
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return min(longest, int(window)) if window else longest


ARCHITECTURES = {
    "llama": Architecture("LLAMA", _describe_rotary, ("silu",), interleaved_rotation=True),
    "mistral": Architecture("LLAMA", _describe_rotary, ("silu",), interleaved_rotation=True),
    "qwen2": Architecture("QWEN2", _describe_rotary, ("silu",)),
    "qwen3": Architecture("QWEN3", _describe_rotary, ("silu",)),
    "gpt_bigcode": Architecture("STARCODER", _describe_starcoder, ("gelu_pytorch_tanh",)),
}
"""transformers' `model_type` -> how it is written."""
