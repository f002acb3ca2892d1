"""Peak memory of one device: static memory, step phases and overhead."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftchat.planning.settings import BYTES, PlanSettings

if TYPE_CHECKING:
    from peftchat.planning.activations import ActivationProfile, LossProfile, StepMemory
    from peftchat.planning.parameter_counts import ParameterCounts, TrainableCounts
    from peftchat.planning.tracing import LossTrace


_QUANT_BLOCK = 64
"""Weights per scale in 4-bit quantization (bitsandbytes' default)."""

_SCALE_BLOCK = 256
"""Scales per second-level scale in double quantization."""

_STATE_BYTES = {
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
"""Optimizer state in bytes per trainable weight.

Eight-bit states also have one float32 scale per 256 values, which is added below. Adafactor's states are one row and
one column per matrix (Shazeer and Stern, 2018).
"""

_WEIGHTWISE_COPIES = 5
"""Float32 tensors of a part's size that exist at once: weights, gradient, and three of the optimizer's."""

_MAX_GATHERED = 1_000_000_000
"""Most elements that ZeRO-3 keeps gathered, and that it updates at once (`stage3_max_live_parameters`,
`sub_group_size`)."""


@dataclass(frozen=True, slots=True)
class StaticMemory:
    """Bytes on one device that do not depend on the batch.

    Attributes:
        weights: the base model, or all weights of full fine-tuning.
        adapter: the adapter and the embeddings of added tokens, with a copy where the reference needs their start.
        gradients: gradients of all trainable weights.
        optimizer: optimizer states, with DeepSpeed's float32 master weights.
        buffers: communication buffers and gathered weights.
        optimizer_step: temporary memory of the optimizer step.
        loading: the peak while weights are loaded.
        heap_leftover: heap that quantizing the weights leaves in a CPU process.
        host: bytes in RAM instead, by offloading.
        widened: float32 copies of weights in bfloat16, while they are computed with.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    buffers: float
    optimizer_step: float
    loading: float
    heap_leftover: float
    host: float
    widened: float = 0.0


def static_memory(settings: PlanSettings, counts: "ParameterCounts", trainable: "TrainableCounts") -> StaticMemory:
    """Return the memory of one device that does not depend on the batch."""
    n = settings.processes
    dtype_size = BYTES[settings.weight_dtype]
    weights = base_bytes(settings, counts)
    full, count = settings.method == "full", trainable.parameters + trainable.new_token_parameters
    # PEFT keeps adapters in float32; DeepSpeed keeps everything in the dtype of the model.
    size = dtype_size if settings.sharded or full else 4
    adapter = 0.0 if full else float(count * size)
    if settings.keeps_start and settings.strategy != "zero3":
        adapter *= 2
    unsharded = weights
    freed = settings.in_backward and settings.weightwise
    gradients = float((trainable.largest if freed else count) * size)
    optimizer = count * optimizer_state_bytes(settings) + _wide_embedding_bytes(settings, counts)
    host = buffers = 0.0
    if settings.sharded:
        optimizer = (optimizer + 4 * count) / n
        gradients /= n
        bucket = counts.hidden_size**2 * dtype_size
        # Two buckets are in flight while communication overlaps with the backward pass.
        buffers = float(min(2 * bucket, 2 * count * dtype_size))
        if settings.strategy == "zero3":
            weights, adapter = weights / n, adapter / n
            gathered = min(_MAX_GATHERED * dtype_size, unsharded)
            buffers += gathered + 0.9 * bucket
        if settings.offload != "none":
            host, optimizer = optimizer + gradients * 2, 0.0
            gradients = float(min(2 * bucket, gradients))
        if settings.offload == "all":
            host, weights, adapter = host + weights + adapter, 0.0, 0.0
    elif settings.strategy == "ddp" and n > 1:
        buffers = gradients
    return StaticMemory(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        optimizer_step=_step_bytes(settings, count, trainable.largest),
        loading=_loading_bytes(settings, counts, weights),
        heap_leftover=2.0 * counts.linear if settings.bits is not None and settings.device == "cpu" else 0.0,
        host=host,
        # Besides the block that is computed, the LM head has a copy.
        widened=4.0 * trainable.largest if settings.widened else 0.0,
    )


def base_bytes(settings: PlanSettings, counts: "ParameterCounts") -> float:
    """Return the unsharded bytes of the base model.

    Embedding, LM head and norms are never quantized.
    """
    dtype_size = BYTES[settings.weight_dtype]
    if settings.bits is None:
        return float(counts.parameters * dtype_size)
    return (counts.parameters - counts.linear) * dtype_size + quantized_bytes(
        counts.linear, settings, outputs=counts.linear_outputs
    )


def quantized_bytes(elements: int, settings: PlanSettings, *, outputs: int) -> float:
    """Return the bytes of quantized weights with their scales.

    Args:
        elements: the number of weights.
        settings: bits and double quantization.
        outputs: output features, each of which has a scale in 8 bits.
    """
    if settings.bits == 8:
        return float(elements + 4 * outputs)
    scales = elements / _QUANT_BLOCK
    return elements / 2 + (scales + 4 * scales / _SCALE_BLOCK if settings.double else 4 * scales)


def optimizer_state_bytes(settings: PlanSettings) -> float:
    """Return the optimizer state in bytes per trainable weight, without a master copy."""
    states = _STATE_BYTES[settings.optimizer]
    return states * (1 + 4 / 256) if "8bit" in settings.optimizer else states


def _step_bytes(settings: PlanSettings, trainable: int, largest: int) -> float:
    """Return the temporary memory of an optimizer step."""
    if settings.sharded:
        if settings.offload != "none":
            return 0.0
        # The shard's gradients in float32, and Adam's denominator.
        return 8.0 * min(trainable / settings.processes, _MAX_GATHERED)
    if settings.weightwise:
        return _weightwise_bytes(settings, largest)
    if settings.optimizer != "adamw_torch":
        return 0.0
    # Adam's denominator exists for one weight at a time on a CPU, and for all at once on a GPU.
    return 8.0 * largest if settings.device == "cpu" else 4.0 * trainable


def _weightwise_bytes(settings: PlanSettings, largest: int) -> float:
    """Return the float32 copies of a part's weights and gradients, and the optimizer's temporary tensors."""
    from peftchat.training.weightwise import PART_ELEMENTS, WHOLE

    part = largest if settings.optimizer in WHOLE else min(largest, PART_ELEMENTS)
    return 4.0 * part * _WEIGHTWISE_COPIES


def _wide_embedding_bytes(settings: PlanSettings, counts: "ParameterCounts") -> float:
    """Return what 8-bit optimizers have for embeddings besides: transformers lets bitsandbytes keep 32 bits there."""
    if settings.method != "full" or settings.weightwise or "8bit" not in settings.optimizer:
        return 0.0
    return counts.embedding * (4 * _STATE_BYTES[settings.optimizer] - optimizer_state_bytes(settings))


def _loading_bytes(settings: PlanSettings, counts: "ParameterCounts", weights: float) -> float:
    as_in_file = settings.bits is None and BYTES[settings.weight_dtype] == 2
    if settings.device == "cpu" and not as_in_file:
        # The pages of the mapped file stay until all weights are converted.
        return weights + 2 * counts.parameters
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
        peak_phase: the phase with the peak.
        phases: bytes in each phase.
        host: bytes of RAM for offloading, per process.
    """

    parts: Mapping[MemoryPart, int]
    peak_phase: Phase
    phases: Mapping[Phase, int]
    host: int

    @property
    def total(self) -> int:
        """Bytes that the device needs."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Bytes that torch allocates, without the overhead of libraries and fragmentation."""
        return self.total - self.parts["framework"] - self.parts["fragmentation"]


def memory_plan(
    settings: PlanSettings,
    counts: "ParameterCounts",
    trainable: "TrainableCounts",
    activations: "ActivationProfile",
    loss: "LossProfile",
) -> MemoryPlan:
    """Predict the peak of one device.

    Args:
        settings: the settings of the run.
        counts: the parameters of the model.
        trainable: the parameters that the method trains.
        activations: the activations for `settings.trace_config`.
        loss: the memory of the loss for the same.
    """
    static = static_memory(settings, counts, trainable)
    step = activations.at(settings.batch * settings.rows, settings.length)
    head = loss.at(settings.targets)
    phases: dict[Phase, dict[MemoryPart, float]] = {
        "loading": {"weights": static.loading},
        "forward": _forward(settings, static, step, head),
        "backward": _backward(settings, static, step, head),
        "step": {"gradients": static.gradients, "buffers": static.optimizer_step},
    }
    for name, parts in phases.items():
        if name != "loading":
            parts |= {"weights": static.weights, "adapter": static.adapter, "optimizer": static.optimizer}
        _add_overhead(parts, settings, static)
    peak = max(phases, key=lambda name: sum(phases[name].values()))
    return MemoryPlan(
        parts={part: round(phases[peak].get(part, 0)) for part in PARTS},
        peak_phase=peak,
        phases={name: round(sum(parts.values())) for name, parts in phases.items()},
        host=round(static.host),
    )


def _accumulated_gradients(settings: PlanSettings, static: StaticMemory) -> float:
    """Return the gradients that exist when another forward pass begins."""
    return static.gradients if settings.accumulation > 1 or settings.sharded else 0.0


def _forward(
    settings: PlanSettings, static: StaticMemory, step: "StepMemory", head: "LossTrace"
) -> dict[MemoryPart, float]:
    at_loss = step.saved + head.forward > step.forward
    return {
        "gradients": _accumulated_gradients(settings, static),
        "activations": step.saved if at_loss else step.forward,
        "logits": head.forward + static.widened if at_loss else 0.0,
        "buffers": static.buffers,
    }


def _backward(
    settings: PlanSettings, static: StaticMemory, step: "StepMemory", head: "LossTrace"
) -> dict[MemoryPart, float]:
    """Return the parts of the backward pass at its largest peak.

    Three peaks are compared: the LM head's gradient, the last block's, and the end with all gradients.
    """
    accumulated = _accumulated_gradients(settings, static)
    logits, activations, gradients = max(
        (head.backward, step.saved, accumulated),
        (0.0, step.backward, accumulated + (0 if accumulated else head.gradients)),
        (0.0, step.end, static.gradients),
        key=sum,
    )
    return {"gradients": gradients, "activations": activations, "logits": logits, "buffers": static.buffers}


def _add_overhead(parts: dict[MemoryPart, float], settings: PlanSettings, static: StaticMemory) -> None:
    """Add the memory of the libraries and the fragmentation."""
    overhead = OVERHEADS[settings.device]
    parts["framework"] = overhead.framework + (overhead.communication if settings.processes > 1 else 0)
    made = sum(parts.get(part, 0.0) for part in ("gradients", "activations", "logits", "buffers"))
    parts["fragmentation"] = overhead.fragmentation * made + static.heap_leftover if made else 0.0


@dataclass(frozen=True, slots=True)
class Overhead:
    """The memory of one process beside its tensors.

    Attributes:
        framework: bytes of the libraries, their kernels and workspaces.
        communication: further bytes if there are several processes.
        fragmentation: fraction of a step's memory that is lost between allocations.
    """

    framework: int
    communication: int
    fragmentation: float


OVERHEADS: Mapping[str, Overhead] = {
    "cuda": Overhead(framework=600_000_000, communication=900_000_000, fragmentation=0.06),
    "cpu": Overhead(framework=540_000_000, communication=100_000_000, fragmentation=0.28),
}
"""Overhead by device.

The CPU's is fitted to `scripts/bench_plan.py` and includes what glibc's heap keeps after tensors are freed. CUDA's are
common values for its context, NCCL's buffers and torch's caching allocator; none was measured.
"""
