"""What is trained, counted over every row, and whether the rows keep what the recipe's policy promises."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.examples import EncodedExample, TokenTags
from peftchat.chat_template.loss_mask import LossOn, TurnPart, loss_mask_table, role_of, token_tag
from peftchat.conversation import ROLES, Role
from peftchat.dataset.cache import EncodedSplit, Split
from peftchat.dataset.packing import efficiency, pack
from peftchat.formatting import format_count, format_percent
from peftchat.recipe import Recipe

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
class TokenCount:
    """Tokens, and how many of them carry a target."""

    tokens: int = 0
    trained: int = 0

    @property
    def share(self) -> float:
        """The trained part of the tokens, 0 to 1."""
        return self.trained / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class Occurrences:
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
    roles: dict[Role | None, TokenCount] = field(default_factory=dict)
    open_answers: Occurrences = field(default_factory=Occurrences)
    silent_ends: Occurrences = field(default_factory=Occurrences)
    lookalikes: Occurrences = field(default_factory=Occurrences)

    @property
    def total(self) -> TokenCount:
        """The tokens of all roles."""
        tallies = self.roles.values()
        return TokenCount(sum(tally.tokens for tally in tallies), sum(tally.trained for tally in tallies))

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
    survey = MaskSurvey(roles={role: TokenCount() for role in (*ROLES, None)})
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


_REASONS = {
    "too_long": "longer than data.max_length",
    "nothing_to_learn": "with nothing to learn",
}


@dataclass(frozen=True, slots=True)
class MaskSummary:
    """A survey in words.

    Attributes:
        headline: one line.
        roles: tokens by the role of their turn, roles that do not occur left out.
        total: of all roles.
        facts: name, value, and whether it is a reason to fail.
        failures: the reasons why the mask cannot be trusted; empty if it can.
    """

    headline: str
    roles: tuple[tuple[str, TokenCount], ...]
    total: TokenCount
    facts: tuple[tuple[str, str, bool], ...]
    failures: tuple[str, ...]


def summarize(recipe: Recipe, side: Split, rows: EncodedSplit, survey: MaskSurvey) -> MaskSummary:
    """The summary of one side's rows.

    Args:
        recipe: as the user wrote it: what it refuses is a failure here.
        side: train or eval.
        rows: encoded with nothing refused.
        survey: of these rows.
    """
    total = survey.total
    headline = (
        f"{side}: {_examples(survey.rows)}, {format_count(total.tokens)} tokens, {format_percent(total.share)} trained "
        f"(chat.loss_on: {recipe.chat.loss_on})"
    )
    return MaskSummary(
        headline,
        tuple((role or "the template itself", tally) for role, tally in survey.roles.items() if tally.tokens),
        total,
        tuple(_facts(recipe, rows, survey)),
        tuple(_failures(recipe, rows, survey)),
    )


def _facts(recipe: Recipe, rows: EncodedSplit, survey: MaskSurvey) -> list[tuple[str, str, bool]]:
    stats = rows.stats
    dropped = _dropped(rows)
    looks = survey.lookalikes
    special = f"{format_count(looks.count)} times in messages, as ordinary text (first {looks.first})"
    return [
        ("packing", _packing(recipe, rows), False),
        ("shortened to fit", _truncated(recipe, rows), False),
        *([("divided to fit", _split(rows), False)] if recipe.data.truncation == "split" else []),
        ("rows left out", dropped or "none", bool(stats.dropped) and not stats.examples),
        ("special-token text", special if looks.count else "none", _refused_text(recipe, survey)),
        ("answers without end", _found(survey.open_answers), bool(survey.open_answers.count)),
        ("ends not trained", _found(survey.silent_ends), bool(survey.silent_ends.count)),
    ]


def _truncated(recipe: Recipe, rows: EncodedSplit) -> str:
    stats = rows.stats
    if not stats.truncated:
        return "none"
    its = "its" if stats.truncated == 1 else "their"
    where = {"turns_leading": f"at {its} beginning", "split": "that did not fit alone"}
    who = "conversation" if recipe.data.truncation == "split" else "row"
    return (
        f"{format_count(stats.truncated)} {who}{_s(stats.truncated)} lost {format_count(stats.rounds_dropped)} "
        f"exchange{_s(stats.rounds_dropped)} {where.get(recipe.data.truncation, f'at {its} end')}"
        f"{_named(rows, 'truncated')}"
    )


def _split(rows: EncodedSplit) -> str:
    stats = rows.stats
    if not stats.split:
        return "none"
    became = f"{format_count(stats.split)} conversation{_s(stats.split)} became {_examples(stats.split_examples)}"
    return f"{became}{_named(rows, 'split')}"


def _dropped(rows: EncodedSplit) -> str:
    return "; ".join(
        f"{format_count(number)} {_REASONS.get(reason, reason)}{_named(rows, reason)}"
        for reason, number in rows.stats.dropped.items()
    )


def _examples(number: int) -> str:
    return f"{format_count(number)} row{_s(number)}"


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _packing(recipe: Recipe, rows: EncodedSplit) -> str:
    length = recipe.data.max_length
    if not recipe.data.packing:
        return "off: one conversation a row, padded to the longest of its batch"
    lengths = rows.store.lengths
    packs = pack(lengths, length, recipe.training.seed)
    filled = format_percent(efficiency(packs, lengths, length))
    return f"{format_count(len(packs))} sequences of {format_count(length)} tokens, {filled} full"


def _named(rows: EncodedSplit, what: str) -> str:
    named = rows.stats.first_sources.get(what, [])
    return f" ({', '.join(named[:3])}{', …' if len(named) > 3 else ''})" if named else ""


def _found(found: Occurrences) -> str:
    return f"{format_count(found.count)} (first {found.first})" if found.count else "none"


def _refused_text(recipe: Recipe, survey: MaskSurvey) -> bool:
    return recipe.chat.special_text == "refuse" and survey.lookalikes.count > 0


def _failures(recipe: Recipe, rows: EncodedSplit, survey: MaskSurvey) -> list[str]:
    """Why the mask cannot be trusted, each reason with the place to look at."""
    policy = f"chat.loss_on: {recipe.chat.loss_on}"
    failures = []
    if survey.everything_masked:
        why = f"no token of any row is trained ({policy})" if survey.rows else f"no row is left; {_dropped(rows)}"
        failures.append(f"everything is masked: {why}")
    if survey.nothing_masked:
        asked = ", which asks for it" if recipe.chat.loss_on == "everything" else ""
        failures.append(f"nothing is masked: every token is trained ({policy}{asked})")
    if survey.silent_ends.count:
        failures.append(
            f"the end token of {format_count(survey.silent_ends.count)} answers is not trained, the first is in "
            f"{survey.silent_ends.first}: the model would not learn to stop"
        )
    if survey.open_answers.count:
        failures.append(
            f"{format_count(survey.open_answers.count)} answers are cut: they have no end token, the first is in "
            f"{survey.open_answers.first}"
        )
    if _refused_text(recipe, survey):
        failures.append(
            f"text spelled like a special token stands {format_count(survey.lookalikes.count)} times in messages, "
            "the first "
            f"in {survey.lookalikes.first}, and chat.special_text: refuse does not let it be encoded as text"
        )
    for refusing, reason, key in (
        (recipe.chat.empty_rows == "refuse", "nothing_to_learn", "chat.empty_rows"),
        (recipe.data.truncation == "refuse", "too_long", "data.truncation"),
    ):
        if refusing and rows.stats.dropped.get(reason):
            number = rows.stats.dropped[reason]
            failures.append(f"{_examples(number)} {_REASONS[reason]}{_named(rows, reason)}, and {key} is `refuse`")
    return failures
