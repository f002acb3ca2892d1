"""One page over several runs: their losses against steps, tokens and time, and what tells them apart."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from peftchat.errors import UserError
from peftchat.formatting import format_bytes, format_count, format_decimal, format_duration, format_short_count
from peftchat.recipe.document import flat_values
from peftchat.reports.curves import Against, mean_window, points, smoothed
from peftchat.reports.page import write_page
from peftchat.reports.svg import Series, line_plot
from peftchat.runs.eval_losses import GroupLoss
from peftchat.runs.metrics_file import Scalar
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary, SampleAnswer

_COLORS = 8
MAX_RUNS = 2 * _COLORS
"""Each color is used twice, the second time for a dashed line."""

_NONE = "\N{EN DASH}"
_NOT_TOLD = {"output_dir"}
_AXES: tuple[tuple[Against, str], ...] = (("step", "step"), ("tokens", "tokens"), ("seconds", "seconds"))


@dataclass(frozen=True)
class ReportedRun:
    """A run on a page over several.

    Attributes:
        name: the end of its path that tells it from the others.
        folder: its folder.
        summary: its results; empty for a run that has not finished.
        lines: its metrics.
        number: its place, which its color and dashes follow from.
    """

    name: str
    folder: RunFolder
    summary: RunSummary
    lines: Sequence[dict[str, Scalar]]
    number: int

    @property
    def style(self) -> str:
        """The classes of its line."""
        return f"line-{self.number % _COLORS}" + " dashed" * (self.number >= _COLORS)

    def series(self, curve: Sequence[tuple[float, float]]) -> Series:
        """Return one of its curves, smoothed where it is long."""
        window = mean_window(curve)
        shown = curve if window == 1 else smoothed(curve, window)
        return Series(self.name, shown, color=self.number % _COLORS, dashed=self.number >= _COLORS)


def read_runs(paths: Iterable[Path]) -> list[ReportedRun]:
    """Read the folders of several runs, finished or not.

    Raises:
        UserError: a folder is no run's, or is named twice; a run has no losses; or there are too many runs.
    """
    folders = list(paths)
    if len(folders) > MAX_RUNS:
        raise UserError(
            f"{len(folders)} runs cannot be told apart on one page; at most {MAX_RUNS} can", hint="Give fewer runs."
        )
    seen: dict[Path, Path] = {}
    for path in folders:
        check_run(path)
        if path.resolve() in seen:
            raise UserError("this run is named twice", where=f"{seen[path.resolve()]} and {path}", hint="Name it once.")
        seen[path.resolve()] = path
    runs = []
    for number, (name, path) in enumerate(zip(_names(list(seen)), folders, strict=True)):
        folder = RunFolder(path)
        lines = folder.metrics.read()
        if not points(lines, "loss") and not points(lines, "eval_loss"):
            raise UserError(
                f"the run has no losses: none of the {len(lines)} lines of metrics.jsonl has `loss` or `eval_loss`",
                where=str(path),
                hint="Give runs that have logged a step; training.logging_steps sets how often they do.",
            )
        summary = RunSummary.read(folder) if folder.is_finished else RunSummary()
        runs.append(ReportedRun(name, folder, summary, lines, number))
    return runs


def check_run(path: Path) -> None:
    """Check that a folder is a run's.

    Raises:
        UserError: it is none.
    """
    folder = RunFolder(path)
    if folder.has_started or folder.is_finished:
        return
    hint = "Give the folder that a recipe names as output_dir, once training has begun."
    if not path.exists():
        raise UserError("there is no such folder", where=str(path), hint=hint)
    if not path.is_dir():
        raise UserError("a run is a folder, and this is a file", where=str(path), hint=hint)
    inside = sorted(child.name for child in path.iterdir() if RunFolder(child).has_started)
    if inside:
        hint = f"It holds runs: {', '.join(inside[:5])}{' …' if len(inside) > 5 else ''}. Name those."
    raise UserError("this folder is no run: it has no recipe.yaml with a run's files", where=str(path), hint=hint)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return for each of different paths the shortest end that no other path has."""
    names = []
    for path in paths:
        for length in range(1, len(path.parts) + 1):
            end = path.parts[-length:]
            if sum(other.parts[-length:] == end for other in paths) == 1:
                break
        names.append(os.path.join(*end))  # noqa: PTH118 - only a name
    return names


def write_overlay(path: Path, runs: Sequence[ReportedRun]) -> Path:
    """Write a self-contained page over several runs, and return its path."""
    return write_page(
        path,
        "overlay.html.jinja",
        runs=runs,
        plots=[(name, _plots(runs, against, name)) for against, name in _AXES],
        results=[(run, _results(run.summary)) for run in runs],
        cautions=_cautions(runs),
        differences=_differences(runs),
        groups=_groups(runs),
        answers=_answers(runs),
        versions=_versions(runs),
    )


def _plots(runs: Sequence[ReportedRun], against: Against, name: str) -> list[tuple[str, Markup]]:
    drawn = []
    for key, title in (("eval_loss", "Held-out loss"), ("loss", "Training loss")):
        series = [run.series(points(run.lines, key, against)) for run in runs]
        drawn.append((title, line_plot(series, label=f"{title} by {name}", x_name=name, legend=False)))
    return [(title, plot) for title, plot in drawn if plot]


def _results(summary: RunSummary) -> list[tuple[str, str]]:
    return [
        ("Method", summary.method or "not finished"),
        ("Held-out loss before", format_decimal(summary.eval_loss_before)),
        ("After", format_decimal(summary.eval_loss)),
        ("Steps", format_count(summary.steps)),
        ("Tokens", format_short_count(summary.tokens)),
        ("Time", format_duration(summary.seconds)),
        ("Tokens/s", format_count(summary.tokens_per_second)),
        ("Peak memory", format_bytes(summary.peak_memory_bytes)),
        ("Trained parameters", format_short_count(summary.trainable_parameters)),
    ]


def _cautions(runs: Sequence[ReportedRun]) -> list[str]:
    """Return why losses of these runs may not be compared."""
    found = []
    marks = [run.summary.fingerprints for run in runs]
    known = [mark for mark in marks if mark is not None]
    held_out = {mark.data["eval"].digest for mark in known if "eval" in mark.data}
    if len(held_out) > 1:
        found.append("The runs were held to different conversations, or encode them differently.")
    if len({mark.tokenizer for mark in known if mark.tokenizer}) > 1:
        found.append("The tokenizers differ, so a loss per token means something else in each.")
    if len({run.summary.objective for run in runs}) > 1:
        found.append("The objectives differ, and so do their losses.")
    if len({run.summary.base_model for run in runs if run.summary.base_model}) > 1:
        found.append("The bases differ.")
    unfinished = [run.name for run in runs if not run.folder.is_finished]
    if unfinished:
        found.append(f"Not finished: {', '.join(unfinished)}.")
    if any(not points(run.lines, "tokens") for run in runs):
        found.append("Plots by tokens lack runs of older versions, whose metrics.jsonl has no tokens.")
    return found


def _differences(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Return the keys of the recipes that are not the same in all runs, with the value of each run."""
    recipes: list[dict[str, Any]] = []
    for run in runs:
        file = run.folder.recipe
        recipes.append(flat_values(file.read_text(encoding="utf-8")) if file.is_file() else {})
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in _NOT_TOLD)
    rows = [(key, [_value_text(recipe.get(key)) for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _value_text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, dict) and "path" in one for one in value):
        return ", ".join(Path(one["path"]).name for one in value)
    return _NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _groups(runs: Sequence[ReportedRun]) -> list[tuple[str, str, list[GroupLoss | None]]]:
    """Return the held-out losses of every source, role, kind, turn and length, run beside run."""
    tables = [run.summary.eval_by or {} for run in runs]
    found = []
    for name in dict.fromkeys(name for table in tables for name in table):
        groups = dict.fromkeys(group for table in tables for group in table.get(name, {}))
        if len(groups) > 1 or name == "role":
            found += [(name, group, [table.get(name, {}).get(group) for table in tables]) for group in groups]
    return found


def _answers(runs: Sequence[ReportedRun]) -> list[tuple[str, list[tuple[str, SampleAnswer]]]]:
    """Return the answers after training by question."""
    found: dict[str, list[tuple[str, SampleAnswer]]] = {}
    for run in runs:
        for answer in run.summary.samples_after:
            found.setdefault(answer.prompt, []).append((run.name, answer))
    return list(found.items())


def _versions(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Return devices and processes of all runs, and the libraries whose versions differ."""
    summaries = [run.summary for run in runs]
    rows = [
        ("Device", [one.device or "not measured" for one in summaries]),
        ("Processes", [format_count(one.world_size) for one in summaries]),
    ]
    for library in dict.fromkeys(library for one in summaries for library in one.versions):
        versions = [one.versions.get(library) or _NONE for one in summaries]
        if len(set(versions)) > 1:
            rows.append((library, versions))
    return rows
