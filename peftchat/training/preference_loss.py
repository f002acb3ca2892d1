"""Losses of preference pairs, from the log-probabilities of their answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from peftchat.recipe import Recipe
    from peftchat.recipe.objectives import CpoSection, DpoSection, OrpoSection, SimpoSection
    from peftchat.training.reference_kl import NextTokens


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


@dataclass(frozen=True, slots=True)
class AnswerPass:
    """What a forward pass without gradients finds of the answers of a batch.

    Attributes:
        log_probs: of each answer, in nats, summed over its trained tokens, float32, shape (answers,).
        next_tokens: what the model says of the tokens of those answers that are trained.
        kl: the KL divergence from the reference, summed over the trained tokens of each of these answers, float32; None
            where none was asked for.
    """

    log_probs: Tensor
    next_tokens: "NextTokens"
    kl: Tensor | None


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
        rewards: `beta` times the log-probability of each answer, detached: less that of the reference, or its mean per
            token, as the objective has it.
        likelihood_weight: the weight of the chosen answers' mean loss per token, which is added.
    """

    losses: Tensor
    rewards: AnswerLogProbs
    likelihood_weight: float = 0.0


def pair_loss(
    recipe: "Recipe", policy: AnswerLogProbs, reference: AnswerLogProbs | None, tokens: AnswerLogProbs
) -> PairLoss:
    """Return the loss of pairs by the recipe's objective.

    Args:
        recipe: its objective, and the section of the same name.
        policy: by the model that is trained, differentiable.
        reference: by the reference; None for an objective without one.
        tokens: the number of trained tokens of each answer.
    """
    if recipe.dpo is not None and reference is not None:
        return dpo_loss(recipe.dpo, policy, reference, tokens)
    if recipe.cpo is not None:
        return cpo_loss(recipe.cpo, policy)
    means = AnswerLogProbs(policy.chosen / tokens.chosen, policy.rejected / tokens.rejected)
    if recipe.simpo is not None:
        return simpo_loss(recipe.simpo, means)
    if recipe.orpo is not None:
        return orpo_loss(recipe.orpo, means)
    raise ValueError(f"no loss for `objective: {recipe.objective}`")


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
    return PairLoss(losses, _scaled(dpo.beta, AnswerLogProbs(chosen, rejected)), dpo.rpo_alpha or 0.0)


def cpo_loss(cpo: "CpoSection", policy: AnswerLogProbs) -> PairLoss:
    """Return the loss of contrastive preference optimization, as TRL's `CPOTrainer` defines it.

    https://github.com/huggingface/trl/blob/v1.16.0/trl/experimental/cpo/cpo_trainer.py
    """
    margin = cpo.beta * (policy.chosen - policy.rejected)
    losses = -F.logsigmoid(margin) if cpo.loss_type == "sigmoid" else torch.relu(1 - margin)
    return PairLoss(losses, _scaled(cpo.beta, policy), cpo.alpha)


def simpo_loss(simpo: "SimpoSection", means: AnswerLogProbs) -> PairLoss:
    """Return the loss of simple preference optimization, from mean log-probabilities per token.

    It is that of TRL's `CPOTrainer` with `loss_type: simpo` and without the likelihood of the chosen answers.
    """
    losses = -F.logsigmoid(simpo.beta * (means.chosen - means.rejected) - simpo.gamma)
    return PairLoss(losses, _scaled(simpo.beta, means))


def orpo_loss(orpo: "OrpoSection", means: AnswerLogProbs) -> PairLoss:
    """Return the loss of odds ratio preference optimization, from mean log-probabilities per token.

    TRL's `ORPOTrainer` adds the likelihood of prompts too; here, as everywhere, prompts are not trained.
    https://github.com/huggingface/trl/blob/v1.16.0/trl/experimental/orpo/orpo_trainer.py
    """
    odds = means.chosen - means.rejected - (_log1mexp(means.chosen) - _log1mexp(means.rejected))
    return PairLoss(-orpo.beta * F.logsigmoid(odds), _scaled(orpo.beta, means), 1.0)


def _scaled(beta: float, values: AnswerLogProbs) -> AnswerLogProbs:
    """Return rewards: detached values times beta."""
    return AnswerLogProbs(beta * values.chosen.detach(), beta * values.rejected.detach())


_CERTAIN = -1e-6
"""The highest mean log-probability of an answer in odds: those of a certain one are infinite."""


def _log1mexp(log_probs: Tensor) -> Tensor:
    """Return `log(1 - exp(x))` for x below 0 (Maechler, 2012), without loss of digits."""
    below = log_probs.clamp(max=_CERTAIN)
    near = below > -0.6931472
    # Each branch gets a harmless value where the other one holds, so that no gradient is infinite.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, below, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, below))),
    )


PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                "logps/rejected")  # fmt: skip
"""What is told of pairs, by TRL's names: means over pairs. A pair is right where the chosen answer has the higher
reward, and half right where both have the same; log-probabilities are those of whole answers under the model."""


REFERENCE_KL = "reference_kl"
"""What an evaluation tells of the distance to the reference: the mean KL divergence per trained token of the held-out
answers, in nats, over all tokens that could come next (`peftchat.training.reference_kl`)."""


def pair_metrics(loss: PairLoss, policy: AnswerLogProbs) -> Tensor:
    """Return the metrics of each pair in the order of `PAIR_METRICS`, float64, shape (metrics, P), detached."""
    chosen, rejected = loss.rewards.chosen, loss.rewards.rejected
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    rows = (chosen, rejected, right, chosen - rejected, policy.chosen, policy.rejected)
    return torch.stack([row.detach().double() for row in rows])
