"""Checkpoints: what TRL's trainer writes and reads, for sharded weights and several processes too."""

import os
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME
from trl import SFTTrainer

from peftchat.models.saving import (
    is_stored_under_other_names,
    load_adapter_state,
    load_full_weights,
    load_training_modules,
    save_model_files,
    save_training_modules,
)
from peftchat.runs.checkpoint import Checkpoint, keep_newest
from peftchat.training.context import TrainContext
from peftchat.training.number_checks import NumberChecks
from peftchat.training.position import RunPosition
from peftchat.training.sharded_checkpoint import is_of_other_processes, load_sharded
from peftchat.training.throughput import Throughput, TokenCounts


class CheckpointTrainer(SFTTrainer):
    """Writes and reads checkpoints of a run.

    Attributes:
        throughput: counts the tokens and the time of training.
        checks: looks at the numbers of each step.
        position: where the run is, for messages.
    """

    optimizer: Any
    throughput: Throughput
    checks: NumberChecks
    position: RunPosition
    _context: TrainContext

    @property
    def causal_model(self) -> PreTrainedModel:
        """The language model itself, inside any PEFT wrapper."""
        base: PreTrainedModel = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return base

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer into a folder; every process must call it."""
        folder = Path(output_dir or self.args.output_dir)
        with self.throughput.paused():
            # Checkpoints keep float32: a resumed run must not start from rounded weights.
            save_model_files(
                self.model, self.processing_class, folder,
                adapter=self._context.recipe.adapter, dtype=None, is_main=self.args.should_save,
                wrapped=self.model_wrapped if self.is_deepspeed_enabled else None,
            )  # fmt: skip
            if self._context.recipe.adapter is not None and self.args.should_save:
                save_training_modules(self.model, self._context.recipe.adapter, folder)

    def save_checkpoint(self) -> None:
        """Write a checkpoint after the last step; every process must call it."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # TRL's own method also writes a model card into the folder of checkpoints.
        folder, training = Path(self.args.output_dir), self._context.recipe.training
        checkpoint = Checkpoint.at_step(folder, self.state.global_step)
        self.position.enter("writing a checkpoint", self.state.global_step)
        with self.throughput.paused():
            self.checks.check_weights(self.model, self.state.global_step)
            if self.args.should_save:
                checkpoint.begin()
            self.accelerator.wait_for_everyone()
            Trainer._save_checkpoint(self, model, trial)
            self._save_more(checkpoint)
            counts = self.gather_objects(self.throughput.collect().as_dict())
            written = self.gather_objects(checkpoint.names())
            if self.args.should_save:
                checkpoint.mark_complete(counts, self._context.content.marker(), written=chain.from_iterable(written))
                best_step = self.state.best_global_step if training.load_best_model_at_end else None
                keep_newest(folder, training.save_total_limit, best_step=best_step)
            self.accelerator.wait_for_everyone()

    def _save_more(self, checkpoint: Checkpoint) -> None:
        """Write what else a resumed run needs; every process calls it."""

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(value, "sum")
        return total

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all processes; every process must call it."""
        if self.accelerator.num_processes == 1:
            return [value]
        gathered: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Load the weights of a checkpoint into the model, which no process may have sharded."""
        self._load_from_checkpoint(str(checkpoint.path), self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapter = self._context.recipe.adapter
        if adapter is not None:
            load_adapter_state(self.model, adapter, Path(resume_from_checkpoint))
            load_training_modules(self.model, adapter, Path(resume_from_checkpoint))
        elif is_stored_under_other_names(self.causal_model):
            # transformers' trainer passes over the tensors whose names it does not find in the model.
            load_full_weights(self.causal_model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        """Leave the optimizer's state of a checkpoint out where it cannot be read; the schedule goes on."""
        checkpoint = None if resume_from_checkpoint is None else Checkpoint(Path(resume_from_checkpoint))
        is_joined = (
            self.is_deepspeed_enabled
            and checkpoint is not None
            and is_of_other_processes(checkpoint, self.args.world_size)
        )
        if checkpoint is None or not (self._context.content.fresh_optimizer or is_joined):
            whole: tuple[nn.Module, Any] = super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
            return whole
        prepared: tuple[nn.Module, Any] = super()._prepare_for_training(max_steps, train_dataloader, None)
        if is_joined:
            load_sharded(self.model_wrapped, self.accelerator, checkpoint, whole=self._context.recipe.adapter is None)
        schedule = torch.load(checkpoint.path / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        return prepared

    def gather_token_counts(self) -> TokenCounts:
        """Return the counts of all processes; every process must call it."""
        counts = self.gather_objects(self.throughput.collect().as_dict())
        return TokenCounts.merge([TokenCounts(**one) for one in counts])


def resumed_counts(checkpoint: Checkpoint | None) -> TokenCounts | None:
    """Return this process's counts at the checkpoint.

    With another number of processes than before, the main process takes all counts.
    """
    if checkpoint is None:
        return None
    counts = [TokenCounts(**one) for one in checkpoint.token_counts()]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if len(counts) == world:
        return counts[rank]
    merged = TokenCounts.merge(counts)
    return merged if rank == 0 else TokenCounts.zeros(len(merged.seen))
