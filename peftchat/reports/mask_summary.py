"""The numbers under the rows: what terminal and page both say about a mask."""

from dataclasses import dataclass

from peftchat.dataset.cache import EncodedSplit, Split
from peftchat.dataset.packing import efficiency, pack
from peftchat.formatting import format_count, format_percent
from peftchat.recipe import Recipe
from peftchat.training.mask_survey import Found, MaskSurvey, Tally

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
    roles: tuple[tuple[str, Tally], ...]
    total: Tally
    facts: tuple[tuple[str, str, bool], ...]
    failures: tuple[str, ...]


def summarise(recipe: Recipe, side: Split, rows: EncodedSplit, survey: MaskSurvey) -> MaskSummary:
    """The summary of one side's rows.

    Args:
        recipe: as the user wrote it: what it refuses is a failure here.
        side: train or eval.
        rows: encoded with nothing refused.
        survey: of these rows.
    """
    total = survey.total
    headline = (
        f"{side}: {_rows(survey.rows)}, {format_count(total.tokens)} tokens, {format_percent(total.share)} trained "
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
        ("shortened to fit", _shortened(recipe, rows), False),
        *([("divided to fit", _divided(rows), False)] if recipe.data.truncation == "split" else []),
        ("rows left out", dropped or "none", bool(stats.dropped) and not stats.rows),
        ("special-token text", special if looks.count else "none", _refused_text(recipe, survey)),
        ("answers without end", _found(survey.open_answers), bool(survey.open_answers.count)),
        ("ends not trained", _found(survey.silent_ends), bool(survey.silent_ends.count)),
    ]


def _shortened(recipe: Recipe, rows: EncodedSplit) -> str:
    stats = rows.stats
    if not stats.shortened:
        return "none"
    its = "its" if stats.shortened == 1 else "their"
    where = {"turns_leading": f"at {its} beginning", "split": "that did not fit alone"}
    who = "dialogue" if recipe.data.truncation == "split" else "row"
    return (
        f"{format_count(stats.shortened)} {who}{_s(stats.shortened)} lost {format_count(stats.exchanges_cut)} "
        f"exchange{_s(stats.exchanges_cut)} {where.get(recipe.data.truncation, f'at {its} end')}"
        f"{_named(rows, 'shortened')}"
    )


def _divided(rows: EncodedSplit) -> str:
    stats = rows.stats
    if not stats.divided:
        return "none"
    became = f"{format_count(stats.divided)} dialogue{_s(stats.divided)} became {_rows(stats.parts)}"
    return f"{became}{_named(rows, 'divided')}"


def _dropped(rows: EncodedSplit) -> str:
    return "; ".join(
        f"{format_count(number)} {_REASONS.get(reason, reason)}{_named(rows, reason)}"
        for reason, number in rows.stats.dropped.items()
    )


def _rows(number: int) -> str:
    return f"{format_count(number)} row{_s(number)}"


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _packing(recipe: Recipe, rows: EncodedSplit) -> str:
    length = recipe.data.max_length
    if not recipe.data.packing:
        return "off: one dialogue a row, padded to the longest of its batch"
    lengths = rows.store.lengths
    packs = pack(lengths, length, recipe.training.seed)
    return f"{format_count(len(packs))} sequences of {format_count(length)} tokens, {format_percent(efficiency(packs, lengths, length))} full"


def _named(rows: EncodedSplit, what: str) -> str:
    named = rows.stats.named.get(what, [])
    return f" ({', '.join(named[:3])}{', …' if len(named) > 3 else ''})" if named else ""


def _found(found: Found) -> str:
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
            f"text spelled like a special token stands {format_count(survey.lookalikes.count)} times in messages, the first "
            f"in {survey.lookalikes.first}, and chat.special_text: refuse does not let it be encoded as text"
        )
    for refusing, reason, key in (
        (recipe.chat.empty_rows == "refuse", "nothing_to_learn", "chat.empty_rows"),
        (recipe.data.truncation == "refuse", "too_long", "data.truncation"),
    ):
        if refusing and rows.stats.dropped.get(reason):
            number = rows.stats.dropped[reason]
            failures.append(f"{_rows(number)} {_REASONS[reason]}{_named(rows, reason)}, and {key} is `refuse`")
    return failures
