"""`peftchat launch`: write a cluster's job for a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from peftchat.cli.common import Command, RecipeType, echo_json, json_option, note, output_option, set_option
from peftchat.errors import UserError
from peftchat.files import write_new_text
from peftchat.output_paths import check_output

if TYPE_CHECKING:
    from peftchat.launching.kubernetes import Api
    from peftchat.launching.targets import Target


@click.command("launch", cls=Command)
@click.argument("recipe", type=RecipeType())
@click.option(
    "--to", "target", type=click.Choice(["slurm", "kubernetes", "skypilot"]), required=True, help="Scheduler."
)
@output_option("The file to write.  [default: standard output]")
@click.option("--gpu", metavar="NAME", help="The cluster's GPU, such as a100-80gb, or cpu.  [default: this machine's]")
@click.option(
    "--gpus", type=click.IntRange(min=1), metavar="N", help="GPUs of each node to take.  [default: as in the recipe]"
)
@click.option(
    "--node-gpus", type=click.IntRange(min=1), metavar="N", default=8, show_default=True, help="GPUs that a node has."
)
@click.option("--time", metavar="LIMIT", help="Time limit, such as 8:00:00.  [default: from the plan, with a margin]")
@click.option("--name", help="Name of the job.  [default: the recipe's]")
@click.option("--setup", multiple=True, metavar="COMMAND", help="slurm, skypilot: run this before. Repeatable.")
@click.option("--partition", help="slurm: the partition.")
@click.option("--account", help="slurm: the account.")
@click.option("--image", help="kubernetes, skypilot: container image with peftchat.")
@click.option("--volume", help="kubernetes, skypilot: existing volume for the run folder.  [default: a new claim]")
@click.option("--namespace", help="kubernetes: the namespace.")
@click.option(
    "--api",
    type=click.Choice(["trainjob", "pytorchjob"]),
    help="kubernetes: Kubeflow Trainer v2, or the older training operator.  [default: trainjob]",
)
@set_option()
@json_option("Print one JSON object: the job as text, and where it was written.")
def command(
    recipe: Path,
    target: str,
    output: Path | None,
    gpu: str | None,
    gpus: int | None,
    node_gpus: int,
    time: str | None,
    name: str | None,
    setup: tuple[str, ...],
    partition: str | None,
    account: str | None,
    image: str | None,
    volume: str | None,
    namespace: str | None,
    api: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a cluster's job that trains a recipe; nothing is sent.

    Memory, disk and time are those of `plan`, with margins.

    \b
    peftchat launch my.yaml --to slurm --gpu a100-80gb --partition gpu -o my.sbatch && sbatch my.sbatch
    peftchat launch my.yaml --to kubernetes --gpu h100 --image ghcr.io/me/peftchat:1 | kubectl apply -f -
    peftchat launch my.yaml --to skypilot --gpu l4 --image ghcr.io/me/peftchat:1 -o my.sky.yaml
    """
    from peftchat.launching.job import JobOptions, parse_time
    from peftchat.launching.targets import JobPlaces, check_places

    places = JobPlaces(partition, account, image, volume, namespace, cast("Api | None", api))
    check_places(cast("Target", target), places)
    if setup and target == "kubernetes":
        raise UserError("`--to kubernetes` does not use the option", where="--setup", hint="Put it into the image.")
    options = JobOptions(gpu, gpus, node_gpus, name, None if time is None else parse_time(time), setup)
    if output is not None:
        _check_new(output)
    from peftchat import api as library
    from peftchat.library_setup import prepare_libraries
    from peftchat.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, to_train=False)
    prepare_libraries()
    text = library.write_job(loaded, cast("Target", target), options, places, tell=note)
    if output is not None:
        check_output(output, loaded.inputs(), "-o")
        write_new_text(output, text)
    if as_json:
        echo_json({"target": target, "job": text, "written": None if output is None else str(output)})
    if output is None:
        if not as_json:
            click.echo(text, nl=False)
        return
    send = {"slurm": "sbatch", "kubernetes": "kubectl apply -f", "skypilot": "sky launch"}[target]
    note(f"Wrote {output}. Read it, then: {send} {output}")


def _check_new(output: Path) -> None:
    check_output(output, (), "-o")
    if output.exists():
        raise UserError("the file already exists", where=str(output), hint="Choose another name with `-o`.")
