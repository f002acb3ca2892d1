"""Stopping a run after its current step, with a checkpoint, or asking it for a checkpoint alone.

The first signal ends a run after its step, the second one at once. SIGUSR2, or a file in the run folder, asks for a
checkpoint, and the run goes on.
"""

import time
from contextlib import suppress
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftchat.console import stderr
from peftchat.interruption import CHECKPOINT, DeferredSignals, Interrupted, signal_name
from peftchat.runs.checkpoint import Checkpoint
from peftchat.runs.run_folder import RunFolder
from peftchat.training.several_processes import is_lost_process
from peftchat.training.trainer import ChatTrainer

_GPU_SECONDS = 2.0
"""How often the processes of a run on GPUs agree: reading the answer waits for the GPU."""

_FILE_SECONDS = 1.0
"""How often a run looks for the file that asks for a checkpoint; a network file system takes milliseconds."""


class EvaluationStopped(Exception):
    """A signal came during an evaluation; the last step is complete."""


class StopCallback(TrainerCallback):
    """Stops a run after a signal, in all its processes after the same step.

    A signal may reach one process alone, or each at another step. So the processes agree on it by a reduction of one
    numbers: after every step on a CPU, where it costs a fraction of a millisecond, and about every two seconds on GPUs.

    Args:
        trainer: the trainer.
        run_folder: a file in it may ask for a checkpoint.
        resume_command: the command that resumes the run.
        saves: whether a checkpoint may be written; not with `training.save_strategy: no`.
        saved_step: the step of the checkpoint that the run resumes from, or 0.

    Attributes:
        signals: the signals of this process.
    """

    def __init__(
        self, trainer: ChatTrainer, run_folder: RunFolder, resume_command: str, *, saves: bool, saved_step: int
    ) -> None:
        self.signals = DeferredSignals()
        self._trainer = trainer
        self._run_folder = run_folder
        self._looked = 0.0
        # Whether this process was asked for a checkpoint, whether all know, and whether it was told.
        self._asks_others, self._asked, self._told = False, False, True
        self._resume_command = resume_command
        self._saves = saves
        self._saved_step = saved_step
        self._number: int | None = None
        # Places passed where the processes may agree, the last one where they did, and the next one where they will.
        self._places, self._last_place, self._next_place = 0, 0, 0
        self._last_time = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step, with a checkpoint and without another evaluation."""
        if self._is_agreed():
            control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = self._saves
        elif self._asked:
            # Also with `save_strategy: no`, which asks for none by itself.
            control.should_save = True
            self._asked, self._told = False, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this checkpoint."""
        self._saved_step = state.global_step
        if not self._told:
            self._told = True
            if self._trainer.is_world_process_zero():
                path = Checkpoint.at_step(self._run_folder.checkpoints, state.global_step).path
                stderr.print(f"Checkpoint, as asked: {path}", markup=False, highlight=False)
        if self._is_agreed():
            control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop within an evaluation.

        Raises:
            EvaluationStopped: a process was asked to stop.
        """
        if self._is_agreed():
            raise EvaluationStopped

    @property
    def is_stopping(self) -> bool:
        """Whether the processes have agreed to stop."""
        return self._number is not None

    def raise_if_stopped(self) -> None:
        """End a run that was stopped; every process must call it.

        Raises:
            Interrupted: with the step, and how to resume.
        """
        self._next_place = 0
        if not self._is_agreed():
            return
        step = self._trainer.state.global_step
        if self._saves and step > self._saved_step:
            self._trainer.save_checkpoint()
        assert self._number is not None
        raise Interrupted(self._number, self._message(step, signal_name(self._number)))

    def has_lost_data_worker(self, error: Exception) -> bool:
        """Whether a signal to the whole process group ended the data loader's workers of this only process.

        All batches of a step are fetched before it begins, so the last step is complete.
        """
        return (
            self.signals.number is not None
            and self._trainer.accelerator.num_processes == 1
            and str(error).startswith("DataLoader worker")
        )

    def interrupted(self, error: Exception) -> Interrupted | None:
        """Return the interruption that an error comes from: the others may end before this process has seen it."""
        if self.signals.number is None or not isinstance(error, RuntimeError):
            return None
        if not is_lost_process(error) and not str(error).startswith("DataLoader worker"):
            return None
        return Interrupted(self.signals.number)

    def _message(self, step: int, name: str) -> str:
        if not step:
            return f"Stopped before the first step ({name}). Start again with `{self._resume_command}`."
        if not self._saves:
            return f"Stopped at step {step} ({name}). No checkpoint was written: training.save_strategy is `no`."
        return f"Stopped at step {step} ({name}). Resume with `{self._resume_command}`."

    def _is_agreed(self) -> bool:
        """Whether a process was asked to stop; all processes call it at the same places and get the same answer."""
        if self._number is not None:
            return True
        accelerator = self._trainer.accelerator
        asked = self._is_asked()
        if accelerator.num_processes == 1:
            self._number, self._asked = self.signals.number, self._asked or asked
            return self._number is not None
        self._places += 1
        self._asks_others = self._asks_others or asked
        if self._places < self._next_place:
            return False
        seconds = time.monotonic() - self._last_time
        own = [float(self.signals.number or 0), seconds, float(self._asks_others)]
        agreed = torch.tensor(own, device=self._trainer.args.device)
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        number, seconds, asked_by_one = agreed.tolist()
        self._number = int(number) or None
        self._asked, self._asks_others = self._asked or asked_by_one > 0, False
        # All compute the same next place, from the slowest process's clock.
        between = seconds / (self._places - self._last_place)
        self._next_place = self._places + self._interval(between)
        self._last_place, self._last_time = self._places, time.monotonic()
        return self._number is not None

    def _is_asked(self) -> bool:
        """Return whether a signal or the file asks this process for a checkpoint; the file is deleted."""
        asked = CHECKPOINT.take()
        now = time.monotonic()
        if self._trainer.is_world_process_zero() and now - self._looked > _FILE_SECONDS:
            self._looked = now
            with suppress(FileNotFoundError):
                self._run_folder.checkpoint_request.unlink()
                asked = True
        return asked

    def _interval(self, seconds: float) -> int:
        """Return how many places to pass until the next agreement, with this many seconds from one to the next."""
        if self._trainer.args.device.type == "cpu":
            return 1
        return max(1, min(1000, int(_GPU_SECONDS / max(seconds, 1e-3))))
