"""Updates weight by weight: bfloat16 weights rounded stochastically, and gradients freed as soon as they are used.

The optimizers are those of torch, transformers and bitsandbytes. Each works on float32 copies of a part of one weight
at a time, so that neither the copies nor the optimizer's own temporary tensors grow with the model.

Stochastic rounding follows Gupta et al., 2015 (https://arxiv.org/abs/1502.02551): to nearest, a bfloat16 weight would
not move at updates below 1/512 of it. Gradients are freed as in LOMO (Lv et al., 2023,
https://arxiv.org/abs/2306.09782), by the hook of torch's tutorial on optimizer steps in the backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftchat.models.rounding import round_with_noise

if TYPE_CHECKING:
    from transformers import Trainer

    from peftchat.recipe import Recipe
    from peftchat.recipe.schema import TrainingSection

PART_ELEMENTS = 2**21
"""Most elements of a weight that are updated at a time, by an optimizer that treats each of them alone."""

_BLOCK = 256
"""Values that share a scale in bitsandbytes' 8-bit states: parts of whole blocks have the states of the whole."""

WHOLE = ("adafactor",)
"""Optimizers whose states describe rows and columns of a whole weight."""

MakeOptimizer = Callable[[Sequence[Mapping[str, Any]]], Optimizer]
"""Returns an optimizer for groups of parameters."""


def uses_little_memory(recipe: "Recipe") -> bool:
    """Return whether a recipe's weights are updated one by one."""
    training = recipe.training
    return training.master_weights == "bfloat16" or training.optimizer_in_backward


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a weight, and the parameter that stands for them in the optimizer.

    Attributes:
        rows: the rows; all of them for a vector.
        stand_in: float32; it has values only while it is updated.
        group: the index of its group.
    """

    rows: slice
    stand_in: nn.Parameter
    group: int


class WeightwiseOptimizer(Optimizer):
    """An optimizer that updates one weight at a time.

    Args:
        make: makes the optimizer.
        groups: of the trained weights, each with `params` and options.
        optim: its name in transformers.
        seed: of stochastic rounding.
        in_backward: whether a weight is updated once its gradient is there, which is then freed.
    """

    def __init__(
        self,
        make: MakeOptimizer,
        groups: Sequence[Mapping[str, Any]],
        *,
        optim: str,
        seed: int,
        in_backward: bool,
    ) -> None:
        self._seed, self._in_backward = seed, in_backward
        self._parts: dict[nn.Parameter, list[_Part]] = {}
        made = []
        for number, group in enumerate(groups):
            for weight in group["params"]:
                ranges = _row_ranges(weight, whole=optim in WHOLE)
                self._parts[weight] = [_Part(rows, nn.Parameter(_nothing(weight)), number) for rows in ranges]
            stand_ins = [part.stand_in for weight in group["params"] for part in self._parts[weight]]
            made.append({**group, "params": stand_ins})
        self._places = {weight: place for place, weight in enumerate(self._parts)}
        self.inner = make(made)
        super().__init__([{"params": group["params"]} for group in self.inner.param_groups], self.inner.defaults)
        self._share()
        self.param_groups[0].setdefault("updates", 0)
        self._is_training = False
        self._squares: list[Tensor] = []
        if in_backward:
            for weight in self._parts:
                weight.register_post_accumulate_grad_hook(self._use)

    def _share(self) -> None:
        """Take the groups and states of the optimizer inside for one's own."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @contextmanager
    def training(self) -> Iterator[None]:
        """Update weights in the backward passes of the block; no other backward pass is a training step."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    @property
    def updates_in_backward(self) -> bool:
        """Whether the backward pass updates the weights."""
        return self._in_backward

    def take_norm(self) -> Tensor:
        """Return the norm of all gradients that were used since the last call."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    def _use(self, weight: Tensor) -> None:
        """Update a weight by its gradient, and free the gradient."""
        if not self._is_training or not isinstance(weight, nn.Parameter):
            return
        assert weight.grad is not None
        self._squares.append(torch.linalg.vector_norm(weight.grad, dtype=torch.float32).square())
        self._update(weight)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights whose gradients are still there, and count the step."""
        for weight in self._parts:
            if weight.grad is not None:
                self._update(weight)
        self.param_groups[0]["updates"] += 1

    @torch.no_grad()
    def _update(self, weight: nn.Parameter) -> None:
        grad, weight.grad = weight.grad, None
        assert grad is not None
        is_narrow = weight.dtype == torch.bfloat16
        generator = self._generator(weight) if is_narrow else None
        for part in self._parts[weight]:
            rows, stand_in = weight[part.rows] if weight.dim() else weight, part.stand_in
            # `float` of a float32 weight is the weight itself, which is then updated in place.
            stand_in.data = rows.float()
            stand_in.grad = (grad[part.rows] if grad.dim() else grad).float()
            self._step_alone(part)
            if generator is not None:
                rows.copy_(round_stochastically(stand_in.data, generator))
            stand_in.grad = None
            stand_in.data = _nothing(weight)

    def _step_alone(self, part: _Part) -> None:
        """Let the optimizer inside look at one part only."""
        held = [group["params"] for group in self.inner.param_groups]
        try:
            for number, group in enumerate(self.inner.param_groups):
                group["params"] = [part.stand_in] if number == part.group else []
            self.inner.step()
        finally:
            for group, params in zip(self.inner.param_groups, held, strict=True):
                group["params"] = params

    def _generator(self, weight: nn.Parameter) -> torch.Generator:
        """Return the random numbers of a weight's update: the same ones in a run that was resumed."""
        number = (self._seed * 1_000_003 + int(self.param_groups[0]["updates"])) * 1_000_003 + self._places[weight]
        return torch.Generator(weight.device).manual_seed(number % 2**63)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove the gradients of the weights."""
        for weight in self._parts:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the optimizer inside, and the number of updates."""
        content: dict[str, Any] = self.inner.state_dict()
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.inner.load_state_dict(state_dict)
        self._share()


def _nothing(weight: Tensor) -> Tensor:
    """Return a float32 tensor without elements, where a weight is."""
    return torch.empty(0, device=weight.device)


def _row_ranges(weight: Tensor, *, whole: bool) -> list[slice]:
    """Return the rows of each part of a weight."""
    rows = len(weight) if weight.dim() else 1
    width = max(1, weight.numel() // max(1, rows))
    step = rows if whole else max(_BLOCK, PART_ELEMENTS // width // _BLOCK * _BLOCK)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(1, step))]


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values in bfloat16, rounded up or down with the probability that keeps their mean."""
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return round_with_noise(values, noise)


def make_weightwise(trainer: "Trainer", training: "TrainingSection") -> WeightwiseOptimizer:
    """Return the optimizer that a recipe's training section names, for the trained weights of a trainer's model."""
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    trained = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for name, weight in trained if (name in decayed) is decays], "weight_decay": decay}
        for decays, decay in ((True, trainer.args.weight_decay), (False, 0.0))
    ]
    return WeightwiseOptimizer(
        lambda made: kind(made, **options),
        groups,
        optim=training.optim,
        seed=training.seed,
        in_backward=training.optimizer_in_backward,
    )
