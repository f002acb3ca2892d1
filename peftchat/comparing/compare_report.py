"""Comparison report: the files, the table in the terminal and the HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.comparing.candidates import describe
from peftchat.comparing.compare_plots import COLORS, comparison_plots, interval_marks, line_styles, search_plot
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.outcomes import CandidateResult
from peftchat.comparing.pair_scores import value_of, wrong
from peftchat.comparing.results import ComparisonResult, ComparisonSummary, TaskSummary
from peftchat.comparing.task_reasons import format_score, format_task_gap
from peftchat.console import natural_width
from peftchat.files import write_text
from peftchat.formatting import (
    UNKNOWN,
    format_bytes,
    format_count,
    format_decimal,
    format_duration,
    format_percent,
    format_short_count,
)
from peftchat.reports.page import write_page
from peftchat.runs.run_summary import SampleAnswer

_FIRST = ("variant", "settings")
_OF_PAIRS = ("margin", "own reward")
_LAST = (
    "general loss",
    "tokens/s",
    "time",
    "peak memory",
    "trained",
    "on disk",
    "merged",
)
"""Columns of the table beside those of tasks; all but the first two and the last hold numbers."""


def table_headers(result: ComparisonResult) -> tuple[str, ...]:
    """Return the columns of the table: for each task its score and the gap to the best score, after general loss."""
    tasks = [header for task in result.tasks.tasks for header in (task.title, f"{task.task} gap")]
    gap = "gap" if result.measure.is_share else "loss gap"
    of_pairs = _OF_PAIRS if result.measure.has_pairs else ()
    return (*_FIRST, result.measure.title, gap, *of_pairs, _LAST[0], *tasks, *_LAST[1:])


def _task_cells(result: ComparisonResult, candidate: CandidateResult) -> list[str]:
    name, cells = candidate.candidate.name, []
    for task in result.tasks.tasks:
        score, gap = task.score(name), task.gap(task.best, name)
        sign = "" if gap is None or not round(gap.mean, 6) else "-" if task.higher_is_better else "+"
        cells += [
            UNKNOWN if score is None else format_score(score[0]) + format_standard_error(score[1]),
            "" if gap is None or name == task.best else f"{sign}{format_task_gap(gap)}",
        ]
    return cells


def format_standard_error(error: float | None) -> str:
    """Format the standard error of a score, with a blank before it."""
    return "" if error is None else f" (SE {format_score(error)})"


def base_task_line(result: ComparisonResult) -> str | None:
    """Return the scores of the untouched base, in a sentence."""
    scores = TaskSummary.all_of("base", result.tasks)
    told = ", ".join(
        f"{one.task} {one.metric} {format_score(one.score)}{format_standard_error(one.stderr)}" for one in scores
    )
    return f"The base model: {told}." if told else None


@dataclass(frozen=True)
class TableRow:
    """One candidate in the table.

    Attributes:
        cells: a text for each header; empty for an unknown value.
        failure: why there are no numbers.
        recommended: whether it is the recommended candidate.
        tied: whether it is tied with the lowest loss.
    """

    cells: Sequence[str]
    failure: str | None = None
    recommended: bool = False
    tied: bool = False


def table_rows(result: ComparisonResult) -> list[TableRow]:
    """Return the candidates from the best on, by their loss or by what is right; failed ones last."""
    finished = sorted(
        (candidate for candidate in result.candidates if candidate.loss is not None),
        key=lambda candidate: fmean(wrong(run, result.measure) for run in candidate.runs),
    )
    failed = [candidate for candidate in result.candidates if candidate.loss is None]
    return [_table_row(result, candidate) for candidate in (*finished, *failed)]


def _table_row(result: ComparisonResult, candidate: CandidateResult) -> TableRow:
    recommendation, best, measure = result.recommendation, candidate.best, result.measure
    value = value_of(candidate, measure)
    if best is None or value is None or recommendation is None:
        failures = [run.failure for run in candidate.failures if run.failure]
        blank = [""] * (len(table_headers(result)) - 1)
        return TableRow((candidate.candidate.name, *blank), failures[0] if failures else "not run yet")
    gap = recommendation.evidence.gap(recommendation.lowest, candidate)
    cells = (
        candidate.candidate.name,
        describe(candidate.settings),
        measure.format_interval(value.mean, value.margin),
        "" if candidate is recommendation.lowest or gap is None else measure.format_gap(gap),
        *_pair_cells(result, candidate),
        format_general_loss(candidate, result.base_general_loss),
        *_task_cells(result, candidate),
        format_count(candidate.tokens_per_second),
        format_duration(candidate.seconds),
        format_bytes(candidate.peak_memory_bytes),
        format_short_count(best.trainable_parameters),
        format_bytes(best.weights_bytes),
        candidate.evaluation.merge or "",
    )
    return TableRow(cells, recommended=candidate is recommendation.recommended, tied=candidate in recommendation.tied)


def _pair_cells(result: ComparisonResult, candidate: CandidateResult) -> list[str]:
    """Return what the table has of pairs beside the share that is right."""
    if not result.measure.has_pairs:
        return []
    margin = "" if candidate.margin is None else f"{candidate.margin:+.3f}"
    return [margin, format_percent(candidate.own_right)]


def format_general_loss(candidate: CandidateResult, base: float | None) -> str:
    """Format the general loss after training and its change from the base model."""
    after = candidate.evaluation.general_loss
    if after is None:
        return UNKNOWN if candidate.evaluation.error else ""
    if not base:
        return format_decimal(after)
    change = after / base - 1
    return f"{format_decimal(after)} ({'+' if change >= 0 else '-'}{format_percent(abs(change))})"


_TEXT_COLUMNS = ("variant", "settings", "merged")
_OPTIONAL_COLUMNS = ("on disk", "own reward", "loss gap", "gap", "merged", "margin", "time", "general loss", "trained",
                     "tokens/s")  # fmt: skip
"""Columns that a narrow terminal omits, in this order; the page has them all."""


def print_comparison(result: ComparisonResult, console: Console) -> None:
    """Print the table, the recommendation and its reasons."""
    table = _fit_table(result, console.width if console.is_terminal else None)
    # A file or a pipe has no limited width.
    Console(file=console.file, width=max(console.width, natural_width(table))).print(table)
    wrap = not console.is_terminal
    base = base_task_line(result)
    if base is not None:
        console.print(Text(base), soft_wrap=wrap)
    recommendation = result.recommendation
    if recommendation is None:
        return
    console.print(Text(recommendation.headline, style="bold green"))
    for reason in recommendation.reasons:
        console.print(Text(f"  {reason}"), soft_wrap=wrap)
    for warning in recommendation.warnings:
        console.print(Text.assemble(("  note: ", "yellow"), warning), soft_wrap=wrap)


def _fit_table(result: ComparisonResult, width: int | None) -> Table:
    """Return the table with as many columns as fit `width`; None means all."""
    rows, headers = table_rows(result), table_headers(result)
    shown = list(headers)
    table = _table(rows, headers, shown)
    gaps = [f"{task.task} gap" for task in result.tasks.tasks]
    for header in (*_OPTIONAL_COLUMNS, *gaps):
        if width is None or natural_width(table) <= width:
            break
        if header not in shown:
            continue
        shown.remove(header)
        table = _table(rows, headers, shown)
    return table


def _table(rows: Sequence[TableRow], headers: Sequence[str], shown: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for header in shown:
        table.add_column(header, justify="left" if header in _TEXT_COLUMNS else "right", no_wrap=True)
    for row in rows:
        if row.failure is not None:
            table.add_row(Text(row.cells[0], style="red"), Text("failed", style="red"))
            continue
        cells = [cell for header, cell in zip(headers, row.cells, strict=True) if header in shown]
        style = "bold green" if row.recommended else "" if row.tied else "dim"
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def write_comparison_files(result: ComparisonResult, folder: ComparisonFolder) -> None:
    """Write the summary, the report and the recommended recipe.

    The recipe is written only if a candidate finished.
    """
    ComparisonSummary.of(result, folder).write(folder)
    if result.recommendation is not None:
        write_text(folder.recommended, result.recommended_recipe(folder), errors="backslashreplace")
    write_comparison_page(folder.report, result, folder.recommended)


def write_comparison_page(path: Path, result: ComparisonResult, recommended: Path) -> Path:
    """Write the HTML page.

    Args:
        path: the page.
        result: what it shows.
        recommended: the file with the recommended recipe.
    """
    recommendation = result.recommendation
    finished = [candidate for candidate in result.candidates if candidate.best is not None]
    lines = line_styles(result.candidates)
    return write_page(
        path,
        "compare.html.jinja",
        recommendation=recommendation,
        headers=table_headers(result),
        base_tasks=base_task_line(result),
        rows=table_rows(result),
        lines=[lines[candidate.candidate.name] for candidate in finished],
        colors=COLORS,
        measure=result.measure,
        notes=NOTES[result.measure.key],
        plots=comparison_plots(result, finished, lines),
        intervals=interval_marks(recommendation, finished, lines),
        search=search_plot(result, finished, lines),
        trials=[(candidate.candidate.name, _trials(candidate)) for candidate in result.candidates],
        merges=[(one.candidate.name, one.evaluation) for one in finished if one.evaluation.merge is not None],
        answers=_answers(finished),
        failures=[(one.candidate.name, run) for one in result.candidates for run in one.failures],
        describe=describe,
        introduction=_introduction(result, finished),
        base_general_loss=result.base_general_loss,
        command=f"peftchat train {recommended}",
        recipe=recommended.read_text(encoding="utf-8") if recommendation and recommended.is_file() else None,
    )


def _selection(result: ComparisonResult, seeds: str) -> str:
    """Say how the settings of a variant were found."""
    if all(len(candidate.trials) <= 1 for candidate in result.candidates):
        return f"No settings were searched: each variant has one, trained on seed{'s' if ',' in seeds else ''} {seeds}."
    several = f"; the best settings of each variant were trained on seeds {seeds}." if "," in seeds else "."
    own = " of the candidate's own objective" if result.measure.is_share else ""
    return f"Settings were selected on seed {result.plan.seeds[0]} by held-out loss{own}{several}"


_GAP_TEXTS = {
    "loss": "The loss gap compares each variant with the lowest, conversation by conversation and seed by seed.",
    "pairs_right": "The gap compares each candidate with the one that has the most pairs right, pair by pair and seed "
    "by seed, in points of a hundred.",
    "answers_right": "The gap compares each candidate with the one that has the most answers right, answer by answer "
    "and seed by seed, in points of a hundred.",
}

NOTES = {
    "loss": "Gray: higher than the lowest loss by more than the noise.",
    "pairs_right": "Gray: fewer are right than of the best, by more than the noise. Margin is how much more the chosen "
    "answer's log-probability rose than the rejected one's, in nats.",
    "answers_right": "Gray: fewer are right than of the best, by more than the noise.",
}
"""What the page says below the table."""


def _introduction(result: ComparisonResult, finished: Sequence[CandidateResult]) -> list[str]:
    """Describe what all runs have in common, one paragraph each."""
    plan = result.plan
    seeds = ", ".join(map(str, plan.seeds))
    budget = "the recipe's own number of steps" if plan.options.budget is None else str(plan.options.budget)
    cases = result.measure.cases
    paragraphs = [
        f"Base model: {plan.base.recipe.model.name}. Every run trains for {budget} on the same {cases} and is "
        "evaluated on the same held-out ones.",
        _selection(result, seeds),
    ]
    shares = {run.job.share for one in result.candidates for run in one.trials if run.job.share < 1}
    if shares:
        times = ", ".join(f"{1 / share:.3g}" for share in sorted(shares))
        paragraphs.append(
            f"Learning rates were tried in runs {times} times shorter, each with the whole schedule. The best of a "
            "variant and its better neighbor were trained in full."
        )
    paragraphs.append(
        f"{_GAP_TEXTS[result.measure.key]} Its ± is half of the 95 % interval that holds for all pairs of candidates "
        "at once, so that it may be read after the best has been picked."
    )
    if result.measure.is_share:
        own = " Own reward is the share by the objective's own reward." if result.measure.has_pairs else ""
        paragraphs.append(f"{result.measure.explanation}{own}")
    if len(plan.seeds) > 1:
        what = "share that is right" if result.measure.is_share else "held-out loss"
        paragraphs.append(f"The ± of the {what} is half of Student's 95 % interval over the seeds alone.")
    before = {format_decimal(one.best.loss_before) for one in finished if one.best and one.best.loss_before is not None}
    if before and result.losses_are_alike:
        ends = sorted((min(before), max(before))[: len(before)])
        paragraphs.append(f"Held-out loss before training: {' to '.join(ends)}.")
    return paragraphs


def _trials(candidate: CandidateResult) -> list[tuple[str, str, bool]]:
    """Return the settings of each trial, its loss, and whether it is the best."""
    return [
        (
            describe(run.job.settings) + (" (short)" if run.job.share < 1 else ""),
            "failed" if run.failure is not None else format_decimal(run.loss),
            run is candidate.best,
        )
        for run in candidate.trials
    ]


def _answers(finished: Sequence[CandidateResult]) -> list[tuple[str, list[tuple[str, SampleAnswer]]]]:
    """Return each prompt with the answers of all candidates, by name."""
    by_prompt: dict[str, list[tuple[str, SampleAnswer]]] = {}
    for candidate in finished:
        for answer in candidate.evaluation.answers:
            by_prompt.setdefault(answer.prompt, []).append((candidate.candidate.name, answer))
    return list(by_prompt.items())
