"""Preflight: checks of the disk, of the model and of saving, before the first step."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftchat.chat_template.loss_mask import IGNORE_INDEX
from peftchat.console import stderr
from peftchat.dataset.collator import cu_seqlens
from peftchat.errors import UserError, first_line
from peftchat.formatting import format_bytes
from peftchat.models.loading import VARLEN
from peftchat.training.context import TrainContext
from peftchat.training.model import fall_back_to_sdpa
from peftchat.training.out_of_memory import is_out_of_memory
from peftchat.training.saving_trial import try_saving
from peftchat.training.throughput import unsharded_numel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from peftchat.recipe import Recipe
    from peftchat.runs.run_folder import Checkpoint
    from peftchat.training.trainer import ChatTrainer


_SMALL_FILES = 32 * 2**20
"""Bytes of tokenizer, metrics and report."""

_FULL_DISK = 2**20
"""A disk with fewer free bytes counts as full."""

_LENGTH = 12
"""Tokens of each test conversation."""

_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Keys of a config for the tokens that a layer's attention reaches."""

_WINDOW = 4
"""Tokens of a window of attention in a test: fewer than those of a conversation."""


def preflight(trainer: "ChatTrainer", context: TrainContext) -> None:
    """Check the model as training calls it, the free disk space, and that everything but the weights can be saved.

    If variable-length attention was selected automatically and does not work, the trainer falls back to SDPA.

    Raises:
        UserError: the loss or the isolation of packed conversations is wrong for this model, the disk is too small, or
            something cannot be saved.
    """
    if context.checkpoint is not None:
        _check_checkpoint(trainer, context.checkpoint)
    try:
        check_model(trainer, context.recipe)
    except (UserError, RuntimeError) as error:
        # Only an attention that was selected automatically is replaced; for one that the recipe names it is an error.
        layout = fall_back_to_sdpa(context.recipe, trainer.causal_model)
        if layout is None:
            raise
        trainer.set_layout(layout)
        check_model(trainer, context.recipe)
        if context.is_main:
            reason = str(error).splitlines()[0]
            stderr.print(
                f"Chosen: model.attention: sdpa, slower ({VARLEN} does not work here: {reason})",
                markup=False,
                highlight=False,
            )
    check_space(context.run_folder.path, trainer.model, context.recipe)
    if context.is_main:
        try_saving(trainer, context)


def _check_checkpoint(trainer: "ChatTrainer", checkpoint: "Checkpoint") -> None:
    bad = trainer.checks.weight_not_finite(trainer.model)
    if bad is not None:
        raise UserError(
            f"the checkpoint's weight {bad} is not finite",
            where=str(checkpoint.path),
            hint="Delete this folder; `--resume` then goes on from the checkpoint before it.",
        )


def check_model(trainer: "ChatTrainer", recipe: "Recipe") -> None:
    """Check the loss, and that packed conversations are isolated.

    Raises:
        UserError: one of them is wrong for this model.
    """
    base, device = trainer.causal_model, trainer.args.device
    vocabulary = min(base.config.get_text_config().vocab_size, 1000)
    varlen = trainer.layout == "varlen"
    with trainer.compute_loss_context_manager():
        # Logits are float32 where they were computed in 16 bits, too: under autocast, and with added tokens.
        exact = base.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
        check_loss(trainer.model_wrapped, base, vocabulary, device, varlen=varlen, exact=exact)
        if varlen or recipe.data.packing:
            check_isolation(trainer.model_wrapped, vocabulary, device, varlen=varlen)
            with _short_windows(base, recipe.data.max_length) as has_windows:
                if has_windows:
                    check_isolation(trainer.model_wrapped, vocabulary, device, varlen=varlen)
        trainer.check_batches(vocabulary)


@contextmanager
def _short_windows(model: "PreTrainedModel", longest: int) -> Iterator[bool]:
    """Give attention with a window one of `_WINDOW` tokens for a moment; yield whether a pack can exceed the window.

    Only then do layers get a mask, which transformers builds from the config at each call. Test conversations are
    shorter than real windows.

    Args:
        model: the causal language model.
        longest: tokens of the longest pack.
    """
    config = model.config.get_text_config()
    windows = {name: value for name in _WINDOWS if (value := _common(config, name)) and _WINDOW < value < longest}
    for name in windows:
        setattr(config, name, _WINDOW)
    try:
        yield bool(windows)
    finally:
        for name, value in windows.items():
            setattr(config, name, value)


def _common(config: "PretrainedConfig", name: str) -> int | None:
    """Return what all layers have of a config's key; None where there is no such key, or layers differ."""
    try:
        value = getattr(config, name, None)
    # https://github.com/huggingface/transformers/tree/main/src/transformers/integrations/heterogeneity
    except RuntimeError:
        return None
    return value if isinstance(value, int) else None


def check_space(folder: Path, model: nn.Module, recipe: "Recipe") -> None:
    """Check that the disk has space for the finished model and the checkpoints.

    Raises:
        UserError: with the bytes needed and the bytes free.
    """
    trained = sum(unsharded_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    finished = trained * (4 if recipe.method != "full" or recipe.model.dtype == "float32" else 2)
    training = recipe.training
    # Weights and Adam's two moments in float32; while a checkpoint is written, the one it replaces is still there.
    kept = 0 if training.save_strategy == "no" else 1 if training.max_steps in range(1, training.save_steps) else 2
    needed = finished + kept * 12 * trained + _SMALL_FILES
    free = shutil.disk_usage(_nearest_existing(folder)).free
    if free < needed:
        raise UserError(
            f"the run needs about {format_bytes(needed)} of disk space, and only {format_bytes(free)} are free",
            where=f"output_dir: {folder}",
            hint="Free disk space, choose another folder, or save fewer checkpoints (training.save_strategy: no).",
        )


def is_disk_full(folder: Path) -> bool:
    """Whether the folder's disk is full."""
    return shutil.disk_usage(_nearest_existing(folder)).free < _FULL_DISK


def _nearest_existing(folder: Path) -> Path:
    """Return the folder, or the closest one above it that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def check_isolation(model: nn.Module, vocabulary: int, device: torch.device, *, varlen: bool) -> None:
    """Check that attention does not leak between packed conversations.

    Two packs that differ only in their first conversation go through the model. The loss of the second conversation
    must be the same.

    Args:
        model: the model as training calls it.
        vocabulary: token ids below this are ordinary tokens.
        device: where the model is.
        varlen: whether training passes the conversations' offsets to the attention.

    Raises:
        UserError: it differs.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary, (3, 1, _LENGTH), generator=generator).to(device)
    arguments: dict[str, Any] = {"position_ids": torch.arange(_LENGTH, device=device).repeat(2)[None]}
    if varlen:
        arguments |= _offsets([_LENGTH, _LENGTH], device)

    def loss_after(start: Tensor) -> float:
        ids = torch.cat([start, second], dim=1)
        labels = ids.clone()
        labels[:, : _LENGTH + 1] = IGNORE_INDEX
        return _loss(model, ids, labels, arguments)

    one, two = loss_after(first), loss_after(other)
    if not abs(one - two) <= 1e-4 * max(1.0, abs(one)):
        raise UserError(
            "packed conversations are not isolated: attention leaks across their boundaries in this model",
            where="data.packing: true",
            hint="Set data.packing: false, or another model.attention.",
        )


def check_loss(
    model: nn.Module, base: "PreTrainedModel", vocabulary: int, device: torch.device, *, varlen: bool, exact: bool
) -> None:
    """Check the fused loss against cross-entropy on the model's own logits.

    They differ where a model scales or caps its logits in a way that `LogitTransform` does not know. With `varlen`,
    the check also compares variable-length attention with transformers' own.

    Raises:
        UserError: with both losses, or with the model's own if that is not finite.
    """
    ids = torch.randint(vocabulary, (1, _LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.arange(_LENGTH, device=device)[None]
    labels = ids.clone()
    # After the virtual tokens of prompt tuning, even the first token would be a target.
    labels[:, 0] = IGNORE_INDEX
    arguments = {"position_ids": positions} | (_offsets([_LENGTH], device) if varlen else {})
    was_training = model.training
    model.eval()
    with torch.no_grad(), _telling_failures(base):
        fused = model(input_ids=ids, labels=labels, supervised=True, **arguments).losses
        own = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    model.train(was_training)
    # The virtual tokens of prompt tuning have logits of their own.
    expected = F.cross_entropy(own[0, -_LENGTH:-1].float(), ids[0, 1:], reduction="none")
    if not bool(expected.isfinite().all()):
        raise UserError(
            f"the model's loss is {float(expected.sum())} before training, on {_LENGTH} random tokens",
            where=f"model.name: {base.config.name_or_path}",
            hint="Check its weights for values that are not finite, or set model.dtype: float32.",
        )
    if not _agree(fused, expected, exact=exact):
        raise UserError(
            "the fused loss does not match the model's own logits "
            f"(got {float(fused.sum()):.4f}, expected {float(expected.sum()):.4f})",
            where=f"model.name: {base.config.name_or_path}",
            hint="Choose another model; this architecture is not supported yet.",
        )


@contextmanager
def _telling_failures(base: "PreTrainedModel") -> Iterator[None]:
    """Say in one message that a model's own code fails, as it does where a config asks for what that code cannot do.

    Raises:
        UserError: with the reason.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the model's forward pass fails on {_LENGTH} tokens ({first_line(error)}, {type(error).__name__})",
            where=f"model.name: {base.config.name_or_path}",
            hint="Check its config.json, or choose another model.",
        ) from error


def _agree(fused: Tensor, expected: Tensor, *, exact: bool) -> bool:
    """Return whether the losses of single tokens are equal, or their sums where rounded logits move each of them.

    A loss that is not a number is not equal.
    """
    if exact:
        return bool(((fused - expected).abs() <= 1e-3 * expected.clamp(min=1.0)).all())
    total = float(expected.sum())
    return abs(float(fused.sum()) - total) <= 0.02 * max(1.0, abs(total))


def _offsets(lengths: list[int], device: torch.device) -> dict[str, Any]:
    offsets = cu_seqlens(lengths)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in offsets.items()}


def _loss(model: nn.Module, ids: Tensor, labels: Tensor, arguments: dict[str, Any]) -> float:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels, supervised=True, **arguments).loss
    model.train(was_training)
    return float(loss)
