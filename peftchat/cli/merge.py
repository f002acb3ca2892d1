"""`peftchat merge`: merge a run's adapter into its base, or combine several adapters."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import Command, PathType, allow_changed_option, json_option, output_option

if TYPE_CHECKING:
    from peftchat.merging.merge_plan import Rounding
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
@click.argument("runs", metavar="RUN...", type=PathType(), nargs=-1, required=True)
@output_option("Folder of the result.  [default: RUN/merged; required with --combine]")
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
@click.option(
    "--combine",
    "rule",
    metavar="RULE",
    help="Combine two or more runs: linear, ties, dare_linear, dare_ties or magnitude_prune. PEFT's rules, applied to "
    "the updates. The result is a plain LoRA.",
)
@click.option("--weights", metavar="A,B,...", help="combine: the weight of each run.  [default: those of the mean]")
@click.option("--density", type=float, help="combine: part of the entries to keep. Not for linear.  [default: 0.5]")
@click.option("--seed", type=int, help="combine: seed of dare_linear and dare_ties.  [default: 0]")
@click.option(
    "--as",
    "result",
    type=click.Choice(["adapter", "model"]),
    help="combine: write a LoRA or merged weights.  [default: adapter]",
)
@click.option("--rank", type=int, help="combine: rank of the LoRA.  [default: exact, or the smallest within tolerance]")
@click.option(
    "--tolerance",
    type=float,
    help="combine: largest KL divergence from the exact combination, and largest rise of its loss, in nats per token."
    "  [default: 0.01]",
)
@click.option(
    "--rounding",
    type=click.Choice(["stochastic", "nearest"]),
    default="stochastic",
    show_default=True,
    help="To bfloat16: up or down, so that small updates count, or to the nearest, as PEFT does.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@json_option("Print the report as one JSON object.")
def command(
    runs: tuple[Path, ...],
    output: Path | None,
    bases: tuple[str, ...],
    allow_changed: bool,
    verify: bool,
    scale: float,
    adapters: tuple[tuple[Path, float], ...],
    memory_budget: int | None,
    dtype: str | None,
    rule: str | None,
    weights: str | None,
    density: float | None,
    seed: int | None,
    result: str | None,
    rank: int | None,
    tolerance: float | None,
    rounding: "Rounding",
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge a run's adapter into its base and verify the result.

    RUN is a run folder; the embeddings of new tokens are merged too. Weights stream through memory one tensor at a
    time, so the model may be larger than memory. An interrupted merge resumes when it is started again.

    \b
    peftchat merge runs/assistant
    peftchat merge runs/assistant -o assistant-7b --memory-budget 512MB
    peftchat merge runs/assistant runs/style --combine linear --weights 0.7,0.3 -o runs/both
    """
    given = {"--weights": weights, "--density": density, "--seed": seed, "--as": result, "--rank": rank}
    _check_kind(runs, rule, {**given, "--tolerance": tolerance}, is_blend=bool(adapters) or scale != 1.0)

    import torch

    from peftchat import api
    from peftchat.merging import MergeOptions

    base, base_model = _split_bases(bases)
    if rule is not None:
        from peftchat.cli.merge_output import ModelSettings, combine
        from peftchat.export.combine import CombineOptions

        combined = CombineOptions(
            output=_required(output),
            rule=rule,
            weights=_weights(weights),
            density=density,
            seed=seed,
            rank=rank,
            tolerance=tolerance,
            overwrite=overwrite,
            base=base_model,
            allow_changed=allow_changed,
        )
        settings = ModelSettings(base, verify, memory_budget, getattr(torch, dtype) if dtype else None, rounding)
        combine(runs, combined, settings, as_model=result == "model", as_json=as_json)
        return
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
        rounding=rounding,
    )
    merged = api.merge(runs[0], options)
    if as_json:
        click.echo(json.dumps({"folder": str(merged.folder), **merged.report.as_dict()}))
    else:
        from peftchat.cli.merge_output import print_merge

        print_merge(merged.folder, merged.report)


def _check_kind(runs: tuple[Path, ...], rule: str | None, given: dict[str, object], *, is_blend: bool) -> None:
    """Check that the options are those of a merge, or of a combination.

    Raises:
        UserError: they are of both.
    """
    from peftchat.errors import UserError

    if rule is not None and is_blend:
        hint = "Name all runs as arguments, and their weights with --weights."
        raise UserError("--combine takes the place of these options", where="--scale, --adapter", hint=hint)
    if rule is not None:
        return
    if len(runs) > 1:
        hint = f"Say how they are combined, for example `--combine linear -o FOLDER`, or merge {runs[0]} alone."
        raise UserError(f"got {len(runs)} runs, expected one", where=str(runs[1]), hint=hint)
    stray = [name for name, value in given.items() if value is not None]
    if stray:
        raise UserError("only --combine has these options", where=", ".join(stray), hint="Add --combine RULE.")


def _required(output: Path | None) -> Path:
    from peftchat.errors import UserError

    if output is None:
        raise UserError("a combination belongs to no single run", where="-o", hint="Name its folder: `-o FOLDER`.")
    return output


def _weights(text: str | None) -> list[float] | None:
    """Read weights as `0.7,0.3`; None where there are none."""
    from peftchat.errors import UserError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        hint = "Give one for each run, in their order, as 0.7,0.3."
        raise UserError(
            f"got {text!r}, expected numbers with commas between them", where="--weights", hint=hint
        ) from None


def _split_bases(bases: tuple[str, ...]) -> "tuple[BaseMode, str | None]":
    """Return which weights of the base to take, and where the base is if it has moved."""
    from peftchat.errors import UserError

    modes = [base for base in bases if base in ("auto", "original", "dequantized")]
    models = [base for base in bases if base not in modes]
    if len(modes) > 1 or len(models) > 1:
        raise UserError(f"got {' and '.join(bases)}, expected one of each kind", where="--base")
    mode: BaseMode = modes[0] if modes else "auto"  # type: ignore[assignment]
    return mode, models[0] if models else None
