"""A recipe's `training` section as TRL's arguments."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTTrainer

from peftchat.errors import UserError, VerificationError
from peftchat.models.added_tokens import MODULE_NAME
from peftchat.models.saving import is_adapted, load_adapter_state, save_model_files
from peftchat.recipe import training_arguments
from peftchat.runs.run_folder import Checkpoint
from peftchat.training.distributed import DistributedSetup
from peftchat.training.loss import install_supervised_forward
from peftchat.training.progress import memory_in_use
from peftchat.training.throughput import Throughput, TokenCounts
from peftchat.training.variant_hooks import TrainerHooks, set_param_group_lrs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from peftchat.dataset.collator import BatchLayout, ChatCollator
    from peftchat.recipe import Recipe, TrainingSection


def sft_config(
    recipe: "Recipe",
    placement: DistributedSetup,
    folder: Path,
    *,
    deepspeed: dict[str, Any] | None,
    resuming: bool,
) -> "SFTConfig":
    """TRL's arguments for the run.

    Args:
        folder: the run folder.
        deepspeed: DeepSpeed's configuration, if it has a part.
        resuming: whether the run goes on from a checkpoint; the evaluation before the first step then is done.
    """
    from trl import SFTConfig

    on_cpu = placement.gpus == 0
    arguments = training_arguments(recipe)
    # Left out, TRL would switch it on.
    arguments.setdefault("gradient_checkpointing", False)
    if recipe.training.gradient_checkpointing:
        arguments.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if resuming:
        arguments["eval_on_start"] = False
    arguments["report_to"] = arguments.get("report_to") or "none"
    return SFTConfig(
        **arguments,
        output_dir=str(folder / "checkpoints"),
        bf16=recipe.model.dtype == "bfloat16",
        fp16=recipe.model.dtype == "float16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and placement.world_size > 1 else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        deepspeed=deepspeed,
        # Rows come encoded, packed and labeled; TRL is to leave them alone.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=False,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        log_level="error",
    )


_TENSORS_OF_OURS = ("real_tokens", "watched")


class ChatTrainer(SFTTrainer):
    """Trains on packs of encoded conversations.

    Args:
        model: the model, wrapped by PEFT on adapter paths, with its new rows attached.
        args: TRL's arguments.
        train_packs: a data set whose `rows` column lists the rows of each pack.
        train_collator: lays out training packs.
        eval_packs: the same for held-out rows, or None.
        eval_collator: lays out held-out packs.
        tokenizer: saved with every checkpoint.
        callbacks: progress and metrics.
        totals: counts so far, when the run resumes.
        parts: what the variant brings into the loop.
    """

    control: TrainerControl

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        args: "SFTConfig",
        *,
        train_packs: "Dataset",
        train_collator: "ChatCollator",
        eval_packs: "Dataset | None",
        eval_collator: "ChatCollator | None",
        tokenizer: "PreTrainedTokenizerBase",
        callbacks: "Sequence[TrainerCallback]" = (),
        totals: TokenCounts | None = None,
        parts: TrainerHooks | None = None,
    ) -> None:
        self._parts = parts or TrainerHooks()
        trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(
            model=model,
            args=args,
            data_collator=train_collator,
            train_dataset=train_packs,
            eval_dataset=eval_packs,
            processing_class=tokenizer,
            callbacks=[*callbacks, *self._parts.callbacks],
        )
        # TRL casts what is trained on a quantized base to bfloat16, in which small updates round to nothing.
        # https://github.com/huggingface/trl/issues/7268
        for name, parameter in self.model.named_parameters():
            if name in trained and parameter.dtype != trained[name].dtype:
                parameter.data = trained[name].to(parameter.device)
        self.remove_callback(PrinterCallback)
        install_supervised_forward(self.causal_model)
        self.model_accepts_loss_kwargs = True
        self.meter = Throughput(train_collator.watched_count, totals)
        self._train_collator = train_collator
        self._eval_collator = eval_collator
        self._reported = TokenCounts(**self.meter.totals.as_dict())

    @property
    def causal_model(self) -> PreTrainedModel:
        """The language model itself, inside any PEFT wrapper."""
        base: PreTrainedModel = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return base

    @property
    def layout(self) -> "BatchLayout":
        """How batches are laid out."""
        return self._train_collator.layout

    def lay_out(self, layout: "BatchLayout") -> None:
        """Lay batches out otherwise from here on; before training begins."""
        for collator in (self._train_collator, self._eval_collator):
            if collator is not None:
                collator.layout = layout

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood over the supervised tokens of the whole optimizer step.

        Dividing by the step's count, not the micro-batch's, makes accumulation and processes invisible to the update.
        """
        self.meter.add(inputs["real_tokens"], inputs["input_ids"].numel(), inputs["labels"], inputs["watched"])
        outputs = model(**self._model_inputs(inputs), supervised=True)
        count = (inputs["labels"] >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        loss: Tensor = outputs.loss / torch.as_tensor(count, device=outputs.loss.device).clamp(min=1)
        if num_items_in_batch is not None:
            # The count is that of all processes, and gradients are averaged over them.
            loss = loss * self.accelerator.num_processes
        if self._parts.penalty is not None:
            loss = loss + self._parts.penalty() / self.current_gradient_accumulation_steps
        if outputs.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        return loss

    def _model_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        kept: dict[str, Any] = {name: value for name, value in inputs.items() if name not in _TENSORS_OF_OURS}
        if self.aux_loss_enabled:
            kept["output_router_logits"] = True
        return kept

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss per supervised token of the held-out rows, in nats.

        transformers averages over batches and counts wrapped-around rows twice; here every token counts once,
        whatever the batch size and the number of processes.
        """
        assert self._eval_collator is not None
        packs = self.eval_dataset
        size = self.args.per_device_eval_batch_size
        batches = [range(start, min(start + size, len(packs))) for start in range(0, len(packs), size)]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        model = self.model_wrapped
        sums = torch.zeros(3, dtype=torch.float64)
        with self.meter.paused(), torch.no_grad():
            was_training = model.training
            model.eval()
            for first in range(0, len(batches), world):
                mine = first + rank
                # ZeRO-3 gathers in step, so a process that has run out of batches goes through the last one again.
                batch = self._eval_collator([packs[index] for index in batches[min(mine, len(batches) - 1)]])
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    outputs = model(**self._model_inputs(inputs), supervised=True)
                if mine < len(batches):
                    count = (inputs["labels"] >= 0).sum()
                    sums += torch.stack([outputs.loss, outputs.correct, count]).double().cpu()
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            model.train(was_training)
        loss, correct, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(count, 1),
            f"{metric_key_prefix}_accuracy": correct / max(count, 1),
            f"{metric_key_prefix}_tokens": int(count),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed, supervised share and memory to the lines of training steps."""
        if "loss" in logs and "train_runtime" not in logs:
            if not math.isfinite(logs["loss"]):
                raise VerificationError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: training diverged. "
                    "Lower training.learning_rate, or clip by training.max_grad_norm"
                )
            logs.update(self._pace())
        super().log(logs, start_time)

    def _pace(self) -> dict[str, float]:
        now, before = self.meter.collect(), self._reported
        mine = torch.tensor([now.tokens - before.tokens, now.supervised - before.supervised], dtype=torch.float64).to(
            self.args.device
        )
        tokens, supervised = self.accelerator.reduce(mine, "sum").tolist()
        seconds = now.seconds - before.seconds
        self._reported = TokenCounts(**now.as_dict())
        return {
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "supervised_share": supervised / tokens if tokens else 0.0,
            "memory_bytes": memory_in_use(),
            "seconds": now.seconds,
        }

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, with the learning rates that the variant wants for some of its parameters."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made and self._parts.rate_of is not None:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            set_param_group_lrs(optimizer, names, self._parts.rate_of)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """No decay on the rows of new tokens: it would pull them to zero, away from the other embeddings."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if MODULE_NAME not in name.split(".")]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer into a folder; every process must call it."""
        folder = Path(output_dir or self.args.output_dir)
        with self.meter.paused():
            # Checkpoints keep float32, or a resumed run would start from rounded weights.
            save_model_files(
                self.model, self.processing_class, folder, dtype=None, is_main=self.args.should_save,
                wrapped=self.model_wrapped if self.is_deepspeed_enabled else None,
            )  # fmt: skip

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # TRL's own method would first write a model card beside the checkpoints.
        with self.meter.paused():
            Trainer._save_checkpoint(self, model, trial)
            totals = self.meter.collect().as_dict()
            everyone = self._gather_objects(totals)
            if self.args.should_save:
                Checkpoint.at_step(Path(self.args.output_dir), self.state.global_step).mark_complete(everyone)
            self.accelerator.wait_for_everyone()

    def _gather_objects(self, value: Any) -> list[Any]:
        if self.accelerator.num_processes == 1:
            return [value]
        gathered: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_adapted(self.model):
            load_adapter_state(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def gathered_totals(self) -> TokenCounts:
        """The counts of all processes together; Every process must call it."""
        return TokenCounts.together(
            [TokenCounts(**counts) for counts in self._gather_objects(self.meter.collect().as_dict())]
        )


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
            hint="Use linear, cosine or constant.",
        )
    return inner


def has_budget(training: "TrainingSection") -> bool:
    """Whether anything but steps and epochs ends the run."""
    return training.max_tokens is not None or training.max_minutes is not None
