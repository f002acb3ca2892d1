"""Search of the learning rate in the terminal: a row with a bar for each rate, the advice, and the line to set."""

import shlex
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from peftchat.console import stdout
from peftchat.formatting import format_decimal, format_percent, format_rate
from peftchat.training.rate_trials import Gap, RateSearch, RateTrial

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe

_BAR = 14
"""Characters of the bar of the untrained model's loss."""


def print_rate_search(search: RateSearch, loaded: "LoadedRecipe") -> None:
    """Print the rates that were tried, the advised one, how sure it is, and how to set it.

    Args:
        search: the search.
        loaded: the recipe that it searched for, as it was given.
    """
    stdout.print(
        f"Learning rate: {format_rate(search.advised)}, by the held-out loss after {search.steps} steps at each of "
        f"{len(search.trials)} rates. {search.certainty}",
        markup=False,
    )
    stdout.print(_table(search), soft_wrap=False)
    ratio = float(f"{search.advised / search.rule.value:.2g}")
    stdout.print(
        f"The rule gives {format_rate(search.rule.value)}; the advice is {ratio:g} times that. The untrained "
        f"model's loss is {format_decimal(search.loss_before)}.",
        markup=False,
    )
    if search.steps < search.run_steps:
        stdout.print(
            f"The run itself has {search.run_steps} steps. Longer runs tend to want the same rate or a lower one; "
            f"`--find-lr-steps` makes the search longer.",
            markup=False,
        )
    if search.has_shares:
        stdout.print(
            f"The loss says how far the {search.cases} are apart, and nothing of what the model then writes. Look at "
            "samples of a run with `--prompt`, and take a lower rate where they are worse.",
            markup=False,
        )
    rate = format_rate(search.advised)
    stdout.print("Set it in the recipe:", markup=False)
    stdout.print(Text(f"  training:\n    learning_rate: {rate}", style="bold"))
    command = shlex.join(["peftchat", "train", *loaded.arguments(training__learning_rate=rate)])
    stdout.print(f"or: {command}", markup=False, soft_wrap=True)


def _table(search: RateSearch) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    last = f"{search.cases} right" if search.has_shares else "training loss"
    for name in ("rate", "held-out loss", "above the lowest", last):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("held-out loss", overflow="fold")
    for trial, gap in zip(search.trials, search.gaps, strict=True):
        is_near = search.low <= trial.rate <= search.high
        table.add_row(
            format_rate(trial.rate),
            format_decimal(trial.loss) if trial.problem is None else "failed",
            _gap_text(gap),
            _last(search, trial),
            _bar(search, trial),
            style="bold green" if is_near else None,
        )
    return table


def _last(search: RateSearch, trial: RateTrial) -> str:
    if trial.problem is not None:
        return ""
    return format_percent(trial.right) if search.has_shares else format_decimal(trial.train_loss)


def _gap_text(gap: Gap | None) -> str:
    if gap is None:
        return ""
    return "lowest" if gap.value == 0 and gap.error == 0 else f"{gap.value:+.4f} ± {2 * gap.error:.4f}"


def _bar(search: RateSearch, trial: RateTrial) -> Text:
    """Draw the held-out loss above the lowest; a full bar is that of the untrained model."""
    if trial.loss is None:
        return Text(trial.problem or "", style="red")
    lowest = min(one.loss for one in search.trials if one.loss is not None)
    whole = search.loss_before - lowest
    share = (trial.loss - lowest) / whole if whole > 0 else 2.0
    return Text("▇" * max(1, round(_BAR * min(1.0, share))) + (">" if share > 1 else ""))
