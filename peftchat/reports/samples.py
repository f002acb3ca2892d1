"""Answers before and after training, side by side for the eye."""

from collections.abc import Mapping
from typing import Any

from rich.panel import Panel
from rich.text import Text

from peftchat.console import stdout


def print_samples(summary: Mapping[str, Any]) -> None:
    """Print each question of a run with the answers that the model gave before and after training.

    Args:
        summary: the content of `run.json`.
    """
    before = {sample["prompt"]: sample for sample in summary.get("samples_before") or ()}
    for sample in summary.get("samples_after") or ():
        text = Text()
        earlier = before.get(sample["prompt"])
        if earlier is not None:
            _add(text, "before", earlier)
            text.append("\n")
        _add(text, "after", sample)
        stdout.print(Panel(text, title=Text(sample["prompt"], style="bold"), title_align="left"), soft_wrap=False)


def _add(text: Text, when: str, sample: Mapping[str, Any]) -> None:
    text.append(f"{when}  ", style="bold green" if when == "after" else "bold")
    text.append(_shortened(sample["answer"]) or "(nothing)")
    if not sample["stopped"]:
        text.append("  (did not stop by itself)", style="italic yellow")


def _shortened(answer: str, most: int = 600) -> str:
    return answer if len(answer) <= most else f"{answer[:most]} …"
