"""The small files of a model folder: everything that is not a weight comes from the trained side."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from peftchat.merging.plan import Plan
from peftchat.merging.shards import INDEX_NAME, SINGLE_NAME

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)

_GENERATION = "generation_config.json"
CONFIG_NAME = "config.json"
_HIDDEN_CONFIG = "config.unproved.json"
"""The config's name until the merge is proved: no loader takes a folder without `config.json` for a model."""


def write_index(folder: Path, plan: Plan) -> None:
    """The index of the shards; a single `model.safetensors` needs none."""
    if tuple(plan.shards) == (SINGLE_NAME,):
        return
    weight_map = {tensor.spec.name: file for file, tensors in plan.shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": plan.bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_companions(
    folder: Path, config: Any, run: Path, base: Path, *, untied: bool, dtype: torch.dtype | None
) -> None:
    """Write the config (see `make_loadable`), `generation_config.json`, tokenizer, chat template and remote code.

    A bare adapter that was saved without a tokenizer was trained with the base's, and only then that one is taken.

    Args:
        folder: the merged model.
        config: the model's config, already grown to the merged vocabulary.
        run: where the trained side's files are.
        base: where remote code is.
        untied: the output head no longer shares the embedding's weight.
        dtype: type of the merged weights.
    """
    trained = [name for name in _TOKENIZER if (run / name).is_file()]
    for name in _TOKENIZER:
        source = (run if trained else base) / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    for code in base.glob("*.py"):
        shutil.copyfile(code, folder / code.name)
    generation = next((side / _GENERATION for side in (run, base) if (side / _GENERATION).is_file()), None)
    if generation is not None:
        shutil.copyfile(generation, folder / _GENERATION)
        for name, value in _special_ids(generation).items():
            setattr(config, name, value)
    if untied:
        config.tie_word_embeddings = False
    config.dtype = dtype
    config.save_pretrained(folder)
    (folder / CONFIG_NAME).rename(folder / _HIDDEN_CONFIG)


def read_config(folder: Path) -> Any:
    """The config of a merged folder that is not yet proved."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder / _HIDDEN_CONFIG))


def make_loadable(folder: Path) -> None:
    """Give `config.json` its name, which makes the folder a model."""
    (folder / _HIDDEN_CONFIG).rename(folder / CONFIG_NAME)


def _special_ids(generation: Path) -> dict[str, Any]:
    """End and padding ids as the trained side stops and pads."""
    settings = json.loads(generation.read_text(encoding="utf-8"))
    return {name: settings[name] for name in ("eos_token_id", "pad_token_id") if settings.get(name) is not None}
