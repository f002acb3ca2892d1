"""`peftchat mask`: show and check which tokens a recipe trains."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from peftchat.cli.common import (
    Command,
    PathType,
    RecipeType,
    conversation_progress,
    echo_json,
    json_option,
    note,
    set_option,
)
from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from peftchat.reports.mask import MaskReport

_EXAMPLES_IN_TERMINAL = 3
_EXAMPLES_ON_PAGE = 50
_MAX_EXAMPLES_ON_PAGE = 2000


class _Limit(click.ParamType):
    """A number of examples, or `all`, which stays text."""

    name = "N|all"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all":
            return "all"
        try:
            number = int(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither a number nor `all`", param, ctx)
        if number < 0:
            self.fail("must be 0 or more, or `all`", param, ctx)
        return number


@click.command("mask", cls=Command, renamed={"--side": "--split"})
@click.argument("recipe", type=RecipeType())
@set_option()
@click.option(
    "--rows",
    "limit",
    type=_Limit(),
    help=f"Examples to show.  [default: {_EXAMPLES_IN_TERMINAL}; {_EXAMPLES_ON_PAGE} with --html, all with --json]",
)
@click.option(
    "--split", type=click.Choice(["train", "eval"]), default="train", show_default=True, help="Examples of which split."
)
@click.option("--conversation", "number", type=int, help="Show one trained answer of this conversation, from 1.")
@click.option("--turn", type=int, help="Which of its messages, from 1.  [default: the last trained answer]")
@json_option("Print the examples as JSON lines and nothing else.")
@click.option("--html", "page", type=PathType("file"), help="Write an HTML page.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    limit: int | Literal["all"] | None,
    split: Literal["train", "eval"],
    number: int | None,
    turn: int | None,
    as_json: bool,
    page: Path | None,
) -> None:
    """Show what is trained, token by token.

    Print examples in color, counts per role, and what is truncated and dropped. Every example is checked, also those
    that are not shown. The status is 1 if nothing or everything is masked, if an answer has no end token or an
    untrained one, or if a message holds what the recipe rejects. Needs only the tokenizer; writes nothing but the
    cache of encoded examples and the page.

    \b
    peftchat mask recipes/demo_cpu.yaml
    peftchat mask recipes/demo_cpu.yaml --rows all --json > examples.jsonl
    peftchat mask recipes/demo_cpu.yaml --html mask.html --set chat.loss_on=last_answer
    """
    from peftchat.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, to_train=False)
    if page is not None:
        from peftchat.reports.page import check_page

        page = check_page(page, loaded.inputs())
    if turn is not None and number is None:
        raise UserError("a turn without its conversation", where="--turn", hint="Add `--conversation N`.")
    if number is not None and (as_json or page is not None):
        raise UserError("one answer is shown as text only", where="--conversation", hint="Leave out --json and --html.")
    if number is not None:
        from peftchat.reports.mask_turn import turn_text

        click.echo(turn_text(loaded.recipe, split, number, turn), nl=False)
        return
    from peftchat.reports.mask import inspect_mask

    with conversation_progress("encoding") as advance:
        report = inspect_mask(loaded.recipe, split, advance)
    if as_json:
        for example in report.as_json(_number(limit, "all")):
            echo_json(example)
    if page is not None:
        _write_page(page, recipe.name, report, limit)
    elif not as_json:
        from peftchat.console import stdout
        from peftchat.reports.mask_render import print_mask

        print_mask(report.shown(_number(limit, _EXAMPLES_IN_TERMINAL)), report.summary, stdout, report.sides)
    if report.summary.failures:
        raise VerificationError("; ".join(report.summary.failures))


def _number(limit: int | Literal["all"] | None, default: int | Literal["all"]) -> int | None:
    """Return how many examples to show, None for all of them."""
    chosen = default if limit is None else limit
    return None if chosen == "all" else chosen


def _write_page(page: Path, name: str, report: "MaskReport", limit: int | Literal["all"] | None) -> None:
    from peftchat.reports.mask_render import write_mask_page

    available = len(report.examples.store) // (1 if report.sides is None else 2)
    number = _number(limit, _EXAMPLES_ON_PAGE)
    shown = available if number is None else min(number, available)
    if shown > _MAX_EXAMPLES_ON_PAGE:
        raise UserError(
            f"an HTML page of {shown:,} examples is too large for a browser, the limit is {_MAX_EXAMPLES_ON_PAGE:,}",
            where="--rows",
            hint="Give a smaller number, or use `--json`, which has no limit.",
        )
    write_mask_page(page, name, list(report.shown(shown)), report.summary, report.sides)
    note(f"{report.summary.headline}\nWrote {page}.")
