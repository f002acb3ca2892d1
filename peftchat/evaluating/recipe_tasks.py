"""The tasks that a recipe names: checked before training, asked at the end of the run."""

import dataclasses
import gc
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.child_process import is_child
from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from peftchat.evaluating.run_evaluation import EvaluateOptions
    from peftchat.recipe import LoadedRecipe
    from peftchat.recipe.sections import EvaluationSection
    from peftchat.training.distributed import DistributedSetup


def check_recipe_tasks(loaded: "LoadedRecipe", distributed: "DistributedSetup") -> None:
    """Check that the recipe's tasks can be asked at the end of its run; their data is loaded, and downloaded if needed.

    Raises:
        UserError: the harness, a task or its data is missing, or another program starts the run's processes.
    """
    section = loaded.recipe.evaluation
    launched = distributed.launcher == "environment" and distributed.world_size > 1
    if not section.tasks or (launched and is_child()):
        # The launcher has checked them, and will ask them.
        return
    from peftchat.evaluating.task_catalog import load_tasks, parse_tasks

    where = loaded.where("evaluation", "tasks")
    if launched:
        raise UserError(
            "tasks are asked at the end of runs whose processes peftchat starts itself",
            where=where,
            hint="Add `--set evaluation.tasks=[]`, and run `peftchat evaluate` on the run folder afterwards.",
        )
    try:
        load_tasks(parse_tasks(",".join(section.tasks)), _folders(section))
    except UserError as error:
        # The message may name an option of `peftchat evaluate`.
        of_file = error.where is not None and not error.where.startswith("--")
        what = f"{error.where}: {error.message}" if of_file else error.message
        hint = None if error.hint is None else error.hint.replace("`--include`", "`evaluation.include`")
        raise UserError(what, where=where, hint=hint) from error


def evaluate_recipe_tasks(loaded: "LoadedRecipe") -> None:
    """Ask the recipe's tasks of its finished run and of the base, and print the table to standard error.

    Raises:
        VerificationError: they could not be asked; the run itself is complete.
    """
    section = loaded.recipe.evaluation
    if not section.tasks:
        return
    import torch
    from transformers.utils.logging import disable_progress_bar

    from peftchat.console import stderr
    from peftchat.evaluating.evaluation_progress import EvaluationProgress
    from peftchat.evaluating.evaluation_report import evaluation_table, notes
    from peftchat.evaluating.run_evaluation import evaluate_models

    # What the trainer held is needed no more.
    gc.collect()
    torch.cuda.empty_cache()
    disable_progress_bar()
    run = loaded.recipe.output_dir
    try:
        with EvaluationProgress() as progress:
            evaluation, folder = evaluate_models(run, _options(loaded), progress.watch)
    except UserError as error:
        again = shlex.join(["peftchat", "evaluate", run, *_flags(loaded)])
        what = f"the run is complete, but its tasks could not be asked: {str(error).rstrip('.')}. Then: {again}"
        raise VerificationError(what) from error
    stderr.print(evaluation_table(evaluation), soft_wrap=False)
    for text in notes(evaluation):
        stderr.print(text, markup=False)
    stderr.print(f"Results: {folder}", markup=False)


def _options(loaded: "LoadedRecipe") -> "EvaluateOptions":
    from peftchat.evaluating.harness import AskOptions
    from peftchat.evaluating.run_evaluation import EvaluateOptions

    section = loaded.recipe.evaluation
    ask = dataclasses.replace(AskOptions(), chat_template=section.chat_template, limit=section.limit)
    # A base that a resumed run was told to accept has been checked and noted by the run.
    return EvaluateOptions(tasks=",".join(section.tasks), include=_folders(section), ask=ask, allow_changed=True)


def _folders(section: "EvaluationSection") -> list[Path]:
    return [] if section.include is None else [Path(section.include)]


def _flags(loaded: "LoadedRecipe") -> list[str]:
    """Return the options of `peftchat evaluate` that ask the same."""
    section = loaded.recipe.evaluation
    flags = ["--tasks", ",".join(section.tasks)]
    if section.include is not None:
        flags += ["--include", section.include]
    if section.limit is not None:
        flags += ["--limit", str(section.limit)]
    if section.chat_template:
        flags.append("--chat-template")
    return flags
