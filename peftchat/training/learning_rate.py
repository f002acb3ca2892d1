"""Learning rate: a warm-up that begins above zero, and a schedule that goes on after it was lengthened."""

import json
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftchat.formatting import format_decimal
from peftchat.runs.run_folder import Checkpoint

_MOST_RATES = 100_000
"""Steps whose rates are checked one by one; of a longer run, as many at equal distances."""

_TOLERANCE = 1e-3
"""Share of the peak by which rounding may miss it."""


def unwrapped(schedule: Any) -> Any:
    """Return the schedule inside accelerate's wrapper."""
    return getattr(schedule, "scheduler", schedule)


def set_rates(schedule: LambdaLR, position: float) -> None:
    """Set the learning rates of a schedule's optimizer to those at a position, in steps."""
    rates = [base * factor(position) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]  # type: ignore[operator,arg-type]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    # The trainer logs this as the learning rate.
    schedule._last_lr = rates


def begin_above_zero(schedule: Any, warmup_steps: int, steps: int) -> None:
    """Let a warm-up rise from `1 / (warmup_steps + 1)` of the peak instead of from zero.

    With transformers' schedules the first step of a warm-up has a learning rate of 0 and changes nothing, which is all
    of a run of one step: https://github.com/huggingface/transformers/blob/main/src/transformers/optimization.py

    Args:
        schedule: changed in place, before its first step; the rates after the warm-up stay.
        warmup_steps: its length.
        steps: those of the run. Where the warm-up covers them all, the schedule stays at the peak behind its end:
            transformers' polynomial divides by zero there.
    """
    schedule = unwrapped(schedule)
    if not warmup_steps or not isinstance(schedule, LambdaLR):
        return
    schedule.lr_lambdas = [_stretched(factor, warmup_steps, steps) for factor in schedule.lr_lambdas]
    set_rates(schedule, schedule.last_epoch)


def _stretched(factor: Callable[[Any], float], warmup_steps: int, steps: int) -> Callable[[Any], float]:
    def stretched(position: float) -> float:
        if position < warmup_steps:
            return factor((position + 1) * warmup_steps / (warmup_steps + 1))
        return 1.0 if warmup_steps >= steps else factor(position)

    return stretched


def check_rates(schedule: Any, warmup_steps: int, steps: int) -> None:
    """Refuse a schedule whose options lead away from the rate of the recipe.

    transformers takes any options: some fail in the middle of a run, and a decay that is longer than the run begins
    it near its end.

    Raises:
        ValueError: a rate of the run cannot be computed, is below 0 or above the peak, or the peak is never reached.
    """
    schedule = unwrapped(schedule)
    if not isinstance(schedule, LambdaLR) or steps < 1:
        return
    factor: Callable[[Any], float] = schedule.lr_lambdas[0]
    highest = 0.0
    for step in range(0, steps, max(1, steps // _MOST_RATES)):
        try:
            share = factor(step)
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"the rate of step {step + 1} cannot be computed: {error}") from error
        if not 0 <= share <= 1 + _TOLERANCE:
            raise ValueError(f"the rate of step {step + 1} would be {share:.3g} times training.learning_rate")
        highest = max(highest, share)
    if warmup_steps < steps <= _MOST_RATES and highest < 1 - _TOLERANCE:
        raise ValueError(f"its rates reach {highest:.3g} times training.learning_rate at most")


class ContinuedScheduleCallback(TrainerCallback):
    """Tells where the learning rate jumps because a resumed run has another number of steps than before.

    A checkpoint holds the rate that the former schedule had for the next step. The schedule of the whole run decides
    instead, from the first resumed step on.

    Args:
        checkpoint: the checkpoint that the run resumes from.
        tell: called with one line.
    """

    def __init__(self, checkpoint: Checkpoint, tell: Callable[[str], None]) -> None:
        self._checkpoint = checkpoint
        self._tell = tell
        self._before: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rate of the former schedule, and set that of the present one."""
        schedule = unwrapped(kwargs["lr_scheduler"])
        if isinstance(schedule, LambdaLR):
            self._before = float(schedule._last_lr[0])
            set_rates(schedule, schedule.last_epoch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the two at the first resumed step."""
        before, self._before = self._before, None
        if before is None:
            return
        after = float(unwrapped(kwargs["lr_scheduler"])._last_lr[0])
        former_steps = _former_steps(self._checkpoint)
        if former_steps == state.max_steps or abs(after - before) <= 0.01 * max(after, before):
            return
        self._tell(
            f"The run goes on from step {state.global_step} to {state.max_steps}, and was planned for {former_steps}: "
            f"the learning rate goes from {format_decimal(before)} to {format_decimal(after)}."
        )


def _former_steps(checkpoint: Checkpoint) -> int | None:
    state = json.loads((checkpoint.path / "trainer_state.json").read_text(encoding="utf-8"))
    steps = state.get("max_steps")
    return int(steps) if isinstance(steps, int) else None
