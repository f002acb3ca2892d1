"""Answers before and after training, side by side for the eye."""

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
from peftchat.reports.verdict import cautions, verdict
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
    text.append(_truncated_answer(sample.answer) or "(nothing)")
    if not sample.stopped:
        text.append("  (did not stop by itself)", style="italic yellow")


def _truncated_answer(answer: str, most: int = 600) -> str:
    return answer if len(answer) <= most else f"{answer[:most]} …"


_COLORS = {"better": "green", "worse": "red", "failed": "red", "unknown": "yellow"}


def print_summary(facts: RunSummary) -> None:
    """Print the verdict, the main numbers and the new tokens of a run to standard error."""
    result = verdict(facts)
    stderr.print()
    stderr.print(Text(result.headline, style=f"bold {_COLORS[result.outcome]}"), soft_wrap=False)
    stderr.print(_figures(facts))
    if facts.new_tokens:
        stderr.print(_tokens(facts))
    for caution in cautions(facts):
        stderr.print(Text.assemble(("note: ", "yellow"), caution), soft_wrap=False)


def _figures(facts: RunSummary) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    rows = [
        ("training loss", format_decimal(facts.train_loss)),
        ("steps", format_count(facts.steps)),
        ("time", format_duration(facts.seconds)),
        ("tokens", f"{format_count(facts.tokens)}, {format_percent(facts.supervised_share)} supervised"),
        ("speed", _per_second(facts)),
        ("peak memory", format_bytes(facts.peak_memory_bytes)),
        ("trained", _parameters(facts)),
    ]
    for name, value in rows:
        if not value.startswith(UNKNOWN):
            table.add_row(name, value)
    return table


def _per_second(facts: RunSummary) -> str:
    if facts.tokens_per_second is None or facts.model_flops_utilisation is None:
        return UNKNOWN if facts.tokens_per_second is None else f"{format_count(facts.tokens_per_second)} tokens/s"
    utilization = format_percent(facts.model_flops_utilisation)
    return f"{format_count(facts.tokens_per_second)} tokens/s, {utilization} of the peak matrix rate"


def _parameters(facts: RunSummary) -> str:
    if facts.trainable_parameters is None:
        return UNKNOWN
    return f"{format_short_count(facts.trainable_parameters)} parameters"


def _tokens(facts: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("new token")
    for name in ("id", "seen", "input moved", "output moved"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for token in facts.new_tokens:
        moved = [format_decimal(token.input_moved), format_decimal(token.output_moved)]
        style = "red" if token.verdict == "did not move" else ""
        table.add_row(
            Text(token.token), str(token.id), format_count(token.seen), *moved, Text(token.verdict, style=style)
        )
    return table
