"""Whether vLLM can serve a folder, and the command that does.

What vLLM takes of an adapter: https://docs.vllm.ai/en/stable/features/lora.html and `vllm/lora/peft_helper.py`.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.errors import UserError
from peftchat.merging.safetensors_io import SafetensorsCheckpoint

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` takes."""


@dataclass(frozen=True, slots=True)
class VllmSupport:
    """What vLLM needs.

    Attributes:
        command: serves the folder; None where it cannot be served.
        reasons: what stands in the way.
    """

    command: str | None
    reasons: tuple[str, ...] = ()


def vllm_support(path: str) -> VllmSupport:
    """Judge a run folder or a model folder from its files; an adapter that must be merged is judged by `RUN/merged`.

    Raises:
        UserError: neither a finished run nor a model.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        config = _read(folder / "adapter_config.json")
        reasons = tuple(_adapter_reasons(config))
        if not reasons:
            return VllmSupport(_adapter_command(folder, config))
        merged = folder / "merged"
        if not (merged / "config.json").is_file():
            return VllmSupport(None, (*reasons, f"merge it first: `peftchat merge {folder}`"))
        folder = merged
    elif not (folder / "config.json").is_file():
        raise UserError("neither a finished run nor a model", where=path, hint="Name a run folder or a model folder.")
    reasons = tuple(_model_reasons(folder))
    name = folder.resolve().parent.name if folder.name == "merged" else folder.resolve().name
    return VllmSupport(None, reasons) if reasons else VllmSupport(_command([str(folder), "--served-model-name", name]))


def _adapter_reasons(config: dict[str, Any]) -> list[str]:
    """Why vLLM cannot load the adapter beside its base."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"vLLM loads adapters of the type LORA, and this is {kind}"]
    limits = {
        "use_dora": "vLLM does not load DoRA adapters",
        "trainable_token_indices": "vLLM does not load adapters that bring rows for new tokens",
        "modules_to_save": "vLLM does not load adapters with modules_to_save",
        "rank_pattern": "vLLM wants one rank for all modules",
        "alpha_pattern": "vLLM wants one alpha for all modules",
        "target_parameters": "vLLM does not load adapters on bare parameters",
    }
    reasons = [reason for key, reason in limits.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append("vLLM does not load adapters with trained biases")
    if config["r"] > _RANKS[-1]:
        reasons.append(f"vLLM takes ranks up to {_RANKS[-1]}, and this one is {config['r']}")
    return reasons


def _adapter_command(folder: Path, config: dict[str, Any]) -> str:
    rank = next(rank for rank in _RANKS if rank >= config["r"])
    base = str(config["base_model_name_or_path"])
    name = folder.resolve().name
    arguments = [base, "--tokenizer", str(folder), "--enable-lora", "--lora-modules", f"{name}={folder}"]
    # The stop tokens are those of the run, not of its base.
    return _command([*arguments, "--max-lora-rank", str(rank), "--generation-config", str(folder)])


def _model_reasons(folder: Path) -> list[str]:
    """What a folder of whole weights lacks."""
    reasons = []
    config = _read(folder / "config.json")
    if not config.get("architectures"):
        reasons.append(f"{folder / 'config.json'} names no architecture")
    if not (folder / "tokenizer_config.json").is_file():
        reasons.append(f"{folder} holds no tokenizer")
    elif not (folder / "chat_template.jinja").is_file() and not _read(folder / "tokenizer_config.json").get(
        "chat_template"
    ):
        reasons.append(f"{folder} holds no chat template, so that vLLM cannot answer chats")
    generation = folder / "generation_config.json"
    if not generation.is_file() or _read(generation).get("eos_token_id") is None:
        reasons.append(f"{generation} names no end token, so that answers would not stop")
    checkpoint = SafetensorsCheckpoint.open(folder)
    if any(entry.bytes == 0 for entry in checkpoint.entries.values()):
        reasons.append(f"{folder} holds empty weights")
    return reasons


def _command(arguments: list[str]) -> str:
    return shlex.join(["vllm", "serve", *arguments])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("the file cannot be read", where=str(path)) from error
    if not isinstance(found, dict):
        raise UserError("the file holds no JSON object", where=str(path))
    return found
