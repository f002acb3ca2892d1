"""What `peftchat merge` prints, and its call for several adapters."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import echo_json, note

if TYPE_CHECKING:
    import torch

    from peftchat.export.combine import CombinationReport, CombineOptions, DataLosses
    from peftchat.merging.merge_plan import Rounding
    from peftchat.merging.output import MergeReport
    from peftchat.merging.qlora_base import BaseMode


@dataclass(frozen=True)
class ModelSettings:
    """Options that merged weights alone have; see `MergeOptions`."""

    base: "BaseMode"
    verify: bool
    memory_budget: int | None
    dtype: "torch.dtype | None"
    rounding: "Rounding"


def print_merge(folder: Path, report: "MergeReport") -> None:
    """Print what a merge wrote and how it was verified."""
    from peftchat.console import stdout

    base = report.base
    if base.distance_original is not None and base.distance_dequantized is not None:
        stdout.print(
            f"Base: {base.kind} weights. Distance to the trained weights: original {base.distance_original:.2e}, "
            f"dequantized {base.distance_dequantized:.2e}."
        )
    stdout.print(
        f"Merged {report.tensors} tensors ({report.bytes / 1e9:.2f} GB, {report.changed_bytes / 1e9:.2f} GB changed) "
        f"in {report.seconds:.1f} s; vocabulary {report.vocabulary:,}"
        + (f" ({report.added_rows} added)" if report.added_rows else "")
        + f", head {'tied' if report.tied else 'not tied'}, {report.dtype}."
    )
    if report.verification is None:
        stdout.print("Not verified.")
    else:
        check = report.verification
        stdout.print(f"{check.verdict} {check.prompts} prompts, {check.positions} positions, {check.seconds:.1f} s.")
    stdout.print(f"Model: {folder}")


def combine(
    runs: Sequence[Path], options: "CombineOptions", settings: ModelSettings, *, as_model: bool, as_json: bool
) -> None:
    """Combine adapters into a LoRA or into merged weights, and print the proof.

    Raises:
        UserError: an option is of the other kind, or an input cannot be used.
    """
    from peftchat.errors import UserError
    from peftchat.export.combine import combine_into_adapter, combine_into_model
    from peftchat.merging.combined_inputs import overlaps

    for line in overlaps(runs):
        note(f"Note: {line}")
    if as_model:
        merged, losses = combine_into_model(runs, options, **vars(settings))
        if as_json:
            found = [dataclasses.asdict(one) for one in losses]
            echo_json({"folder": str(merged.folder), **merged.report.as_dict(), "losses": found})
            return
        print_merge(merged.folder, merged.report)
        _print_losses(losses, runs)
        return
    given = {
        "--base": settings.base != "auto",
        "--no-verify": not settings.verify,
        "--memory-budget": settings.memory_budget is not None,
        "--dtype": settings.dtype is not None,
        "--rounding": settings.rounding != "stochastic",
    }
    stray = [name for name, is_given in given.items() if is_given]
    if stray:
        hint = "Leave them out, or write merged weights: `--as model`."
        raise UserError("a combined adapter has no such options", where=", ".join(stray), hint=hint)
    report = combine_into_adapter(runs, options)
    if as_json:
        echo_json({"folder": str(options.output), **report.as_dict()})
        return
    _print(report, runs)
    click.echo(options.output)


def _print(report: "CombinationReport", runs: Sequence[Path]) -> None:
    from peftchat.console import stderr

    _print_losses(report.losses, runs)
    rule, proof = report.combination, report.proof
    how = rule.rule if rule.density == 1 else f"{rule.rule} at density {rule.density:g}"
    weights = ", ".join(f"{weight:.3g}" for _, weight in report.adapters)
    layer, error = report.worst_layer
    same = f"same next token at {proof.top1_agreement:.1%}"
    stderr.print(
        f"Combined {len(report.adapters)} adapters by {how}, weights {weights}: a LoRA of rank {report.rank}"
        f"{', which holds the result exactly' if report.is_exact else ''}. {len(report.layer_errors)} layers, "
        f"{report.parameters:,} parameters, {report.seconds:.1f} s.\n"
        f"Compared with the exact combination: KL {proof.kl:.1e} nats per token (allowed: {report.tolerance:g}), "
        f"{same}, largest error of a layer's update {error:.1e} of its norm ({layer}).",
        markup=False,
        highlight=False,
    )


def _print_losses(losses: "Sequence[DataLosses]", runs: Sequence[Path]) -> None:
    from rich.table import Table

    from peftchat.console import stderr

    if not losses:
        return
    names = _short_names(runs)
    table = Table("data of", *names.values(), "combined", "written", title="Loss, nats per token", title_justify="left")
    for one in losses:
        of = " and ".join(names.get(run, run) for run in one.data.runs)
        label = f"{of}, {one.data.source.removesuffix(' conversations')}" if of else one.data.source
        values = [*one.adapters, one.combined, one.written]
        table.add_row(f"{label} ({one.data.conversations})", *(f"{value:.4f}" for value in values))
    stderr.print(table)


def _short_names(runs: Sequence[Path]) -> dict[str, str]:
    """Return the last part of each folder's name; the whole name where that names two."""
    last = [run.name for run in runs]
    return {str(run): run.name if last.count(run.name) == 1 else str(run) for run in runs}
