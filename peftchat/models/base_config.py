"""What a base's config says against training it: the kind of model, its stored quantization, its positions.

Reads `config.json` alone, so that a plan says the same as a run.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError, first_line
from peftchat.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from peftchat.recipe import LoadedRecipe

_TASKS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": "question answering",
    "ForMultipleChoice": "multiple choice",
    "ForRewardModeling": "reward",
    "RewardModel": "reward",
}
"""The end of an architecture's name -> what its head is for."""

_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where AutoGPTQ, AutoAWQ and ModelOpt note a quantization beside `config.json`."""

_POSITIONS = re.compile(r"pos|wpe")
"""What the names of position tables have in common."""

_STRETCHED = ("linear", "dynamic", "yarn", "longrope", "llama3", "su")
"""The rotary embeddings that a factor stretches beyond the positions that the model was first trained on."""


_LAYERS_WITH_STATE = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Kinds of layers, as `layer_types` names them, that hand a state or a window of values from token to token."""


def carries_state(config: "PretrainedConfig") -> bool:
    """Return whether layers besides attention mix tokens: state-space models, linear attention, short convolutions.

    No mask and no positions keep the conversations of a pack apart in such layers; padding on the right is harmless.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    layer_types = getattr(config.get_text_config(), "layer_types", None)
    if layer_types:
        return not _LAYERS_WITH_STATE.isdisjoint(layer_types)
    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and bool(
        getattr(MODEL_FOR_CAUSAL_LM_MAPPING[kind], "_is_stateful", False)
    )


def attention_shape(config: "PretrainedConfig", longest: int) -> tuple[int, int]:
    """Return the number of layers with full attention, and the channels of a layer's query heads together.

    A layer with a window attends to fewer tokens and is not counted, nor is any of a model that mixes tokens by a state
    and names no kinds of layers.

    Args:
        config: of the model.
        longest: tokens of the longest conversation; a window of at least that many is no window.
    """
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    if not heads:
        return 0, 0
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    if (value := getattr(text, "v_head_dim", None)) and (key := getattr(text, "qk_head_dim", None)):
        # Multi-head latent attention: the products of scores and of values differ in width.
        head = (key + value) / 2
    windows = [getattr(text, "attention_chunk_size", None)]
    if getattr(text, "use_sliding_window", True):
        windows.append(getattr(text, "sliding_window", None))
    has_window = any(window is not None and window < longest for window in windows)
    kinds = getattr(text, "layer_types", None)
    if kinds:
        full = {"full_attention"} if has_window else {"full_attention", "sliding_attention", "chunked_attention"}
        layers = sum(kind in full for kind in kinds)
    else:
        layers = 0 if has_window or carries_state(config) else int(text.num_hidden_layers)
    return layers, round(heads * head)


def check_config(loaded: "LoadedRecipe", source: ModelSource, config: "PretrainedConfig") -> str | None:
    """Check that a model of this config can be trained as the recipe says.

    Args:
        loaded: the recipe.
        source: the base, for messages.
        config: its transformers config.

    Returns:
        A note for the user, or None.

    Raises:
        UserError: it is no causal language model, it is stored quantized, its layers do not keep packed conversations
            apart, or its positions do not reach `max_length`.
    """
    _check_kind(source, config)
    stored = StoredQuantization.of(source, config)
    if stored is not None:
        raise _quantized(source, stored, loaded.recipe.method)
    if loaded.recipe.data.packing and carries_state(config):
        raise UserError(
            f"the conversations of a pack cannot be kept apart: layers of this {config.model_type} hand a state from "
            "token to token",
            where=f"{loaded.where('data', 'packing')}: true",
            hint="Set data.packing: false.",
        )
    notes = (_check_positions(loaded, source, config), _note_on_modalities(loaded.recipe.method, config))
    return " ".join(filter(None, notes)) or None


def _check_kind(source: ModelSource, config: "PretrainedConfig") -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    hint = "Choose a causal language model."
    kind = type(config)
    if config.is_encoder_decoder:
        raise UserError(
            f"expected a causal language model, got an encoder-decoder ({config.model_type})",
            where=source.where,
            hint=hint,
        )
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        raise UserError(
            f"expected a causal language model, and transformers has none of the type {config.model_type}",
            where=source.where,
            hint=hint,
        )
    # XLM calls it `causal`.
    is_causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not is_causal:
        raise UserError(
            f"expected a causal language model, got an encoder ({config.model_type}): its tokens attend to later ones",
            where=source.where,
            hint=hint,
        )
    architectures: list[str] = getattr(config, "architectures", None) or []
    tasks = {task for name in architectures for end, task in _TASKS.items() if name.endswith(end)}
    if tasks and len(architectures) == 1:
        raise UserError(
            f"expected a causal language model, got a {tasks.pop()} model ({architectures[0]})",
            where=source.where,
            hint="Name the language model that it was made from.",
        )


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How a base's weights are quantized on disk.

    Attributes:
        method: transformers' name of the method, such as `bitsandbytes`, `gptq`, `awq` or `fp8`.
        bits: bits of a weight; None where the config does not say.
    """

    method: str
    bits: int | None

    def __str__(self) -> str:
        """Return `gptq, 4 bits`."""
        return self.method if self.bits is None else f"{self.method}, {self.bits} bits"

    @classmethod
    def of(cls, source: ModelSource, config: "PretrainedConfig") -> "StoredQuantization | None":
        """Read it from the config, or from the files that some tools write instead; None for ordinary weights."""
        for part in (config, *[getattr(config, name, None) for name in config.sub_configs]):
            for key in ("quantization_config", "compression_config", "quantization"):
                found: Any = getattr(part, key, None)
                settings: Any = found.to_dict() if hasattr(found, "to_dict") else found
                if settings and isinstance(settings, Mapping):
                    return cls._of_settings(settings, key)
        for file in _QUANTIZATION_FILES:
            if source.has(file):
                return cls(f"see {file}", None)
        return None

    @classmethod
    def _of_settings(cls, settings: Mapping[str, Any], key: str) -> "StoredQuantization":
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            return cls("bitsandbytes", 4 if settings.get("load_in_4bit") else 8)
        # MLX writes no method: https://github.com/ml-explore/mlx-lm
        unnamed = "mlx" if key == "quantization" else "an unnamed method"
        method = settings.get("quant_method") or settings.get("quant_algo") or unnamed
        bits = settings.get("bits") or settings.get("w_bit") or settings.get("weight_bits")
        return cls(str(getattr(method, "value", method)), bits if isinstance(bits, int) else None)


def _quantized(source: ModelSource, stored: StoredQuantization, method: str) -> UserError:
    reasons = {
        "full": "its weights are codes, which `method: full` cannot train",
        "lora": "an adapter on it could not be merged",
        "qlora": "`method: qlora` quantizes a 16-bit model itself",
    }
    return UserError(
        f"the base is stored quantized ({stored}), and {reasons[method]}",
        where=source.where,
        hint="Name the 16-bit model that it was made from"
        + ("." if method == "qlora" else "; `method: qlora` loads that in 4 or 8 bits."),
    )


def _note_on_modalities(method: str, config: "PretrainedConfig") -> str | None:
    """Say what becomes of the parts beside the language model, such as a vision tower, when all weights are trained."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(config)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    if method != "full" or model is None or config.get_text_config() is config:
        return None
    if model.config_class in (None, kind):
        return f"Only the language model of this {config.model_type} is trained; its other parts stay as they are."
    return f"Only the language model of this {config.model_type} is trained and saved, without its other parts."


def _check_positions(loaded: "LoadedRecipe", source: ModelSource, config: "PretrainedConfig") -> str | None:
    recipe = loaded.recipe
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    virtual = int(getattr(recipe.adapter, "num_virtual_tokens", 0))
    needed = recipe.data.max_length + virtual
    if needed <= positions:
        return None
    tokens = f"{recipe.data.max_length} tokens" + (f" after {virtual} virtual ones" if virtual else "")
    reach = _stretched_reach(text, positions)
    if needed <= reach:
        return f"{tokens} are beyond the model's {positions} positions; its rotary embeddings reach {reach}."
    if reach == positions and not _has_positions(config, source, positions):
        return f"{tokens} are beyond the model's {positions} positions; its architecture has no limit."
    raise UserError(
        f"{tokens} do not fit the model's {reach} positions",
        where=f"{loaded.where('data', 'max_length')}: {recipe.data.max_length}",
        hint=f"Write at most {max(reach - virtual, 2)}, or choose a model with a longer context.",
    )


def _stretched_reach(text: Any, positions: int) -> int:
    """Return the positions that rotary embeddings reach by the factor in the config."""
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # Models that mix full and windowed attention have settings for each.
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    reach = positions
    for rope in nested or [parameters]:
        kind = rope.get("rope_type") or rope.get("type")
        if kind in _STRETCHED:
            original = rope.get("original_max_position_embeddings") or positions
            reach = max(reach, int(original * (rope.get("factor") or 1.0)))
    return reach


def _has_positions(config: "PretrainedConfig", source: ModelSource, positions: int) -> bool:
    """Whether a model's layers see positions that end: rotary ones, a table of them, or one in a buffer."""
    text = config.get_text_config()
    if getattr(text, "alibi", None) is True:
        return False
    if getattr(text, "rope_parameters", None):
        return True
    if getattr(text, "max_seq_len", None) == positions:
        return True
    model = build_on_meta(config, trust_remote_code=bool(source.trust_remote_code))
    tables = [table for name, table in (*model.named_parameters(), *model.named_buffers()) if _POSITIONS.search(name)]
    # OPT's table has two more rows, for padding.
    return any(positions in range(size - 4, size + 1) for table in tables for size in table.shape)


def build_on_meta(config: "PretrainedConfig", *, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Build the model of a config on torch's `meta` device, in float32.

    Raises:
        UserError: it cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:
        # Each architecture reports an invalid config in its own way.
        raise UserError(
            f"no causal language model can be built from the config: {first_line(error)}",
            where=f"model.name: {config.name_or_path}",
            hint="Choose a causal language model, or correct its config.json.",
        ) from error
    return model
