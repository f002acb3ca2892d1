"""Label trainer: answers that are good or bad, each for itself (Kahneman-Tversky optimization)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftchat.runs.eval_labels import AnswerResult, LabelSummary, write_eval_answers
from peftchat.runs.eval_losses import ConversationLoss
from peftchat.training.held_out import HeldOutCase
from peftchat.training.preference_loss import REFERENCE_KL, AnswerLogProbs, AnswerPass, PairLoss, answer_sums
from peftchat.training.preference_trainer import PreferenceTrainer

if TYPE_CHECKING:
    from peftchat.dataset.cache import Split
    from peftchat.recipe.objectives import KtoSection
    from peftchat.training.reference_kl import NextTokens

LABEL_METRICS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "rewards/accuracies", "kl")
"""What is told of labeled answers, by TRL's names: means over good (chosen), bad (rejected) and all answers."""

_COUNTED_BY = (0, 1, 0, 1, 2, 2)
"""Which count each of the metrics is divided by: that of good answers, of bad ones, or of all."""


def kto_loss(
    kto: "KtoSection", policy: AnswerLogProbs, reference: AnswerLogProbs, labels: Tensor, kl: Tensor
) -> PairLoss:
    """Return the loss of labeled answers, as TRL's `KTOTrainer` defines it.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/kto_trainer.py

    Args:
        kto: the options.
        policy: the answers under the model as `chosen`; other answers to the same prompts as `rejected`.
        reference: the same under the reference.
        labels: whether each answer is good, bool, shape (P,).
        kl: how much more likely the other answers became, at least 0, shape ().
    """
    ratios = policy.chosen - reference.chosen
    if kto.loss_type == "kto":
        losses = 1 - F.sigmoid(kto.beta * torch.where(labels, ratios - kl, kl - ratios))
    else:
        losses = torch.where(labels, 1 - F.sigmoid(kto.beta * ratios), F.sigmoid(kto.beta * ratios))
    weights = torch.where(labels, kto.desirable_weight, kto.undesirable_weight)
    others = (policy.rejected - reference.rejected).detach()
    return PairLoss(weights * losses, AnswerLogProbs(kto.beta * ratios.detach(), kto.beta * others))


class LabelTrainer(PreferenceTrainer):
    """Trains on labeled answers. A pair of examples is an answer and another record's answer to its prompt.

    The second one is never trained, and is computed in a pass of its own: how likely it became is the KL term, a mean
    over the forward pass of all processes, and in an evaluation over all held-out answers. A loss is a mean over the
    answers of the whole optimizer step.
    """

    answers: Sequence[AnswerResult] = ()
    _kl = 0.0

    def _untrained(self, inputs: Mapping[str, Any], counts: Sequence[int]) -> Tensor:
        """Return the log-probabilities of the other answers, shape (P,), without a gradient."""
        with torch.no_grad():
            outputs = self.model(**self.model_inputs(inputs["others"]), supervised=True)
        return answer_sums(outputs.losses, counts[1::2])

    def _policy(self, losses: Tensor, counts: Sequence[int], untrained: Tensor | None) -> AnswerLogProbs:
        """Return the log-probabilities of the answers as chosen ones, and of the other answers as rejected ones."""
        assert untrained is not None
        return AnswerLogProbs(answer_sums(losses, counts[::2]), untrained)

    def _answers(
        self, model: nn.Module, inputs: Mapping[str, Any], counts: Sequence[int], reference: "NextTokens | None" = None
    ) -> AnswerPass:
        """Return what a model finds of every answer and other answer in turn; only the former are compared."""
        own = super()._answers(model, inputs, counts[::2], reference)
        others = super()._answers(model, inputs["others"], counts[1::2])
        return replace(own, log_probs=torch.stack([own.log_probs, others.log_probs], dim=1).flatten())

    def _no_sums(self) -> Tensor:
        """Return the sums of the metrics, and the numbers of good answers, of bad ones and of all; all zero."""
        return torch.zeros(len(LABEL_METRICS) + 3, dtype=torch.float64, device=self.args.device)

    def _means(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the means by name; those over no answer are left out."""
        *totals, good, bad, everything = sums
        counts = (good, bad, everything)
        of_each = zip(LABEL_METRICS, totals, (counts[place] for place in _COUNTED_BY), strict=True)
        means = {name: total / count for name, total, count in of_each if count}
        if good and bad:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def _labels(self, split: "Split", examples: Any) -> Tensor:
        """Return whether the answers of a batch are good, bool, shape (P,)."""
        known = np.asarray(self._context.splits[split].stats.labels)
        return torch.as_tensor(known[np.asarray(examples)[::2] // 2], device=self.args.device)

    def _measure(
        self, split: "Split", examples: Any, policy: AnswerLogProbs, counts: Sequence[int],
        reference: AnswerLogProbs | None,
    ) -> tuple[PairLoss, Tensor]:  # fmt: skip
        """Return the losses and the sums of the metrics; every process must call it."""
        assert reference is not None
        found, _, sums = self._judge(policy, reference, self._labels(split, examples))
        return found, sums

    def _judge(
        self, policy: AnswerLogProbs, reference: AnswerLogProbs, labels: Tensor
    ) -> tuple[PairLoss, Tensor, Tensor]:
        """Return the losses, which answers are right, and the sums of the metrics; every process must call it."""
        kto = self._recipe.kto
        assert kto is not None
        rises = (policy.rejected - reference.rejected).detach().double()
        share = self._sum_over_processes(torch.stack([rises.sum(), rises.new_tensor(len(rises))]))
        kl = (share[0] / share[1].clamp(min=1)).clamp(min=0).to(policy.chosen.dtype)
        if kto.loss_type != "kto":
            kl = torch.zeros_like(kl)
        found = kto_loss(kto, policy, reference, labels, kl)
        rewards, own = found.rewards.chosen.double(), policy.chosen.detach().double()
        beyond = torch.where(labels, rewards - kto.beta * kl, kto.beta * kl - rewards)
        right = (beyond > 0).double() + 0.5 * (beyond == 0)
        good, bad = labels.double(), (~labels).double()
        sums = [rewards * good, rewards * bad, own * good, own * bad, right, kl.expand(len(right)), good, bad]
        sums.append(torch.ones_like(right))
        return found, right, torch.stack([one.double().sum() for one in sums])

    def held_out_metrics(self, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the mean loss of the held-out answers, and their metrics; every process must call it.

        `eval_accuracy` is the share of answers whose reward is on the side of the KL term that their label names. The
        term is a mean over all held-out answers, so that no number depends on how they are spread over batches.
        """
        examples, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        own, base, kl = (torch.zeros(0, device=self.args.device) for _ in range(3))
        for of_batch, batch, inputs in self._evaluation_batches("eval"):
            found_answers, reference = self._held_out_answers(batch, inputs)
            if of_batch is None or reference is None:
                continue
            if found_answers.kl is not None:
                kl = torch.cat([kl, found_answers.kl])
            examples = np.concatenate([examples, batch["examples"]])
            counts = np.concatenate([counts, batch["target_counts"]])
            own = torch.cat([own, found_answers.log_probs])
            base = torch.cat([base, torch.stack([reference.chosen, reference.rejected], dim=1).flatten()])
        labels = self._labels("eval", examples)
        found, right, sums = self._judge(AnswerLogProbs.of(own), AnswerLogProbs.of(base), labels)
        losses = found.losses.double()
        totals = torch.stack([losses.sum(), losses.new_tensor(counts[::2].sum()), kl.double().sum()])
        loss_sum, tokens, kl_sum, *reduced = self._sum_over_processes(torch.cat([totals, sums])).tolist()
        means, answers = self._means(reduced), reduced[-1]
        loss, self._kl = loss_sum / max(answers, 1), means.get("kl", 0.0)
        store = self._context.splits["eval"].store
        divergences = kl.tolist() if self.measures_kl else [None] * len(labels)
        self.answers = [
            AnswerResult(example, store[example].source, *one)
            for example, *one in zip(
                examples[::2].tolist(), labels.tolist(), counts[::2].tolist(), own[::2].tolist(),
                found.rewards.chosen.tolist(), right.tolist(), losses.tolist(), divergences, strict=True,
            )
        ]  # fmt: skip
        self._evaluated_step = self.state.global_step
        finite = torch.isfinite(losses).cpu().numpy()
        self.checks.check_evaluation(loss, examples[::2][~finite].tolist(), self.state.global_step)
        return {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_tokens": int(tokens),
            f"{metric_key_prefix}_accuracy": means.get("rewards/accuracies", 0.0),
            f"{metric_key_prefix}_answers": int(answers),
            **({f"{metric_key_prefix}_{REFERENCE_KL}": kl_sum / max(tokens, 1)} if self.measures_kl else {}),
            **{f"{metric_key_prefix}_{name}": value for name, value in means.items()},
        }

    def _write_held_out(self, *, before: bool) -> Sequence[ConversationLoss]:
        """Write the last evaluation's answers into the run folder; return nothing."""
        found = self._of_all_processes(self.answers)
        if self._context.is_main:
            written = write_eval_answers(self._context.run_folder.eval_answers, found, before=before)
            self.label_summary = LabelSummary.of(written, self._kl)
        return ()

    def held_out_cases(self) -> list[HeldOutCase]:
        """Return the last evaluation's loss of each answer; every process must call it."""
        return [HeldOutCase(1, one.loss, one.right) for one in self._of_all_processes(self.answers)]
