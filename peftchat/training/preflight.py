"""Room on the disk, counted before training and not found missing after it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftchat.chat_template.loss_mask import IGNORE_INDEX
from peftchat.dataset.collator import borders
from peftchat.errors import UserError
from peftchat.formatting import format_bytes
from peftchat.training.throughput import unsharded_numel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftchat.recipe import Recipe


_SMALL_FILES = 32 * 2**20
"""Tokenizer, metrics, report."""

_FULL = 2**20


def check_space(folder: Path, model: nn.Module, recipe: "Recipe") -> None:
    """Refuse a run whose model and checkpoints will not fit beside what is on the disk.

    Raises:
        UserError: with what is needed and what is there.
    """
    trained = sum(unsharded_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    finished = trained * (4 if recipe.method != "full" or recipe.model.dtype == "float32" else 2)
    training = recipe.training
    # Weights and Adam's two moments in float32; while a checkpoint is written, the one it replaces is still there.
    kept = 0 if training.save_strategy == "no" else 1 if training.max_steps in range(1, training.save_steps) else 2
    needed = finished + kept * 12 * trained + _SMALL_FILES
    free = shutil.disk_usage(_nearest(folder)).free
    if free < needed:
        raise UserError(
            f"the run needs about {format_bytes(needed)} on the disk, and only {format_bytes(free)} are free",
            where=f"output_dir: {folder}",
            hint="Make room, choose another folder, or save fewer checkpoints (training.save_strategy: no).",
        )


def is_disk_full(folder: Path) -> bool:
    """Whether next to nothing can be written there any more."""
    return shutil.disk_usage(_nearest(folder)).free < _FULL


def _nearest(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


_LENGTH = 12


def check_isolation(model: nn.Module, vocabulary: int, device: torch.device, *, with_borders: bool) -> None:
    """Refuse packing where a conversation can see the one before it.

    Two packs that differ only in their first conversation go through the model; the second conversation's states must
    not notice.

    Args:
        model: as it is called in training.
        vocabulary: ids below this are ordinary tokens.
        with_borders: whether training tells the attention where conversations begin.

    Raises:
        UserError: they do notice.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary, (3, 1, _LENGTH), generator=generator).to(device)
    arguments: dict[str, Any] = {"position_ids": torch.arange(_LENGTH, device=device).repeat(2)[None]}
    if with_borders:
        arguments |= _borders_on(device, [_LENGTH, _LENGTH])

    def loss_behind(start: Tensor) -> float:
        ids = torch.cat([start, second], dim=1)
        labels = ids.clone()
        labels[:, : _LENGTH + 1] = IGNORE_INDEX
        return _supervised_loss(model, ids, labels, arguments)

    one, two = loss_behind(first), loss_behind(other)
    if abs(one - two) > 1e-4 * max(1.0, abs(one)):
        raise UserError(
            "this model does not keep packed conversations apart: what stands before a conversation changes its loss",
            where="data.packing: true",
            hint="Set data.packing: false, or another model.attention.",
        )


def check_loss(
    model: nn.Module, base: "PreTrainedModel", vocabulary: int, device: torch.device, *, with_borders: bool
) -> None:
    """Refuse a model whose logits are not what the loss takes them for (an unknown scale or cap behind the head).

    With borders, this also holds the attention between them against transformers' own.

    Raises:
        UserError: the loss differs from the plain formula on the model's own logits.
    """
    ids = torch.randint(vocabulary, (1, _LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.arange(_LENGTH, device=device)[None]
    labels = ids.clone()
    # Behind trained vectors even the first token would be a target.
    labels[:, 0] = IGNORE_INDEX
    arguments = {"position_ids": positions} | (_borders_on(device, [_LENGTH]) if with_borders else {})
    ours = _supervised_loss(model, ids, labels, arguments)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    model.train(was_training)
    # Trained vectors before the prompt have logits of their own.
    logits = logits[:, -_LENGTH:]
    plain = float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
    if abs(ours - plain) > 0.02 * max(1.0, abs(plain)):
        raise UserError(
            f"the model changes its logits in a way that the loss does not know ({ours:.4f} instead of {plain:.4f})",
            where=f"model.name: {base.config.name_or_path}",
            hint="This architecture cannot be trained yet.",
        )


def _borders_on(device: torch.device, lengths: list[int]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in borders(lengths).items()}


def _supervised_loss(model: nn.Module, ids: Tensor, labels: Tensor, arguments: dict[str, Any]) -> float:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels, supervised=True, **arguments).loss
    model.train(was_training)
    return float(loss)
