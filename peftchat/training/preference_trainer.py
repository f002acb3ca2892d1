"""Preference trainer: the trainer of conversations with a loss of pairs, and metrics of pairs."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from peftchat.dataset.pairs import PairCollator
from peftchat.errors import UserError
from peftchat.models.loading import VARLEN
from peftchat.runs.eval_labels import AnswerResult
from peftchat.runs.eval_losses import ConversationLoss
from peftchat.runs.eval_pairs import PairResult, PairSummary, write_eval_pairs
from peftchat.training.held_out import HeldOutCase
from peftchat.training.preference_loss import (
    PAIR_METRICS,
    REFERENCE_KL,
    AnswerLogProbs,
    AnswerPass,
    PairLoss,
    answer_sums,
    pair_loss,
    pair_metrics,
)
from peftchat.training.reference import ReferenceLogProbs, reference_model
from peftchat.training.shared_prompts import TOLERANCES, can_share_prompts, computes_shared_prompts
from peftchat.training.trainer import ChatTrainer

if TYPE_CHECKING:
    from trl import SFTConfig

    from peftchat.dataset.cache import Split
    from peftchat.dataset.collator import Batch, BatchLayout
    from peftchat.runs.checkpoint import Checkpoint
    from peftchat.training.context import TrainContext
    from peftchat.training.model import TrainableModel
    from peftchat.training.reference_kl import NextTokens

Result = TypeVar("Result", PairResult, AnswerResult)


class PreferenceTrainer(ChatTrainer):
    """Trains on pairs of answers. TRL's `DPOTrainer` has the same losses (`peftchat.training.preference_loss`).

    The reference is the model itself with its adapter switched off (`peftchat.training.reference`), so no second model
    is in memory. A loss is a mean over the pairs of the whole optimizer step.

    Args:
        context: the run.
        model: the model to train.
        config: TRL's arguments.
        layout: the batch layout that the model's attention needs.
    """

    def __init__(
        self, context: "TrainContext", model: "TrainableModel", config: "SFTConfig", layout: "BatchLayout"
    ) -> None:
        super().__init__(context, model, config, layout)
        self._recipe = context.recipe
        self._initial_embeddings = model.initial_embeddings
        self._start = model.start
        # ZeRO-3 gathers trained weights for each pass, so that their first values cannot be put back for several.
        self._reference_first = self._recipe.method == "full" or context.distributed.strategy == "zero3"
        self.reference = ReferenceLogProbs(context.content.digests)
        # A base that changed, and may, makes the numbers of the checkpoint those of something else.
        changed = context.content.record.allowed_changes and self._recipe.method != "full"
        if context.checkpoint is not None and not changed:
            self.reference.load(context.checkpoint.path)
        self._sums = self._no_sums()
        self.pairs: list[PairResult] = []
        self.pair_summary: PairSummary | None = None
        self._likelihood_weight = 0.0
        attention, longest = self.causal_model.config._attn_implementation, self._recipe.data.max_length
        shares = attention == VARLEN and can_share_prompts(self.causal_model.config, longest)
        self.share_prompts(shares and not self._recipe.has_labels)

    def share_prompts(self, shares: bool) -> None:
        """Set whether both answers of a pair go on from one prompt in later batches."""
        for collator in self._collators.values():
            if isinstance(collator, PairCollator):
                collator.shares_prompts = shares

    @property
    def shares_prompts(self) -> bool:
        """Whether both answers of a pair go on from one prompt."""
        collator = self._collators["train"]
        return isinstance(collator, PairCollator) and collator.shares_prompts

    def check_batches(self, vocabulary: int) -> None:
        """Give each answer a prompt of its own where the model computes a shared one otherwise."""
        if not self.shares_prompts or self.layout != "varlen":
            return
        tolerance = TOLERANCES[self._recipe.model.computed_in]
        if not computes_shared_prompts(self.model_wrapped, vocabulary, self.args.device, tolerance):
            self.share_prompts(False)
            self._context.notes.tell("The prompt of a pair is computed twice: this model does not continue it twice.")

    def _no_sums(self) -> Tensor:
        """Return the sums of the metrics and the number of pairs, all zero."""
        return torch.zeros(len(PAIR_METRICS) + 1, dtype=torch.float64, device=self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the pairs of the optimizer step and the trained tokens of their chosen answers, shape (2,)."""
        counts = [batch["target_counts"] for batch in batch_samples]
        items = torch.tensor([sum(len(one) for one in counts) // 2, sum(int(one[::2].sum()) for one in counts)])
        items = items.to(device)
        if self.accelerator.num_processes > 1:
            items = self._sum_over_processes(items)
        return items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean loss over the pairs of the whole optimizer step.

        The likelihood of the chosen answers, where the recipe adds it, is a mean over their tokens in the step.
        """
        self._count(inputs)
        counts = self._target_counts
        reference = self._reference_of("train", self.current_examples, inputs, counts)
        if not isinstance(num_items_in_batch, Tensor):
            num_items = torch.tensor([len(counts) // 2, int(counts[::2].sum())], device=inputs["labels"].device)
        else:
            num_items = num_items_in_batch

        untrained = self._untrained(inputs, counts)

        def weigh(losses: Tensor) -> Tensor:
            """Return this batch's part of the loss of the step."""
            policy = self._policy(losses, counts, untrained)
            found, sums = self._measure("train", self.current_examples, policy, counts, reference)
            self._sums += sums
            loss = found.losses.sum() / num_items[0]
            if found.likelihood_weight:
                loss = loss - found.likelihood_weight * policy.chosen.sum() / num_items[1]
            return loss

        outputs = model(**self.model_inputs(inputs), supervised=True, weigh=weigh)
        loss = outputs.loss
        return self._with_other_terms(loss, outputs, num_items_in_batch)

    def _note_loss(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch; that of single pairs is nothing to judge conversations by."""
        self.checks.add(loss, self.current_examples[::2])

    def _untrained(self, inputs: Mapping[str, Any], counts: Sequence[int]) -> Tensor | None:
        """Return the log-probabilities of the answers that take part without a gradient; pairs have none."""
        return None

    def _policy(self, losses: Tensor, counts: Sequence[int], untrained: Tensor | None) -> AnswerLogProbs:
        """Return the model's log-probabilities of the answers of a batch, from the losses of its targets."""
        return AnswerLogProbs.of(answer_sums(losses, counts))

    def _answers(
        self, model: nn.Module, inputs: Mapping[str, Any], counts: Sequence[int], reference: "NextTokens | None" = None
    ) -> AnswerPass:
        """Return what a model finds of every answer of a batch, where no gradient is computed.

        Args:
            model: the model.
            inputs: the batch.
            counts: trained tokens of each answer.
            reference: what the reference says of the same tokens, for the KL divergence from it.
        """
        outputs = model(**self.model_inputs(inputs), supervised=True, reference=reference)
        kl = None if outputs.kl is None else -answer_sums(outputs.kl, counts)
        return AnswerPass(answer_sums(outputs.losses, counts), outputs.next_tokens, kl)

    def _measure(
        self, split: "Split", examples: Any, policy: AnswerLogProbs, counts: Sequence[int],
        reference: AnswerLogProbs | None,
    ) -> tuple[PairLoss, Tensor]:  # fmt: skip
        """Return the losses, and the sums of the metrics with the number of pairs; every process must call it."""
        found = self._pair_loss(policy, counts, reference)
        metrics = pair_metrics(found, policy)
        return found, torch.cat([metrics.sum(1), metrics.new_tensor([metrics.shape[1]])])

    def _means(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the means of the metrics by name, from what `_measure` counted; nothing without pairs."""
        *totals, count = sums
        return {name: value / count for name, value in zip(PAIR_METRICS, totals, strict=True)} if count else {}

    def _pair_loss(self, policy: AnswerLogProbs, counts: Sequence[int], reference: AnswerLogProbs | None) -> PairLoss:
        """Return the loss of each pair."""
        tokens = AnswerLogProbs.of(torch.as_tensor(counts, device=policy.chosen.device))
        return pair_loss(self._recipe, policy, reference, tokens)

    def _reference_of(
        self, split: "Split", examples: Any, inputs: Mapping[str, Tensor], counts: Sequence[int]
    ) -> AnswerLogProbs | None:
        """Return the reference's log-probabilities of the answers of a batch; None without a reference."""
        if not self._recipe.has_reference:
            return None

        places = np.asarray(examples)
        lacks = self.reference.lacks(split, places)
        if self.is_deepspeed_enabled:
            # ZeRO-3 gathers weights in all processes at once.
            lacks = bool(self._sum_over_processes(torch.tensor(float(lacks), device=self.args.device)))
        if lacks:
            self.reference.add(split, places, self._reference_answers(inputs, counts).log_probs)
        return AnswerLogProbs.of(self.reference.of(split, places).to(inputs["labels"].device))

    def prepare(self) -> None:
        """Compute the reference of all pairs where training changes its weights; every process must call it.

        Raises:
            UserError: a resumed run lacks the reference of some pairs, whose weights are gone.
        """
        if not self._recipe.has_reference or not self._reference_first:
            return
        splits = [split for split in self._context.splits if self.reference.lacks(split)]
        checkpoint = self._context.checkpoint
        if splits and checkpoint is not None:
            raise UserError(
                "the checkpoint lacks the reference of some pairs, and the weights that it is made from are trained",
                where=str(checkpoint.path),
                hint="Resume with the data that the run was started with, or start a new run.",
            )
        for split in splits:
            for of_batch, batch, inputs in self._evaluation_batches(split):
                with self.compute_loss_context_manager():
                    log_probs = self._reference_answers(inputs, batch["target_counts"]).log_probs
                if of_batch is not None:
                    self.reference.add(split, batch["examples"], log_probs)
        if splits:
            self.reference.merge(self.gather_objects(self.reference.known))
            pairs = sum(len(self.reference.known[split]) for split in splits) // 2
            self._context.notes.tell(f"The reference of {pairs:,} pairs was computed before the first step.")

    def _reference_answers(self, inputs: Mapping[str, Any], counts: Sequence[int]) -> AnswerPass:
        """Return what the reference finds of every answer of a batch.

        A reference that is computed before the first step is the model itself, with its adapter off if it is new.
        """
        if not self._reference_first:
            with reference_model(self.model, self._initial_embeddings, self._start):
                return self._answers(self.model, inputs, counts)
        # All weights, and an adapter that goes on from a run, are their own reference at the start.
        is_own = self._recipe.method == "full" or self._start is not None
        with nullcontext() if is_own else reference_model(self.model, None):
            return self._answers(self.model_wrapped, inputs, counts)

    @property
    def measures_kl(self) -> bool:
        """Whether evaluations measure the KL divergence from the reference, which takes a pass of the reference each.

        The weights of a reference that was computed before the first step are gone, except for an adapter that is
        switched off, and no token was added.
        """
        if not self._recipe.has_reference or not self.compares_with_reference:
            return False
        is_kept = self._recipe.method != "full" and self._start is None and self._initial_embeddings is None
        return is_kept or not self._reference_first

    def _held_out_answers(self, batch: "Batch", inputs: Mapping[str, Any]) -> tuple[AnswerPass, AnswerLogProbs | None]:
        """Return what the model finds of the answers of a held-out batch, and the reference's log-probabilities."""
        counts, of_reference = batch["target_counts"], None
        with self.compute_loss_context_manager():
            if self.measures_kl:
                found = self._reference_answers(inputs, counts)
                of_reference = found.next_tokens
                if self.reference.lacks("eval", batch["examples"]):
                    self.reference.add("eval", batch["examples"], found.log_probs)
            reference = self._reference_of("eval", batch["examples"], inputs, counts)
            return self._answers(self.model_wrapped, inputs, counts, of_reference), reference

    def held_out_metrics(self, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the mean loss of the held-out pairs, and their metrics; every process must call it.

        `eval_accuracy` is the share of pairs whose chosen answer has the higher reward. A pair counts a half where
        both have the same, as before the first step.
        """
        loss_sum, token_sum, chosen_tokens, kl_sum = 0.0, 0, 0, 0.0
        sums = self._no_sums()
        results: list[PairResult] = []
        not_finite: list[int] = []
        store = self._context.splits["eval"].store
        for of_batch, batch, inputs in self._evaluation_batches("eval"):
            counts = batch["target_counts"]
            answers, reference = self._held_out_answers(batch, inputs)
            if of_batch is None:
                continue
            policy = AnswerLogProbs.of(answers.log_probs)
            found = self._pair_loss(policy, counts, reference)
            losses, self._likelihood_weight = found.losses.double(), found.likelihood_weight
            if not torch.isfinite(losses).all():
                not_finite += batch["examples"].tolist()
            metrics = pair_metrics(found, policy)
            loss_sum += float(losses.sum())
            token_sum += int(counts.sum())
            chosen_tokens += int(counts[::2].sum())
            sums += torch.cat([metrics.sum(1), metrics.new_tensor([metrics.shape[1]])])
            sources = [store[int(index)].source for index in batch["examples"][::2]]
            results += PairResult.of_batch(
                batch["examples"][::2].tolist(), sources, counts.tolist(), losses.tolist(),
                {name: row.tolist() for name, row in zip(PAIR_METRICS, metrics, strict=True)},
                None if answers.kl is None else answers.kl.tolist(),
            )  # fmt: skip
            kl_sum += 0.0 if answers.kl is None else float(answers.kl.double().sum())
        totals = [loss_sum, token_sum, chosen_tokens, kl_sum]
        of_process = torch.tensor(totals, dtype=torch.float64, device=self.args.device)
        reduced = self._sum_over_processes(torch.cat([of_process, sums]))
        loss_sum, tokens, chosen_tokens, kl_sum, *means, count = reduced.tolist()
        likelihood = means[PAIR_METRICS.index("logps/chosen")] / max(chosen_tokens, 1)
        loss = loss_sum / max(count, 1) - self._likelihood_weight * likelihood
        self.pairs, self._evaluated_step = results, self.state.global_step
        self.checks.check_evaluation(loss, not_finite, self.state.global_step)
        return {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_tokens": int(tokens),
            f"{metric_key_prefix}_accuracy": means[PAIR_METRICS.index("rewards/accuracies")] / max(count, 1),
            f"{metric_key_prefix}_pairs": int(count),
            **({f"{metric_key_prefix}_{REFERENCE_KL}": kl_sum / max(tokens, 1)} if self.measures_kl else {}),
            **{
                f"{metric_key_prefix}_{name}": value / max(count, 1)
                for name, value in zip(PAIR_METRICS, means, strict=True)
            },
        }

    def _of_all_processes(self, results: Sequence[Result]) -> list[Result]:
        """Return the last evaluation's results of all processes, in order; every process must call it."""
        gathered: list[Sequence[Result]] = self.gather_objects(results)
        return sorted((one for part in gathered for one in part), key=lambda one: one.example)

    def _write_held_out(self, *, before: bool) -> Sequence[ConversationLoss]:
        """Write the last evaluation's pairs into the run folder; return nothing."""
        found = self._of_all_processes(self.pairs)
        if self._context.is_main:
            written = write_eval_pairs(self._context.run_folder.eval_pairs, found, before=before)
            self.pair_summary = PairSummary.of(written)
        return ()

    def held_out_cases(self) -> list[HeldOutCase]:
        """Return the last evaluation's loss of each pair, with its share of the likelihood; their mean is the loss."""
        found = self._of_all_processes(self.pairs)
        weight = self._likelihood_weight * len(found) / max(1, sum(one.chosen_tokens for one in found))
        return [HeldOutCase(1, one.loss - weight * one.chosen_logp, one.right) for one in found]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the pairs' metrics since the last line to the logs of training steps."""
        if "loss" in logs and "train_runtime" not in logs:
            logs.update(self._means(self._sum_over_processes(self._sums).tolist()))
            self._sums = self._no_sums()
        super().log(logs, start_time)

    def _save_more(self, checkpoint: "Checkpoint") -> None:
        """Write the reference's log-probabilities, so that a resumed run has the same ones."""
        if not self._recipe.has_reference:
            return
        self.reference.merge(self.gather_objects(self.reference.known))
        if self.args.should_save:
            self.reference.save(checkpoint.path)
