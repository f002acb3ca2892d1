"""The result of a judging: a table in the terminal, `results.json`, and one page with every question."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from peftchat.files import write_text
from peftchat.formatting import format_count, format_percent
from peftchat.judging.judge_run import Judgment, Outcome
from peftchat.judging.style import STYLE
from peftchat.judging.verdicts import ExamResult, JudgeVerdict, Rate
from peftchat.reports.page import write_page

RESULTS, PAGE = "results.json", "report.html"

_WEAK_EXAM = 0.6
"""An accuracy whose interval reaches down to this is little better than a coin."""


@dataclass(frozen=True)
class Judging:
    """Two models, judged.

    Attributes:
        name_a: the first model.
        name_b: the second model.
        outcomes: judge -> the outcome of each pair, in one order of pairs.
        verdicts: one for each judge.
        exams: the judges' exams, if there were any.
        agreement: kappa of the first two judges; None for one judge, or where chance explains all.
        cost: of all tokens; None if no prices were given.
        settings: what was asked and how.
    """

    name_a: str
    name_b: str
    outcomes: Mapping[str, Sequence[Outcome]]
    verdicts: Sequence[JudgeVerdict]
    exams: Sequence[ExamResult]
    agreement: float | None
    cost: float | None
    settings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as a JSON object, without texts."""
        return {
            "a": self.name_a,
            "b": self.name_b,
            "judges": [verdict.as_dict() for verdict in self.verdicts],
            "exams": [exam.as_dict() for exam in self.exams],
            "kappa": self.agreement,
            "cost": self.cost,
            "settings": dict(self.settings),
        }

    def write(self, folder: Path) -> None:
        """Write `report.html` and `results.json` into a folder."""
        _write_page(self, folder / PAGE)
        write_text(folder / RESULTS, json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")

    def notes(self) -> list[str]:
        """Return what limits the result."""
        lines = []
        for exam in self.exams:
            if exam.accuracy.low < _WEAK_EXAM:
                lines.append(
                    f"{exam.judge} chose the better answer in {format_percent(exam.accuracy.value)} of {exam.pairs} "
                    f"known pairs ({_interval(exam.accuracy)}): its verdicts say little."
                )
        for verdict in self.verdicts:
            if verdict.unread_replies:
                cut = f" {verdict.cut_replies} of them were cut by --max-tokens." if verdict.cut_replies else ""
                lines.append(
                    f"{verdict.judge}: {verdict.unread_replies} replies could not be read and do not count.{cut}"
                )
            if verdict.read and verdict.disagreements / verdict.read > 0.5:
                lines.append(f"{verdict.judge}: the order decides more often than the answers.")
            if verdict.win_rate is not None and verdict.win_rate.low <= 0.5 <= verdict.win_rate.high:
                lines.append(f"{verdict.judge}: the interval holds 50 %, so neither model is better by it.")
        if len(self.verdicts) > 1:
            shown = "cannot be told from chance" if self.agreement is None else f"{self.agreement:.2f} (Cohen's kappa)"
            lines.append(f"Agreement of the first two judges on A, B or tie: {shown}.")
        if self.cost is not None:
            lines.append(f"Cost of all replies by the given prices: {self.cost:.2f}.")
        return lines


_TITLES = (
    "wins of A", "wins of B", "ties", "win rate of A", "at equal length", "at equal style", "orders disagree",
    "first preferred", "length A / B", "headers A / B", "list items A / B", "bold A / B", "style that wins",
)  # fmt: skip


_EXAM = "exam: the better answer chosen"


def _row(verdict: JudgeVerdict) -> list[str]:
    return [
        verdict.judge,
        str(verdict.wins_a),
        str(verdict.wins_b),
        str(verdict.ties),
        _shown(verdict.win_rate),
        _shown(verdict.length_controlled),
        _shown(verdict.style_controlled),
        f"{verdict.disagreements} of {verdict.read}",
        "—" if verdict.first_preferred is None else format_percent(verdict.first_preferred),
        f"{format_count(round(verdict.mean_length_a))} / {format_count(round(verdict.mean_length_b))}",
        *(f"{verdict.style_a[name]:.1f} / {verdict.style_b[name]:.1f}" for name in STYLE[1:]),
        _winning_style(verdict),
    ]


def _page_rows(judging: Judging) -> list[list[str]]:
    rows = [_row(verdict) for verdict in judging.verdicts]
    if not judging.exams:
        return rows
    return [[*row, _shown(exam.accuracy)] for row, exam in zip(rows, judging.exams, strict=True)]


def _winning_style(verdict: JudgeVerdict) -> str:
    """Name the covariates whose slope certainly is not zero, with the sign that wins."""
    told = [
        f"{'more' if slope.value > 0 else 'less'} {name}"
        for name, slope in verdict.style_slopes.items()
        if slope.low > 0 or slope.high < 0
    ]
    return ", ".join(told) or "none certainly"


def _shown(rate: Rate | None) -> str:
    return "—" if rate is None else f"{format_percent(rate.value)} ({_interval(rate)})"


def _interval(rate: Rate) -> str:
    return f"{format_percent(rate.low)} to {format_percent(rate.high)}"


def judging_table(judging: Judging) -> Table:
    """Return a table with a line for each number and a column for each judge."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column(f"A: {judging.name_a}\nB: {judging.name_b}")
    rows = [_row(verdict) for verdict in judging.verdicts]
    for row in rows:
        table.add_column(row[0], justify="right")
    for index, title in enumerate(_TITLES, start=1):
        table.add_row(title, *(row[index] for row in rows))
    for title, side in (("scores of A", "scores_a"), ("scores of B", "scores_b")):
        shown = [_histogram(getattr(verdict, side)) for verdict in judging.verdicts]
        if any(shown):
            table.add_row(title, *shown)
    if judging.exams:
        table.add_row(_EXAM, *(_shown(exam.accuracy) for exam in judging.exams))
    return table


def _histogram(scores: Mapping[str, int]) -> str:
    return ", ".join(f"{score}: {count}" for score, count in scores.items())


def _write_page(judging: Judging, path: Path) -> None:
    first = next(iter(judging.outcomes.values()))
    shown: list[dict[str, Any]] = []
    for index, outcome in enumerate(first):
        of_judges = [(judge, outcomes[index]) for judge, outcomes in judging.outcomes.items()]
        of_pair = {_kind(one) for _, one in of_judges}
        if any(one.is_read and not one.agrees for _, one in of_judges):
            of_pair.add("changed")
        shown.append(
            {
                "pair": outcome.pair,
                "kinds": " ".join(sorted(of_pair)),
                "winners": [(judge, one.winner or "not read") for judge, one in of_judges],
                "replies": [
                    (f"{judge}, {order}: {_said(judgment)}", judgment.reply)
                    for judge, one in of_judges
                    for order, judgment in (("A first", one.forward), ("B first", one.backward))
                ],
            }
        )
    labels = {
        "all": "all", "won-a": "A wins", "won-b": "B wins", "tie": "ties", "changed": "orders disagree",
        "unread": "not read",
    }  # fmt: skip
    kinds = [
        {"id": kind, "label": label, "count": sum(kind == "all" or kind in one["kinds"].split() for one in shown)}
        for kind, label in labels.items()
    ]
    write_page(
        path,
        "judge.html.jinja",
        name_a=judging.name_a,
        name_b=judging.name_b,
        titles=[*_TITLES, _EXAM] if judging.exams else _TITLES,
        rows=_page_rows(judging),
        notes=judging.notes(),
        kinds=kinds,
        outcomes=shown,
    )


def _kind(outcome: Outcome) -> str:
    return {"A": "won-a", "B": "won-b", "tie": "tie"}.get(outcome.winner or "", "unread")


def _said(judgment: Judgment) -> str:
    if judgment.winner is None:
        return "not read"
    scores = judgment.scores
    return f"{judgment.winner}" if scores is None else f"{scores.first:g} and {scores.second:g} in the order shown"
