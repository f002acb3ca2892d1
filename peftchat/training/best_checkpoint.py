"""Best checkpoint: the evaluation whose weights a run ends with, and early stopping."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftchat.errors import VerificationError
from peftchat.formatting import format_decimal
from peftchat.runs.checkpoint import Checkpoint
from peftchat.runs.run_summary import KeptStep
from peftchat.training.sharded_checkpoint import load_sharded

if TYPE_CHECKING:
    from peftchat.training.context import TrainContext
    from peftchat.training.trainer import ChatTrainer

_LOSS_TOLERANCE = 1e-3
"""Relative difference between a held-out loss and that of the same weights, saved and loaded again."""


def best_callbacks(context: "TrainContext") -> list[TrainerCallback]:
    """Return the callbacks that the recipe's best checkpoint and early stopping need."""
    training = context.recipe.training
    callbacks: list[TrainerCallback] = []
    if training.load_best_model_at_end:
        callbacks.append(_BestStepCallback(context))
    if training.early_stopping_patience is not None:
        callbacks.append(
            ResumedEarlyStopping(training.early_stopping_patience, training.early_stopping_threshold),
        )
    return callbacks


class ResumedEarlyStopping(EarlyStoppingCallback):
    """Early stopping that counts on where the checkpoint of a resumed run left off.

    transformers restores a callback's state by `restore_callback_states_from_checkpoint` alone, which restores the
    trainer's control as well, so that a run that had stopped could not go on:
    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/trainer.py
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the count over from the trainer's state; a run without early stopping left none there."""
        states: Any = state.stateful_callbacks
        stored = states.setdefault(type(self).__name__, self.state())
        if isinstance(stored, Mapping):
            self.early_stopping_patience_counter = int(stored["attributes"]["early_stopping_patience_counter"])
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class _BestStepCallback(TrainerCallback):
    """Compares later evaluations alone if the best checkpoint of a resumed run is gone."""

    def __init__(self, context: "TrainContext") -> None:
        self._context = context

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the checkpoint of the best step so far."""
        step = state.best_global_step
        if not step or Checkpoint.at_step(self._context.run_folder.checkpoints, step).is_complete:
            return
        self._context.notes.tell(
            f"The checkpoint of the best evaluation so far, after step {step}, is gone. "
            "The best of the later evaluations is kept."
        )
        state.best_metric, state.best_global_step = None, 0


def load_best(trainer: "ChatTrainer", context: "TrainContext") -> KeptStep | None:
    """Load the weights of the best evaluation into the model, and check that their held-out loss is the one noted.

    The last step counts as one of the evaluations. Every process must call it.

    Returns:
        Which step the model now has the weights of; None if the recipe compares no evaluations.

    Raises:
        VerificationError: the best checkpoint is gone, or its weights give another held-out loss.
    """
    training, state = context.recipe.training, trainer.state
    if not training.load_best_model_at_end and training.early_stopping_patience is None:
        return None
    metric, last_step = training.metric_for_best_model, state.global_step
    last = _evaluation(state, last_step)[metric]
    best_step, best = state.best_global_step or last_step, state.best_metric
    if best is None or not math.isfinite(best) or (last > best if metric == "eval_accuracy" else last < best):
        best_step, best = last_step, last
    stopped_early = _stopped_early(trainer)
    if not training.load_best_model_at_end:
        return KeptStep(last_step, metric, last, last_step, last, stopped_early)
    if best_step != last_step:
        _load(trainer, context, best_step)
    kept = KeptStep(best_step, metric, float(best), last_step, last, stopped_early)
    context.notes.tell(str(kept))
    return kept


def _load(trainer: "ChatTrainer", context: "TrainContext", step: int) -> None:
    checkpoint = Checkpoint.at_step(context.run_folder.checkpoints, step)
    if not checkpoint.is_complete:
        raise VerificationError(
            f"{checkpoint.path}: the checkpoint of the best evaluation is gone or incomplete. "
            "Set training.load_best_model_at_end: false and run with --resume --allow-changed to keep the last weights."
        )
    if trainer.is_deepspeed_enabled:
        # The adapter alone is in a checkpoint of an adapter.
        is_whole = context.recipe.adapter is None
        load_sharded(trainer.model_wrapped, trainer.accelerator, checkpoint, whole=is_whole)
    else:
        trainer.load_weights(checkpoint)
    noted, found = _evaluation(trainer.state, step)["eval_loss"], trainer.held_out_metrics()["eval_loss"]
    if not math.isclose(noted, found, rel_tol=_LOSS_TOLERANCE):
        raise VerificationError(
            f"{checkpoint.path}: its weights give a held-out loss of {format_decimal(found)}, and gave "
            f"{format_decimal(noted)} after step {step}. No model was saved; the checkpoints are kept."
        )


def _evaluation(state: TrainerState, step: int) -> Mapping[str, float]:
    """Return the metrics of the last evaluation after a step."""
    found: Mapping[str, float] = next(
        line for line in reversed(state.log_history) if line.get("step") == step and "eval_loss" in line
    )
    return found


def _stopped_early(trainer: "ChatTrainer") -> bool:
    stopping = next((one for one in trainer.callback_handler.callbacks if isinstance(one, ResumedEarlyStopping)), None)
    return stopping is not None and stopping.early_stopping_patience_counter >= stopping.early_stopping_patience
