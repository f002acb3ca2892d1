"""`peftchat plan`: predict memory, time and cost of a run, and what would make it fit."""

import json
from pathlib import Path

import click


def _list(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from peftchat.console import stdout
    from peftchat.planning.hardware import gpu_table

    stdout.print(gpu_table(), soft_wrap=False)
    context.exit()


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--gpu", metavar="NAME", help="A GPU such as a100-80gb, or cpu.  [default: this machine's]")
@click.option(
    "--gpus", type=click.IntRange(min=1), metavar="N", help="How many of them.  [default: as the recipe says]"
)
@click.option("--price", type=click.FloatRange(min=0), metavar="AMOUNT", help="Price of one of them per hour.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; the value is YAML.")
@click.option("--grid/--no-grid", default=True, help="Also predict other methods and strategies.  [default: --grid]")
@click.option("--probe", is_flag=True, help="Also measure a few steps on the longest batch on this machine.")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Show the known GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(
    recipe: Path,
    gpu: str | None,
    gpus: int | None,
    price: float | None,
    overrides: tuple[str, ...],
    grid: bool,
    probe: bool,
    as_json: bool,
) -> None:
    """Predict memory, time and cost of RECIPE before anything is downloaded or trained.

    Reads the model's config and no weights. The status is 0 even if the run does not fit; the first line and
    `fits` in the JSON show it.

    \b
    peftchat plan recipes/qlora_1gpu.yaml --gpu rtx4090
    peftchat plan recipes/zero3_full.yaml --gpu a100-80gb --gpus 8 --price 2.5
    peftchat plan recipes/demo_cpu.yaml --probe
    """
    from peftchat.logging_setup import quiet_libraries
    from peftchat.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, to_train=False)
    quiet_libraries()
    from peftchat.console import stdout
    from peftchat.planning.hardware import find_hardware
    from peftchat.planning.measure import measure_run
    from peftchat.planning.plan import plan_training
    from peftchat.planning.plan_report import as_json as plan_json
    from peftchat.planning.plan_report import print_measured, print_plan

    distributed = loaded.recipe.distributed
    wanted = gpus or (distributed.processes * distributed.nodes if distributed.processes else None)
    plan = plan_training(loaded.recipe, find_hardware(gpu, wanted), price=price, with_grid=grid)
    if not as_json:
        print_plan(plan, stdout)
    measured = measure_run(loaded.recipe, plan) if probe else None
    if as_json:
        click.echo(json.dumps(plan_json(plan, measured)))
    elif measured is not None:
        print_measured(plan, measured, stdout)
