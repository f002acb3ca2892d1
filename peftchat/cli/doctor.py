"""`peftchat doctor`: examine the installation, the machine, and what a recipe needs."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import RecipeType, echo_json, json_option, set_option
from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peftchat.doctor.examination import Section
    from peftchat.doctor.findings import Finding

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


@click.command("doctor")
@click.argument("recipe", type=RecipeType(), required=False)
@click.option("--quick", is_flag=True, help="Leave out the probes, which run libraries for about a minute.")
@set_option()
@json_option()
def command(recipe: Path | None, quick: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Examine the installation, the machine, and what a recipe needs.

    Each finding has its cure. The status is 1 if there is a problem; warnings and notes leave it 0.

    \b
    peftchat doctor
    peftchat doctor --quick --json
    peftchat doctor recipes/qlora_1gpu.yaml
    """
    if recipe is None and overrides:
        raise UserError("overrides a recipe, and none is given", where="--set", hint="Give a recipe.")
    from peftchat.recipe import load_recipe

    loaded = None if recipe is None else load_recipe(recipe, overrides, to_train=False)
    from peftchat.doctor.examination import sections
    from peftchat.doctor.findings import worst

    parts = sections(loaded, quick=quick)
    findings = _collect(parts) if as_json else _show(parts)
    if as_json:
        echo_json({"status": worst(findings), "findings": [finding.as_json() for finding in findings]})
    problems = sum(finding.status == "problem" for finding in findings)
    if problems:
        raise VerificationError(f"problems found: {problems}")


def _collect(parts: "Iterable[Section]") -> "list[Finding]":
    return [finding for part in parts for finding in part.examine()]


def _show(parts: "Iterable[Section]") -> "list[Finding]":
    """Print each finding as soon as it is known; return them all."""
    from rich.text import Text

    from peftchat.console import stderr, stdout

    findings = []
    for part in parts:
        stdout.print(Text(f"\n{part.title}", style="bold"))
        with stderr.status(f"{part.title} …"):
            for finding in part.examine():
                findings.append(finding)
                line = Text.assemble(
                    (f"  {finding.status:<8}", _STYLES[finding.status]), f"{finding.subject}: {finding.found}"
                )
                stdout.print(line)
                if finding.cure is not None and finding.status != "ok":
                    stdout.print(Text(f"          {finding.cure}", style="dim"))
    return findings
