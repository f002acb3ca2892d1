"""Memory of one device, by part: a pure function of settings, counts and traced activations.

Weights, gradients and optimizer states follow Rajbhandari et al. (2020, ZeRO) and Dettmers et al. (2023, QLoRA);
activations and the loss are traced (`peftchat.planning.activations`). A run has four moments that may be its peak:
loading, the loss at the end of the forward pass, the backward pass, and the optimizer's step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftchat.planning.settings import PlanSettings
from peftchat.planning.states import Static, static_bytes

if TYPE_CHECKING:
    from peftchat.planning.activations import ActivationProfile, LossProfile, StepBytes
    from peftchat.planning.facts import ModelFacts, TrainedFacts
    from peftchat.planning.trace import LossTrace

Part = Literal[
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
PARTS: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]

Moment = Literal["loading", "forward", "backward", "step"]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The predicted peak of one device.

    Attributes:
        parts: bytes of each part at the peak.
        moment: when the peak is.
        moments: bytes at each moment.
        host: bytes of main memory that offloading takes, for each process.
    """

    parts: Mapping[Part, int]
    moment: Moment
    moments: Mapping[Moment, int]
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
    facts: "ModelFacts",
    trained: "TrainedFacts",
    activations: "ActivationProfile",
    loss: "LossProfile",
) -> MemoryPlan:
    """Predict the peak of one device.

    Args:
        trained: what the method trains.
        activations: traced for `settings.activation_key`.
        loss: traced for the same.
    """
    static = static_bytes(settings, facts, trained)
    step = activations.step(settings.batch, settings.length)
    head = loss.at(settings.targets)
    moments: dict[Moment, dict[Part, float]] = {
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


def _standing(settings: PlanSettings, static: Static) -> float:
    """Gradients that are there while another forward pass begins."""
    return static.gradients if settings.accumulation > 1 or settings.sharded else 0.0


def _forward(settings: PlanSettings, static: Static, step: "StepBytes", head: "LossTrace") -> dict[Part, float]:
    at_loss = step.kept + head.forward > step.forward
    return {
        "gradients": _standing(settings, static),
        "activations": step.kept if at_loss else step.forward,
        "logits": head.forward if at_loss else 0.0,
        "buffers": static.buffers,
    }


def _backward(settings: PlanSettings, static: Static, step: "StepBytes", head: "LossTrace") -> dict[Part, float]:
    """The worst of three: the head's gradient, the last block's, and the end, when all gradients are there."""
    standing = _standing(settings, static)
    logits, activations, gradients = max(
        (head.backward, step.kept, standing),
        (0.0, step.backward, standing + (0 if standing else head.gradients)),
        (0.0, step.end, static.gradients),
        key=sum,
    )
    return {"gradients": gradients, "activations": activations, "logits": logits, "buffers": static.buffers}


def _add_overhead(parts: dict[Part, float], settings: PlanSettings, static: Static) -> None:
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
