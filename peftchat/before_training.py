"""What happens before a run: processes found, inputs checked, open settings chosen.

Nothing heavy is loaded here, so that a run that cannot be done is refused at once.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.output_paths import check_output
from peftchat.recipe import LoadedRecipe, dump_recipe

if TYPE_CHECKING:
    from peftchat.runs.run_summary import AutoSetting
    from peftchat.training.distributed import DistributedSetup


def resolve_processes() -> None:
    """Leave in the environment what a launcher says about this process, and say once what else is ignored.

    Raises:
        UserError: the launcher's variables contradict each other.
    """
    from peftchat.console import stderr
    from peftchat.training.launcher_environment import clean_environment

    ignored = clean_environment(os.environ)
    if ignored and os.environ.get("RANK", "0") == "0":
        stderr.print(f"Ignored from the environment: {', '.join(ignored)}", markup=False, highlight=False)


def prepare_training(
    loaded: LoadedRecipe, *, resume: bool = False, allow_changed: bool = False, download: bool = False
) -> "DistributedSetup":
    """Resolve the processes of a run, and check the base, paths and folders before anything heavy is loaded.

    Args:
        loaded: the recipe.
        resume: continue from the last complete checkpoint, if there is one.
        allow_changed: continue although base, tokenizer, template or data changed.
        download: download the weights of a hub model that is not in the cache, to check them.

    Raises:
        UserError: a path does not exist, the base is incomplete or cannot be trained, the run folder is occupied, or
            the machine lacks what the recipe requests.
    """
    return check_inputs(
        loaded,
        lambda: _check_run_folder(loaded, resume=resume, allow_changed=allow_changed),
        download=download,
    )


def check_inputs(
    loaded: LoadedRecipe, check_folder: Callable[[], None] = lambda: None, *, download: bool
) -> "DistributedSetup":
    """Resolve the processes, and check the base, the data's paths, questions and tasks.

    Args:
        loaded: the recipe.
        check_folder: checks of the folder to write to; they run before the base is read.
        download: download the weights of a hub model that is not in the cache, to check them.

    Raises:
        UserError: a path does not exist, the base is incomplete or cannot be trained, or the machine lacks what the
            recipe requests.
    """
    from peftchat.conversations.readers import find_files
    from peftchat.dataset.cache import check_small_files
    from peftchat.models.source import ModelSource
    from peftchat.training.recipe_questions import read_questions
    from peftchat.training.several_processes import is_main_process

    recipe = loaded.recipe
    for source in (*recipe.data.train, *(recipe.data.eval or ())):
        find_files(source.path, source.split)
    check_folder()
    read_questions(loaded)
    ModelSource.of_recipe(recipe).check_folder()
    if is_main_process():
        check_small_files(recipe)
    # Here, because an interruption during an import of a command ends it: a library may swallow the exception.
    import torch  # noqa: F401

    from peftchat.evaluating.recipe_tasks import check_recipe_tasks
    from peftchat.training.distributed import resolve_distributed

    distributed = resolve_distributed(loaded)
    check_recipe_tasks(loaded, distributed)
    # Last, because it imports the model's code.
    from peftchat.models.base_check import check_base

    check_base(loaded, download=download)
    return distributed


def check_rate_file(loaded: LoadedRecipe, file: Path) -> None:
    """Check, by writing, that a search may write its file into the run folder, which may hold a run.

    Raises:
        UserError: it may not.
    """
    from peftchat.runs.run_folder import RunFolder

    folder = file.parent
    where = f"output_dir: {folder}"
    inputs = [entry for entry in loaded.inputs() if entry.path.parent != folder]
    check_output(folder, inputs, where, continues=RunFolder(folder).has_started)
    if folder.exists() and not folder.is_dir():
        raise UserError("the run folder cannot be created: a file has its name", where=where)
    if file.is_dir():
        raise UserError("a folder has the name of the search's file", where=str(file), hint="Move it away.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file.with_name(".find_lr.tmp"), "")
        file.with_name(".find_lr.tmp").unlink()
    except OSError as error:
        raise UserError(f"the folder is not writable: {error.strerror}", where=where) from error


def _check_run_folder(loaded: LoadedRecipe, *, resume: bool, allow_changed: bool) -> None:
    """Check that the run may write to its folder: nothing that the recipe reads is there."""
    from peftchat.runs.claim import refuse_held
    from peftchat.runs.run_folder import RunFolder
    from peftchat.training.several_processes import is_main_process

    run_folder = RunFolder(Path(loaded.recipe.output_dir))
    if resume:
        _check_not_moved(loaded)
    goes_on = resume and run_folder.has_started
    own = set()
    if goes_on or (run_folder.is_run and run_folder.recipe.read_text("utf-8", "replace") == dump_recipe(loaded.recipe)):
        own = {Path(os.path.realpath(run_folder.recipe))}
    inputs = [entry for entry in loaded.inputs() if Path(os.path.realpath(entry.path)) not in own]
    check_output(run_folder.path, inputs, f"output_dir: {run_folder.path}", continues=goes_on)
    if is_main_process():
        refuse_held(run_folder.path, option="output_dir")
    run_folder.check_usable(loaded.recipe, resume=resume, allow_changed=allow_changed)


def _check_not_moved(loaded: LoadedRecipe) -> None:
    """Check that a run that is resumed by the recipe in its folder goes on there, and not where it was before.

    Raises:
        UserError: the folder was moved or copied, and its recipe still names the former place.
    """
    from peftchat.runs.run_folder import RunFolder

    own = RunFolder(loaded.path.parent)
    if not own.has_started or own.recipe.name != loaded.path.name:
        return
    given = loaded.recipe.output_dir
    is_elsewhere = os.path.realpath(own.path) != os.path.realpath(given)
    if is_elsewhere and loaded.document.place(("output_dir",)).file is not None:
        raise UserError(
            f"{given}: the recipe belongs to the run in {own.path}, which was moved or copied",
            where=loaded.where("output_dir"),
            hint=f"Add `--set output_dir={own.path}`.",
        )


def choose_settings(
    loaded: LoadedRecipe, distributed: "DistributedSetup", *, resume: bool = False
) -> "tuple[LoadedRecipe, tuple[AutoSetting, ...]]":
    """Choose the settings that a recipe leaves open, and print them once for all processes."""
    from peftchat.console import stderr
    from peftchat.planning.auto_settings import resolve_auto_settings
    from peftchat.training.several_processes import is_main_process

    loaded, auto_settings = resolve_auto_settings(loaded, distributed, resume=resume)
    if is_main_process():
        for setting in auto_settings:
            stderr.print(f"Chosen: {setting}", markup=False, highlight=False)
    return loaded, auto_settings
