"""The keys of a recipe's `adapter` section that several variants share."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from peftchat.strict_model import StrictModel


def list_or(*words: str) -> Callable[[object], object]:
    """A check for a key that takes one of these words or a list of module names."""

    def check(value: object) -> object:
        if value in words:
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
            return tuple(value)
        raise PydanticCustomError("module_list", f"expected `{words[0]}` or a list of module names")

    return check


Preset = Literal["all-linear", "attention", "feed-forward"]
"""Groups of layers that exist in every architecture and go by one word."""

Modules = Annotated[Preset | tuple[str, ...], BeforeValidator(list_or(*get_args(Preset)))]

NOT_INHERITED = "x-not-inherited"
"""Marks a key whose number means something else in every variant: a recipe that changes the variant of another one
does not take the number over."""


def own(default: Any, description: str, **limits: Any) -> Any:
    """A field whose value belongs to one variant, such as a rank that is counted in its own way."""
    return Field(default, description=description, json_schema_extra={NOT_INHERITED: True}, **limits)


class AdapterSection(StrictModel):
    """What every variant has: its name. Each variant adds the settings that it takes."""

    variant: str = Field("lora", description="The kind of adapter; `peftchat variants` lists them.")


class TargetedSection(AdapterSection):
    """Variants that change layers of the base."""

    target_modules: Modules = Field(
        "all-linear",
        description="The layers that get an adapter: `all-linear` (all linear layers but the output head), "
        "`attention` or `feed-forward` (those of one kind), or a list of module names such as `[q_proj, v_proj]`.",
    )


class LowRankSection(TargetedSection):
    """Variants whose update is a product of two thin matrices, scaled by `alpha / r`."""

    r: int = Field(16, ge=1, description="Rank of the update. More rank can learn more and costs more memory.")
    alpha: int = Field(
        32,
        ge=1,
        description="Scale of the update: `alpha / r` (`alpha / sqrt(r)` for rslora) times the adapter's output.",
    )


class DropoutSection(LowRankSection):
    """Low-rank variants that can drop inputs while training."""

    dropout: float = Field(0.05, ge=0, lt=1, description="Share of the adapter's inputs dropped while training.")
