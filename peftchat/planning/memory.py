"""Bytes that do not depend on the batch: weights, gradients, optimizer states, buffers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftchat.planning.settings import BYTES, PlanSettings

if TYPE_CHECKING:
    from peftchat.planning.activations import ActivationProfile, LossProfile, StepMemory
    from peftchat.planning.parameter_counts import ParameterCounts, TrainableCounts
    from peftchat.planning.tracing import LossTrace


_BLOCK = 64
"""Weights that share a scale in 4-bit quantization (bitsandbytes' default)."""

_SCALES = 256
"""Scales that share a second scale where they are quantized too."""

_STATES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "paged_adamw_32bit": 8.0,
    "ademamix": 12.0,
    "ademamix_8bit": 3.0,
    "paged_ademamix_8bit": 3.0,
    "paged_ademamix_32bit": 12.0,
    "lion_8bit": 1.0,
    "lion_32bit": 4.0,
    "paged_lion_8bit": 1.0,
    "paged_lion_32bit": 4.0,
    "adafactor": 0.05,
    "adagrad": 4.0,
    "rmsprop": 4.0,
    "sgd": 0.0,
}
"""Bytes of state a trained weight. Eight-bit states have a float32 scale for every 256 values, added below; those of
Adafactor are a row and a column a matrix (Shazeer and Stern, 2018)."""

_GATHERED = 1_000_000_000
"""Elements that ZeRO-3 keeps whole at most, and that it steps at once (`stage3_max_live_parameters`,
`sub_group_size`)."""


@dataclass(frozen=True, slots=True)
class StaticMemory:
    """Bytes on one device.

    Attributes:
        weights: the base, or all weights of full fine-tuning.
        adapter: the adapter and the rows of new tokens.
        gradients: of everything trained, when all of them are there.
        optimizer: its states, with DeepSpeed's float32 masters.
        buffers: of communication, and weights gathered for a while.
        step: what the optimizer's step makes for a while.
        loading: the most while weights are read.
        left: what packing the weights leaves in the heap of a process on a processor.
        host: in main memory instead, by offloading.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    buffers: float
    step: float
    loading: float
    left: float
    host: float


def static_memory(settings: PlanSettings, facts: "ParameterCounts", trained: "TrainableCounts") -> StaticMemory:
    """The bytes of one device that only settings and counts decide."""
    n = settings.processes
    held = BYTES[settings.held]
    weights = base_bytes(settings, facts)
    full, count = settings.method == "full", trained.parameters + trained.rows
    # PEFT holds adapters in float32; DeepSpeed holds everything in the dtype of the model.
    size = held if settings.sharded or full else 4
    beside = 0.0 if full else float(count * size)
    whole = weights
    gradients = float(count * size)
    optimizer = count * state_bytes(settings)
    host = buffers = 0.0
    if settings.sharded:
        optimizer = (optimizer + 4 * count) / n
        gradients /= n
        bucket = facts.hidden**2 * held
        # Two buckets are in flight while communication overlaps with the backward pass.
        buffers = float(min(2 * bucket, 2 * count * held))
        if settings.strategy == "zero3":
            weights, beside = weights / n, beside / n
            gathered = min(_GATHERED * held, whole)
            buffers += gathered + 0.9 * bucket
        if settings.offload != "none":
            host, optimizer = optimizer + gradients * 2, 0.0
            gradients = float(min(2 * bucket, gradients))
        if settings.offload == "all":
            host, weights, beside = host + weights + beside, 0.0, 0.0
    elif settings.strategy == "ddp" and n > 1:
        buffers = gradients
    return StaticMemory(
        weights=weights,
        adapter=beside,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        step=_step_bytes(settings, count, trained.largest),
        loading=_loading_bytes(settings, facts, weights),
        left=2.0 * facts.linear if settings.bits is not None and settings.device == "cpu" else 0.0,
        host=host,
    )


def base_bytes(settings: PlanSettings, facts: "ParameterCounts") -> float:
    """The weights of the base on one device before any sharding; embedding, head and norms are never packed."""
    held = BYTES[settings.held]
    if settings.bits is None:
        return float(facts.parameters * held)
    return (facts.parameters - facts.linear) * held + packed_bytes(facts.linear, settings, rows=facts.linear_rows)


def packed_bytes(elements: int, settings: PlanSettings, *, rows: int) -> float:
    """Quantized weights with their scales.

    Args:
        elements: weights.
        rows: output features, each with a scale in 8 bits.
    """
    if settings.bits == 8:
        return float(elements + 4 * rows)
    scales = elements / _BLOCK
    return elements / 2 + (scales + 4 * scales / _SCALES if settings.double else 4 * scales)


def state_bytes(settings: PlanSettings) -> float:
    """Bytes of optimizer state a trained weight, without a master copy."""
    states = _STATES[settings.optimizer]
    return states * (1 + 4 / 256) if "8bit" in settings.optimizer else states


def _step_bytes(settings: PlanSettings, trained: int, largest: int) -> float:
    """What an optimizer's step makes for a while."""
    if settings.sharded:
        if settings.offload != "none":
            return 0.0
        # The shard's gradients in float32, and Adam's denominator.
        return 8.0 * min(trained / settings.processes, _GATHERED)
    if settings.optimizer != "adamw_torch":
        return 0.0
    # A denominator is made: for one weight after the other on a processor, for all at once on a GPU.
    return 8.0 * largest if settings.device == "cpu" else 4.0 * trained


def _loading_bytes(settings: PlanSettings, facts: "ParameterCounts", weights: float) -> float:
    as_in_file = settings.bits is None and BYTES[settings.held] == 2
    if settings.device == "cpu" and not as_in_file:
        # The file is mapped, and its pages stay until all weights are made of them.
        return weights + 2 * facts.parameters
    return weights


MemoryPart = Literal[
    "weights",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "buffers",
    "framework",
    "fragmentation",
]
PARTS: tuple[MemoryPart, ...] = MemoryPart.__args__  # type: ignore[attr-defined]

Phase = Literal["loading", "forward", "backward", "step"]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The predicted peak of one device.

    Attributes:
        parts: bytes of each part at the peak.
        moment: when the peak is.
        moments: bytes at each moment.
        host: bytes of main memory that offloading takes, for each process.
    """

    parts: Mapping[MemoryPart, int]
    moment: Phase
    moments: Mapping[Phase, int]
    host: int

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Bytes that torch allocates: without its own needs and without what lies between allocations."""
        return self.total - self.parts["framework"] - self.parts["fragmentation"]


def memory_plan(
    settings: PlanSettings,
    facts: "ParameterCounts",
    trained: "TrainableCounts",
    activations: "ActivationProfile",
    loss: "LossProfile",
) -> MemoryPlan:
    """Predict the peak of one device.

    Args:
        trained: what the method trains.
        activations: traced for `settings.activation_key`.
        loss: traced for the same.
    """
    static = static_memory(settings, facts, trained)
    step = activations.step(settings.batch, settings.length)
    head = loss.at(settings.targets)
    moments: dict[Phase, dict[MemoryPart, float]] = {
        "loading": {"weights": static.loading},
        "forward": _forward(settings, static, step, head),
        "backward": _backward(settings, static, step, head),
        "step": {"gradients": static.gradients, "buffers": static.step},
    }
    for name, parts in moments.items():
        if name != "loading":
            parts |= {"weights": static.weights, "adapter": static.adapter, "optimizer": static.optimizer}
        _add_overhead(parts, settings, static)
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan(
        parts={part: round(moments[peak].get(part, 0)) for part in PARTS},
        moment=peak,
        moments={name: round(sum(parts.values())) for name, parts in moments.items()},
        host=round(static.host),
    )


def _standing(settings: PlanSettings, static: StaticMemory) -> float:
    """Gradients that are there while another forward pass begins."""
    return static.gradients if settings.accumulation > 1 or settings.sharded else 0.0


def _forward(
    settings: PlanSettings, static: StaticMemory, step: "StepMemory", head: "LossTrace"
) -> dict[MemoryPart, float]:
    at_loss = step.kept + head.forward > step.forward
    return {
        "gradients": _standing(settings, static),
        "activations": step.kept if at_loss else step.forward,
        "logits": head.forward if at_loss else 0.0,
        "buffers": static.buffers,
    }


def _backward(
    settings: PlanSettings, static: StaticMemory, step: "StepMemory", head: "LossTrace"
) -> dict[MemoryPart, float]:
    """The worst of three: the head's gradient, the last block's, and the end, when all gradients are there."""
    standing = _standing(settings, static)
    logits, activations, gradients = max(
        (head.backward, step.kept, standing),
        (0.0, step.backward, standing + (0 if standing else head.gradients)),
        (0.0, step.end, static.gradients),
        key=sum,
    )
    return {"gradients": gradients, "activations": activations, "logits": logits, "buffers": static.buffers}


def _add_overhead(parts: dict[MemoryPart, float], settings: PlanSettings, static: StaticMemory) -> None:
    """What the libraries need for themselves, and what lies between allocations."""
    overhead = OVERHEADS[settings.device]
    parts["framework"] = overhead.framework + (overhead.communication if settings.processes > 1 else 0)
    made = sum(parts.get(part, 0.0) for part in ("gradients", "activations", "logits", "buffers"))
    parts["fragmentation"] = overhead.share * made + static.left if made else 0.0


@dataclass(frozen=True, slots=True)
class Overhead:
    """What one process needs beside its tensors.

    Attributes:
        framework: bytes of the libraries, their kernels and workspaces.
        communication: bytes more where there are several processes.
        share: of what a step makes, lost between allocations.
    """

    framework: int
    communication: int
    share: float


OVERHEADS: Mapping[str, Overhead] = {
    "cuda": Overhead(framework=600_000_000, communication=900_000_000, share=0.06),
    "cpu": Overhead(framework=680_000_000, communication=100_000_000, share=0.28),
}
"""By device. The processor's are fitted to `scripts/bench_plan.py`, glibc's heap included, which keeps more than what
is alive. CUDA's are usual figures for its context, NCCL's buffers and torch's caching allocator; none was measured."""
