"""`peftchat train`: fine-tune a model from a recipe."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from peftchat.cli.common import Command, RecipeType, allow_changed_option, echo_json, json_option, note, set_option
from peftchat.errors import UserError
from peftchat.interruption import CHECKPOINT


@click.command("train", cls=Command, renamed={"--ask": "--prompt"})
@click.argument("recipe", type=RecipeType())
@set_option()
@click.option("--resume", is_flag=True, help="Resume from the last checkpoint; start from scratch if there is none.")
@allow_changed_option()
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan and one example, train nothing.")
@click.option("--find-lr", is_flag=True, help="Search the learning rate with short runs, and train nothing else.")
@click.option(
    "--find-lr-steps",
    type=click.IntRange(min=5),
    metavar="N",
    help="Optimizer steps of each short run.  [default: 40, at most those of the run]",
)
@json_option("With --find-lr: print one JSON object and nothing else.")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Answer this before and after training. Repeatable."
)
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    resume: bool,
    allow_changed: bool,
    dry_run: bool,
    find_lr: bool,
    find_lr_steps: int | None,
    as_json: bool,
    prompts: tuple[str, ...],
) -> None:
    """Fine-tune a model from a recipe.

    The run folder holds the model or adapter, metrics, checkpoints and a report.

    \b
    peftchat train recipes/qlora_1gpu.yaml
    peftchat train recipes/demo_cpu.yaml --set training.max_steps=20 --set output_dir=runs/try
    peftchat train recipes/demo_cpu.yaml --find-lr
    """
    given = {"--resume": resume, "--allow-changed": allow_changed, "--dry-run": dry_run, "--prompt": bool(prompts)}
    _check_search(given, find_lr=find_lr, steps=find_lr_steps, as_json=as_json)
    if not (find_lr or dry_run):
        CHECKPOINT.begin()
    from peftchat import api
    from peftchat.before_training import choose_settings, prepare_training, resolve_processes
    from peftchat.recipe import load_recipe

    resolve_processes()
    loaded = load_recipe(recipe, overrides)
    if find_lr:
        from peftchat.reports.rate_terminal import print_rate_search

        search, file = api.find_learning_rate(loaded, steps=find_lr_steps)
        if as_json:
            echo_json(search.as_dict())
        else:
            print_rate_search(search, loaded)
        note(f"Written: {file}")
        return
    if dry_run:
        distributed = prepare_training(loaded, resume=resume, allow_changed=allow_changed)
        loaded, _ = choose_settings(loaded, distributed, resume=resume)
        from peftchat.planning.plan_report import print_dry_run

        print_dry_run(loaded, distributed)
        return
    try:
        summary = api.train(loaded, resume=resume, allow_changed=allow_changed, prompts=prompts)
    except api.WorkerError as error:
        sys.exit(error.status)
    from peftchat.training.several_processes import is_main_process

    # Of several processes that this one has started, the first has told.
    if is_main_process() and (summary.world_size == 1 or "RANK" in os.environ):
        from peftchat.reports.run_terminal import print_samples, print_summary

        print_summary(summary)
        print_samples(summary)
        note(f"Run folder: {loaded.recipe.output_dir}")


def _check_search(given: Mapping[str, bool], *, find_lr: bool, steps: int | None, as_json: bool) -> None:
    """Refuse options that do not go with `--find-lr`, and those that need it.

    Raises:
        UserError: naming them.
    """
    if not find_lr:
        alone = "--json" if as_json else "--find-lr-steps" if steps is not None else None
        if alone is not None:
            raise UserError("the option belongs to `--find-lr`", where=alone, hint="Add `--find-lr`, or leave it out.")
        return
    for option, is_given in given.items():
        if is_given:
            raise UserError(
                f"`--find-lr` trains short runs of its own and cannot be combined with `{option}`",
                where=option,
                hint="Search the rate first, then train with it.",
            )
