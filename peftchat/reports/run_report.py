"""What a finished run leaves for people: the model card and the report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from peftchat.files import write_text
from peftchat.formatting import (
    format_bytes,
    format_count,
    format_decimal,
    format_duration,
    format_percent,
    format_short_count,
)
from peftchat.reports.model_card import model_card
from peftchat.reports.page import write_page
from peftchat.reports.svg import Series, line_plot
from peftchat.reports.verdict import cautions, verdict
from peftchat.runs.metrics_file import Scalar
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary, SampleAnswer


def write_summaries(run: Path) -> None:
    """Write `README.md` and `report.html` into a run folder that has its `run.json`."""
    folder = RunFolder(run)
    recipe = folder.recipe.read_text(encoding="utf-8")
    write_text(folder.model_card, model_card(RunSummary.read(folder), recipe))
    write_report(run)


_SMOOTH_FROM = 40


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder from its `run.json`, `metrics.jsonl` and `recipe.yaml`.

    The last two may be missing, and so may any key of `run.json`: the page then says "not measured".

    Returns:
        the path of the page.

    Raises:
        UserError: `run.json` is missing, or a file is not what its name says.
    """
    folder = RunFolder(run)
    facts = RunSummary.read(folder)
    return write_page(
        folder.report,
        "run_report.html.jinja",
        name=run.resolve().name,
        facts=facts,
        verdict=verdict(facts),
        cautions=cautions(facts),
        tiles=_tiles(facts),
        plots=_plots(folder.metrics.read()),
        samples=_paired(facts.samples_before, facts.samples_after),
        weights_size=folder.weights_bytes(),
        recipe=folder.recipe.read_text(encoding="utf-8") if folder.recipe.exists() else None,
        record=json.dumps(json.loads(folder.summary.read_text(encoding="utf-8")), indent=2, ensure_ascii=False),
    )


def _tiles(facts: RunSummary) -> list[tuple[str, str]]:
    return [
        ("Held-out loss", format_decimal(facts.eval_loss)),
        ("Time", format_duration(facts.seconds)),
        ("Tokens/s", format_count(facts.tokens_per_second)),
        ("Supervised", format_percent(facts.supervised_share)),
        ("Trained", format_short_count(facts.trainable_parameters)),
        ("Peak memory", format_bytes(facts.peak_memory_bytes)),
    ]


def _plots(lines: Sequence[Mapping[str, Scalar]]) -> list[tuple[str, Markup]]:
    wanted = {
        "Loss": _losses(lines),
        "Learning rate": [Series("learning rate", _points(lines, "learning_rate"))],
        "Tokens per second": [Series("tokens per second", _points(lines, "tokens_per_second"))],
        "Gradient norm, before clipping": [Series("gradient norm", _points(lines, "grad_norm"))],
    }
    drawn = [(title, line_plot(series, label=f"{title} by step", x_name="step")) for title, series in wanted.items()]
    return [(title, plot) for title, plot in drawn if plot]


def _losses(lines: Sequence[Mapping[str, Scalar]]) -> list[Series]:
    """Training and held-out loss; a long training curve is noisy and gets its moving mean drawn over it."""
    train = _points(lines, "loss")
    held_out = Series("held out", _points(lines, "eval_loss"), color=1)
    if len(train) < _SMOOTH_FROM:
        return [Series("training", train), held_out]
    window = len(train) // 20 * 2 + 1
    mean = Series(f"mean of {window}", _smoothed(train, window))
    return [Series("training", train, faint=True), mean, held_out]


def _points(lines: Sequence[Mapping[str, Scalar]], key: str) -> list[tuple[float, float]]:
    return [
        (float(step), float(value))
        for step, value in ((line.get("step"), line.get(key)) for line in lines)
        if isinstance(step, int | float) and isinstance(value, int | float)
    ]


def _smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Centered moving mean; near the ends over the part of the window that exists."""
    half = window // 2
    values = [y for _, y in points]
    means = []
    for place, (x, _) in enumerate(points):
        near = values[max(0, place - half) : place + half + 1]
        means.append((x, sum(near) / len(near)))
    return means


def _paired(
    before: Sequence[SampleAnswer], after: Sequence[SampleAnswer]
) -> list[tuple[str, SampleAnswer | None, SampleAnswer | None]]:
    """Answers to the same prompt side by side, in the order in which the prompts were asked."""
    first = {answer.prompt: answer for answer in before}
    last = {answer.prompt: answer for answer in after}
    return [(prompt, first.get(prompt), last.get(prompt)) for prompt in {**first, **last}]
