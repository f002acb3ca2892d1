"""Label trainer: answers that are good or bad, each for itself (Kahneman-Tversky optimization)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peftchat.runs.eval_losses import ConversationLoss
from peftchat.training.preference_loss import AnswerLogProbs, PairLoss, answer_sums
from peftchat.training.preference_trainer import PreferenceTrainer

if TYPE_CHECKING:
    from peftchat.dataset.cache import Split
    from peftchat.recipe.objectives import KtoSection

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

    The second one is never trained: how likely it became is the KL term, a mean over the forward pass of all processes.
    A loss is a mean over the answers of the whole optimizer step.
    """

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
        self, split: "Split", examples: Any, losses: Tensor, counts: Sequence[int],
        reference: AnswerLogProbs | None, *, is_counted: bool = True,
    ) -> tuple[AnswerLogProbs, PairLoss, Tensor]:  # fmt: skip
        """Return log-probabilities, losses and the sums of the metrics; every process must call it."""
        kto = self._recipe.kto
        assert kto is not None and reference is not None
        policy, labels = AnswerLogProbs.of(answer_sums(losses, counts)), self._labels(split, examples)
        rises = (policy.rejected - reference.rejected).detach().double()
        share = self._sum_over_processes(torch.stack([rises.sum(), rises.new_tensor(len(rises))]) * is_counted)
        kl = (share[0] / share[1].clamp(min=1)).clamp(min=0).to(losses.dtype)
        if kto.loss_type != "kto":
            kl = torch.zeros_like(kl)
        found = kto_loss(kto, policy, reference, labels, kl)
        rewards, own = found.rewards.chosen.double(), policy.chosen.detach().double()
        beyond = torch.where(labels, rewards - kto.beta * kl, kto.beta * kl - rewards)
        right = (beyond > 0).double() + 0.5 * (beyond == 0)
        good, bad = labels.double(), (~labels).double()
        sums = [rewards * good, rewards * bad, own * good, own * bad, right, kl.expand(len(right)), good, bad]
        sums.append(torch.ones_like(right))
        return policy, found, torch.stack([one.double().sum() for one in sums])

    def held_out_metrics(self, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the mean loss of the held-out answers, and their metrics; every process must call it.

        `eval_accuracy` is the share of answers whose reward is on the side of the KL term that their label names.
        """
        loss_sum, token_sum, sums = 0.0, 0, self._no_sums()
        not_finite: list[int] = []
        for of_batch, batch, inputs in self._evaluation_batches("eval"):
            examples, counts = batch["examples"], batch["target_counts"]
            with self.compute_loss_context_manager():
                reference = self._reference_of("eval", examples, inputs, counts)
                outputs = self.model_wrapped(**self.model_inputs(inputs), supervised=True)
            _, found, measured = self._measure(
                "eval", examples, outputs.losses, counts, reference, is_counted=of_batch is not None
            )
            if of_batch is None:
                continue
            if not torch.isfinite(found.losses).all():
                not_finite += examples.tolist()
            loss_sum += float(found.losses.double().sum())
            token_sum += int(counts[::2].sum())
            sums += measured
        totals = torch.tensor([loss_sum, token_sum], dtype=torch.float64, device=self.args.device)
        loss_sum, tokens, *reduced = self._sum_over_processes(torch.cat([totals, sums])).tolist()
        means, answers = self._means(reduced), reduced[-1]
        loss = loss_sum / max(answers, 1)
        self._pairs_step = self.state.global_step
        self.checks.check_evaluation(loss, not_finite, self.state.global_step)
        return {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_tokens": int(tokens),
            f"{metric_key_prefix}_accuracy": means.get("rewards/accuracies", 0.0),
            f"{metric_key_prefix}_answers": int(answers),
            **{f"{metric_key_prefix}_{name}": value for name, value in means.items()},
        }

    def write_held_out_losses(self) -> Sequence[ConversationLoss]:
        """Return nothing: labeled answers have no loss of their own that another model's could be compared with."""
        return ()
