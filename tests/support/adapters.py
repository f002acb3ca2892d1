"""Adapters trained by noise, and stock PEFT as the oracle for what they compute and merge to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from tests.support.models import small_config

VOCABULARY = 96
"""Tokens of `small_config`, unless told otherwise."""

IDS = torch.arange(0, 60).reshape(3, 20)


@dataclass(frozen=True)
class Trained:
    """A base folder, a run folder, and what stock PEFT makes of them: unmerged logits and merged weights."""

    base: Path
    run: Path
    logits: torch.Tensor
    merged: dict[str, torch.Tensor]
    merged_logits: torch.Tensor


def make_base(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, *, shard: str = "40KB", **changes: Any
) -> Path:
    """Save a random model with every bias and norm away from its trivial start."""
    set_seed(11)
    model = AutoModelForCausalLM.from_config(
        small_config(kind, **{"bos_token_id": 1, "eos_token_id": 2, **changes}), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, rows: int = 0, **options: Any) -> Any:
    """The stock model in float32, grown where the adapter needs it."""
    set_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()
    if rows > model.get_input_embeddings().weight.shape[0]:
        head = model.get_output_embeddings()
        old = None if head.bias is None else head.bias.detach().clone()
        model.resize_token_embeddings(rows, mean_resizing=False)
        if old is not None:
            model.get_output_embeddings().bias.data = torch.cat([old, old.mean().expand(rows - len(old))])
    return model


def train_by_noise(
    base: Path,
    run: Path,
    config: Any,
    rows: int = 0,
    noise: float = 0.05,
    save_embeddings: bool | str = False,
    **options: Any,
) -> Trained:
    """Wrap the base, move every trained parameter, save as a run does, and let stock PEFT compute and merge."""
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(load(base, rows, **options), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(run, save_embedding_layers=save_embeddings)
    return oracle(base, run, rows, **options)


def oracle(base: Path, run: Path, rows: int = 0, **options: Any) -> Trained:
    """Load base and adapter again in stock PEFT."""
    model = PeftModel.from_pretrained(load(base, rows, **options), run).eval()
    with torch.no_grad():
        logits = model(IDS).logits
        merged = model.merge_and_unload()
        return Trained(base, run, logits, merged.state_dict(), merged(IDS).logits)


def merged_logits(folder: Path) -> torch.Tensor:
    """Logits of a merged folder, by stock transformers alone."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's shards."""
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found.update(load_file(shard))
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference as a share of the range."""
    return float((one - other).abs().max() / (other.max() - other.min()))
