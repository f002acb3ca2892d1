"""What is trained, counted over every row, and whether the rows keep what the recipe's policy promises."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import LossOn, TokenTags, TurnPart, loss_mask_table, role_of, token_tag
from peftchat.conversation import ROLES, Role

_CHUNK = 2048
_LAST_ANSWER = token_tag(TurnPart.OUTSIDE, last_answer=True)

Flags = npt.NDArray[np.bool_]

# Code -> its part and the number of its role, for whole rows at once.
_PARTS = np.zeros(256, dtype=np.int8)
_ROLES = np.zeros(256, dtype=np.int8)
_SPEAKERS: tuple[Role | None, ...] = (None, *ROLES)
for _part, (_number, _role), _last in itertools.product(TurnPart, enumerate(_SPEAKERS), (False, True)):
    _PARTS[token_tag(_part, _role, last_answer=_last)] = _part
    _ROLES[token_tag(_part, _role, last_answer=_last)] = _number


@dataclass(slots=True)
class Tally:
    """Tokens, and how many of them carry a target."""

    tokens: int = 0
    trained: int = 0

    @property
    def share(self) -> float:
        """The trained part of the tokens, 0 to 1."""
        return self.trained / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class Found:
    """How often something was found, and the row in which it was found first."""

    count: int = 0
    first: str = ""

    def add(self, count: int, source: str) -> None:
        """Count further finds in a row."""
        if count and not self.count:
            self.first = source
        self.count += count


@dataclass(slots=True)
class MaskSurvey:
    """The mask of one side in numbers.

    Attributes:
        rows: rows looked at.
        roles: for each role, the tokens of its turns; under None those that a template writes outside the turns.
        open_answers: answers without an end token.
        silent_ends: answers that are trained while their end token is not.
        lookalikes: stretches of messages spelled like a special token.
    """

    rows: int = 0
    roles: dict[Role | None, Tally] = field(default_factory=dict)
    open_answers: Found = field(default_factory=Found)
    silent_ends: Found = field(default_factory=Found)
    lookalikes: Found = field(default_factory=Found)

    @property
    def total(self) -> Tally:
        """The tokens of all roles."""
        tallies = self.roles.values()
        return Tally(sum(tally.tokens for tally in tallies), sum(tally.trained for tally in tallies))

    @property
    def nothing_masked(self) -> bool:
        """Whether every token is a target, but for the first of each row, which never is one."""
        total = self.total
        return total.tokens > 0 and total.trained == total.tokens - self.rows

    @property
    def everything_masked(self) -> bool:
        """Whether no token is a target."""
        return self.total.trained == 0


def trained_tokens(codes: TokenTags, table: npt.NDArray[np.bool_]) -> Flags:
    """Which tokens of one row carry a target: bool, shape (T,).

    Args:
        codes: of the row's tokens, uint8, shape (T,).
        table: of the policy, bool, shape (256,).
    """
    trained = table[codes]
    # Nothing stands before the first token that could predict it.
    trained[:1] = False
    return trained


def survey_mask(rows: Iterator[EncodedExample], loss_on: LossOn) -> MaskSurvey:
    """Count and check the mask of all rows; memory does not grow with their number."""
    table = loss_mask_table(loss_on)
    survey = MaskSurvey(roles={role: Tally() for role in (*ROLES, None)})
    while chunk := [row for row in itertools.islice(rows, _CHUNK) if len(row.codes)]:
        _count(survey, chunk, table)
        _check_answers(survey, chunk, table, loss_on)
        for row in chunk:
            survey.lookalikes.add(row.lookalikes, row.source)
    return survey


def _count(survey: MaskSurvey, rows: Sequence[EncodedExample], table: npt.NDArray[np.bool_]) -> None:
    survey.rows += len(rows)
    codes = np.concatenate([row.codes for row in rows])
    trained = np.concatenate([trained_tokens(row.codes, table) for row in rows])
    everything = np.bincount(codes, minlength=256)
    targets = np.bincount(codes[trained], minlength=256)
    for value in np.flatnonzero(everything):
        tally = survey.roles[role_of(int(value))]
        tally.tokens += int(everything[value])
        tally.trained += int(targets[value])


def _check_answers(
    survey: MaskSurvey, rows: Sequence[EncodedExample], table: npt.NDArray[np.bool_], loss_on: LossOn
) -> None:
    """Find the answers that do not end, and those whose end the model would not learn to write."""
    for row in rows:
        starts = turn_starts(row.codes)
        answers = np.flatnonzero(_ROLES[row.codes[starts]] == _SPEAKERS.index("assistant"))
        if not len(answers):
            continue
        trained = trained_tokens(row.codes, table)
        ends = _last_end_tokens(row.codes, starts)
        has_end = np.logical_or.reduceat(ends, starts)[answers]
        end_trained = np.logical_or.reduceat(ends & trained, starts)[answers]
        promised = np.ones(len(answers), dtype=bool)
        if loss_on == "last_answer":
            promised = (row.codes[starts[answers]] & _LAST_ANSWER) != 0
        survey.open_answers.add(int((~has_end).sum()), row.source)
        survey.silent_ends.add(int((has_end & promised & ~end_trained).sum()), row.source)


def turn_starts(codes: TokenTags) -> npt.NDArray[np.int64]:
    """Where turns begin: another role, or the same one going back to an earlier part of a turn.

    Args:
        codes: of the row's tokens, uint8, shape (T,); T > 0.
    """
    parts, roles = _PARTS[codes], _ROLES[codes]
    begins = (roles[1:] != roles[:-1]) | (np.diff(parts) < 0)
    return np.flatnonzero(np.concatenate([[True], begins]))


def _last_end_tokens(codes: TokenTags, starts: npt.NDArray[np.int64]) -> Flags:
    """The last token of each turn's end: text may stand between a content and its end token."""
    ends = _PARTS[codes] == TurnPart.END
    followed = np.concatenate([ends[1:], [False]])
    followed[starts[1:] - 1] = False
    last: Flags = ends & ~followed
    return last
