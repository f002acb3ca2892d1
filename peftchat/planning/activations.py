"""Activations: what a step keeps and makes for a while, as a function of layers, batch and length.

The figures are read off the model's own code on shapes (`peftchat.planning.tracing`) at one and two layers and two or
three lengths. They are exact in between and beyond: bytes are linear in layers and in the batch, and linear in the
length but for the scores or the mask of unfused attention, which are quadratic.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftchat.planning.settings import AttentionKind, TraceConfig
from peftchat.planning.tracing import BackboneTrace, LossTrace, fake_mode, fake_model, trace_backbone, trace_loss
from peftchat.training.loss import chunk_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftchat.planning.parameter_counts import ParameterCounts
    from peftchat.recipe import Recipe

_LENGTHS = (256, 512, 1024)
"""Tokens of the rows that are traced; two of them do where nothing grows with the square of the length."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that a forward and backward pass adds to weights and optimizer, at its moments.

    Attributes:
        kept: activations alive between forward and backward.
        forward: the most during the forward of the backbone, `kept` included.
        backward: the most while the last block's gradient is formed, nearly all of `kept` included.
        end: the most at the end of the backward pass, without the gradients themselves.
    """

    kept: float
    forward: float
    backward: float
    end: float


@dataclass(frozen=True, slots=True)
class _Law:
    """`constant + batch * (linear * length + square * length²)` bytes."""

    constant: float
    linear: float
    square: float

    def __call__(self, batch: int, length: int) -> float:
        return max(0.0, self.constant + batch * (self.linear * length + self.square * length * length))

    @classmethod
    def through(cls, lengths: Sequence[int], values: Sequence[float]) -> "_Law":
        """The law through its values at two lengths, or at three where it has a quadratic term."""
        (x, y), (a, b) = lengths[:2], values[:2]
        first = (b - a) / (y - x)
        square = 0.0
        if len(lengths) > 2:
            square = ((values[2] - b) / (lengths[2] - y) - first) / (lengths[2] - x)
        linear = first - square * (x + y)
        return cls(a - linear * x - square * x * x, linear, square)


class ActivationProfile:
    """The activations of one architecture under one way of training it.

    Args:
        trace: gives the bytes of a step for (layers, length), at batch 1.
        layers: blocks of the whole model.
        attention: decides whether anything grows with the square of the length.
    """

    def __init__(self, trace: Callable[[int, int], BackboneTrace], layers: int, attention: AttentionKind) -> None:
        self._layers = layers
        lengths = _LENGTHS[::2] if attention == "fused" else _LENGTHS
        names = ("forward_peak", "saved", "first_layer_peak", "rest_peak", "gradients")

        def laws(depth: int) -> dict[str, _Law]:
            found = [trace(depth, length) for length in lengths]
            return {name: _Law.through(lengths, [getattr(one, name) for one in found]) for name in names}

        self._one = laws(1)
        self._two = laws(2) if layers > 1 else self._one

    def step(self, batch: int, length: int) -> StepMemory:
        """The bytes of a step over `batch` rows of `length` tokens."""
        first = self._one["saved"](batch, length)
        block = self._two["saved"](batch, length) - first if self._layers > 1 else first

        def whole(name: str) -> float:
            # A block deep inside adds what it keeps; what lives for a while is that of one block.
            if self._layers == 1:
                return self._one[name](batch, length)
            return self._two[name](batch, length) + (self._layers - 2) * block

        end = self._one["rest_peak"](batch, length) - self._one["gradients"](batch, length)
        kept, backward = whole("saved"), whole("first_layer_peak")
        return StepMemory(kept, whole("forward_peak"), backward, max(0.0, end))


class LossProfile:
    """Bytes of the loss as a function of the supervised positions of one micro-batch.

    Logits exist for one chunk of positions at a time, so the bytes of the forward are a constant, something for each
    position, and something for each position of a chunk.

    Args:
        trace: gives the bytes for a number of positions, as a CPU works through them.
        chunk: positions of the CPU's chunk.
        of_a_chunk: positions of a chunk on the device planned for, of so many in all.
    """

    def __init__(self, trace: Callable[[int], LossTrace], chunk: int, of_a_chunk: Callable[[int], int]) -> None:
        half, one, four = (trace(count) for count in (chunk // 2, chunk, 4 * chunk))
        slope = (one.forward - half.forward) / (chunk - chunk // 2)
        self._position = (four.forward - one.forward) / (3 * chunk)
        self._row = slope - self._position
        self._constant = one.forward - slope * chunk
        self._back = (four.backward - one.backward) / (3 * chunk)
        self._back_constant = one.backward - self._back * chunk
        self._gradients = one.gradients
        self.rows_at_once = of_a_chunk

    def at(self, targets: int) -> LossTrace:
        """The bytes for so many supervised positions."""
        forward = self._constant + self._position * targets + self._row * self.rows_at_once(targets)
        return LossTrace(round(forward), round(self._back_constant + self._back * targets), self._gradients)


def activation_profile(config: "PretrainedConfig", recipe: "Recipe", key: TraceConfig) -> ActivationProfile:
    """Trace the architecture of `config` as `recipe` wraps it."""

    def trace(layers: int, length: int) -> BackboneTrace:
        with fake_mode():
            model = fake_model(config, recipe, key, layers)
            return trace_backbone(model, 1, length, _dtype(key.autocast))

    return ActivationProfile(trace, int(config.get_text_config().num_hidden_layers), key.attention)


def estimated_profile(facts: "ParameterCounts", key: TraceConfig) -> ActivationProfile:
    """A rule of thumb for architectures that cannot be traced: 34 bytes a token and unit of width in a block.

    Korthikanti et al. (2022), for 16 bits and fused attention; with scores or masks their quadratic term as well.
    """
    scale = 2 if key.autocast is None and key.held == "float32" else 1
    scores = {"fused": 0, "masked": 2, "eager": 5 * facts.heads}[key.attention]

    def trace(layers: int, length: int) -> BackboneTrace:
        block = scale * length * (34 * facts.hidden + scores * length)
        entry = scale * 2 * length * facts.hidden
        kept = entry + layers * (entry if key.checkpointing else block)
        once = block if key.checkpointing else block // 3
        return BackboneTrace(kept + once, kept, kept + once, block, 0)

    return ActivationProfile(trace, facts.layers, key.attention)


def loss_profile(
    config: "PretrainedConfig", facts: "ParameterCounts", key: TraceConfig, *, trains_head: bool, device: str
) -> LossProfile:
    """Trace the loss over a head of the model's size."""
    size = facts.vocabulary + (0 if trains_head else key.new_tokens)

    def of_a_chunk(on: str, targets: int) -> int:
        return chunk_size(targets, size, on, trains_head=trains_head)

    def trace(targets: int) -> LossTrace:
        with fake_mode():
            return trace_loss(
                config,
                targets=targets,
                head=(facts.vocabulary, facts.head_size // facts.vocabulary),
                held=getattr(torch, key.held),
                autocast=_dtype(key.autocast),
                trains_head=trains_head,
                new_tokens=key.new_tokens,
            )

    return LossProfile(trace, of_a_chunk("cpu", 2**40), functools.partial(of_a_chunk, device))


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
