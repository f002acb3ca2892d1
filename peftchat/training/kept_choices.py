"""Kept choices: what was measured to be fastest, for each machine, model shape and set of versions."""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
import torch

from peftchat.files import cache_root, write_text
from peftchat.models.loading import has_bfloat16_kernels

if TYPE_CHECKING:
    from peftchat.training.context import TrainContext
    from peftchat.training.trainer import ChatTrainer

_PACKAGES = ("peftchat", "torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to compute the steps of a run. The ways differ in speed, and in their results by rounding alone.

    Attributes:
        compiled: whether the layers are compiled, and on a GPU the loss.
        attention: transformers' name of the attention.
        threads: of this process.
        loss_chunk: factor on the number of positions that the loss projects at a time.
        micro_batch: packs in one forward pass of one process. A step has the same packs, whatever it is.
        fused_adapter: whether plain LoRA adapters are computed together with their layers.
    """

    compiled: bool
    attention: str
    threads: int
    loss_chunk: float = 1.0
    micro_batch: int = 1
    fused_adapter: bool = True

    def differences(self, other: "Choice") -> dict[str, Any]:
        """Return the fields in which another choice differs, with its values."""
        mine, its = asdict(self), asdict(other)
        return {name: value for name, value in its.items() if value != mine[name]}

    def with_values(self, values: dict[str, Any]) -> "Choice":
        """Return the choice with other values of some fields."""
        return replace(self, **values)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Times of a forward and backward pass over one micro-batch, each way, and what was chosen.

    Attributes:
        default: what a run takes without measuring.
        chosen: the fastest.
        seconds: median time of the default.
        ratios: `field=value` -> median ratio to the default, for each way that was tried.
        differs: those of them whose loss was another, and that were not chosen for it.
        compile_seconds: how long the compiler took, 0 if nothing was compiled.
        spent_seconds: what the measurement took in all.
        date: when it was made, ISO 8601.
    """

    default: Choice
    chosen: Choice
    seconds: float
    ratios: dict[str, float] = field(default_factory=dict)
    differs: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    spent_seconds: float = 0.0
    date: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def of_dict(cls, content: dict[str, Any]) -> Self:
        """Return the measurement of JSON values.

        Raises:
            TypeError, KeyError: it is of another version.
        """
        default, chosen = Choice(**content["default"]), Choice(**content["chosen"])
        return cls(**{**content, "default": default, "chosen": chosen, "differs": tuple(content["differs"])})


def circumstances(context: "TrainContext", trainer: "ChatTrainer", default: Choice) -> dict[str, Any]:
    """Return what a measurement holds for: the machine, the versions, the model's shape, and the run's batches."""
    recipe, config = context.recipe, trainer.causal_model.config.get_text_config()
    variables = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    adapter = None if recipe.adapter is None else recipe.adapter.model_dump(mode="json")
    shape = {key: value for key, value in config.to_dict().items() if isinstance(value, int | float | str)}
    training = recipe.training
    return {
        "machine": {
            "cpu": _cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "bfloat16": has_bfloat16_kernels(),
            "variables": {name: os.environ[name] for name in variables if name in os.environ},
            "cores": os.cpu_count(),
            "processes": context.distributed.processes,
        },
        "versions": {package: version(package) for package in _PACKAGES},
        "shape": {key: value for key, value in shape.items() if not key.startswith("_") and key != "name_or_path"},
        "run": {
            "method": recipe.method,
            "adapter": adapter,
            "bits": None if recipe.quantization is None else recipe.quantization.bits,
            "computed_in": recipe.model.computed_in,
            "checkpointing": training.gradient_checkpointing,
            "batch": training.per_device_train_batch_size,
            "accumulation": training.gradient_accumulation_steps,
            "max_length": recipe.data.max_length,
            "packing": recipe.data.packing,
            "default": asdict(default),
        },
    }


def kept_file(key: dict[str, Any]) -> Path:
    """Return the file of the measurement that holds under some circumstances."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return cache_root() / "choices" / f"{name}.json"


def read_kept(key: dict[str, Any]) -> Measurement | None:
    """Return the kept measurement; None without one that can be read."""
    try:
        content = json.loads(kept_file(key).read_text(encoding="utf-8"))
        return Measurement.of_dict(content["measurement"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep(key: dict[str, Any], measurement: Measurement) -> bool:
    """Write a measurement; return whether that was possible."""
    try:
        file = kept_file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**key, "measurement": measurement.as_dict()}, indent=2, default=str) + "\n")
    except OSError:
        return False
    return True


def read_choice(file: Path) -> Choice | None:
    """Return the choice that a run was started with; None where it has not noted one."""
    try:
        return Choice(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_choice(file: Path, choice: Choice) -> None:
    """Note the choice of a run, for those who resume it."""
    write_text(file, json.dumps(asdict(choice)) + "\n")


def physical_cores() -> int:
    """Return the number of cores without their second threads."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model", "stepping")
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in named.items()}
    return ", ".join(found[key] for key in wanted if key in found) or platform.machine()
