"""`peftchat init`: write a recipe to start from, by questions or by flags."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from peftchat.cli.common import echo_json, json_option, note, output_option
from peftchat.errors import UserError
from peftchat.files import write_new_text
from peftchat.output_paths import check_output

if TYPE_CHECKING:
    from collections.abc import Mapping

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
@click.option("--ask/--no-ask", default=None, help="Ask for these.  [default: in a terminal, if none is given]")
@click.option("--gpu", metavar="NAME", help="Ask for a recipe that fits this GPU.  [default: this machine's]")
@json_option("Ask nothing, and print one JSON object: the file, and the keys that it leaves open.")
@click.pass_context
def command(
    context: click.Context,
    method: str,
    model: str | None,
    data: str | None,
    output: Path,
    ask: bool | None,
    gpu: str | None,
    as_json: bool,
) -> None:
    """Write a recipe to start from, with every key explained.

    In a terminal and without flags, at most five questions are asked about the data, the base model and the method.
    The recipe is one that fits this machine by `peftchat plan`.

    \b
    peftchat init
    peftchat init --method qlora --model HuggingFaceTB/SmolLM2-135M --data conversations.jsonl
    peftchat train recipe.yaml --dry-run
    """
    given = [name for name in ("method", "model", "data") if _is_given(context, name)]
    if ask and given:
        raise UserError(f"`--{given[0]}` is an answer already", where="--ask", hint="Give flags, or answer questions.")
    if ask and as_json:
        raise UserError("the answers to questions are no JSON", where="--json", hint="Give flags instead of `--ask`.")
    check_output(output, (), "-o")
    is_asked = ask if ask is not None else not given and not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    if is_asked:
        _by_questions(output, gpu)
        return
    if gpu is not None:
        raise UserError("only the questions take it", where="--gpu", hint="`peftchat plan RECIPE --gpu NAME` plans.")
    from peftchat.recipe.reference import starting_recipe

    settings = {} if model is None else _settings_for(model)
    text = starting_recipe(cast("Method", method), output, model=model, data=data, settings=settings)
    write_new_text(output, text)
    open_keys = [key for key, value in (("model.name", model), ("data.train", data)) if value is None]
    if as_json:
        echo_json({"written": str(output), "open": open_keys})
    todo = f"Fill in {' and '.join(open_keys)}, then: " if open_keys else "Next: "
    note(f"Wrote {output}. {todo}peftchat train {output} --dry-run")


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _settings_for(model: str) -> "Mapping[str, str]":
    """Return the keys that this base model needs; none, with a note, where it cannot be looked at."""
    from peftchat.planning.first_recipe import settings_for_model

    try:
        return settings_for_model(model)
    except UserError as error:
        note(f"The recipe names a model that was not looked at: {error}")
        return {}


def _by_questions(output: Path, gpu: str | None) -> None:
    from peftchat.cli.init_questions import ask_for_recipe

    if output.exists():
        raise UserError("the file already exists", where=str(output), hint="Choose another name with `-o`.")
    answered = ask_for_recipe(output, gpu)
    write_new_text(output, answered.text)
    fits = "" if answered.fits else " It does not fit here: try another GPU with `peftchat plan --gpu NAME`."
    note(f"Wrote {output}.{fits} Every key is explained in it. Next:")
    run = f"runs/{output.stem}"
    for line, what in (
        (f"peftchat mask {output}", "see what is trained, token by token"),
        (f"peftchat plan {output}", "memory, time and cost"),
        (f"peftchat train {output}", f"train; the report is {run}/report.html"),
        (f"peftchat chat {run}", "talk to the result; `web` does so in the browser"),
        (f"peftchat merge {run}", "make one model of base and adapter"),
    ):
        note(f"  {line:<32} {what}")
