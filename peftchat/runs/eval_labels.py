"""Held-out labeled answers: `eval_answers.jsonl`, a line an answer, and what a run's summary says of them."""

from collections.abc import Sequence
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
class AnswerResult:
    """A held-out labeled answer under the model, and its log-probability before training.

    Attributes:
        example: the index of its example; not in the file.
        source: where it came from, `file:line`.
        label: whether it is a good one.
        tokens: its trained tokens.
        logp: its log-probability.
        reward: its reward against the reference.
        right: 1 if the reward is on the side of the KL term that the label names, a half on the term itself, else 0.
        loss: by the objective.
        kl: KL divergence from the reference, in nats, summed over its trained tokens; None where it was not measured.
        logp_before: its log-probability before the first step; None where it was not measured.
    """

    example: int
    source: str
    label: bool
    tokens: int
    logp: float
    reward: float
    right: float
    loss: float
    kl: float | None = None
    logp_before: float | None = None

    def as_line(self) -> dict[str, Any]:
        """Return the line of the file."""
        values = asdict(self)
        del values["example"]
        return values


def write_eval_answers(path: Path, answers: Sequence[AnswerResult], *, before: bool) -> list[AnswerResult]:
    """Write one line per answer, beside the log-probability before the first step that the file has already.

    Args:
        path: the file.
        answers: the results, in order.
        before: whether they are those before the first step.

    Returns:
        The results as written.
    """
    noted: Sequence[tuple[float, ...]] = [(one.logp,) for one in answers]
    if not before:
        noted = read_before(path, [one.source for one in answers], ("logp_before",))
    if noted:
        answers = [replace(one, logp_before=logp) for one, (logp,) in zip(answers, noted, strict=True)]
    write_lines(path, (one.as_line() for one in answers))
    return list(answers)


def read_eval_answers(path: Path) -> list[AnswerResult]:
    """Read what `write_eval_answers` wrote, without the examples; nothing where the file is missing or is no such."""
    fields = [name for name in AnswerResult.__slots__ if name != "example"]
    return read_lines(path, lambda line: AnswerResult(-1, **{name: line[name] for name in fields if name in line}))


class LabelSummary(BaseModel):
    """What a run's summary says of its held-out labeled answers, by the weights that are kept.

    Attributes:
        good: the number of good answers.
        bad: that of bad ones.
        right: the share whose reward is on the side of the KL term that the label names.
        right_low: the lower end of the share's 95 % interval.
        right_high: its upper end.
        kl: the KL term in nats.
        good_reward: mean reward of the good answers; None without one, as are the others.
        bad_reward: that of the bad ones.
        good_logp: mean log-probability of the good answers, in nats.
        bad_logp: that of the bad ones.
        good_logp_before: the first before training; None where it was not measured.
        bad_logp_before: the second.
        reference_kl: mean KL divergence from the reference per trained token, in nats; None where it was not measured.
            `kl` is the estimate that the loss subtracts.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    good: int
    bad: int
    right: float
    right_low: float
    right_high: float
    kl: float
    good_reward: float | None = None
    bad_reward: float | None = None
    good_logp: float | None = None
    bad_logp: float | None = None
    good_logp_before: float | None = None
    bad_logp_before: float | None = None
    reference_kl: float | None = None

    @classmethod
    def of(cls, answers: Sequence[AnswerResult], kl: float) -> Self:
        """Summarize results; there must be one."""
        right = sum(one.right for one in answers) / len(answers)
        low, high = wilson_interval(right, len(answers))
        good, bad = ([one for one in answers if one.label is label] for label in (True, False))
        return cls(
            good=len(good), bad=len(bad), right=right, right_low=low, right_high=high, kl=kl,
            good_reward=mean_if_known(one.reward for one in good), bad_reward=mean_if_known(one.reward for one in bad),
            good_logp=mean_if_known(one.logp for one in good), bad_logp=mean_if_known(one.logp for one in bad),
            good_logp_before=mean_if_known(one.logp_before for one in good),
            bad_logp_before=mean_if_known(one.logp_before for one in bad),
            reference_kl=mean_per_token([one.kl for one in answers], sum(one.tokens for one in answers)),
        )  # fmt: skip

    @property
    def right_text(self) -> str:
        """How many answers are right, with the interval, in words."""
        return share_text(self.right, (self.right_low, self.right_high), self.good + self.bad, "answers")

    @property
    def margin(self) -> float | None:
        """How much higher the reward of good answers is than that of bad ones, in the mean."""
        return None if self.good_reward is None or self.bad_reward is None else self.good_reward - self.bad_reward

    @property
    def both_fell(self) -> bool:
        """Whether good and bad answers became less likely."""
        sides = ((self.good_logp_before, self.good_logp), (self.bad_logp_before, self.bad_logp))
        return all(before is not None and after is not None and after < before for before, after in sides)
