"""Combination of several adapters' updates of one weight into a single update.

The rules are those of PEFT's `add_weighted_adapter`, whose functions do the work. PEFT applies `linear`, `ties` and
`dare_*` to LoRA's two factors one by one, and a product of sums is not the sum of the products. Here they apply to the
updates themselves, as PEFT's rules that end in `_svd` do.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from peftchat.errors import UserError

Rule = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
RULES: tuple[str, ...] = get_args(Rule)
DEFAULT_DENSITY = 0.5

_SAME_AS_LINEAR = {"cat": "cat", "svd": "svd", "task_arithmetic": "task arithmetic"}


@dataclass(frozen=True)
class Combination:
    """How the updates of several adapters become one.

    Attributes:
        rule: `linear` adds weighted updates. `magnitude_prune` keeps the largest entries of each first. `ties` also
            drops entries whose sign is not that of the sum, and takes the mean of the rest (Yadav et al., 2023,
            https://arxiv.org/abs/2306.01708). `dare_linear` and `dare_ties` keep random entries, enlarged so that
            their mean stays (Yu et al., 2023, https://arxiv.org/abs/2311.03099).
        density: fraction of entries that are kept; 1 for `linear`.
        seed: of the random entries. Each weight and adapter draws its own, whatever else is combined.
    """

    rule: Rule
    density: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, rule: str, density: float | None = None, seed: int | None = None) -> "Combination":
        """Check a user's options.

        Raises:
            UserError: there is no such rule, or an option is out of range or has no effect.
        """
        if rule not in RULES:
            hint = f"Rules: {', '.join(RULES)}."
            if rule in _SAME_AS_LINEAR:
                hint = f"`linear` is what PEFT calls {_SAME_AS_LINEAR[rule]}: the exact weighted sum of the updates."
            raise UserError(f"there is no rule {rule!r}", where="--combine", hint=hint)
        if rule == "linear" and density is not None:
            hint = "Leave the option out, or choose another rule."
            raise UserError("`linear` keeps every entry, so it has no density", where="--density", hint=hint)
        if not rule.startswith("dare") and seed is not None:
            hint = "Leave the option out, or choose dare_linear or dare_ties."
            raise UserError(f"nothing is drawn at random in `{rule}`", where="--seed", hint=hint)
        if density is not None and not 0 < density <= 1:
            hint = "It is the fraction of entries that are kept."
            raise UserError(f"the density is {density:g}, expected above 0 and at most 1", where="--density", hint=hint)
        default = 1.0 if rule == "linear" else DEFAULT_DENSITY
        return cls(rule, default if density is None else density, seed or 0)  # type: ignore[arg-type]

    @property
    def is_mean(self) -> bool:
        """Whether the rule itself takes a mean, so that weights of 1 give the mean of the adapters."""
        return self.rule in ("ties", "dare_ties")

    def default_weights(self, count: int) -> list[float]:
        """Return the weights that give the mean of `count` adapters."""
        return [1.0 if self.is_mean else 1.0 / count] * count

    def combine(self, name: str, updates: Sequence[tuple[int, float, torch.Tensor]]) -> torch.Tensor:
        """Return the combined update of one weight.

        Args:
            name: of the parameter; it determines the random entries, with the seed and the adapter's number.
            updates: number, weight and update of each adapter that changes the parameter, all of one shape.
        """
        from peft.utils import merge_utils

        # Weights come first: an adapter of weight 0 has no say in a sign, and one below 0 speaks against it.
        weighted = [self._thinned(f"{name}/{number}", update) * weight for number, weight, update in updates]
        if not self.is_mean:
            return torch.stack(weighted).sum(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that it prunes nothing at density 1
            merged: torch.Tensor = merge_utils.ties(weighted, torch.ones(len(weighted), dtype=weighted[0].dtype), 1.0)
        return merged

    def _thinned(self, name: str, update: torch.Tensor) -> torch.Tensor:
        """Return the update with the entries that are kept; the others are 0."""
        from peft.utils.merge_utils import prune

        if self.density == 1:
            return update
        if not self.rule.startswith("dare"):
            return prune(update, self.density, method="magnitude")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little"))
            return prune(update, self.density, method="random", rescale=True)
