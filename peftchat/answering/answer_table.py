"""The table of models that answered: what a turn costs, and how answers ended."""

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from peftchat.formatting import format_count, format_percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftchat.answering.answer_run import ModelAnswers

_MANY_TIMES = 10


def answer_table(answered: "Sequence[ModelAnswers]") -> Table:
    """Return the table: prompt and answer tokens a turn, and how answers ended."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("asked by")
    for name in ("turns", "prompt tokens", "answer tokens", "ended", "ran on", "cut"):
        table.add_column(name, justify="right")
    for entry in answered:
        row = entry.as_dict()
        table.add_row(
            entry.name,
            entry.prompting,
            format_count(row["turns"]),
            format_count(row["prompt_tokens_per_turn"]),
            format_count(row["answer_tokens_per_turn"]),
            format_percent(row["ended_by_itself"]),
            format_percent(row["stopped_at_another_turn"]),
            format_percent(row["cut_at_the_limit"]),
        )
    return table


def answer_notes(answered: "Sequence[ModelAnswers]") -> list[str]:
    """Say what the columns are, what a dialogue costs beside a template, and where rounds were dropped."""
    rows = [entry.as_dict() for entry in answered]
    lines = [
        "Tokens are means per turn. An answer ended by itself, ran on into another turn and was stopped, or was cut at "
        "the token limit."
    ]
    templates = [row for row in rows if row["prompting"] == "template"]
    for row in rows:
        if row["prompting"] == "dialogue":
            for other in templates:
                times = row["prompt_tokens_per_turn"] / other["prompt_tokens_per_turn"]
                shown = f"{times:.0f}" if times >= _MANY_TIMES else f"{times:.1f}"
                lines.append(
                    f"{row['model']} reads {format_count(row['prompt_tokens_per_turn'])} prompt tokens a turn, "
                    f"{other['model']} {format_count(other['prompt_tokens_per_turn'])}: {shown} times as many."
                )
        if row["dropped_rounds"]:
            lines.append(f"{row['model']}: {row['dropped_rounds']:,} earlier rounds did not fit into its prompts.")
        lines.append(f"Answers: {row['answers']}")
    return lines
