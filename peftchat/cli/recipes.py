"""`peftchat recipes`: list the recipes that came with the package, or print one."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from peftchat.cli.common import beginning_with, echo_json, json_option
from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.recipe.shipped import ShippedRecipe


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from peftchat.recipe.shipped import shipped_recipes

    return beginning_with(incomplete, (recipe.name for recipe in shipped_recipes()))


@click.command("recipes")
@click.argument("name", required=False, shell_complete=_complete)
@json_option("Print JSON: the list, or one recipe with its text.")
def command(name: str | None, as_json: bool) -> None:
    """List the recipes that came with the package, or print one.

    Other commands take a listed recipe by its name where no such file exists.

    \b
    peftchat recipes
    peftchat recipes lora_1gpu > my.yaml
    peftchat train recipes/qlora_1gpu.yaml
    """
    from peftchat.recipe.shipped import find_shipped_recipe, shipped_recipes

    recipes = shipped_recipes()
    if not recipes:
        raise UserError("this installation has no recipes", hint="`peftchat init` writes one to start from.")
    if name is None:
        _list_recipes(recipes, as_json)
        return
    path = find_shipped_recipe(Path(name))
    if path is None:
        known = ", ".join(recipe.name for recipe in recipes)
        raise UserError(f"no recipe `{name}` came with peftchat", hint=f"Give one of: {known}.")
    text = path.read_text(encoding="utf-8")
    if as_json:
        echo_json({"name": path.stem, "path": str(path), "text": text})
    else:
        click.echo(text, nl=False)


def _list_recipes(recipes: "list[ShippedRecipe]", as_json: bool) -> None:
    if as_json:
        echo_json([{"name": one.name, "path": str(one.path), "summary": one.summary} for one in recipes])
        return
    from rich.table import Table

    from peftchat.console import stdout

    table = Table("recipe", "summary", box=None, pad_edge=False)
    for recipe in recipes:
        table.add_row(recipe.name, recipe.summary)
    stdout.print(table, soft_wrap=False)
    stdout.print(f"\nThey are in {recipes[0].path.parent}. Print one: peftchat recipes {recipes[0].name}")
