"""What the weight file of a PEFT adapter holds."""

from pathlib import Path
from typing import Any

import torch

from peftchat.errors import UserError
from peftchat.models.safetensors_files import read_header

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_ROOT = "base_model.model."

_TABLES = frozenset(
    f"{layer}.{tensor}"
    for layer in ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "tok_embeddings", "lm_head")
    for tensor in ("weight", "lora_embedding_A")
)
"""The last two parts of the names that architectures have for tensors with a row, or a column, for each token."""


def check_weights(folder: Path) -> None:
    """Check every entry of the adapter's weight file.

    Raises:
        UserError: the file is missing, damaged or empty, or has a tensor without elements. A sharded trainer writes
            such tensors when it saves without gathering.
    """
    if not (folder / ADAPTER_WEIGHTS_NAME).exists() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            "the adapter is pickled (adapter_model.bin); loading it could run any code",
            where=str(folder),
            hint="Load it with peft where you trust it, and save it again: peft writes safetensors.",
        )
    entries = read_header(folder / ADAPTER_WEIGHTS_NAME)
    if not entries:
        raise UserError("the adapter holds no tensors", where=str(folder / ADAPTER_WEIGHTS_NAME))
    empty = [name for name, entry in entries.items() if entry.bytes == 0]
    if empty:
        raise UserError(
            f"{len(empty)} of {len(entries)} tensors have no elements, first {empty[0]}: the adapter was saved "
            "from a sharded model without gathering it",
            where=str(folder / ADAPTER_WEIGHTS_NAME),
            hint="Save it again from a checkpoint of the run.",
        )


def vocabulary_needed(config: Any, folder: Path) -> int:
    """Return the embedding rows that this adapter needs in its base.

    It is 0 if neither config nor weights determine it.
    """
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    ids = [token_id for listed in lists for token_id in listed]
    saved_rows = [
        entry.shape[1 if name.endswith("lora_embedding_A") else 0]
        for key, entry in read_header(folder / ADAPTER_WEIGHTS_NAME).items()
        if ".".join((name := base_name(key)).split(".")[-2:]) in _TABLES
    ]
    return max([token_id + 1 for token_id in ids] + saved_rows, default=0)


def base_name(key: str) -> str:
    """Return the name that a tensor of the file has in the base, without PEFT's wrappers."""
    return key.removeprefix(_ROOT).replace(".token_adapter.", ".").replace(".base_layer.", ".")


def each_once(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out copies that PEFT passes over: with embeddings it saves all that it finds inside their wrappers.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/save_and_load.py (`save_embedding_layers`)
    """
    inner = (".modules_to_save.", ".original_module.")
    return {
        key: value
        for key, value in state.items()
        if not any(part in key and key.replace(part, ".") in state for part in inner)
    }
