"""`peftchat train`: fine-tune a model from a recipe."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import Command, note, set_option

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe
    from peftchat.runs.run_summary import AutoSetting
    from peftchat.training.distributed import DistributedSetup


@click.command("train", cls=Command, renamed={"--ask": "--prompt"})
@click.argument("recipe", type=click.Path(path_type=Path))
@set_option()
@click.option("--resume", is_flag=True, help="Resume from the last checkpoint; start from scratch if there is none.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan and one example, train nothing.")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Answer this before and after training. Repeatable."
)
def command(recipe: Path, overrides: tuple[str, ...], resume: bool, dry_run: bool, prompts: tuple[str, ...]) -> None:
    """Fine-tune a model from a recipe.

    The run folder holds the model or adapter, metrics, checkpoints and a report.

    \b
    peftchat train recipes/qlora_1gpu.yaml
    peftchat train recipes/demo_cpu.yaml --set training.max_steps=20 --set output_dir=runs/try
    """
    from peftchat.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from peftchat.logging_setup import quiet_libraries

    quiet_libraries()
    from peftchat.training.distributed import is_main_process, resolve_distributed, slurm_variables

    os.environ.update(slurm_variables(os.environ))
    distributed = resolve_distributed(loaded)
    _check_paths(loaded, resume=resume)
    if distributed.launcher == "torchrun" and not dry_run:
        _launch(loaded, distributed, sys.argv[1:])
        return
    loaded, choices = _choose(loaded, distributed)
    if dry_run:
        from peftchat.planning.plan_report import print_dry_run

        print_dry_run(loaded, distributed)
        return
    from peftchat.training.context import TrainOptions
    from peftchat.training.train import train

    command_line = " ".join(["peftchat", *sys.argv[1:]])
    # Standard output is for data; DeepSpeed prints to it while it compiles.
    with contextlib.redirect_stdout(sys.stderr):
        summary = train(loaded, TrainOptions(resume, prompts, command_line, choices), distributed)
    if is_main_process():
        from peftchat.reports.run_report import write_summaries
        from peftchat.reports.run_terminal import print_samples, print_summary

        write_summaries(Path(loaded.recipe.output_dir))
        print_summary(summary)
        print_samples(summary)
        note(f"Run folder: {loaded.recipe.output_dir}")


def _choose(loaded: "LoadedRecipe", distributed: "DistributedSetup") -> "tuple[LoadedRecipe, tuple[AutoSetting, ...]]":
    """Return the recipe with its open settings chosen, and print the choices once for all processes."""
    from peftchat.planning.auto_settings import resolve_auto_settings

    chosen, choices = resolve_auto_settings(loaded, distributed)
    for choice in choices:
        note(f"Chosen: {choice}")
    return chosen, choices


def _check_paths(loaded: "LoadedRecipe", *, resume: bool) -> None:
    """Check paths and folders before the libraries load."""
    from peftchat.conversations.readers import find_files
    from peftchat.models.source import ModelSource
    from peftchat.runs.run_folder import RunFolder

    recipe = loaded.recipe
    ModelSource.of_recipe(recipe).check_weights()
    for entry in (*recipe.data.train, *(recipe.data.eval or ())):
        find_files(entry.path, entry.split)
    RunFolder(Path(recipe.output_dir)).check_usable(recipe, resume=resume)


def _launch(loaded: "LoadedRecipe", distributed: "DistributedSetup", arguments: list[str]) -> None:
    """Encode the data once, so that an error is printed once; then start the processes."""
    from peftchat.dataset.cache import load_splits
    from peftchat.training.context import load_chat_format
    from peftchat.training.distributed import launch

    load_splits(loaded.recipe, load_chat_format(loaded.recipe))
    sys.exit(launch(distributed, arguments))
