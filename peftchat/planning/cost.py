"""Time and money: arithmetic of the run over what the device can do, with every assumption named."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.training.throughput import training_flops

if TYPE_CHECKING:
    from peftchat.planning.facts import ModelFacts, TrainedFacts
    from peftchat.planning.hardware import Hardware
    from peftchat.planning.settings import PlanSettings

_UTILISATION = {"full": 0.40, "lora": 0.35, "qlora": 0.25}
"""Share of the matrix rate that training reaches on a GPU, model FLOPs only; a careful guess for each method."""

_UTILISATION_ON_CPU = 0.20


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What a run takes.

    Attributes:
        tokens: worked through, padding included.
        steps: optimizer steps.
        flops: floating-point operations of the model, recomputation not counted.
        tflops: matrix rate of one device, in 10^12 operations a second.
        utilisation: assumed share of it.
        seconds: of training, without loading, evaluation and saving.
        money: at the given price, None without one.
        assumptions: in words.
    """

    tokens: int
    steps: int
    flops: float
    tflops: float
    utilisation: float
    seconds: float
    money: float | None
    assumptions: tuple[str, ...]


def cost_estimate(
    settings: "PlanSettings",
    facts: "ModelFacts",
    trained: "TrainedFacts",
    hardware: "Hardware",
    *,
    tokens: int,
    steps: int,
    tflops: float,
    price: float | None,
) -> CostEstimate:
    """Estimate time and money.

    Args:
        tokens: of the whole run, over all devices.
        steps: optimizer steps of the whole run.
        tflops: matrix rate of one device.
        price: of one device for an hour, in any currency.
    """
    full = settings.method == "full"
    body = facts.linear + (0 if full else trained.parameters)
    flops = training_flops(
        body=body,
        head=facts.head_size,
        trained_body=min(trained.parameters, body),
        trains_head=full,
        tokens=tokens,
        supervised=round(tokens * settings.supervised),
    ) + _attention_flops(settings, facts, tokens)
    done = flops * (1.33 if settings.checkpointing else 1.0)
    share = _UTILISATION[settings.method] if settings.device == "cuda" else _UTILISATION_ON_CPU
    # Processes on one processor share its cores.
    devices = hardware.count if settings.device == "cuda" else 1
    seconds = done / (tflops * 1e12 * share * devices)
    money = None if price is None else price * seconds / 3600 * hardware.count
    return CostEstimate(
        tokens, steps, flops, tflops, share, seconds, money, _assumptions(settings, hardware, share, tflops)
    )


def _attention_flops(settings: "PlanSettings", facts: "ModelFacts", tokens: int) -> float:
    """Scores and weighted sums over the keys a query sees: half of its dialogue, or all positions under a mask."""
    within = settings.attention == "fused"
    seen = min(settings.dialogue, settings.length) / 2 if within else settings.length
    return 12.0 * facts.layers * facts.hidden * seen * tokens


def _assumptions(settings: "PlanSettings", hardware: "Hardware", share: float, tflops: float) -> tuple[str, ...]:
    told = [f"{share:.0%} of {tflops:,.3g} TFLOP/s in use ({hardware.label})"]
    if settings.checkpointing:
        told.append("a third more arithmetic for checkpointing")
    if hardware.count > 1 and settings.device == "cuda":
        told.append(f"{hardware.count} devices work at the speed of {hardware.count}: communication is hidden")
    if settings.offload != "none":
        told.append("offloading costs nothing, which it does")
    told.append("loading, evaluation and saving not counted")
    return tuple(told)
