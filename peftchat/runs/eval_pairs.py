"""Held-out pairs: `eval_pairs.jsonl`, a line a pair, and what a run's summary says of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from peftchat.runs.eval_lines import (
    mean_if_known,
    mean_per_token,
    read_before,
    read_lines,
    share_text,
    wilson_interval,
    write_lines,
)


@dataclass(frozen=True, slots=True)
class PairResult:
    """A held-out pair under the model, and the margin that it had before training.

    Attributes:
        example: the index of its chosen answer's example; not in the file.
        source: where it came from, `file:line`.
        chosen_tokens: trained tokens of the chosen answer.
        rejected_tokens: those of the rejected one.
        chosen_logp: log-probability of the chosen answer, in nats.
        rejected_logp: that of the rejected one.
        chosen_reward: the chosen answer's reward against the reference.
        rejected_reward: the rejected one's.
        loss: by the objective.
        chosen_kl: KL divergence from the reference, in nats, summed over the chosen answer's trained tokens; None where
            it was not measured.
        rejected_kl: that of the rejected answer.
        chosen_logp_before: log-probability before the first step; None where it was not measured.
        rejected_logp_before: that of the rejected one.
    """

    example: int
    source: str
    chosen_tokens: int
    rejected_tokens: int
    chosen_logp: float
    rejected_logp: float
    chosen_reward: float
    rejected_reward: float
    loss: float
    chosen_kl: float | None = None
    rejected_kl: float | None = None
    chosen_logp_before: float | None = None
    rejected_logp_before: float | None = None

    @classmethod
    def of_batch(
        cls,
        examples: Sequence[int],
        sources: Sequence[str],
        tokens: Sequence[int],
        losses: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
        kl: Sequence[float] | None = None,
    ) -> list[Self]:
        """Return the results of a batch.

        Args:
            examples: indices of the chosen answers' examples.
            sources: of each pair.
            tokens: of each answer: chosen, rejected, chosen, …
            losses: of each pair.
            metrics: of each pair, by the names of `peftchat.training.preference_loss.PAIR_METRICS`.
            kl: divergence from the reference of each answer, if it was measured.
        """
        of_answers: Sequence[float | None] = [None] * len(tokens) if kl is None else kl
        rows = zip(
            examples, sources, tokens[::2], tokens[1::2], metrics["logps/chosen"], metrics["logps/rejected"],
            metrics["rewards/chosen"], metrics["rewards/rejected"], losses, of_answers[::2], of_answers[1::2],
            strict=True,
        )  # fmt: skip
        return [cls(*row) for row in rows]

    @property
    def margin(self) -> float:
        """How much higher the chosen answer's reward is."""
        return self.chosen_reward - self.rejected_reward

    @property
    def right(self) -> float:
        """1 if the chosen answer's reward is the higher one, a half if both are the same, else 0."""
        return (self.margin > 0) + 0.5 * (self.margin == 0)

    def as_line(self) -> dict[str, Any]:
        """Return the line of the file."""
        values = asdict(self)
        del values["example"]
        return {**values, "margin": self.margin}


def write_eval_pairs(path: Path, pairs: Sequence[PairResult], *, before: bool) -> list[PairResult]:
    """Write one line per pair, beside the log-probabilities before the first step that the file has already.

    Args:
        path: the file.
        pairs: the results, in order.
        before: whether they are those before the first step.

    Returns:
        The results as written.
    """
    noted: Sequence[tuple[float, ...]] = [(one.chosen_logp, one.rejected_logp) for one in pairs]
    if not before:
        noted = read_before(path, [one.source for one in pairs], ("chosen_logp_before", "rejected_logp_before"))
    if noted:
        pairs = [
            replace(one, chosen_logp_before=chosen, rejected_logp_before=rejected)
            for one, (chosen, rejected) in zip(pairs, noted, strict=True)
        ]
    write_lines(path, (one.as_line() for one in pairs))
    return list(pairs)


def read_eval_pairs(path: Path) -> list[PairResult]:
    """Read what `write_eval_pairs` wrote, without the examples; nothing where the file is missing or is no such."""
    fields = [name for name in PairResult.__slots__ if name != "example"]
    return read_lines(path, lambda line: PairResult(-1, **{name: line[name] for name in fields if name in line}))


class PairSummary(BaseModel):
    """What a run's summary says of its held-out pairs, by the weights that are kept.

    Attributes:
        pairs: their number.
        right: the share whose chosen answer has the higher reward; a pair with equal rewards counts a half.
        right_low: the lower end of the share's 95 % interval.
        right_high: its upper end.
        margin: mean difference of the rewards.
        chosen_reward: mean reward of the chosen answers.
        rejected_reward: that of the rejected ones.
        chosen_logp: mean log-probability of the chosen answers, in nats.
        rejected_logp: that of the rejected ones.
        chosen_logp_before: the first before training; None where it was not measured.
        rejected_logp_before: the second.
        reference_kl: mean KL divergence from the reference per trained token of both answers, in nats; None where it
            was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    pairs: int
    right: float
    right_low: float
    right_high: float
    margin: float
    chosen_reward: float
    rejected_reward: float
    chosen_logp: float
    rejected_logp: float
    chosen_logp_before: float | None = None
    rejected_logp_before: float | None = None
    reference_kl: float | None = None

    @classmethod
    def of(cls, pairs: Sequence[PairResult]) -> Self:
        """Summarize results; there must be one."""
        right = sum(one.right for one in pairs) / len(pairs)
        low, high = wilson_interval(right, len(pairs))
        return cls(
            pairs=len(pairs), right=right, right_low=low, right_high=high,
            margin=_mean(one.margin for one in pairs),
            chosen_reward=_mean(one.chosen_reward for one in pairs),
            rejected_reward=_mean(one.rejected_reward for one in pairs),
            chosen_logp=_mean(one.chosen_logp for one in pairs),
            rejected_logp=_mean(one.rejected_logp for one in pairs),
            chosen_logp_before=mean_if_known(one.chosen_logp_before for one in pairs),
            rejected_logp_before=mean_if_known(one.rejected_logp_before for one in pairs),
            reference_kl=mean_per_token(
                [kl for one in pairs for kl in (one.chosen_kl, one.rejected_kl)],
                sum(one.chosen_tokens + one.rejected_tokens for one in pairs),
            ),
        )  # fmt: skip

    @property
    def right_text(self) -> str:
        """How many pairs are right, with the interval, in words."""
        return share_text(self.right, (self.right_low, self.right_high), self.pairs, "pairs")

    @property
    def both_fell(self) -> bool:
        """Whether both answers became less likely, the chosen one too."""
        if self.chosen_logp_before is None or self.rejected_logp_before is None:
            return False
        return self.chosen_logp < self.chosen_logp_before and self.rejected_logp < self.rejected_logp_before


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
