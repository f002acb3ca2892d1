"""`peftchat train`: fine-tune a model from a recipe."""

import sys
from pathlib import Path

import click

from peftchat.cli.common import Command, PathType, allow_changed_option, note, set_option


@click.command("train", cls=Command, renamed={"--ask": "--prompt"})
@click.argument("recipe", type=PathType())
@set_option()
@click.option("--resume", is_flag=True, help="Resume from the last checkpoint; start from scratch if there is none.")
@allow_changed_option()
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan and one example, train nothing.")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Answer this before and after training. Repeatable."
)
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    resume: bool,
    allow_changed: bool,
    dry_run: bool,
    prompts: tuple[str, ...],
) -> None:
    """Fine-tune a model from a recipe.

    The run folder holds the model or adapter, metrics, checkpoints and a report.

    \b
    peftchat train recipes/qlora_1gpu.yaml
    peftchat train recipes/demo_cpu.yaml --set training.max_steps=20 --set output_dir=runs/try
    """
    from peftchat import api
    from peftchat.recipe import load_recipe

    api.settle_processes()
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        distributed = api.prepare_training(loaded, resume=resume, allow_changed=allow_changed)
        loaded, _ = api.choose_settings(loaded, distributed, resume=resume)
        from peftchat.planning.plan_report import print_dry_run

        print_dry_run(loaded, distributed)
        return
    try:
        summary = api.train(loaded, resume=resume, allow_changed=allow_changed, prompts=prompts)
    except api.WorkerError as error:
        sys.exit(error.status)
    from peftchat.training.several_processes import is_main_process

    if is_main_process():
        from peftchat.reports.run_terminal import print_samples, print_summary

        print_summary(summary)
        print_samples(summary)
        note(f"Run folder: {loaded.recipe.output_dir}")
