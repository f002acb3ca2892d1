"""The table of a comparison as words, for terminal and page alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from peftchat.comparing.candidates import describe
from peftchat.comparing.choose import excess, loss_words, thousandths
from peftchat.comparing.outcome import Outcome
from peftchat.comparing.result import Result
from peftchat.comparing.statistics import Estimate
from peftchat.formatting import (
    UNKNOWN,
    format_bytes,
    format_count,
    format_decimal,
    format_duration,
    format_percent,
    format_short_count,
)

HEADERS = (
    "variant",
    "settings",
    "held-out loss",
    "above the lowest",
    "plain text",
    "tokens/s",
    "time",
    "peak memory",
    "trained",
    "on disk",
    "merged",
)
"""Columns; all but the first two and the last are numbers."""

_MERGES = {"same": "same", "differs": "DIFFERS", "does not fold": "does not fold", "nothing to fold": "whole model"}


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        cells: a text for each of the headers; empty where there is nothing to say.
        failure: why there are no numbers.
        chosen: it is the one recommended.
        tied: it cannot be told from the lowest.
    """

    cells: Sequence[str]
    failure: str | None
    chosen: bool
    tied: bool


def table_rows(result: Result) -> list[Row]:
    """The candidates by their loss, failed ones last."""
    finished = sorted(
        (outcome for outcome in result.outcomes if outcome.loss is not None),
        key=lambda outcome: outcome.loss.mean if outcome.loss else 0.0,
    )
    failed = [outcome for outcome in result.outcomes if outcome.loss is None]
    return [_row(result, outcome) for outcome in (*finished, *failed)]


def _row(result: Result, outcome: Outcome) -> Row:
    advice, best, loss = result.recommendation, outcome.best, outcome.loss
    if best is None or loss is None or advice is None:
        reasons = [record.failure for record in outcome.failures if record.failure]
        blank = [""] * (len(HEADERS) - 1)
        return Row((outcome.candidate.name, *blank), reasons[0] if reasons else "not run yet", False, False)
    above = excess(advice.lowest, outcome)
    cells = (
        outcome.candidate.name,
        describe(outcome.settings),
        loss_words(loss),
        "" if outcome is advice.lowest else _difference_words(above),
        plain_words(outcome, result.base_plain_loss),
        format_count(outcome.tokens_per_second),
        format_duration(outcome.seconds),
        format_bytes(outcome.peak_memory_bytes),
        format_short_count(best.trainable_parameters),
        format_bytes(best.weights_bytes),
        _MERGES.get(outcome.measured.merge or "", ""),
    )
    return Row(cells, None, outcome is advice.choice, outcome in advice.tied)


def _difference_words(above: Estimate) -> str:
    return f"{above.mean:+.3f}" + ("" if above.margin is None else f" ± {thousandths(above.margin)}")


def plain_words(outcome: Outcome, base: float | None) -> str:
    """Loss on plain text after training, and how far that is from the base's."""
    after = outcome.measured.plain_loss
    if after is None:
        return UNKNOWN if outcome.measured.failure else ""
    if not base:
        return format_decimal(after)
    change = after / base - 1
    return f"{format_decimal(after)} ({'+' if change >= 0 else '-'}{format_percent(abs(change))})"
