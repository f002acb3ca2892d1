"""Room on the disk, counted before training and not found missing after it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from peftchat.errors import UserError
from peftchat.formatting import format_bytes
from peftchat.training.flops import true_size

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

_SMALL_FILES = 32 * 2**20
"""Tokenizer, metrics, report."""

_FULL = 2**20


def check_space(folder: Path, model: nn.Module, recipe: "Recipe") -> None:
    """Refuse a run whose model and checkpoints will not fit beside what is on the disk.

    Raises:
        InputError: with what is needed and what is there.
    """
    trained = sum(true_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    finished = trained * (4 if recipe.method != "full" or recipe.model.dtype == "float32" else 2)
    training = recipe.training
    # Weights and Adam's two moments in float32; while a checkpoint is written, the one it replaces is still there.
    kept = 0 if training.save_strategy == "no" else 1 if training.max_steps in range(1, training.save_steps) else 2
    needed = finished + kept * 12 * trained + _SMALL_FILES
    free = shutil.disk_usage(_nearest(folder)).free
    if free < needed:
        raise UserError(
            f"the run needs about {format_bytes(needed)} on the disk, and there is no space left beyond {format_bytes(free)}",
            where=f"output_dir: {folder}",
            cure="Make room, choose another folder, or save fewer checkpoints (training.save_strategy: no).",
        )


def is_disk_full(folder: Path) -> bool:
    """Whether next to nothing can be written there any more."""
    return shutil.disk_usage(_nearest(folder)).free < _FULL


def _nearest(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
