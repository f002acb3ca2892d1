"""`peftchat init`: write a recipe to start from."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from peftchat.cli.common import note, output_option
from peftchat.files import write_new_text
from peftchat.output_paths import check_output

if TYPE_CHECKING:
    from peftchat.recipe.sections import Method


@click.command("init")
@click.option(
    "--method",
    type=click.Choice(["full", "lora", "qlora"]),
    default="lora",
    show_default=True,
    help="Train all weights, an adapter, or an adapter on a quantized base.",
)
@click.option("--model", metavar="MODEL", help="Base model: a folder or a hub id.")
@click.option("--data", metavar="DATA", help="Conversations: a file, a folder or a hub id.")
@output_option("The file to write.", default=Path("recipe.yaml"), show_default=True)
def command(method: str, model: str | None, data: str | None, output: Path) -> None:
    """Write a recipe to start from, with every key explained.

    \b
    peftchat init --method qlora --model HuggingFaceTB/SmolLM2-135M --data conversations.jsonl
    peftchat train recipe.yaml --dry-run
    """
    from peftchat.recipe.reference import starting_recipe

    text = starting_recipe(cast("Method", method), output, model=model, data=data)
    check_output(output, (), "-o")
    write_new_text(output, text)
    open_keys = [key for key, given in (("model.name", model), ("data.train", data)) if given is None]
    todo = f"Fill in {' and '.join(open_keys)}, then: " if open_keys else "Next: "
    note(f"Wrote {output}. {todo}peftchat train {output} --dry-run")
