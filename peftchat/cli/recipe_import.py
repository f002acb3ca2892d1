"""`peftchat recipe import`: read another tool's configuration as a recipe."""

from pathlib import Path

import click

from peftchat.cli.common import OrderedGroup, PathType, echo_json, json_option, note, output_option
from peftchat.errors import UserError, VerificationError
from peftchat.files import write_new_text, write_text
from peftchat.output_paths import InputPath, check_output

_TOOLS = ("axolotl", "llamafactory", "llamafactory-v1", "trl", "torchtune")


@click.group("recipe", cls=OrderedGroup)
def command() -> None:
    """Make a recipe of what another tool reads."""


@command.command("import")
@click.argument("file", type=PathType())
@click.option("--from", "tool", type=click.Choice(_TOOLS), help="The file's tool.  [default: by its keys]")
@output_option("The recipe to write.", default=Path("recipe.yaml"), show_default=True)
@click.option("--overwrite", "--force", is_flag=True, help="Replace a recipe that is there.")
@click.option("--check", is_flag=True, help="Show what becomes of each line, and write nothing.")
@click.option("--partial", is_flag=True, help="Write the recipe without the lines that are refused.")
@json_option("Print one JSON object: every line, and the recipe as text.")
def import_command(
    file: Path, tool: str | None, output: Path, overwrite: bool, check: bool, partial: bool, as_json: bool
) -> None:
    """Read another tool's configuration as a recipe.

    The tools are Axolotl, LLaMA-Factory, TRL and torchtune. FILE is YAML or JSON, or a shell script with the flags of
    one training. Each of its lines is kept, changed, left
    out because it has no bearing on what is learned, or refused. With a refused line the status is 1, and nothing is
    written without `--partial`.

    \b
    peftchat recipe import lora-1b.yml --check
    peftchat recipe import qwen3_lora_sft.yaml -o recipe.yaml
    peftchat recipe import sft.sh --from trl --partial
    """
    from peftchat.console import stdout
    from peftchat.importing.importing import import_file
    from peftchat.importing.shown_import import as_json as import_json
    from peftchat.importing.shown_import import print_import
    from peftchat.importing.writing import recipe_text

    if not check:
        check_output(output, [InputPath(file, "the file that is read")], "-o")
        if output.exists() and not overwrite:
            hint = "Choose another name with `-o`, or replace it with `--overwrite`."
            raise UserError("the file already exists", where=str(output), hint=hint)
    imported = import_file(file, tool)
    text = recipe_text(imported, output)
    is_written = not check and not imported.blocking and (partial or not imported.refused)
    if as_json:
        given = import_json(imported)
        echo_json({**given, "written": str(output) if is_written else None, "recipe": text})
    else:
        print_import(imported, stdout)
    if is_written:
        (write_text if overwrite else write_new_text)(output, text)
        note(f"Wrote {output}.")
        for key, what in imported.to_give.items():
            note(f"Give it, or look at it: {key}: {what}.")
        note(f"Next: peftchat train {output} --dry-run")
    elif imported.blocking:
        first = imported.blocking[0]
        raise VerificationError(
            f"{file}:{first.source.line}: {first.source.key}: no recipe can do what this file asks for: {first.why}."
        )
    elif imported.refused:
        count = len(imported.refused)
        what = "1 line is refused" if count == 1 else f"{count} lines are refused"
        cure = "" if check else " Nothing was written; `--partial` writes the recipe without them."
        raise VerificationError(f"{what}: a run without would learn something else.{cure}")
