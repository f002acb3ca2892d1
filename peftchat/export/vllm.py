"""vLLM support of a folder, and the command that serves it.

What vLLM supports of an adapter: https://docs.vllm.ai/en/stable/features/lora.html and `vllm/lora/peft_helper.py`.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.models.safetensors_files import SafetensorsCheckpoint
from peftchat.models.source import (
    ADAPTER_CONFIG,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    ModelKind,
    ModelSource,
    read_json,
)

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` accepts."""


@dataclass(frozen=True, slots=True)
class VllmSupport:
    """Whether vLLM can serve a folder.

    Attributes:
        command: serves the folder; None where it cannot be served.
        reasons: why it cannot be served.
    """

    command: str | None
    reasons: tuple[str, ...] = ()


def vllm_support(name: str) -> VllmSupport:
    """Check by its files whether vLLM can serve a run or model folder.

    An adapter that must be merged is checked by `RUN/merged`.

    Raises:
        UserError: there is no such folder, or it holds neither a model nor an adapter.
    """
    model = ModelSource.open(name, local=True)
    model.require_model()
    reasons: tuple[str, ...] = ()
    served_name = model.path.resolve().name
    if model.kind is ModelKind.ADAPTER:
        config = read_json(model.path / ADAPTER_CONFIG)
        reasons = tuple(adapter_reasons(config))
        if not reasons:
            return VllmSupport(_adapter_command(model.path, config))
        merged = model.path / "merged"
        if not (merged / MODEL_CONFIG).is_file():
            return VllmSupport(None, (*reasons, f"merge it first: `peftchat merge {model.path}`"))
        model = ModelSource.open(str(merged))
    elif model.path.name == "merged":
        served_name = model.path.resolve().parent.name
    reasons = tuple(model_reasons(model))
    if reasons:
        return VllmSupport(None, reasons)
    return VllmSupport(_command([str(model.path), "--served-model-name", served_name]))


def adapter_reasons(config: dict[str, Any]) -> list[str]:
    """Return why vLLM cannot load the adapter beside its base."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"vLLM loads adapters of the type LORA, got {kind}"]
    limits = {
        "use_dora": "vLLM does not load DoRA adapters",
        "trainable_token_indices": "vLLM does not load adapters with embeddings of new tokens",
        "modules_to_save": "vLLM does not load adapters with modules_to_save",
        "rank_pattern": "vLLM supports only one rank for all modules",
        "alpha_pattern": "vLLM supports only one alpha for all modules",
        "target_parameters": "vLLM does not load adapters on parameters without a module",
    }
    reasons = [reason for key, reason in limits.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append("vLLM does not load adapters with trained biases")
    if config["r"] > LORA_RANKS[-1]:
        reasons.append(f"vLLM supports ranks up to {LORA_RANKS[-1]}, got {config['r']}")
    return reasons


def _adapter_command(folder: Path, config: dict[str, Any]) -> str:
    rank = next(rank for rank in LORA_RANKS if rank >= config["r"])
    base = str(config["base_model_name_or_path"])
    name = folder.resolve().name
    arguments = [base, "--tokenizer", str(folder), "--enable-lora", "--lora-modules", f"{name}={folder}"]
    # The stop tokens are those of the run, not of its base.
    return _command([*arguments, "--max-lora-rank", str(rank), "--generation-config", str(folder)])


def model_reasons(model: ModelSource) -> list[str]:
    """Return what a full model lacks."""
    folder, reasons = model.path, []
    if not read_json(folder / MODEL_CONFIG).get("architectures"):
        reasons.append(f"{folder / MODEL_CONFIG} names no architecture")
    if not model.has("tokenizer_config.json"):
        reasons.append(f"{folder} has no tokenizer")
    elif not model.has("chat_template.jinja") and not read_json(folder / "tokenizer_config.json").get("chat_template"):
        reasons.append(f"{folder} has no chat template, so vLLM cannot answer chats")
    generation = folder / GENERATION_CONFIG
    if not model.has(GENERATION_CONFIG) or read_json(generation).get("eos_token_id") is None:
        reasons.append(f"{generation} names no end token, so answers would not stop")
    checkpoint = SafetensorsCheckpoint.open(folder)
    if any(entry.bytes == 0 for entry in checkpoint.entries.values()):
        reasons.append(f"{folder} has empty weights")
    return reasons


def _command(arguments: list[str]) -> str:
    return shlex.join(["vllm", "serve", *arguments])
