"""Mask summary: counts over every example, and checks of the loss mask against the recipe."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from peftchat.chat_template.examples import EncodedExample, TokenTags
from peftchat.chat_template.loss_mask import LossOn, LossPolicy, TurnPart, loss_mask_table, part_of, role_of, token_tag
from peftchat.conversation import ROLES, Role
from peftchat.dataset.cache import EncodedSplit, Split
from peftchat.dataset.epochs import EpochPacks
from peftchat.dataset.mixture import data_notes
from peftchat.dataset.packing import efficiency, pack
from peftchat.formatting import format_count, format_percent
from peftchat.recipe import Recipe

ANSWER_KINDS = {
    TurnPart.REASONING: "reasoning",
    TurnPart.EMPTY_REASONING: "empty reasoning",
    TurnPart.CONTENT: "content",
    TurnPart.TOOL_CALL: "tool calls",
}
"""The kinds of text in an answer that are counted apart, and their names."""

_CHUNK = 2048
_LAST_ANSWER = token_tag(TurnPart.OUTSIDE, last_answer=True)
_CONTEXT = token_tag(TurnPart.OUTSIDE, context=True)

Flags = npt.NDArray[np.bool_]

# Token tag -> its part and the number of its role.
_PARTS = np.zeros(256, dtype=np.int8)
_ROLES = np.zeros(256, dtype=np.int8)
_PLACES = np.zeros(256, dtype=np.int8)
_ORDER = (TurnPart.OUTSIDE, TurnPart.HEADER, TurnPart.CONTENT, TurnPart.END, TurnPart.TRAILER)
"""The parts of a turn in the order in which they stand there. Those of an answer's text, in any order, are one."""
_ROLE_ORDER: tuple[Role | None, ...] = (None, *ROLES)
for _part, (_number, _role), _last, _context in itertools.product(
    TurnPart, enumerate(_ROLE_ORDER), (False, True), (False, True)
):
    _tag = token_tag(_part, _role, last_answer=_last, context=_context)
    _PARTS[_tag] = _part
    _PLACES[_tag] = _ORDER.index(_part if _part in _ORDER else TurnPart.CONTENT)
    _ROLES[_tag] = _number


@dataclass(slots=True)
class TokenCount:
    """The number of tokens, and how many of them are targets."""

    tokens: int = 0
    trained: int = 0

    @property
    def share(self) -> float:
        """The fraction of tokens that are targets."""
        return self.trained / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class Occurrences:
    """The number of occurrences, and the source of the first."""

    count: int = 0
    first: str = ""

    def add(self, count: int, source: str) -> None:
        """Count the occurrences in one example."""
        if count and not self.count:
            self.first = source
        self.count += count


@dataclass(slots=True)
class MaskSurvey:
    """Counts over the loss mask of one split.

    Attributes:
        examples: the number of examples.
        roles: the tokens in the turns of each role; None for template text outside the turns.
        answers: the tokens of answers by their part, for the kinds of text that `ANSWER_KINDS` names.
        unterminated_answers: answers without an end token.
        untrained_eos: trained answers whose end token is not a target.
        special_token_text: stretches of messages spelled like a special token.
    """

    examples: int = 0
    roles: dict[Role | None, TokenCount] = field(default_factory=dict)
    answers: dict[TurnPart, TokenCount] = field(default_factory=dict)
    unterminated_answers: Occurrences = field(default_factory=Occurrences)
    untrained_eos: Occurrences = field(default_factory=Occurrences)
    special_token_text: Occurrences = field(default_factory=Occurrences)

    @property
    def total(self) -> TokenCount:
        """The counts over all roles."""
        counts = self.roles.values()
        return TokenCount(sum(count.tokens for count in counts), sum(count.trained for count in counts))

    @property
    def nothing_masked(self) -> bool:
        """Whether every token is a target, except the first of each example, which never is."""
        total = self.total
        return total.tokens > 0 and total.trained == total.tokens - self.examples

    @property
    def everything_masked(self) -> bool:
        """Whether no token is a target."""
        return self.total.trained == 0


def trained_tokens(tags: TokenTags, table: npt.NDArray[np.bool_]) -> Flags:
    """Return which tokens of one example are targets: bool, shape (T,).

    Args:
        tags: the tags of its tokens, uint8, shape (T,).
        table: the loss mask by token tag, bool, shape (256,).
    """
    trained = table[tags]
    # No token precedes the first one to predict it.
    trained[:1] = False
    return trained


def survey_mask(examples: Iterator[EncodedExample], policy: LossPolicy | LossOn) -> MaskSurvey:
    """Count and check the loss mask of all examples, in memory that does not grow with their number."""
    table = loss_mask_table(policy)
    loss_on = policy.loss_on if isinstance(policy, LossPolicy) else policy
    survey = MaskSurvey(
        roles={role: TokenCount() for role in (*ROLES, None)}, answers={part: TokenCount() for part in ANSWER_KINDS}
    )
    while chunk := [example for example in itertools.islice(examples, _CHUNK) if len(example.token_tags)]:
        _count(survey, chunk, table)
        _check_answers(survey, chunk, table, loss_on)
        for example in chunk:
            survey.special_token_text.add(example.special_token_text, example.source)
    return survey


def _count(survey: MaskSurvey, examples: Sequence[EncodedExample], table: npt.NDArray[np.bool_]) -> None:
    survey.examples += len(examples)
    tags = np.concatenate([example.token_tags for example in examples])
    trained = np.concatenate([trained_tokens(example.token_tags, table) for example in examples])
    tokens = np.bincount(tags, minlength=256)
    targets = np.bincount(tags[trained], minlength=256)
    for value in np.flatnonzero(tokens):
        role, part = role_of(int(value)), part_of(int(value))
        counts = [survey.roles[role]]
        if role == "assistant" and part in survey.answers:
            counts.append(survey.answers[part])
        for count in counts:
            count.tokens += int(tokens[value])
            count.trained += int(targets[value])


def _check_answers(
    survey: MaskSurvey, examples: Sequence[EncodedExample], table: npt.NDArray[np.bool_], loss_on: LossOn
) -> None:
    """Count the answers without an end token, and those whose end token is not trained."""
    for example in examples:
        starts = turn_starts(example.token_tags)
        answers = np.flatnonzero(_ROLES[example.token_tags[starts]] == _ROLE_ORDER.index("assistant"))
        if not len(answers):
            continue
        trained = trained_tokens(example.token_tags, table)
        ends = _last_end_tokens(example.token_tags, starts)
        has_end = np.logical_or.reduceat(ends, starts)[answers]
        end_trained = np.logical_or.reduceat(ends & trained, starts)[answers]
        should_train = (example.token_tags[starts[answers]] & _CONTEXT) == 0
        unterminated = should_train & ~has_end
        if loss_on == "last_answer":
            should_train &= (example.token_tags[starts[answers]] & _LAST_ANSWER) != 0
        survey.unterminated_answers.add(int(unterminated.sum()), example.source)
        survey.untrained_eos.add(int((has_end & should_train & ~end_trained).sum()), example.source)


def turn_starts(tags: TokenTags) -> npt.NDArray[np.int64]:
    """Return where turns begin: at another role, or at an earlier part of a turn.

    Args:
        tags: the tags of an example's tokens, uint8, shape (T,); T > 0.
    """
    parts, roles = _PLACES[tags], _ROLES[tags]
    begins = (roles[1:] != roles[:-1]) | (np.diff(parts) < 0)
    return np.flatnonzero(np.concatenate([[True], begins]))


def _last_end_tokens(tags: TokenTags, starts: npt.NDArray[np.int64]) -> Flags:
    """Return the last token of each turn's end; text may precede the end token."""
    ends = _PARTS[tags] == TurnPart.END
    followed = np.concatenate([ends[1:], [False]])
    followed[starts[1:] - 1] = False
    last: Flags = ends & ~followed
    return last


_REASONS = {
    "too_long": "longer than data.max_length",
    "nothing_to_learn": "without a trained token",
}


@dataclass(frozen=True, slots=True)
class MaskSummary:
    """The counts and checks of a loss mask, as text.

    Attributes:
        headline: one line.
        roles: tokens by the role of their turn, for roles that occur.
        answers: tokens of answers by kind of text; empty where answers are nothing but content.
        total: tokens of all roles.
        details: name, value, and whether it is a failure.
        failures: one reason per failed check.
    """

    headline: str
    roles: tuple[tuple[str, TokenCount], ...]
    answers: tuple[tuple[str, TokenCount], ...]
    total: TokenCount
    details: tuple[tuple[str, str, bool], ...]
    failures: tuple[str, ...]


def summarize(recipe: Recipe, split: Split, examples: EncodedSplit, survey: MaskSurvey) -> MaskSummary:
    """Summarize the loss mask of one split.

    Args:
        recipe: the user's recipe; examples that it rejects are failures.
        split: train or eval.
        examples: the examples, encoded without rejections.
        survey: the counts over these examples.
    """
    total = survey.total
    headline = (
        f"{split}: {_number_of_examples(survey.examples)}, {format_count(total.tokens)} tokens, "
        f"{format_percent(total.share)} trained (chat.loss_on: {recipe.chat.loss_policy})"
    )
    return MaskSummary(
        headline,
        tuple((role or "template text", count) for role, count in survey.roles.items() if count.tokens),
        _answers(survey),
        total,
        tuple(_details(recipe, split, examples, survey)),
        tuple(_failures(recipe, examples, survey)),
    )


def _answers(survey: MaskSurvey) -> tuple[tuple[str, TokenCount], ...]:
    found = tuple((ANSWER_KINDS[part], count) for part, count in survey.answers.items() if count.tokens)
    return () if [name for name, _ in found] in ([], [ANSWER_KINDS[TurnPart.CONTENT]]) else found


def _details(recipe: Recipe, split: Split, examples: EncodedSplit, survey: MaskSurvey) -> list[tuple[str, str, bool]]:
    stats = examples.stats
    dropped = _dropped(examples)
    text = survey.special_token_text
    special = f"{format_count(text.count)} times in messages, as ordinary text (first {text.first})"
    return [
        ("packing", _packing(recipe, split, examples), False),
        ("truncated", _truncated(recipe, examples), False),
        *([("split", _split(examples), False)] if recipe.data.truncation == "split" else []),
        *([("template", _expanded(examples), False)] if stats.expanded else []),
        *(("data", note, False) for note in data_notes(recipe, split, stats)),
        ("dropped", dropped or "none", bool(stats.dropped) and not stats.examples),
        ("special-token text", special if text.count else "none", _rejects_text(recipe, survey)),
        (
            "answers without an end token",
            _occurrences(survey.unterminated_answers),
            bool(survey.unterminated_answers.count),
        ),
        ("untrained end tokens", _occurrences(survey.untrained_eos), bool(survey.untrained_eos.count)),
    ]


def _truncated(recipe: Recipe, examples: EncodedSplit) -> str:
    stats = examples.stats
    if not stats.truncated:
        return "none"
    its = "its" if stats.truncated == 1 else "their"
    where = {"drop_first_turns": f"at {its} beginning", "split": "that did not fit alone"}
    who = "conversation" if recipe.data.truncation == "split" else "example"
    return (
        f"{format_count(stats.truncated)} {who}{_plural(stats.truncated)} lost {format_count(stats.rounds_dropped)} "
        f"round{_plural(stats.rounds_dropped)} {where.get(recipe.data.truncation, f'at {its} end')}"
        f"{_named(examples, 'truncated')}"
    )


def _split(examples: EncodedSplit) -> str:
    stats = examples.stats
    if not stats.split:
        return "none"
    conversations = f"{format_count(stats.split)} conversation{_plural(stats.split)}"
    return f"{conversations} became {_number_of_examples(stats.split_examples)}{_named(examples, 'split')}"


def _expanded(examples: EncodedSplit) -> str:
    """Return how many examples a template that rewrites earlier turns makes."""
    stats = examples.stats
    conversations = f"{format_count(stats.expanded)} conversation{_plural(stats.expanded)}"
    made = _number_of_examples(stats.expanded_examples)
    return f"{conversations} became {made}, as the template rewrites earlier turns{_named(examples, 'expanded')}"


def _dropped(examples: EncodedSplit) -> str:
    return "; ".join(
        f"{format_count(number)} {_REASONS.get(reason, reason)}{_named(examples, reason)}"
        for reason, number in examples.stats.dropped.items()
    )


def _number_of_examples(number: int) -> str:
    return f"{format_count(number)} example{_plural(number)}"


def _plural(number: int) -> str:
    return "" if number == 1 else "s"


def _packing(recipe: Recipe, split: Split, examples: EncodedSplit) -> str:
    length = recipe.data.max_length
    if not recipe.data.packing:
        return "off: examples are padded to the longest of their batch"
    lengths = examples.store.lengths
    epochs = EpochPacks.of(recipe, examples) if split == "train" else None
    if epochs is not None:
        filled = format_percent(float(epochs.lengths_of(0).mean()) / length)
        return f"{format_count(len(epochs))} sequences of {format_count(length)} tokens an epoch, {filled} full"
    packs = pack(lengths, length, recipe.training.seed)
    filled = format_percent(efficiency(packs, lengths, length))
    return f"{format_count(len(packs))} sequences of {format_count(length)} tokens, {filled} full"


def _named(examples: EncodedSplit, what: str) -> str:
    named = examples.stats.first_sources.get(what, [])
    return f" ({', '.join(named[:3])}{', …' if len(named) > 3 else ''})" if named else ""


def _occurrences(found: Occurrences) -> str:
    return f"{format_count(found.count)} (first {found.first})" if found.count else "none"


def _rejects_text(recipe: Recipe, survey: MaskSurvey) -> bool:
    return recipe.chat.special_token_text == "error" and survey.special_token_text.count > 0


def _failures(recipe: Recipe, examples: EncodedSplit, survey: MaskSurvey) -> list[str]:
    """Return the failed checks, each with the source of its first occurrence."""
    policy = f"chat.loss_on: {recipe.chat.loss_policy}"
    failures = []
    if survey.everything_masked:
        why = f"no token is trained ({policy})" if survey.examples else f"no example is left; {_dropped(examples)}"
        failures.append(f"everything is masked: {why}")
    if survey.nothing_masked:
        asked = ", as requested" if recipe.chat.loss_on == "everything" else ""
        failures.append(f"nothing is masked: every token is trained ({policy}{asked})")
    if survey.untrained_eos.count:
        failures.append(
            f"the end token of {format_count(survey.untrained_eos.count)} answers is not trained (first in "
            f"{survey.untrained_eos.first}), so the model would not learn to stop"
        )
    if survey.unterminated_answers.count:
        failures.append(
            f"{format_count(survey.unterminated_answers.count)} answers have no end token (first in "
            f"{survey.unterminated_answers.first})"
        )
    if _rejects_text(recipe, survey):
        failures.append(
            f"messages contain text spelled like a special token {format_count(survey.special_token_text.count)} times "
            f"(first in {survey.special_token_text.first}), and chat.special_token_text is `error`"
        )
    for refusing, reason, key in (
        (recipe.chat.untrainable_examples == "error", "nothing_to_learn", "chat.untrainable_examples"),
        (recipe.data.truncation == "error", "too_long", "data.truncation"),
    ):
        if refusing and examples.stats.dropped.get(reason):
            number = examples.stats.dropped[reason]
            which = f"{_number_of_examples(number)} {_REASONS[reason]}{_named(examples, reason)}"
            failures.append(f"{which}, and {key} is `error`")
    return failures
