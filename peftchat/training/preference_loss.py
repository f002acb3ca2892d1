"""Losses of preference pairs, from the log-probabilities of their answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from peftchat.recipe import Recipe
    from peftchat.recipe.objectives import DpoSection


@dataclass(frozen=True, slots=True)
class AnswerLogProbs:
    """The log-probabilities of the answers of some pairs, in nats, each summed over the answer's trained tokens.

    Attributes:
        chosen: float32, shape (P,).
        rejected: float32, shape (P,).
    """

    chosen: Tensor
    rejected: Tensor

    @classmethod
    def of(cls, answers: Tensor) -> Self:
        """Take answers apart that come as chosen, rejected, chosen, …; shape (2 P,)."""
        return cls(answers[::2], answers[1::2])


def answer_sums(losses: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the log-probability of each answer from the losses of its targets.

    Args:
        losses: negative log-likelihoods, float32, shape (N,).
        counts: targets of each answer; they sum to N.

    Returns:
        float32, shape (answers,), differentiable.
    """
    sizes = torch.as_tensor(counts, device=losses.device)
    owners = torch.repeat_interleave(torch.arange(len(sizes), device=losses.device), sizes, output_size=len(losses))
    return torch.zeros(len(sizes), dtype=losses.dtype, device=losses.device).index_add(0, owners, -losses)


@dataclass(frozen=True, slots=True)
class PairLoss:
    """The loss of some pairs, and what is told of them.

    Attributes:
        losses: of each pair, float32, shape (P,).
        rewards: `beta` times how much more likely each answer became than under the reference, detached.
        likelihood_weight: the weight of the chosen answers' mean loss per token, which is added.
    """

    losses: Tensor
    rewards: AnswerLogProbs
    likelihood_weight: float = 0.0


def pair_loss(recipe: "Recipe", policy: AnswerLogProbs, reference: AnswerLogProbs, tokens: AnswerLogProbs) -> PairLoss:
    """Return the loss of pairs by the recipe's objective.

    Args:
        recipe: its objective, and the section of the same name.
        policy: by the model that is trained, differentiable.
        reference: by the reference.
        tokens: the number of trained tokens of each answer.
    """
    assert recipe.dpo is not None
    return dpo_loss(recipe.dpo, policy, reference, tokens)


def dpo_loss(dpo: "DpoSection", policy: AnswerLogProbs, reference: AnswerLogProbs, tokens: AnswerLogProbs) -> PairLoss:
    """Return the loss of direct preference optimization and its relatives, as TRL's `DPOTrainer` defines them.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/dpo_trainer.py
    """
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    margin = dpo.beta * (chosen - rejected)
    if dpo.loss_type == "sigmoid":
        losses = -F.logsigmoid(margin)
    elif dpo.loss_type == "hinge":
        losses = torch.relu(1 - margin)
    elif dpo.loss_type == "ipo":
        losses = (chosen / tokens.chosen - rejected / tokens.rejected - 1 / (2 * dpo.beta)) ** 2
    else:
        share = dpo.label_smoothing
        losses = (share * F.logsigmoid(-margin) - (1 - share) * F.logsigmoid(margin)) / (1 - 2 * share)
    rewards = AnswerLogProbs(dpo.beta * chosen.detach(), dpo.beta * rejected.detach())
    return PairLoss(losses, rewards, dpo.rpo_alpha or 0.0)


PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                "logps/rejected")  # fmt: skip
"""What is told of pairs, by TRL's names: means over pairs. A pair is right where the chosen answer has the higher
reward, and half right where both have the same; log-probabilities are those of whole answers under the model."""


def pair_metrics(loss: PairLoss, policy: AnswerLogProbs) -> Tensor:
    """Return the metrics of each pair in the order of `PAIR_METRICS`, float64, shape (metrics, P), detached."""
    chosen, rejected = loss.rewards.chosen, loss.rewards.rejected
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    rows = (chosen, rejected, right, chosen - rejected, policy.chosen, policy.rejected)
    return torch.stack([row.detach().double() for row in rows])
