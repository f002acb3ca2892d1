"""`peftchat init`: write a recipe to start from."""

from pathlib import Path
from typing import cast, get_args

import click

from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.recipe.sections import Method


@click.command()
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    default="lora",
    show_default=True,
    help="All weights, an adapter, or an adapter on a quantized base.",
)
@click.option("--model", metavar="MODEL", help="Base model: a folder or a hub id.")
@click.option("--data", metavar="DATA", help="Conversations: a file, a folder or a hub id.")
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    default=Path("recipe.yaml"),
    show_default=True,
    help="The file to write.",
)
def command(method: str, model: str | None, data: str | None, target: Path) -> None:
    """Write a recipe to start from, with every key explained.

    \b
    Example:
        peftchat init --method qlora --model HuggingFaceTB/SmolLM2-135M --data conversations.jsonl
        peftchat train recipe.yaml --dry-run
    """
    from peftchat.recipe.reference import starting_recipe

    text = starting_recipe(cast("Method", method), target, model=model, data=data)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError("exists already", where=str(target), hint="Choose another name with `-o`.") from error
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(target)) from error
    open_keys = [key for key, given in (("model.name", model), ("data.train", data)) if given is None]
    todo = f"Fill in {' and '.join(open_keys)}, then: " if open_keys else "Next: "
    stderr.print(f"Wrote {target}. {todo}peftchat train {target} --dry-run", markup=False)
