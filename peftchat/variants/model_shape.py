"""Names and sizes of a base model's layers, on which the settings of a variant depend."""

from collections.abc import Mapping
from dataclasses import dataclass

from peftchat.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Names and sizes of the base's layers.

    Attributes:
        model_type: the architecture's name in transformers.
        hidden_size: width of the residual stream.
        num_layers: number of decoder layers.
        linear: dotted name of each linear layer except the LM head -> (inputs, outputs).
        norms: dotted names of the normalization layers that have weights.
        is_conv1d: whether the linear layers store their weights as (inputs, outputs), as GPT-2's Conv1D does.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    linear: Mapping[str, tuple[int, int]]
    norms: tuple[str, ...]
    is_conv1d: bool

    def target_module_names(self, group: str) -> list[str]:
        """Return the last two parts of the names of a group of linear layers, as PEFT matches them.

        Args:
            group: `attention`, `feed-forward` or `all-linear`.

        Raises:
            UserError: the model has no such layers.
        """
        names = [name for name in self.linear if group == "all-linear" or (group == "attention") == in_attention(name)]
        if not names:
            raise UserError(
                f"this model has no linear layers of the group `{group}`",
                where="adapter.target_modules",
                hint="Write `all-linear`, or the names of the layers.",
            )
        return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))

    def peft_targets(self, modules: str | tuple[str, ...]) -> str | list[str]:
        """Return PEFT's `target_modules` for a setting of that name.

        Raises:
            UserError: the model has no layers of the group.
        """
        if modules == "all-linear":
            return "all-linear"
        return self.target_module_names(modules) if isinstance(modules, str) else list(modules)

    def sizes(self, modules: str | tuple[str, ...]) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the linear layers that `modules` names; of all layers where it names none."""
        if modules == "all-linear":
            return list(self.linear.values())
        names = self.target_module_names(modules) if isinstance(modules, str) else modules
        sizes = [size for name, size in self.linear.items() if any(is_target(name, target) for target in names)]
        return sizes or list(self.linear.values())


def is_target(name: str, target: str) -> bool:
    """Return whether PEFT matches a module's name with an entry of `target_modules`."""
    return name == target or name.endswith(f".{target}")


def in_attention(name: str) -> bool:
    """Return whether a layer belongs to attention, by the name of a block around it."""
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def largest_divisor(sizes: list[int], limit: int) -> int:
    """Return the largest whole number up to `limit` that divides all sizes."""
    return next(number for number in range(limit, 0, -1) if all(size % number == 0 for size in sizes))
