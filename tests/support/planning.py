"""Configs of well-known models, written by their published shapes, and recipes on them."""

import json
from pathlib import Path
from typing import Any

from peftchat.recipe import Recipe

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
    "llama-3.2-3b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "starcoderbase": {
        "model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "vocab_size": 49152, "n_embd": 6144,
        "n_inner": 24576, "n_layer": 40, "n_head": 48, "n_positions": 8192, "multi_query": True,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "small": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "hidden_size": 64,
        "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    },
    # A block of few operations, for plans that trace many ways of training.
    "small-gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 1000, "n_embd": 64, "n_layer": 3,
        "n_head": 4, "n_positions": 4096, "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip


def model_folder(name: str, parent: Path) -> Path:
    """A folder that holds nothing but the config of the named shape."""
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    return folder


def recipe_dict(name: str, parent: Path, method: str, **training: Any) -> dict[str, Any]:
    """A recipe on the named shape as YAML has it; its data need not exist."""
    return {
        "model": {"name": str(model_folder(name, parent)), "dtype": "bfloat16"},
        "method": method,
        "data": {"train": [{"path": "rows/of-a-hub"}], "max_length": 2048},
        "training": {"gradient_accumulation_steps": 1, **training},
        "output_dir": str(parent / "run"),
    }


def recipe_on(name: str, parent: Path, method: str, **training: Any) -> Recipe:
    """The same as a recipe."""
    return Recipe.model_validate(recipe_dict(name, parent, method, **training))
