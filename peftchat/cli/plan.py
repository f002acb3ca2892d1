"""`peftchat plan`: predict memory, time and cost of a run, and what would make it fit."""

import json
from pathlib import Path

import click

from peftchat.cli.common import Command, RecipeType, json_option, set_option


def _print_gpus(context: click.Context, _: click.Parameter, given: bool) -> None:
    if not given:
        return
    from peftchat.console import stdout
    from peftchat.planning.hardware import gpu_table

    stdout.print(gpu_table(), soft_wrap=False)
    context.exit()


@click.command("plan", cls=Command, renamed={"--grid": "--alternatives", "--no-grid": "--no-alternatives"})
@click.argument("recipe", type=RecipeType())
@click.option("--gpu", metavar="NAME", help="A GPU such as a100-80gb, or cpu.  [default: this machine's]")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Number of GPUs.  [default: as in the recipe]")
@click.option("--price", type=click.FloatRange(min=0), metavar="AMOUNT", help="Price of one GPU per hour.")
@set_option()
@click.option(
    "--alternatives/--no-alternatives",
    default=True,
    help="Also compare other methods and distributed strategies.  [default: --alternatives]",
)
@click.option("--probe", is_flag=True, help="Also measure a few steps on the longest batch here, and compare.")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_print_gpus, help="List known GPUs.")
@json_option()
def command(
    recipe: Path,
    gpu: str | None,
    gpus: int | None,
    price: float | None,
    overrides: tuple[str, ...],
    alternatives: bool,
    probe: bool,
    as_json: bool,
) -> None:
    """Predict memory, time and cost before anything is trained.

    Reads the model's config and downloads no weights. The status is 0 even if the run does not fit: the first line
    and `fits` in the JSON report that.

    \b
    peftchat plan recipes/qlora_1gpu.yaml --gpu rtx4090
    peftchat plan recipes/zero3_full.yaml --gpu a100-80gb --gpus 8 --price 2.5
    peftchat plan recipes/demo_cpu.yaml --probe
    """
    from peftchat import api
    from peftchat.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, to_train=False)
    from peftchat.console import stdout
    from peftchat.planning.measure import measure_run
    from peftchat.planning.plan_report import as_json as plan_json
    from peftchat.planning.plan_report import print_measured, print_plan

    plan = api.plan(loaded, gpu=gpu, gpus=gpus, price=price, alternatives=alternatives)
    if not as_json:
        print_plan(plan, stdout)
    measured = measure_run(loaded.recipe, plan) if probe else None
    if as_json:
        click.echo(json.dumps(plan_json(plan, measured)))
    elif measured is not None:
        print_measured(plan, measured, stdout)
