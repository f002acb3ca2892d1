"""`peftchat mask`: see, token by token, what a recipe trains, and fail where it is not what the recipe promises."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from peftchat.recipe import Recipe
    from peftchat.reports.mask import MaskReport

_ROWS_IN_TERMINAL = 3
_ROWS_ON_PAGE = 50
_MOST_ROWS_ON_PAGE = 2000


class _HowMany(click.ParamType):
    """A number of rows, or `all`, which stays a word."""

    name = "N|all"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all":
            return "all"
        try:
            number = int(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither a number of rows nor `all`", param, ctx)
        if number < 0:
            self.fail("a number of rows is 0 or more", param, ctx)
        return number


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; the value is YAML.")
@click.option(
    "--rows",
    "how_many",
    type=_HowMany(),
    help=f"Rows to show.  [default: {_ROWS_IN_TERMINAL}; {_ROWS_ON_PAGE} with --html, all with --json]",
)
@click.option("--side", type=click.Choice(["train", "eval"]), default="train", show_default=True, help="Which rows.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON lines and nothing else.")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write a page to this file.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    how_many: int | Literal["all"] | None,
    side: Literal["train", "eval"],
    as_json: bool,
    page: Path | None,
) -> None:
    """Show what RECIPE trains: rows in color, counts a role, what is cut and left out.

    Every row is checked, also those that are not shown. The status is 1 if nothing is masked, everything is masked,
    an answer has no end token or one that is not trained, or a message holds what the recipe refuses. Needs the
    tokenizer only; writes nothing but the cache of encoded rows and the page.

    \b
    peftchat mask recipes/demo_cpu.yaml
    peftchat mask recipes/demo_cpu.yaml --rows all --json > rows.jsonl
    peftchat mask recipes/demo_cpu.yaml --html mask.html --set chat.loss_on=last_answer
    """
    from peftchat.logging_setup import quiet_libraries
    from peftchat.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, to_train=False)
    quiet_libraries()
    look = _look(loaded.recipe, side)
    if as_json:
        for row in look.as_json(_limit(how_many, "all")):
            click.echo(json.dumps(row))
    if page is not None:
        _write_page(page, recipe.name, look, how_many)
    elif not as_json:
        from peftchat.console import stdout
        from peftchat.reports.mask_render import print_mask

        print_mask(look.shown(_limit(how_many, _ROWS_IN_TERMINAL)), look.summary, stdout)
    if look.summary.failures:
        raise VerificationError("; ".join(look.summary.failures))


def _look(recipe: "Recipe", side: Literal["train", "eval"]) -> "MaskReport":
    from peftchat.console import stderr
    from peftchat.reports.mask import inspect_mask

    started = time.monotonic()
    with stderr.status("encoding …") as status:

        def advance(conversations: int) -> None:
            rate = conversations / (time.monotonic() - started)
            status.update(f"encoding: {conversations:,} conversations, {rate:,.0f} a second")

        return inspect_mask(recipe, side, advance)


def _limit(how_many: int | Literal["all"] | None, default: int | Literal["all"]) -> int | None:
    wanted = default if how_many is None else how_many
    return None if wanted == "all" else wanted


def _write_page(page: Path, name: str, look: "MaskReport", how_many: int | Literal["all"] | None) -> None:
    from peftchat.console import stderr
    from peftchat.reports.mask_render import write_mask_page

    there_are = len(look.rows.store)
    limit = _limit(how_many, _ROWS_ON_PAGE)
    wanted = there_are if limit is None else min(limit, there_are)
    if wanted > _MOST_ROWS_ON_PAGE:
        raise UserError(
            f"a page of {wanted:,} rows is more than a browser bears",
            where="--rows",
            hint=f"Give at most {_MOST_ROWS_ON_PAGE:,}; `--json` has no limit.",
        )
    write_mask_page(page, name, list(look.shown(wanted)), look.summary)
    stderr.print(f"{look.summary.headline}\nWrote {page}.", markup=False)
