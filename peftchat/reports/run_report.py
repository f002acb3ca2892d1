"""HTML report and model card of a finished run."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from ruamel.yaml.error import YAMLError

from peftchat.conversations.dataset_card import SKIPPED
from peftchat.errors import UserError, first_line
from peftchat.files import write_text
from peftchat.formatting import (
    format_bytes,
    format_count,
    format_decimal,
    format_duration,
    format_percent,
    format_short_count,
)
from peftchat.recipe import Recipe, dump_recipe
from peftchat.reports.assessment import assess_run, run_warnings
from peftchat.reports.curves import mean_window, points, smoothed
from peftchat.reports.mask import ShownExample
from peftchat.reports.mask_render import example_html
from peftchat.reports.model_card import model_card
from peftchat.reports.page import write_page
from peftchat.reports.svg import Series, line_plot
from peftchat.runs.metrics_file import Scalar
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary, SampleAnswer


def write_summaries(run: Path) -> None:
    """Write `README.md` and `report.html` into a run folder that has its `run.json`."""
    folder = RunFolder(run)
    recipe = folder.recipe.read_text(encoding="utf-8")
    write_text(folder.model_card, model_card(RunSummary.read(folder), recipe))
    write_report(run)


def try_model_card(recipe: Recipe) -> None:
    """Make the model card of a run without results, and read it with huggingface_hub.

    Raises:
        UserError: its metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        ModelCard(model_card(RunSummary(), dump_recipe(recipe)))
    except (ValueError, TypeError, YAMLError) as error:
        raise UserError(
            f"the model card cannot be written: {first_line(error)}",
            where=f"model.name: {recipe.model.name}",
            hint="Give the base's folder, or the run folder, a plainer name.",
        ) from error


@dataclass(frozen=True)
class ReportExtras:
    """What a page shows beside the files of the run.

    Attributes:
        planned: names, planned values, measured values, and how far the plan is off.
        examples: examples of the training data with their masks.
        missing: why a part is not there, one sentence each.
    """

    planned: Sequence[tuple[str, str, str, str]] = ()
    examples: Sequence[ShownExample] = ()
    missing: Sequence[str] = ()


def write_report(run: Path, *, path: Path | None = None, extras: ReportExtras | None = None) -> Path:
    """Write `report.html` into a run folder from its `run.json`, `metrics.jsonl` and `recipe.yaml`.

    The last two may be missing, and so may any key of `run.json`; the page then shows "not measured".

    Args:
        run: the run folder.
        path: another file to write to.
        extras: the plan and examples, which take the base's config, the tokenizer and the data.

    Returns:
        The path of the page.

    Raises:
        UserError: `run.json` is missing, or a file has unexpected content.
    """
    folder = RunFolder(run)
    summary = RunSummary.read(folder)
    extras = extras or ReportExtras()
    return write_page(
        path or folder.report,
        "run_report.html.jinja",
        name=run.resolve().name,
        summary=summary,
        assessment=assess_run(summary),
        warnings=run_warnings(summary),
        left_out=SKIPPED,
        tiles=_tiles(summary),
        plots=_plots(folder.metrics.read()),
        answers=_by_question(folder),
        samples=_paired(summary.samples_before, summary.samples_after),
        extras=extras,
        masks=[(example, example_html(example)) for example in extras.examples],
        run=shlex.quote(os.path.relpath(run)),
        weights_size=folder.weights_bytes(),
        recipe=folder.recipe.read_text(encoding="utf-8") if folder.recipe.exists() else None,
        record=json.dumps(json.loads(folder.summary.read_text(encoding="utf-8")), indent=2, ensure_ascii=False),
    )


def _tiles(summary: RunSummary) -> list[tuple[str, str]]:
    return [
        ("Held-out loss", format_decimal(summary.eval_loss)),
        *_pair_tiles(summary),
        ("Time", format_duration(summary.seconds)),
        ("Tokens/s", format_count(summary.tokens_per_second)),
        ("Supervised", format_percent(summary.supervised_share)),
        ("Trained", format_short_count(summary.trainable_parameters)),
        ("Peak memory", format_bytes(summary.peak_memory_bytes)),
    ]


def _pair_tiles(summary: RunSummary) -> list[tuple[str, str]]:
    pairs, answers = summary.eval_pairs, summary.eval_labels
    if pairs is not None:
        return [
            ("Held-out pairs right", format_percent(pairs.right)),
            ("Held-out margin", format_decimal(pairs.margin)),
            *_kl_tile(pairs.reference_kl),
        ]
    if answers is None:
        return []
    rewards = [("good", answers.good_reward), ("bad", answers.bad_reward)]
    return [
        ("Held-out answers right", format_percent(answers.right)),
        *((f"Reward of {name} answers", format_decimal(value)) for name, value in rewards if value is not None),
        ("KL term", format_decimal(answers.kl)),
        *_kl_tile(answers.reference_kl),
    ]


def _kl_tile(reference_kl: float | None) -> list[tuple[str, str]]:
    return [] if reference_kl is None else [("KL from the reference, per token", format_decimal(reference_kl))]


def _plots(lines: Sequence[Mapping[str, Scalar]]) -> list[tuple[str, Markup]]:
    has_labels = any("kl" in line or "eval_kl" in line for line in lines)
    first, second = ("good", "bad") if has_labels else ("chosen", "rejected")
    right = "Answers on the side of their label" if has_labels else "Pairs with the higher reward for the chosen answer"
    wanted = {
        "Loss": _losses(lines),
        right: _both(lines, "rewards/accuracies"),
        "Margin of the rewards": _both(lines, "rewards/margins"),
        "KL term": _both(lines, "kl"),
        "KL from the reference, in nats per token of held-out answers": [
            Series("held out", points(lines, "eval_reference_kl"), color=1)
        ],
        "Log-probability of whole answers, held out": [
            Series(first, points(lines, "eval_logps/chosen")),
            Series(second, points(lines, "eval_logps/rejected"), color=1),
        ],
        "Learning rate": [Series("learning rate", points(lines, "learning_rate"))],
        "Tokens per second": [Series("tokens per second", points(lines, "tokens_per_second"))],
        "Gradient norm, before clipping": [Series("gradient norm", points(lines, "grad_norm"))],
    }
    drawn = [(title, line_plot(series, label=f"{title} by step", x_name="step")) for title, series in wanted.items()]
    return [(title, plot) for title, plot in drawn if plot]


def _losses(lines: Sequence[Mapping[str, Scalar]]) -> list[Series]:
    """Return training and held-out loss, with a moving mean over a long training curve."""
    train = points(lines, "loss")
    held_out = Series("held out", points(lines, "eval_loss"), color=1)
    window = mean_window(train)
    if window == 1:
        return [Series("training", train), held_out]
    mean = Series(f"mean of {window}", smoothed(train, window))
    return [Series("training", train, faint=True), mean, held_out]


def _both(lines: Sequence[Mapping[str, Scalar]], key: str) -> list[Series]:
    """Return a metric in training and on held-out pairs."""
    held_out = points(lines, f"eval_{key}")
    return [Series("training", points(lines, key)), Series("held out", held_out, color=1)]


def _by_question(folder: RunFolder) -> list[tuple[str, list[tuple[int, SampleAnswer]]]]:
    """Return the answers at each evaluation by question; nothing where another program wrote the file."""
    found: dict[str, list[tuple[int, SampleAnswer]]] = {}
    try:
        for line in folder.samples.read():
            one = SampleAnswer(line["prompt"], line["answer"], line["stopped"])
            found.setdefault(one.prompt, []).append((line["step"], one))
    except (UserError, KeyError):
        return []
    return list(found.items())


def _paired(
    before: Sequence[SampleAnswer], after: Sequence[SampleAnswer]
) -> list[tuple[str, SampleAnswer | None, SampleAnswer | None]]:
    """Return the answers before and after training by prompt."""
    first = {answer.prompt: answer for answer in before}
    last = {answer.prompt: answer for answer in after}
    return [(prompt, first.get(prompt), last.get(prompt)) for prompt in {**first, **last}]
