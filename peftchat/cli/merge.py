"""`peftchat merge`: merge a run's adapter into its base."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import Command, PathType, allow_changed_option, json_option, output_option

if TYPE_CHECKING:
    from peftchat.merging.output import MergeReport
    from peftchat.merging.qlora_base import BaseMode

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class _Size(click.ParamType):
    """Bytes, as `512MB`, `2G` or a plain number."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+)\s*([KMG]?)(?:i?B)?", str(value), re.IGNORECASE)
        if not match or int(match[1]) == 0:
            self.fail(f"{value!r} is not a size such as 512MB or 2GB", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


class _WeightedAdapter(click.ParamType):
    """A folder and its weight, as `PATH=WEIGHT`; the weight is 1 if it is left out."""

    name = "path=weight"

    def convert(
        self, value: str | tuple[Path, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float]:
        if isinstance(value, tuple):
            return value
        path, equals, weight = value.rpartition("=")
        try:
            number = float(weight) if equals else 1.0
        except ValueError:
            self.fail(f"{weight!r} in {value!r} is not a number", param, ctx)
        return PathType().convert(path if equals else value, param, ctx), number


@click.command("merge", cls=Command, renamed={"--out": "--output", "--working-set": "--memory-budget"})
@click.argument("run", type=PathType())
@output_option("Folder of the merged model.  [default: RUN/merged]")
@click.option(
    "--base",
    "bases",
    multiple=True,
    metavar="auto|original|dequantized|MODEL",
    help="For a QLoRA run: merge into the original base or into the one it was trained on. auto takes the nearer one. "
    "MODEL is the folder or hub id of a base that has moved. Repeatable.  [default: auto]",
)
@allow_changed_option()
@click.option(
    "--verify/--no-verify", default=True, help="Compare the logits with base and adapter afterwards.  [default: on]"
)
@click.option("--scale", type=float, default=1.0, show_default=True, help="Weight of the run's own adapter.")
@click.option(
    "--adapter",
    "adapters",
    type=_WeightedAdapter(),
    multiple=True,
    help="Another adapter on the same base, with its weight. Repeatable.",
)
@click.option(
    "--memory-budget", type=_Size(), help="Memory for weights in flight.  [default: one tensor and its update]"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype of the merged weights.  [default: the base's]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@json_option("Print the report as one JSON object.")
def command(
    run: Path,
    output: Path | None,
    bases: tuple[str, ...],
    allow_changed: bool,
    verify: bool,
    scale: float,
    adapters: tuple[tuple[Path, float], ...],
    memory_budget: int | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge a run's adapter into its base and verify the result.

    RUN is a run folder; the embeddings of new tokens are merged too. Weights stream through memory one tensor at a
    time, so the model may be larger than memory. An interrupted merge resumes when it is started again.

    \b
    peftchat merge runs/assistant
    peftchat merge runs/assistant -o assistant-7b --memory-budget 512MB
    """
    from peftchat.logging_setup import quiet_libraries

    quiet_libraries()
    import torch

    from peftchat import api
    from peftchat.merging import MergeOptions

    base, base_model = _split_bases(bases)
    options = MergeOptions(
        output=output,
        base=base,
        base_model=base_model,
        allow_changed=allow_changed,
        verify=verify,
        scale=scale,
        adapters=adapters,
        memory_budget=memory_budget,
        dtype=getattr(torch, dtype) if dtype else None,
        overwrite=overwrite,
    )
    result = api.merge(run, options)
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), **result.report.as_dict()}))
    else:
        _print(result.folder, result.report)


def _split_bases(bases: tuple[str, ...]) -> "tuple[BaseMode, str | None]":
    """Return which weights of the base to take, and where the base is if it has moved."""
    from peftchat.errors import UserError

    modes = [base for base in bases if base in ("auto", "original", "dequantized")]
    models = [base for base in bases if base not in modes]
    if len(modes) > 1 or len(models) > 1:
        raise UserError(f"got {' and '.join(bases)}, expected one of each kind", where="--base")
    mode: BaseMode = modes[0] if modes else "auto"  # type: ignore[assignment]
    return mode, models[0] if models else None


def _print(folder: Path, report: "MergeReport") -> None:
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
