"""Evaluation of held-out conversations: each supervised token counts once, on any number of processes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerControl

from peftchat.chat_template.loss_mask import TARGET_KINDS
from peftchat.runs.eval_losses import ConversationLoss
from peftchat.training.checkpoint_trainer import CheckpointTrainer
from peftchat.training.held_out import HeldOutCase, HeldOutLosses, write_losses
from peftchat.training.questions import answer_questions

if TYPE_CHECKING:
    from peftchat.dataset.cache import Split
    from peftchat.dataset.collator import Batch, ChatCollator


# Batch entries that are counts or another batch, not arguments of the model.
_COUNTS = (
    "real_tokens", "attended_pairs", "tracked_counts", "examples", "target_counts", "pack_sizes", "others",
)  # fmt: skip


class EvaluatingTrainer(CheckpointTrainer):
    """Evaluates the held-out examples of a run.

    Attributes:
        control: what transformers does behind the present step.
    """

    control: TrainerControl
    _collators: "Mapping[Split, ChatCollator]"
    _held_out: HeldOutLosses
    _evaluated_step: int | None

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the model in a batch."""
        arguments: dict[str, Any] = {name: value for name, value in inputs.items() if name not in _COUNTS}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        return arguments

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the mean loss per supervised token of the held-out examples, in nats.

        transformers averages over batches and counts wrapped-around examples twice. Here every token counts once,
        for any batch size and number of processes.
        """
        metrics = self.held_out_metrics(metric_key_prefix)
        if self.state.global_step == 0:
            self.write_held_out_losses()
        self.position.enter("answering questions", self.state.global_step)
        with self.throughput.paused():
            metrics |= answer_questions(self.causal_model, self._context, self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def write_held_out_losses(self) -> Sequence[ConversationLoss]:
        """Write the last evaluation's losses into the run folder; every process must call it.

        A resumed run that had evaluated its last step already evaluates it here. Without held-out data there are none.

        Returns:
            Those of conversations.
        """
        if self.eval_dataset is None:
            return ()
        if self._evaluated_step is None:
            self.held_out_metrics()
        return self._write_held_out(before=self._evaluated_step == 0)

    def _write_held_out(self, *, before: bool) -> Sequence[ConversationLoss]:
        """Write the last evaluation's losses; return those of conversations."""
        return write_losses(self._held_out, self._context, self.gather_objects, before=before)

    def held_out_cases(self) -> list[HeldOutCase]:
        """Return the last evaluation's loss of each case, in order; every process must call it."""
        found = self._held_out.conversations(self._context.splits["eval"].store, self.gather_objects)
        return [HeldOutCase(one.tokens, one.loss) for one in found]

    def held_out_metrics(self, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Compute what `evaluate` returns, without logging it; every process must call it."""
        sums = torch.zeros(3, dtype=torch.float64)
        held_out = HeldOutLosses()
        not_finite: list[int] = []
        for of_batch, batch, inputs in self._evaluation_batches("eval"):
            with self.compute_loss_context_manager():
                outputs = self.model_wrapped(**self.model_inputs(inputs), supervised=True)
            if of_batch is None:
                continue
            count = (inputs["labels"] >= 0).sum()
            # Single losses are summed in float64, so that those of all conversations sum to this one.
            losses = outputs.losses.double()
            added = torch.stack([losses.sum(), outputs.correct.double(), count.double()]).cpu()
            not_finite += [] if torch.isfinite(added).all() else batch["examples"].tolist()
            sums += added
            held_out.add(self._collators["eval"].target_cells(of_batch), losses.cpu().numpy())
        loss, correct, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        by_kind = torch.from_numpy(held_out.by_kind())
        kind_sums = self.accelerator.reduce(by_kind.to(self.args.device), "sum").T.tolist()
        self.checks.check_evaluation(loss / max(count, 1), not_finite, self.state.global_step)
        self._held_out, self._evaluated_step = held_out, self.state.global_step
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(count, 1),
            f"{metric_key_prefix}_accuracy": correct / max(count, 1),
            f"{metric_key_prefix}_tokens": int(count),
        }
        for kind, (kind_loss, kind_count) in zip(TARGET_KINDS, kind_sums, strict=True):
            if kind_count:
                metrics[f"{metric_key_prefix}_loss_{kind}"] = kind_loss / kind_count
                metrics[f"{metric_key_prefix}_tokens_{kind}"] = int(kind_count)
        return metrics

    def _evaluation_batches(self, split: "Split") -> "Iterator[tuple[list[Any] | None, Batch, Batch]]":
        """Yield this process's part of the batches of a split, in order, with the model set to evaluate.

        Yields:
            The packs of the batch, the batch, and the same on the model's device. ZeRO-3 gathers weights in all
            processes at once, so a process without a batch gets the last one once more, without packs: it counts
            nothing of it.
        """
        collator, packs = self._collators[split], self.eval_dataset if split == "eval" else self.train_dataset
        size = self.args.per_device_eval_batch_size
        batches = [range(start, min(start + size, len(packs))) for start in range(0, len(packs), size)]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        model = self.model_wrapped
        with self.throughput.paused(), torch.no_grad():
            was_training = model.training
            model.eval()
            for first in range(0, len(batches), world):
                index = first + rank
                of_batch = [packs[number] for number in batches[min(index, len(batches) - 1)]]
                batch = collator(of_batch)
                self.position.enter("the evaluation", self.state.global_step, batch["examples"], split)
                yield of_batch if index < len(batches) else None, batch, self._prepare_inputs(batch)
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            model.train(was_training)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare an evaluation with the best one, and write a checkpoint of a better one that is to be kept."""
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if is_best and self._context.recipe.training.load_best_model_at_end:
            # transformers notes the step only where `save_strategy` writes checkpoints by itself.
            self.state.best_global_step = self.state.global_step
            self.control.should_save = True
        return is_best

    def has_evaluated(self, step: int) -> bool:
        """Whether the model was evaluated after a step."""
        return any(line.get("step") == step and "eval_loss" in line for line in self.state.log_history)
