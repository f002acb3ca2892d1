"""Training steps: TRL's trainer on packs of encoded conversations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from peftchat.dataset.epochs import EpochPacks
from peftchat.errors import UserError, first_line
from peftchat.models.added_tokens import MODULE_NAME
from peftchat.runs.eval_labels import LabelSummary
from peftchat.runs.eval_pairs import PairSummary
from peftchat.training.checkpoint_trainer import resumed_counts
from peftchat.training.context import TrainContext
from peftchat.training.epoch_sampler import EpochCallback, EpochDataset, EpochSampler
from peftchat.training.evaluating_trainer import EvaluatingTrainer
from peftchat.training.held_out import HeldOutLosses
from peftchat.training.learning_rate import begin_above_zero, check_rates
from peftchat.training.loss import SupervisedOutput, install_supervised_forward
from peftchat.training.model import TrainableModel
from peftchat.training.number_checks import NumberChecks
from peftchat.training.out_of_memory import Halving
from peftchat.training.packs import make_collator, make_packs
from peftchat.training.progress import MetricsCallback, memory_in_use
from peftchat.training.throughput import Throughput, TokenCounts
from peftchat.training.variant_hooks import VariantCallback, set_param_group_lrs, trainer_hooks
from peftchat.training.weightwise import WeightwiseOptimizer, make_weightwise, uses_little_memory

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from trl import SFTConfig

    from peftchat.dataset.collator import Batch, BatchLayout


class ChatTrainer(EvaluatingTrainer):
    """Trains on packs of encoded conversations.

    Args:
        context: the run.
        model: the model to train.
        config: TRL's arguments.
        layout: the batch layout that the model's attention needs.
    """

    pair_summary: PairSummary | None = None
    label_summary: LabelSummary | None = None
    compares_with_reference = True
    """Whether an evaluation may compute a reference once more, to tell how far the model is from it."""

    def __init__(
        self, context: TrainContext, model: TrainableModel, config: "SFTConfig", layout: "BatchLayout"
    ) -> None:
        self._context = context
        self._hooks = trainer_hooks(context.recipe.adapter, model.model)
        self._collators = {split: make_collator(context, split, layout) for split in context.splits}
        epochs = EpochPacks.of(context.recipe, context.splits["train"])
        packs = {
            split: make_packs(context, split, layout, epochs if split == "train" else None) for split in context.splits
        }
        trained = {name: weight.data for name, weight in model.model.named_parameters() if weight.requires_grad}
        super().__init__(
            model=model.model,
            args=config,
            data_collator=self._collators["train"],
            train_dataset=packs["train"],
            eval_dataset=packs.get("eval"),
            processing_class=context.chat.tokenizer,
            callbacks=[MetricsCallback(context.run_folder.metrics), VariantCallback(self._hooks)],
        )
        text = self.causal_model.config.get_text_config()
        if getattr(text, "num_local_experts", getattr(text, "num_experts", None)) == 0:
            # TRL goes by the key alone, which dense models of a mixture's class have too, such as Granite 4.0 Micro.
            self.aux_loss_enabled = text.output_router_logits = False
        # TRL casts trainable parameters on a quantized base to bfloat16, in which small updates round to zero.
        # https://github.com/huggingface/trl/issues/7268
        for name, parameter in self.model.named_parameters():
            if name in trained and parameter.dtype != trained[name].dtype:
                parameter.data = trained[name].to(parameter.device)
        self._epoch_sampler: EpochSampler | None = None
        if epochs is not None:
            # TRL's own constructor takes nothing but a data set of `datasets`.
            self.train_dataset = EpochDataset(epochs)
            size = config.train_batch_size * config.gradient_accumulation_steps if layout == "padded" else None
            seed = config.seed if config.data_seed is None else config.data_seed
            self._epoch_sampler = EpochSampler(epochs, seed, size, context.notes.tell)
            self.add_callback(EpochCallback(self._epoch_sampler))
        self.remove_callback(PrinterCallback)
        self.loss_settings = install_supervised_forward(self.causal_model)
        self.model_accepts_loss_kwargs = True
        self.throughput = Throughput(self._collators["train"].num_tracked, resumed_counts(context.checkpoint))
        self._reported = TokenCounts(**self.throughput.counts.as_dict())
        self._held_out = HeldOutLosses()
        self._evaluated_step: int | None = None
        self.current_examples: Sequence[int] = ()
        self.checks = NumberChecks(context, self.args.device, self.gather_objects, self._sum_over_processes)
        self.position = context.position
        self._items_of_step: Tensor | int | None = None
        self.current_gradient_accumulation_steps: int = config.gradient_accumulation_steps
        self._weightwise: WeightwiseOptimizer | None = None
        self._first_micro_batch = config.train_batch_size
        self._other_loader: DataLoader[Any] | None = None
        self._halving = self._make_halving() if context.recipe.training.on_oom == "halve" else None

    @property
    def frees_gradients(self) -> bool:
        """Whether gradients are used and freed in the backward pass."""
        return self._weightwise is not None and self._weightwise.updates_in_backward

    @property
    def layout(self) -> "BatchLayout":
        """How batches are laid out."""
        return self._collators["train"].layout

    def set_layout(self, layout: "BatchLayout") -> None:
        """Change the layout of all later batches.

        Whether the model's attention works is known once the model is wrapped, and by then the data loader has its
        collator.
        """
        for collator in self._collators.values():
            collator.layout = layout

    def micro_batch(self, first: int, last: int) -> "Batch":
        """Return the batch of training packs from one up to another, in the present layout, on the model's device."""
        packs = [self.train_dataset[place] for place in range(first, last)]
        batch: Batch = self._prepare_inputs(self._collators["train"](packs))
        return batch

    def set_micro_batch(self, size: int) -> None:
        """Compute later steps from micro-batches of so many packs; each step has the packs that it would have had.

        Training has begun, so the data loader is replaced by one of the other size.
        """
        if size == self.args.train_batch_size:
            return
        accumulated = self.args.train_batch_size * self.args.gradient_accumulation_steps
        self.args.per_device_train_batch_size = self._train_batch_size = size
        self.args.gradient_accumulation_steps = accumulated // size
        self._other_loader = self.callback_handler.train_dataloader = self.get_train_dataloader()

    def _make_halving(self) -> Halving:
        """Return what redoes a step in smaller micro-batches.

        Raises:
            UserError: the update would not be the same.
        """
        if self.aux_loss_enabled:
            raise UserError(
                "the loss that balances a mixture of experts depends on how a step is cut into micro-batches",
                where="training.on_oom: halve",
                hint="Write `on_oom: stop`, or a smaller training.per_device_train_batch_size.",
            )
        return Halving(
            self._collators["train"],
            self._train_part,
            lambda: self.model_wrapped.zero_grad(set_to_none=True),
            self._context.notes.tell,
            self._context.recipe.data.max_length,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the sampler; one that knows the epoch where each epoch has packs of its own."""
        return self._epoch_sampler or super()._get_train_sampler(train_dataset)

    def _run_epoch(self, **arguments: Any) -> None:
        """Train an epoch, or nothing if a run that was resumed has all its steps already.

        transformers looks at the number of steps behind each step alone, and so takes one more:
        https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/trainer.py
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._other_loader is not None:
            trained = arguments["steps_trained_in_current_epoch"] * self._first_micro_batch
            arguments |= {
                "train_dataloader": self._other_loader, "steps_in_epoch": len(self._other_loader),
                "steps_trained_in_current_epoch": trained // self.args.train_batch_size,
            }  # fmt: skip
        super()._run_epoch(**arguments)

    def prepare(self) -> None:
        """Do what needs the weights of the start, right before the first step; every process must call it."""

    def check_batches(self, vocabulary: int) -> None:
        """Check what this trainer's batches ask of the model; every process must call it.

        Args:
            vocabulary: token ids below this are ordinary tokens.
        """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradient of a micro-batch, and note its loss and its examples."""
        self.current_examples, self._target_counts = inputs.pop("examples"), inputs.pop("target_counts")
        self.position.enter("the forward pass", self.state.global_step + 1, self.current_examples)
        if self._weightwise is not None:
            with self._weightwise.training():
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        elif self._halving is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            self._count(inputs)
            self._items_of_step = num_items_in_batch
            loss, self._target_losses = self._halving.run(inputs, self.current_examples)
        self._note_loss(loss.detach())
        return loss

    def _train_part(self, inputs: dict[str, Any], parts: int) -> tuple[Tensor, Tensor]:
        """Compute the gradient of one of so many parts of a micro-batch; return its loss and those of its targets."""
        steps = self.current_gradient_accumulation_steps
        # Penalties of a variant are divided by it.
        self.current_gradient_accumulation_steps = steps * parts
        try:
            loss: Tensor = super().training_step(self.model_wrapped, inputs, self._items_of_step)
        finally:
            self.current_gradient_accumulation_steps = steps
        return loss.detach(), self._target_losses

    def _count(self, inputs: Mapping[str, Tensor]) -> None:
        """Count the tokens of a micro-batch."""
        self.throughput.add(
            inputs["real_tokens"],
            inputs["attended_pairs"],
            inputs["input_ids"].numel(),
            inputs["labels"],
            inputs["tracked_counts"],
        )

    def get_batch_samples(self, epoch_iterator: "Iterator[Batch]", num_batches: int, device: torch.device) -> Any:
        """Fetch the batches of an optimizer step."""
        self.position.enter("waiting for the next batch", self.state.global_step + 1)
        return super().get_batch_samples(self._without_repeats(epoch_iterator), num_batches, device)

    def _without_repeats(self, batches: "Iterator[Batch]") -> "Iterator[Batch]":
        """Yield batches without the packs that accelerate repeats to give all processes a last batch of one size.

        A process that would have repeated packs alone keeps one without targets, because all compute together.
        https://github.com/huggingface/accelerate/blob/v1.0.0/src/accelerate/data_loader.py (`even_batches`)
        """
        size, processes = self.args.train_batch_size, self.accelerator.num_processes
        for batch in batches:
            if processes > 1 and self.accelerator.gradient_state.end_of_dataloader:
                # Batches are dealt out in turn.
                rounds = math.ceil(math.ceil(len(self.train_dataset) / size) / processes)
                place = ((rounds - 1) * processes + self.accelerator.process_index) * size
                yield self._collators["train"].keep_first(batch, max(0, len(self.train_dataset) - place))
            else:
                yield batch

    def _note_loss(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch and of its examples."""
        self.checks.add(loss, self.current_examples, self._target_losses, self._target_counts)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Return the gradient norm of the optimizer step, and check the step's numbers."""
        self.position.enter("the optimizer's update", self.state.global_step + 1)
        if self._halving is not None:
            self._halving.begin_step()
        if self._weightwise is not None and self.frees_gradients:
            grad_norm = self._weightwise.take_norm()
        norm: Tensor | float | None = super()._get_grad_norm(model, grad_norm)
        if self.state.global_step == 0 and not self.frees_gradients and not self.is_deepspeed_enabled:
            self.checks.tell_without_gradient(self.model)
        if self.checks.end_step(self.state.global_step + 1, norm, self._get_learning_rate()):
            # An optimizer leaves weights without a gradient alone, their moments and weight decay included.
            model.zero_grad(set_to_none=True)
        return norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood over the supervised tokens of the whole optimizer step.

        Dividing by the count of the step, not of the micro-batch, makes the update independent of how the step is
        split into micro-batches and processes.
        """
        if self._halving is None:
            self._count(inputs)
        outputs = model(**self.model_inputs(inputs), supervised=True)
        self._target_losses = outputs.losses.detach()
        count = (inputs["labels"] >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        loss: Tensor = outputs.loss / torch.as_tensor(count, device=outputs.loss.device).clamp(min=1)
        return self._with_other_terms(loss, outputs, num_items_in_batch)

    def _with_other_terms(
        self, loss: Tensor, outputs: SupervisedOutput, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Return the loss of a micro-batch as gradients are averaged, with the variant's and the experts' terms."""
        if num_items_in_batch is not None:
            # The count is over all processes, and gradients are averaged over them.
            loss = loss * self.accelerator.num_processes
        penalty = self._hooks.penalty()
        if penalty is not None:
            loss = loss + penalty / self.current_gradient_accumulation_steps
        if outputs.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        self.position.enter("the backward pass", self.state.global_step + 1, self.position.now.examples)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens, speed, supervised share and memory to the logs of training steps."""
        if "loss" in logs and "train_runtime" not in logs:
            self.checks.check_steps()
            logs.update(self._speed())
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        now, before = self.throughput.collect(), self._reported
        counts = torch.tensor([now.tokens - before.tokens, now.supervised - before.supervised], dtype=torch.float64).to(
            self.args.device
        )
        tokens, supervised = self.accelerator.reduce(counts, "sum").tolist()
        seconds = now.seconds - before.seconds
        self._reported = TokenCounts(**now.as_dict())
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "supervised_share": supervised / tokens if tokens else 0.0,
            "memory_bytes": memory_in_use(),
            "seconds": now.seconds,
        }

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Create the schedule of the learning rate, with a warm-up that begins above zero."""
        is_new = self.lr_scheduler is None
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        try:
            schedule = super().create_scheduler(num_training_steps, optimizer)
            if is_new:
                begin_above_zero(schedule, warmup_steps, num_training_steps)
                check_rates(schedule, warmup_steps, num_training_steps)
        except (ValueError, TypeError, ArithmeticError) as error:
            where = f"training.lr_scheduler_type: {self.args.lr_scheduler_type.value}"
            hint = "Change training.lr_scheduler_kwargs or training.learning_rate."
            raise UserError(f"the schedule cannot be made: {first_line(error)}", where=where, hint=hint) from error
        return schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with the variant's learning rates for some of its parameters."""
        is_new = self.optimizer is None
        if is_new and uses_little_memory(self._context.recipe):
            self.optimizer = self._weightwise = make_weightwise(self, self._context.recipe.training)
            return self._weightwise
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            set_param_group_lrs(optimizer, names, self._hooks)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters with weight decay: none of the added tokens' embeddings.

        Decay would pull them to zero, away from the other embeddings.
        """
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if MODULE_NAME not in name.split(".")]
