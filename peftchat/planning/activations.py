"""Activation memory of a step as a function of layers, batch and length.

Fake tensors trace the bytes on the model's own code (`peftchat.planning.tracing`), at one and two layers and at two or
three lengths. Interpolation and extrapolation are exact, since bytes are linear in layers and batch. They are also
linear in the length, except for the scores or the mask of unfused attention, which are quadratic.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftchat.planning.settings import AttentionKind, TraceConfig
from peftchat.planning.tracing import BackboneTrace, LossTrace, fake_mode, fake_model, trace_backbone, trace_loss
from peftchat.training.linear_cross_entropy import chunk_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftchat.planning.parameter_counts import ParameterCounts
    from peftchat.recipe import Recipe

_LENGTHS = (256, 512, 1024)
"""Traced sequence lengths in tokens; two of them suffice where no term is quadratic."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that a forward and backward pass adds to weights and optimizer states.

    Attributes:
        saved: activations saved for the backward pass.
        forward: the peak of the backbone's forward pass, including `saved`.
        backward: the peak while the last block's gradient is computed, including most of `saved`.
        end: the peak at the end of the backward pass, without the gradients themselves.
    """

    saved: float
    forward: float
    backward: float
    end: float


@dataclass(frozen=True, slots=True)
class _Polynomial:
    """`constant + batch * (linear * length + square * length²)` bytes."""

    constant: float
    linear: float
    square: float

    def __call__(self, batch: int, length: int) -> float:
        return max(0.0, self.constant + batch * (self.linear * length + self.square * length * length))

    @classmethod
    def through(cls, lengths: Sequence[int], values: Sequence[float]) -> "_Polynomial":
        """Fit the values at two lengths, or at three for a quadratic term."""
        (x, y), (a, b) = lengths[:2], values[:2]
        first = (b - a) / (y - x)
        square = 0.0
        if len(lengths) > 2:
            square = ((values[2] - b) / (lengths[2] - y) - first) / (lengths[2] - x)
        linear = first - square * (x + y)
        return cls(a - linear * x - square * x * x, linear, square)


class ActivationProfile:
    """The activation memory of one architecture with one trace config.

    Args:
        trace: returns the bytes of a step for (layers, length) at batch 1.
        num_layers: decoder blocks of the full model.
        attention: whether a term is quadratic in the length.
    """

    def __init__(self, trace: Callable[[int, int], BackboneTrace], num_layers: int, attention: AttentionKind) -> None:
        self._num_layers = num_layers
        lengths = _LENGTHS[::2] if attention == "fused" else _LENGTHS
        names = ("forward_peak", "saved", "first_layer_peak", "rest_peak", "gradients")

        def fit(layers: int) -> dict[str, _Polynomial]:
            traces = [trace(layers, length) for length in lengths]
            return {name: _Polynomial.through(lengths, [getattr(one, name) for one in traces]) for name in names}

        self._one = fit(1)
        self._two = fit(2) if num_layers > 1 else self._one

    def at(self, batch: int, length: int) -> StepMemory:
        """Return the bytes of a step over `batch` sequences of `length` tokens."""
        first = self._one["saved"](batch, length)
        block = self._two["saved"](batch, length) - first if self._num_layers > 1 else first

        def full(name: str) -> float:
            # Each further block adds its saved activations; temporary memory is that of one block.
            if self._num_layers == 1:
                return self._one[name](batch, length)
            return self._two[name](batch, length) + (self._num_layers - 2) * block

        end = self._one["rest_peak"](batch, length) - self._one["gradients"](batch, length)
        saved, backward = full("saved"), full("first_layer_peak")
        return StepMemory(saved, full("forward_peak"), backward, max(0.0, end))


class LossProfile:
    """The memory of the loss as a function of the supervised positions.

    They are those of one micro-batch. Logits exist for one chunk of positions at a time. The forward pass therefore
    takes a constant, a term per position, and a term per position of a chunk.

    Args:
        trace: returns the bytes for a number of positions in chunks of the CPU's size.
        cpu_chunk: positions per chunk on a CPU.
        device_chunk: returns the positions per chunk on the planned device for a total number of positions.
    """

    def __init__(self, trace: Callable[[int], LossTrace], cpu_chunk: int, device_chunk: Callable[[int], int]) -> None:
        half, one, four = (trace(count) for count in (cpu_chunk // 2, cpu_chunk, 4 * cpu_chunk))
        per_position = (one.forward - half.forward) / (cpu_chunk - cpu_chunk // 2)
        self._position = (four.forward - one.forward) / (3 * cpu_chunk)
        self._chunk_position = per_position - self._position
        self._constant = one.forward - per_position * cpu_chunk
        self._backward = (four.backward - one.backward) / (3 * cpu_chunk)
        self._backward_constant = one.backward - self._backward * cpu_chunk
        self._gradients = one.gradients
        self._device_chunk = device_chunk

    def at(self, targets: int) -> LossTrace:
        """Return the bytes for a number of supervised positions."""
        forward = self._constant + self._position * targets + self._chunk_position * self._device_chunk(targets)
        return LossTrace(round(forward), round(self._backward_constant + self._backward * targets), self._gradients)


def activation_profile(config: "PretrainedConfig", recipe: "Recipe", trace_config: TraceConfig) -> ActivationProfile:
    """Trace the activations of an architecture with the recipe's adapter."""

    def trace(layers: int, length: int) -> BackboneTrace:
        with fake_mode():
            model = fake_model(config, recipe, trace_config, layers)
            return trace_backbone(model, 1, length, _dtype(trace_config.autocast))

    return ActivationProfile(trace, int(config.get_text_config().num_hidden_layers), trace_config.attention)


def estimated_profile(counts: "ParameterCounts", trace_config: TraceConfig) -> ActivationProfile:
    """Estimate the activations of an architecture that cannot be traced.

    A block saves 34 bytes per token and unit of width (Korthikanti et al., 2022, for 16 bits and fused attention).
    Scores and masks add a quadratic term.
    """
    scale = 2 if trace_config.autocast is None and trace_config.weight_dtype == "float32" else 1
    scores = {"fused": 0, "masked": 2, "eager": 5 * counts.num_heads}[trace_config.attention]

    def trace(layers: int, length: int) -> BackboneTrace:
        block = scale * length * (34 * counts.hidden_size + scores * length)
        entry = scale * 2 * length * counts.hidden_size
        saved = entry + layers * (entry if trace_config.checkpointing else block)
        temporary = block if trace_config.checkpointing else block // 3
        return BackboneTrace(saved + temporary, saved, saved + temporary, block, 0)

    return ActivationProfile(trace, counts.num_layers, trace_config.attention)


def loss_profile(
    config: "PretrainedConfig", counts: "ParameterCounts", trace_config: TraceConfig, *, trains_head: bool, device: str
) -> LossProfile:
    """Trace the loss with an LM head of the model's size."""
    vocab_size = counts.vocab_size + (0 if trains_head else trace_config.new_tokens)

    itemsize = getattr(torch, trace_config.autocast or trace_config.weight_dtype).itemsize

    def chunk(on: str, targets: int) -> int:
        return chunk_size(targets, vocab_size, on, trains_head=trains_head, itemsize=itemsize)

    def trace(targets: int) -> LossTrace:
        with fake_mode():
            return trace_loss(
                config,
                targets=targets,
                head=(counts.vocab_size, counts.lm_head_size // counts.vocab_size),
                weight_dtype=getattr(torch, trace_config.weight_dtype),
                autocast=_dtype(trace_config.autocast),
                trains_head=trains_head,
                new_tokens=trace_config.new_tokens,
                in_tiles=device == "cpu",
            )

    return LossProfile(trace, chunk("cpu", 2**40), functools.partial(chunk, device))


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
