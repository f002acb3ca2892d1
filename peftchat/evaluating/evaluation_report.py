"""What a user sees of an evaluation: a table in the terminal, Markdown, a plot."""

from collections.abc import Sequence

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from peftchat.evaluating.paired import Difference
from peftchat.evaluating.side_by_side import Evaluation, MetricRow, ModelRow, TaskRow
from peftchat.formatting import format_count, format_decimal
from peftchat.reports.svg import Mark, as_file, interval_plot

_STYLES = {"better": "green", "worse": "red"}


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return the scores of all models, and the differences, as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    header, rows = _cells(evaluation)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < 1 else "right")
    for row in rows:
        table.add_row(*[Text(cell, style=_STYLES.get(cell, "")) for cell in row])
    return table


def notes(evaluation: Evaluation) -> list[str]:
    """Return what must be known to read the numbers, a sentence each."""
    first = evaluation.models[0]
    found = [f"{model.name}: {_how(model)}." for model in evaluation.models]
    shots = ", ".join(
        f"{task.task} {'different numbers of' if task.shots is None else task.shots}" for task in evaluation.shown
    )
    found.append(f"Shots: {shots}.")
    if len(evaluation.models) > 1:
        found.append(
            f"A difference is {first.name} minus the other, on the same questions, with its 95 % interval. "
            "With many intervals, one of twenty misses by chance."
        )
    limited = [task for task in evaluation.shown if task.questions < task.available]
    if limited:
        found.append(f"Only a part of the questions was asked ({_of(limited)}).")
    clustered = [f"{task.task} ({task.clusters} groups)" for task in evaluation.shown if task.clusters is not None]
    if clustered:
        found.append(f"Questions with a common text count as related: {', '.join(clustered)}.")
    for model in evaluation.models:
        if model.cut:
            found.append(
                f"{model.name}: {format_count(model.cut)} of {format_count(model.requests)} requests did not fit into "
                f"the context of {format_count(model.context)} tokens and lost their beginning."
            )
    return found


def _of(tasks: Sequence[TaskRow]) -> str:
    parts = [f"{task.task} {format_count(task.questions)} of {format_count(task.available)}" for task in tasks]
    return ", ".join(parts)


def _how(model: ModelRow) -> str:
    through = "through its chat template" if model.through_template else "without a chat template"
    where = "" if model.name == model.model else f"{model.model}, "
    computed = "" if model.dtype in model.precision else f", computed in {model.dtype}"
    return f"{where}weights {model.precision}{computed}, on {model.device}, asked {through}"


def markdown(evaluation: Evaluation) -> str:
    """Return the table and its notes as Markdown."""
    header, rows = _cells(evaluation)
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)]), *map(_line, rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(evaluation))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def difference_plot(evaluation: Evaluation) -> str:
    """Return the differences with their intervals as an SVG file, or the scores of a single model."""
    first, *others = evaluation.models
    marks = []
    for task in evaluation.shown:
        for metric in task.metrics:
            if not others:
                error = metric.stderrs[0]
                margin = None if error is None else 1.96 * error
                name = f"{task.task} {metric.metric}"
                marks.append(Mark(name, metric.values[0], margin, (), 0, format_decimal(metric.values[0])))
            for place, difference in enumerate(metric.differences):
                if difference is None:
                    continue
                ends = None if difference.low is None or difference.high is None else (difference.low, difference.high)
                name = f"{task.task} {metric.metric}"
                text = f"{difference.mean:+.3f}"
                marks.append(Mark(name, difference.mean, None, (), place % 4, text, interval=ends))
    if others:
        label = f"{first.name} minus {' and '.join(other.name for other in others)}"
        return as_file(interval_plot(marks, label=label, x_name="difference, 95 % interval", around_zero=True))
    return as_file(interval_plot(marks, label=first.name, x_name="score, 95 % interval") or Markup("<svg ></svg>"))


def _cells(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    first, *others = evaluation.models
    header = ["task", "metric", "questions", first.name]
    for other in others:
        header += [other.name, "difference", ""]
    rows = []
    for task in evaluation.shown:
        for number, metric in enumerate(task.metrics):
            row = [task.task if number == 0 else "", metric.metric, format_count(task.questions)]
            row.append(_score(metric, 0))
            for place in range(len(others)):
                row += [_score(metric, place + 1), _interval(metric.differences[place]), metric.verdict(place)]
            rows.append(row)
    return header, rows


def _score(metric: MetricRow, place: int) -> str:
    value, error = metric.values[place], metric.stderrs[place]
    shown = format_decimal(value) if abs(value) > 1 else f"{value:.3f}"
    return shown if error is None else f"{shown} ± {error:.3f}"


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
