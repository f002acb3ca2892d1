"""Run summary in the terminal: the assessment, the main numbers, and answers before and after training."""

from pathlib import Path

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from peftchat.console import stderr, stdout
from peftchat.formatting import (
    UNKNOWN,
    format_bytes,
    format_count,
    format_decimal,
    format_duration,
    format_percent,
    format_short_count,
)
from peftchat.reports.assessment import assess_run, run_warnings
from peftchat.runs.eval_labels import LabelSummary
from peftchat.runs.eval_losses import GroupLoss
from peftchat.runs.eval_pairs import PairSummary
from peftchat.runs.run_summary import RunSummary, SampleAnswer


def print_samples(summary: RunSummary) -> None:
    """Print each prompt of a run with the model's answers before and after training."""
    before = {sample.prompt: sample for sample in summary.samples_before}
    for sample in summary.samples_after:
        text = Text()
        earlier = before.get(sample.prompt)
        if earlier is not None:
            _add(text, "before", earlier)
            text.append("\n")
        _add(text, "after", sample)
        stdout.print(Panel(text, title=Text(sample.prompt, style="bold"), title_align="left"), soft_wrap=False)


def _add(text: Text, when: str, sample: SampleAnswer) -> None:
    text.append(f"{when}  ", style="bold green" if when == "after" else "bold")
    text.append(_truncated_answer(sample.answer) or "(empty)")
    if not sample.stopped:
        text.append("  (reached the length limit)", style="italic yellow")


def _truncated_answer(answer: str, most: int = 600) -> str:
    return answer if len(answer) <= most else f"{answer[:most]} …"


_GROUPS_SHOWN = 4

_COLORS = {"better": "green", "worse": "red", "failed": "red", "unknown": "yellow"}


def print_summary(summary: RunSummary) -> None:
    """Print the assessment, the main numbers and the new tokens of a run to standard error."""
    result = assess_run(summary)
    stderr.print()
    stderr.print(Text(result.headline, style=f"bold {_COLORS[result.outcome]}"), soft_wrap=False)
    stderr.print(_figures(summary))
    if summary.new_tokens:
        stderr.print(_tokens(summary))
    for warning in run_warnings(summary):
        stderr.print(Text.assemble(("note: ", "yellow"), warning), soft_wrap=False)


def _figures(summary: RunSummary) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    rows = [
        ("training loss", format_decimal(summary.train_loss)),
        *_training_by_file(summary),
        *_losses_by_group(summary),
        *_held_out_pairs(summary.eval_pairs),
        *_held_out_labels(summary.eval_labels),
        *_answer_lengths(summary),
        ("steps", format_count(summary.steps)),
        ("time", format_duration(summary.seconds)),
        ("tokens", f"{format_count(summary.tokens)}, {format_percent(summary.supervised_share)} supervised"),
        ("speed", _per_second(summary)),
        ("peak memory", format_bytes(summary.peak_memory_bytes)),
        ("trained", _parameters(summary)),
    ]
    for name, value in rows:
        if not value.startswith(UNKNOWN):
            table.add_row(name, value)
    return table


def _training_by_file(summary: RunSummary) -> list[tuple[str, str]]:
    """Return a row with the training loss of each file, if there are several."""
    files = summary.train_by_source or {}
    if len(files) < 2:
        return []
    shown = [
        f"{Path(file).name} {format_decimal(loss.first)} → {format_decimal(loss.last)}"
        for file, loss in list(files.items())[:_GROUPS_SHOWN]
    ]
    more = len(files) - len(shown)
    return [("training, by file", ", ".join(shown) + (f" and {more} more" if more else ""))]


def _losses_by_group(summary: RunSummary) -> list[tuple[str, str]]:
    """Return a row for each way to tell the held-out loss apart that gives several groups."""
    rows = []
    for name, groups in (summary.eval_by or {}).items():
        if len(groups) > 1:
            shown = [f"{group} {_before_and_after(loss)}" for group, loss in list(groups.items())[:_GROUPS_SHOWN]]
            more = len(groups) - len(shown)
            rows.append((f"held out, by {name}", ", ".join(shown) + (f" and {more} more" if more else "")))
    return rows


def _held_out_pairs(pairs: PairSummary | None) -> list[tuple[str, str]]:
    """Return the rows of held-out pairs."""
    if pairs is None:
        return []
    rewards = f"{format_decimal(pairs.chosen_reward)} chosen, {format_decimal(pairs.rejected_reward)} rejected"
    return [
        ("held-out rewards", f"{rewards}, margin {format_decimal(pairs.margin)}"),
        ("log-probability, chosen", _change(pairs.chosen_logp_before, pairs.chosen_logp)),
        ("log-probability, rejected", _change(pairs.rejected_logp_before, pairs.rejected_logp)),
        _distance(pairs.reference_kl),
    ]


def _distance(reference_kl: float | None) -> tuple[str, str]:
    """Return the row of the distance to the reference."""
    return "KL from the reference", f"{format_decimal(reference_kl)} nats per token of held-out answers"


def _held_out_labels(answers: LabelSummary | None) -> list[tuple[str, str]]:
    """Return the rows of held-out labeled answers."""
    if answers is None:
        return []
    rewards = f"{format_decimal(answers.good_reward)} good, {format_decimal(answers.bad_reward)} bad"
    rows = [("held-out rewards", f"{rewards}, KL term {format_decimal(answers.kl)}")]
    for name, before, after in (
        ("good", answers.good_logp_before, answers.good_logp), ("bad", answers.bad_logp_before, answers.bad_logp),
    ):  # fmt: skip
        if after is not None:
            rows.append((f"log-probability, {name}", _change(before, after)))
    return [*rows, _distance(answers.reference_kl)]


def _answer_lengths(summary: RunSummary) -> list[tuple[str, str]]:
    """Return the mean length of the sample answers of a preference run, which often learns to write more."""
    lengths = summary.answer_lengths
    if lengths is None or summary.objective == "sft":
        return []
    return [("sample answers", f"{_change(*lengths)} words on average")]


def _change(before: float | None, after: float) -> str:
    return format_decimal(after) if before is None else f"{format_decimal(before)} → {format_decimal(after)}"


def _before_and_after(loss: GroupLoss) -> str:
    return _change(loss.before, loss.after)


def _per_second(summary: RunSummary) -> str:
    if summary.tokens_per_second is None or summary.model_flops_utilisation is None:
        return UNKNOWN if summary.tokens_per_second is None else f"{format_count(summary.tokens_per_second)} tokens/s"
    utilization = format_percent(summary.model_flops_utilisation)
    return f"{format_count(summary.tokens_per_second)} tokens/s, {utilization} of the peak matrix rate"


def _parameters(summary: RunSummary) -> str:
    if summary.trainable_parameters is None:
        return UNKNOWN
    return f"{format_short_count(summary.trainable_parameters)} parameters"


def _tokens(summary: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("new token")
    for name in ("id", "seen", "input moved", "output moved"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for token in summary.new_tokens:
        moved = [format_decimal(token.input_moved), format_decimal(token.output_moved)]
        style = "red" if token.verdict == "did not move" else ""
        table.add_row(
            Text(token.token), str(token.id), format_count(token.seen), *moved, Text(token.verdict, style=style)
        )
    return table
