"""Weights stored in bfloat16 that a CPU without bfloat16 kernels computes with in float32, block by block.

A float32 copy of a block's weights exists while the block is computed. Autograd would keep it until the backward pass;
hooks on saved tensors keep the bfloat16 weight instead and copy it once more.
https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class _Stored:
    """A weight in the place of a saved float32 copy of it, or of a view of that copy."""

    weight: nn.Parameter
    version: int
    size: Sequence[int]
    stride: Sequence[int]
    offset: int | torch.SymInt


def compute_in_float32(model: "PreTrainedModel") -> None:
    """Let a model with bfloat16 weights compute in float32.

    The weights, their names and what is saved stay as they are. Embeddings are looked up first and widened then.
    """
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside: set[int] = set()
    for stack in blocks:
        for block in stack:
            if id(block) not in inside and _has_narrow(block, recurse=True):
                inside.update(id(module) for module in block.modules())
                _widen(block, model)
    for module in model.modules():
        if id(module) in inside or not _has_narrow(module, recurse=False):
            continue
        if type(module) is nn.Embedding:
            _widen_output(module)
        else:
            _widen(module, None)


def _has_narrow(module: nn.Module, *, recurse: bool) -> bool:
    return any(weight.dtype == torch.bfloat16 for weight in module.parameters(recurse=recurse))


def _widen_output(embedding: nn.Embedding) -> None:
    """Widen the rows that an embedding looks up."""
    lookup = embedding.forward

    @functools.wraps(lookup)
    def forward(ids: Tensor) -> Tensor:
        return lookup(ids).float()

    embedding.forward = forward  # type: ignore[method-assign, assignment]


def _widen(module: nn.Module, model: "PreTrainedModel | None") -> None:
    """Give a module float32 copies of its weights while its forward pass runs.

    Args:
        module: a block, or a module outside of all blocks.
        model: where checkpointing is switched on for a block; None for what is never checkpointed.
    """
    narrow = module.forward
    is_block = model is not None

    def widened(call: Callable[..., Any], *, keeps: bool) -> Callable[..., Any]:
        def call_widened(*args: Any, **kwargs: Any) -> Any:
            copies = {id(weight): weight.float() for weight in _narrow_weights(module, recurse=is_block)}
            hooks = _stored_instead(module, copies) if keeps and torch.is_grad_enabled() else nullcontext()
            with _swapped(module, copies, recurse=is_block), hooks:
                return call(*args, **kwargs)

        return call_widened

    @functools.wraps(narrow)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if model is None or not (module.training and _is_checkpointed(module, model)):
            return widened(narrow, keeps=True)(*args, **kwargs)
        # Checkpointing drops what a block saves, and its own hooks would not see what ours took.
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is None:
            return widened(narrow, keeps=False)(*args, **kwargs)
        # The block's forward calls it, and what it recomputes needs the copies once more.
        module.__dict__["_gradient_checkpointing_func"] = lambda call, *given, **named: checkpoint(
            widened(call, keeps=False), *given, **named
        )
        try:
            return narrow(*args, **kwargs)
        finally:
            module.__dict__["_gradient_checkpointing_func"] = checkpoint

    module.forward = forward


def _is_checkpointed(block: nn.Module, model: "PreTrainedModel") -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in (block, model.base_model))


def _narrow_weights(module: nn.Module, *, recurse: bool) -> Iterator[nn.Parameter]:
    return (weight for weight in module.parameters(recurse=recurse) if weight.dtype == torch.bfloat16)


@contextmanager
def _swapped(module: nn.Module, copies: Mapping[int, Tensor], *, recurse: bool) -> Iterator[None]:
    """Let modules find copies where they look for their weights, until the end of the block."""
    # What stands in a module's own attributes is found before its parameters.
    covered: list[tuple[dict[str, Any], str]] = []
    try:
        for part in module.modules() if recurse else (module,):
            for name, weight in part._parameters.items():
                copy = None if weight is None else copies.get(id(weight))
                if copy is not None:
                    part.__dict__[name] = copy
                    covered.append((part.__dict__, name))
        yield
    finally:
        for attributes, name in covered:
            del attributes[name]


def _stored_instead(module: nn.Module, copies: Mapping[int, Tensor]) -> saved_tensors_hooks:
    """Return the hooks that save a weight instead of its copy."""
    weights = {id(weight): weight for weight in module.parameters()}
    by_place = {copy.untyped_storage().data_ptr(): weights[key] for key, copy in copies.items()}
    return saved_tensors_hooks(_packer(by_place), _unpack)


def _packer(by_place: Mapping[int, nn.Parameter]) -> Callable[[Tensor], Tensor | _Stored]:
    def pack(saved: Tensor) -> Tensor | _Stored:
        weight = by_place.get(saved.untyped_storage().data_ptr())
        if weight is None:
            return saved
        return _Stored(weight, weight._version, saved.size(), saved.stride(), saved.storage_offset())

    return pack


def _unpack(kept: Tensor | _Stored) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if kept.weight._version != kept.version:
        raise RuntimeError("a weight was changed between the forward and the backward pass that need the same one")
    return kept.weight.detach().float().as_strided(kept.size, kept.stride, kept.offset)
