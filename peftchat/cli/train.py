"""`peftchat train`: one run, from a recipe to a run folder."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe
    from peftchat.runs.run_summary import AutoSetting
    from peftchat.training.distributed import DistributedSetup


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; the value is YAML.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint; starts afresh where there is none.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan and a row, train nothing.")
@click.option("--ask", "questions", multiple=True, metavar="TEXT", help="Answer this before and after training.")
def command(recipe: Path, overrides: tuple[str, ...], resume: bool, dry_run: bool, questions: tuple[str, ...]) -> None:
    """Fine-tune a model as RECIPE says and leave a run folder.

    \b
    peftchat train recipes/qlora_1gpu.yaml
    peftchat train recipes/demo_cpu.yaml --set training.max_steps=20 --set output_dir=runs/try
    """
    from peftchat.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from peftchat.logging_setup import quiet_libraries

    quiet_libraries()
    from peftchat.training.distributed import resolve_distributed, slurm_variables

    os.environ.update(slurm_variables(os.environ))
    placement = resolve_distributed(loaded)
    _refuse_early(loaded, resume=resume)
    if placement.launcher == "elastic" and not dry_run:
        _launch(loaded, placement, sys.argv[1:])
        return
    loaded, choices = _choose(loaded, placement)
    if dry_run:
        from peftchat.planning.plan_report import print_dry_run

        print_dry_run(loaded, placement)
        return
    from peftchat.training.train import TrainOptions, run_training

    command_line = " ".join(["peftchat", *sys.argv[1:]])
    # Standard output is for data; DeepSpeed prints to it while it compiles.
    with contextlib.redirect_stdout(sys.stderr):
        summary = run_training(loaded, placement, TrainOptions(resume, questions, command_line, choices))
    if os.environ.get("RANK", "0") == "0":
        from peftchat.console import stderr
        from peftchat.reports.run_report import write_summaries
        from peftchat.reports.run_terminal import print_samples, print_summary

        write_summaries(Path(loaded.recipe.output_dir))
        print_summary(summary)
        print_samples(summary)
        stderr.print(f"Run folder: {loaded.recipe.output_dir}")


def _choose(loaded: "LoadedRecipe", placement: "DistributedSetup") -> "tuple[LoadedRecipe, tuple[AutoSetting, ...]]":
    """Settle what the recipe leaves open, and say what was settled: once, for all processes."""
    from peftchat.console import stderr
    from peftchat.planning.auto_settings import resolve_open

    chosen, choices = resolve_open(loaded, placement)
    if os.environ.get("RANK", "0") == "0":
        for choice in choices:
            stderr.print(f"Chosen: {choice}", markup=False, highlight=False)
    return chosen, choices


def _refuse_early(loaded: "LoadedRecipe", *, resume: bool) -> None:
    """What can be known in the first second is said in the first second."""
    from peftchat.conversations.readers import find_files
    from peftchat.models.source import ModelSource
    from peftchat.runs.run_folder import RunFolder

    recipe = loaded.recipe
    ModelSource.of_recipe(recipe).check_weights()
    for entry in (*recipe.data.train, *(recipe.data.eval or ())):
        find_files(entry.path, entry.split)
    RunFolder(Path(recipe.output_dir)).check_usable(recipe, resume=resume)


def _launch(loaded: "LoadedRecipe", placement: "DistributedSetup", arguments: list[str]) -> None:
    """Encode the data once, here, where an error is told once; then start the processes."""
    from peftchat.dataset.cache import load_splits
    from peftchat.training.distributed import launch
    from peftchat.training.model import chat_format

    load_splits(loaded.recipe, chat_format(loaded.recipe))
    sys.exit(launch(placement, arguments))
