"""The whole examination: versions, machine, probes, and what one recipe needs here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftchat.doctor.findings import Finding
from peftchat.errors import UserError
from peftchat.formatting import format_bytes

if TYPE_CHECKING:
    from peftchat.planning.plan import TrainingPlan
    from peftchat.recipe import LoadedRecipe


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the examination.

    Attributes:
        title: its heading.
        examine: yields its findings, one as soon as it is known.
    """

    title: str
    examine: Callable[[], Iterator[Finding]]


def sections(loaded: "LoadedRecipe | None", *, quick: bool) -> Iterator[Section]:
    """Yield the parts of an examination.

    Args:
        loaded: a recipe whose needs are examined too, if given.
        quick: leave out the probes, which run libraries for about a minute.
    """
    from peftchat.doctor.machine import examine_machine
    from peftchat.doctor.running import PROBES, run_probe
    from peftchat.doctor.versions import examine_versions

    yield Section("Versions", examine_versions)
    yield Section("Machine", examine_machine)
    if not quick:
        yield Section("Libraries at work", lambda: (run_probe(probe) for probe in PROBES))
    if loaded is not None:
        recipe = loaded
        yield Section(f"Recipe {recipe.path}", lambda: examine_recipe(recipe))


def examine_recipe(loaded: "LoadedRecipe") -> Iterator[Finding]:
    """Yield what a recipe needs and whether this machine has it: packages, processes, data, base, memory, disk."""
    yield _examine("packages and settings", lambda: _check_settings(loaded))
    yield _examine("processes", lambda: _describe_processes(loaded))
    yield _examine("data", lambda: _check_data(loaded))
    base = _examine("base model", lambda: _check_base(loaded))
    yield base
    if base.status == "ok":
        yield from _examine_plan(loaded)


def _examine(subject: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, "ok", check())
    except UserError as error:
        found = f"{error.where}: {error.message}" if error.where else error.message
        return Finding(subject, "problem", found, error.hint)


def _check_settings(loaded: "LoadedRecipe") -> str:
    from peftchat.recipe import load_recipe

    load_recipe(loaded.path, loaded.overrides, to_train=True)
    return "what it needs is installed"


def _describe_processes(loaded: "LoadedRecipe") -> str:
    from peftchat.training.distributed import resolve_distributed

    distributed = resolve_distributed(loaded)
    return f"strategy {distributed.strategy}, processes: {distributed.processes}, GPUs: {distributed.gpus}"


def _check_data(loaded: "LoadedRecipe") -> str:
    from peftchat.conversations.readers import find_files

    data = loaded.recipe.data
    found = [find_files(source.path, source.split) for source in (*data.train, *(data.eval or ()))]
    on_hub = sum(files is None for files in found)
    local = sum(len(files) for files in found if files is not None)
    return f"files here: {local}" + (f", hub data sets: {on_hub}" if on_hub else "")


def _check_base(loaded: "LoadedRecipe") -> str:
    from peftchat.models.base_check import check_base

    check_base(loaded, for_plan=True)
    return f"{loaded.recipe.model.name} can be trained as the recipe says"


def _examine_plan(loaded: "LoadedRecipe") -> Iterator[Finding]:
    from peftchat.planning.hardware import find_hardware
    from peftchat.planning.plan import plan_training

    distributed = loaded.recipe.distributed
    count = distributed.processes * distributed.nodes if distributed.processes else None
    try:
        plan = plan_training(loaded.recipe, find_hardware(None, count), with_grid=False, read_data=False)
    except UserError as error:
        yield Finding("memory", "problem", error.message, error.hint)
        return
    yield _examine_memory(plan)
    yield _examine_disk(loaded, plan)


def _examine_memory(plan: "TrainingPlan") -> Finding:
    needed, there = format_bytes(plan.memory.total), format_bytes(plan.hardware.memory)
    found = f"{needed} predicted for each process; {plan.hardware.label} has {there}"
    if plan.fits:
        return Finding("memory", "ok", found)
    change = plan.cheapest_fix
    if change is None:
        return Finding("memory", "problem", found, "`peftchat plan` lists GPUs and settings that fit.")
    flags = " ".join(f"--set {flag}" for flag in change.flags)
    cure = f"The cheapest change: {change.name} ({flags}). It costs: {change.costs}."
    return Finding("memory", "problem", found, cure)


def _examine_disk(loaded: "LoadedRecipe", plan: "TrainingPlan") -> Finding:
    """Compare the free disk with the checkpoints."""
    import shutil
    from pathlib import Path

    recipe = loaded.recipe
    needed = plan.checkpoint_bytes(recipe)
    folder = Path(recipe.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{format_bytes(free)} free in {existing}; checkpoints take up to about {format_bytes(needed)}"
    if free < needed:
        return Finding("disk", "problem", found, "Free some space, or lower `training.save_total_limit`.")
    return Finding("disk", "ok", found)
