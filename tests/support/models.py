"""Small random models of many architectures."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.support.tokenizers import small_tokenizer


def small_config(kind: str, *, vocabulary: int = 96, width: int = 64, **changes: Any) -> Any:
    """Return a transformers config of two layers and a few ten thousand parameters.

    Args:
        kind: transformers' model type; behind a hyphen, what sets it apart.
        vocabulary: tokens.
        width: hidden size.
        changes: keys of the config.
    """
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    wide = {**sizes, "intermediate_size": 2 * width}
    llama = {**wide, "num_key_value_heads": 2}
    gpt2 = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 512}
    state = {"hidden_size": width, "num_hidden_layers": 2}
    granite = {
        **llama, "num_local_experts": 0, "shared_intermediate_size": 2 * width, "mamba_n_heads": 8,
        "mamba_d_head": width // 4, "mamba_d_state": 8,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width // 2}
    settings: dict[str, dict[str, Any]] = {
        "llama-bias": {**llama, "attention_bias": True, "mlp_bias": True},
        "llama-tied": {**llama, "tie_word_embeddings": True},
        "qwen2-tied": {**llama, "tie_word_embeddings": True},
        # Heads wider than the model's width shared among them, as real ones have them.
        "qwen3": {**llama, "head_dim": width // 2},
        "qwen3-tied": {**llama, "head_dim": width // 2, "tie_word_embeddings": True},
        "qwen3_moe": {**llama, **experts, "head_dim": width // 4},
        "qwen2_moe": {**llama, **experts, "shared_expert_intermediate_size": width},
        "olmoe": {**llama, "num_experts": 4, "num_experts_per_tok": 2},
        "mixtral": {**llama, "num_local_experts": 4},
        "gpt_oss": {
            **llama, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": width // 4, "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {"rope_type": "default"},
        },
        # The first block is dense, and the second has experts that every token passes.
        "deepseek_v3": {
            **wide, "num_key_value_heads": 4, "moe_intermediate_size": width // 2, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16,
            "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        },
        "qwen3_5_moe_text": {
            **llama, **experts, "head_dim": width // 4, "shared_expert_intermediate_size": width,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
        "llama4_text": {
            **llama, "num_local_experts": 4, "head_dim": width // 4, "intermediate_size_mlp": width,
            "attention_chunk_size": 64, "no_rope_layers": [1, 0],
        },
        # Its packs have no mask of their own, and half of its layers a window.
        "afmoe": {
            **llama, **experts, "head_dim": width // 4, "sliding_window": 64, "num_dense_layers": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "laguna": {**llama, **experts, "head_dim": width // 4, "shared_expert_intermediate_size": width},
        # A layer stands between its hidden states and the head.
        "modernbert-decoder": {**wide, "layer_types": ["full_attention", "full_attention"]},
        "gemma": {**llama, "head_dim": width // 4},
        "gemma2": {**llama, "head_dim": width // 4},
        "gemma3_text": {**llama, "head_dim": width // 4},
        "phi": wide,
        "falcon": sizes,
        "bloom": {"hidden_size": width, "n_layer": 2, "n_head": 4},
        "opt": {**sizes, "ffn_dim": 2 * width, "word_embed_proj_dim": width},
        "opt-projected": {**sizes, "ffn_dim": 2 * width, "word_embed_proj_dim": width // 2},
        "gpt_neox": wide,
        "gpt2": gpt2,
        "gpt_bigcode": gpt2,
        # Layers that hand a state from token to token, alone or beside attention.
        "mamba": {**state, "state_size": 8},
        "mamba2": {**state, "state_size": 8, "num_heads": 4, "head_dim": width // 2, "n_groups": 1},
        "falcon_h1": {
            **llama, "mamba_d_ssm": width, "mamba_n_heads": 4, "mamba_d_head": width // 4, "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        "jamba": {
            **llama, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False,
            "mamba_d_state": 8, "mamba_dt_rank": 4,
        },
        "lfm2": {**llama, "layer_types": ["conv", "full_attention"]},
        "qwen3_5_text": {
            **llama, "head_dim": width // 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
        "granitemoehybrid": {**granite, "layer_types": ["mamba", "attention"]},
        "granitemoehybrid-dense": {**granite, "layer_types": ["attention", "attention"]},
    }  # fmt: skip
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model_type = kind if kind in CONFIG_MAPPING else kind.partition("-")[0]
    return AutoConfig.for_model(model_type, **{**settings.get(kind, llama), **ids, **changes})


def random_model(kind: str, vocabulary: int, *, tied: bool | None = None, std: float = 0.15) -> PreTrainedModel:
    """Return a float32 model of width 32 whose matrices are drawn with `std`.

    The usual tiny spread makes every logit the same; a wider one lets mistakes show.
    """
    torch.manual_seed(0)
    changes = {} if tied is None else {"tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(small_config(kind, vocabulary=vocabulary, width=32, **changes)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or name.endswith("lm_head.bias"):
                parameter.normal_(0.0, std)
    return model.eval()


def seeing_model(kind: str, *, vocabulary: int = 96) -> PreTrainedModel:
    """Return a random model of two layers with a vision tower of two layers: `gemma3` or `qwen3_5`."""
    eyes: dict[str, dict[str, Any]] = {
        "qwen3_5": {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14},
        "gemma3": {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    tokens: dict[str, dict[str, int]] = {
        "qwen3_5": {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8},
        "gemma3": {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4},
    }
    torch.manual_seed(0)
    text = small_config(f"{kind}_text", vocabulary=vocabulary, width=32).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, **eyes[kind]}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tokens[kind])
    return AutoModelForImageTextToText.from_config(config).float().eval()


@cache
def small_model(kind: str = "llama", *, tied: bool | None = None, spare_rows: int = 0) -> Path:
    """Return the folder of a random model with its tokenizer, saved once per process; to be read alone.

    Args:
        kind: see `small_config`.
        tied: whether the head is the embedding; None leaves it to the architecture.
        spare_rows: rows of the embedding beyond the tokenizer's size.
    """
    folder = Path(_models().name) / f"{kind}-{tied}-{spare_rows}"
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(folder)
    random_model(kind, len(tokenizer) + spare_rows, tied=tied).save_pretrained(folder)
    return folder


@cache
def _models() -> tempfile.TemporaryDirectory[str]:
    """The folder of all small models, removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="peftchat-models-")
