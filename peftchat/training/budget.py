"""Stopping after so many tokens or minutes of training, with a learning rate that follows what is used up."""

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.recipe import TrainingSection
    from peftchat.training.trainer import ChatTrainer


class BudgetCallback(TrainerCallback):
    """Ends training once `training.max_tokens` or `training.max_minutes` is used up; a resumed run goes on counting.

    The schedule was laid out over all steps of the recipe, of which a budget may leave most undone. It is therefore
    read at the share of the budget that is used up, so that a cosine ends at its end whatever stops the run.

    Args:
        trainer: the trainer that it is a callback of; its meter leaves evaluation and saving out of the time.
        training: names the budgets.
    """

    def __init__(self, trainer: "ChatTrainer", training: "TrainingSection") -> None:
        self._trainer = trainer
        self._tokens = training.max_tokens
        self._seconds = None if training.max_minutes is None else 60.0 * training.max_minutes
        self._used = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what an earlier part of the run has used, and check that the schedule can be read anywhere."""
        _lambda_schedule(self._trainer)
        self._measure(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rate of the coming step."""
        schedule = _lambda_schedule(self._trainer)
        position = self._used * state.max_steps
        rates = [base * rule(position) for base, rule in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        # What the trainer logs as the learning rate.
        schedule._last_lr = rates

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop after the step that uses the last of the budget."""
        self._measure(state)
        if self._used >= 1.0:
            control.should_training_stop = True
        return control

    def _measure(self, state: TrainerState) -> None:
        # Processes must agree on when to stop, so the count is that of all of them.
        totals = self._trainer.gathered_totals()
        shares = [state.global_step / state.max_steps]
        if self._tokens is not None:
            shares.append(totals.tokens / self._tokens)
        if self._seconds is not None:
            shares.append(totals.seconds / self._seconds)
        self._used = min(1.0, max(shares))


def _lambda_schedule(trainer: "ChatTrainer") -> LambdaLR:
    schedule: Any = trainer.lr_scheduler
    # accelerate wraps the schedule it was given.
    inner = getattr(schedule, "scheduler", schedule)
    if not isinstance(inner, LambdaLR):
        raise UserError(
            "a budget of tokens or minutes needs a schedule that is a function of progress, and this one is not",
            where=f"training.lr_scheduler_type: {trainer.args.lr_scheduler_type}",
            cure="Use linear, cosine or constant.",
        )
    return inner


def has_budget(training: "TrainingSection") -> bool:
    """Whether anything but steps and epochs ends the run."""
    return training.max_tokens is not None or training.max_minutes is not None
