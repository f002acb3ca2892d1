"""What the plan says of a finished run, beside what was measured."""

from pathlib import Path

from peftchat.errors import UserError
from peftchat.formatting import format_bytes, format_count, format_duration, format_percent
from peftchat.planning.hardware import find_hardware
from peftchat.planning.plan import plan_training
from peftchat.recipe import load_recipe
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import RunSummary

PlannedValue = tuple[str, str, str, str]
"""A name, the value planned, the value measured, and how far the plan is off."""


def planned_values(run: Path) -> list[PlannedValue]:
    """Plan a finished run on the device that it had, and return both for each value that was measured.

    Time on a CPU is planned at the speed of this machine now.

    Raises:
        UserError: the recipe, the base's config or the device is not known here.
    """
    folder = RunFolder(run)
    summary = RunSummary.read(folder)
    recipe = load_recipe(folder.recipe, to_train=False, upgrade=True).recipe
    if summary.device is None:
        raise UserError("the run did not note its device")
    plan = plan_training(recipe, find_hardware(summary.device, summary.world_size), with_grid=False)
    # Torch counts what it allocates on a GPU; on a CPU the process is measured.
    peak = plan.memory.total if plan.settings.device == "cpu" else plan.memory.allocated
    trained = plan.trainable.parameters + plan.trainable.new_token_parameters
    cost = plan.cost
    rows = [
        ("Peak memory", peak, summary.peak_memory_bytes, format_bytes),
        ("Trained parameters", trained, summary.trainable_parameters, format_count),
        ("Steps", cost.steps if cost else None, summary.steps, format_count),
        ("Tokens", cost.tokens if cost else None, summary.tokens, format_count),
        ("Time of the steps", cost.seconds if cost else None, summary.seconds, format_duration),
    ]
    return [
        (name, form(planned), form(measured), _deviation(planned, measured))
        for name, planned, measured, form in rows
        if planned is not None and measured is not None
    ]


def _deviation(planned: float, measured: float) -> str:
    if planned == measured:
        return "exact"
    if not measured:
        return ""
    sign = "+" if planned > measured else "\N{MINUS SIGN}"
    return f"{sign}{format_percent(abs(planned / measured - 1))}"
