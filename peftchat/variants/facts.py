"""What a variant's settings depend on in the base model."""

from collections.abc import Mapping
from dataclasses import dataclass

from peftchat.errors import UserError


@dataclass(frozen=True)
class ModelFacts:
    """Names and sizes of the base's layers.

    Attributes:
        family: transformers' `model_type`.
        hidden: width of the residual stream.
        layers: number of decoder layers.
        linear: dotted name of each linear layer, the output head aside -> (inputs, outputs).
        norms: dotted names of the normalisation layers that have weights.
        transposed: the linear layers keep their weights as (inputs, outputs), as GPT-2's Conv1D does.
    """

    family: str
    hidden: int
    layers: int
    linear: Mapping[str, tuple[int, int]]
    norms: tuple[str, ...]
    transposed: bool

    def endings(self, group: str) -> list[str]:
        """Shortest useful endings of the names of a group of linear layers, as PEFT matches them.

        Args:
            group: `attention`, `feed-forward` or `all-linear`.

        Raises:
            InputError: the model has no such layers.
        """
        wanted = (name for name in self.linear if group == "all-linear" or (group == "attention") == in_attention(name))
        found = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in wanted))
        if not found:
            raise UserError(
                f"no layer of the model looks like `{group}`",
                where="adapter.target_modules",
                cure="Write `all-linear`, or the names of the layers.",
            )
        return found

    def shapes(self, modules: str | tuple[str, ...] | list[str]) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers that `modules` means; all of them where it means none."""
        if modules == "all-linear":
            return list(self.linear.values())
        names = self.endings(modules) if isinstance(modules, str) else modules
        found = [size for name, size in self.linear.items() if any(matches(name, ending) for ending in names)]
        return found or list(self.linear.values())


def matches(name: str, ending: str) -> bool:
    """Whether PEFT would take a module of this name for a target."""
    return name == ending or name.endswith(f".{ending}")


def in_attention(name: str) -> bool:
    """Whether a layer belongs to attention, by the name of a block around it."""
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])
