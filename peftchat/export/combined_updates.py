"""The combined update of each layer that several adapters change, exact in float64, and factored for a LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftchat.export.lora_factors import (
    FactoredUpdate,
    check_finite,
    dense_update,
    factor_matrix,
    factor_product,
    linear_modules,
    stores_transposed,
)
from peftchat.merging.adapter_source import ADAPTER, AdaptedModule, InstalledAdapter
from peftchat.merging.base_weights import BaseWeights
from peftchat.merging.combination import Combination
from peftchat.merging.delta_rules import low_rank_delta


@dataclass(frozen=True)
class InstalledInput:
    """One of the adapters to combine.

    Attributes:
        number: its place among the adapters of the job, which determines random entries.
        weight: of its updates.
        where: its folder, for messages.
        adapter: the installed adapter.
    """

    number: int
    weight: float
    where: str
    adapter: InstalledAdapter


class CombinedUpdates:
    """The layers that the adapters change, and their combined updates.

    Args:
        inputs: the adapters.
        weights: the base.
        combination: how updates become one.
        hint: what to do with an adapter that a LoRA cannot hold, for messages.

    Raises:
        UserError: a LoRA cannot hold what an adapter does.
    """

    def __init__(
        self, inputs: Sequence[InstalledInput], weights: BaseWeights, combination: Combination, hint: str
    ) -> None:
        self._weights = weights
        self._combination = combination
        self._hint = hint
        self._layers: dict[str, list[tuple[InstalledInput, AdaptedModule]]] = {}
        for one in inputs:
            for module in linear_modules(one.adapter, one.where, hint):
                self._layers.setdefault(module.path, []).append((one, module))

    @property
    def paths(self) -> list[str]:
        """Dotted names of the changed layers in the base."""
        return list(self._layers)

    @property
    def largest_rank(self) -> int:
        """The largest rank that any of the layers can have."""
        return max(self._size(path) for path in self._layers)

    @property
    def exact_rank(self) -> int | None:
        """The rank that holds every update exactly; None if any may be of full rank."""
        ranks = []
        for path, parts in self._layers.items():
            factors = [_factors(module) for _, module in parts]
            if self._combination.rule != "linear" or None in factors:
                return None
            ranks.append(min(sum(right.shape[0] for _, right in filter(None, factors)), self._size(path)))
        return max(ranks)

    def exact(self, path: str) -> torch.Tensor:
        """Return the combined update of a layer, float64, shape (outputs, inputs)."""
        updates = []
        for one, module in self._layers[path]:
            factors = _factors(module)
            if factors is None:
                update = dense_update(one.adapter, module, self._weights, one.where, self._hint).double()
            else:
                update = factors[0] @ factors[1]
                check_finite(path, update, one.where)
                update = update.T if stores_transposed(module) else update
            updates.append((one.number, one.weight, update))
        # In the shape that is stored, as in a merge: random entries are those of the merged weights.
        combined = self._combination.combine(f"{path}.weight", updates)
        return combined.T if self._is_conv1d(path) else combined

    def factored(self, max_rank: int) -> list[FactoredUpdate]:
        """Factor the update of every layer, with at most `max_rank` singular directions."""
        return [self._factor(path, max_rank) for path in self._layers]

    def errors(self, written: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """Return the relative error of each layer: the norm of what a LoRA misses, per norm of the exact update.

        Args:
            written: B and A of each layer, as they are in the LoRA's file.
        """
        errors = {}
        for path in self._layers:
            exact = self.exact(path)
            lora_b, lora_a = (factor.double() for factor in written[path])
            missed, norm = float((lora_b @ lora_a - exact).norm()), float(exact.norm())
            errors[path] = missed / norm if norm else missed
        return errors

    def _factor(self, path: str, max_rank: int) -> FactoredUpdate:
        factors = [(one.weight, _factors(module)) for one, module in self._layers[path]]
        thin = [(weight, *pair) for weight, pair in factors if pair is not None]
        if self._combination.rule != "linear" or len(thin) < len(factors):
            matrix = self.exact(path).to(torch.float32)
            return factor_matrix(path, matrix, max_rank, is_conv1d=self._is_conv1d(path))
        left = torch.cat([weight * left for weight, left, _ in thin], dim=1)
        right = torch.cat([right for _, _, right in thin])
        for (one, _), (_, part, other) in zip(self._layers[path], thin, strict=True):
            check_finite(path, part, one.where)
            check_finite(path, other, one.where)
        return factor_product(path, left, right, max_rank, is_conv1d=self._is_conv1d(path))

    def _is_conv1d(self, path: str) -> bool:
        return stores_transposed(self._layers[path][0][1])

    def _size(self, path: str) -> int:
        return min(self._layers[path][0][1].slots[f"{path}.weight"].shape)


def _factors(module: AdaptedModule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a plain LoRA's scaled B, shape (outputs, r), and A, shape (r, inputs), in float64; None for others."""
    from peft.tuners.lora.layer import Linear

    def no_weights(name: str) -> torch.Tensor:
        raise AssertionError(name)

    if not isinstance(module.layer, Linear) or low_rank_delta(module, no_weights) is None:
        return None
    lora_b = module.layer.lora_B[ADAPTER].weight.detach().double() * module.layer.scaling[ADAPTER]
    return lora_b, module.layer.lora_A[ADAPTER].weight.detach().double()
