"""What a variant's settings depend on in the base model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from peftchat.errors import UserError
from peftchat.strict_model import StrictModel

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class ModelShape:
    """Names and sizes of the base's layers.

    Attributes:
        family: transformers' `model_type`.
        hidden: width of the residual stream.
        layers: number of decoder layers.
        linear: dotted name of each linear layer, the output head aside -> (inputs, outputs).
        norms: dotted names of the normalization layers that have weights.
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
            UserError: the model has no such layers.
        """
        wanted = (name for name in self.linear if group == "all-linear" or (group == "attention") == in_attention(name))
        found = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in wanted))
        if not found:
            raise UserError(
                f"no layer of the model looks like `{group}`",
                where="adapter.target_modules",
                hint="Write `all-linear`, or the names of the layers.",
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


def type_specific(default: Any, description: str, **limits: Any) -> Any:
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


Setting = Literal["unquantized", "4 bits", "8 bits", "ddp", "zero2", "zero3", "packing", "checkpointing"]
"""What may surround a variant in a recipe."""

Stage = Literal["zero2", "zero3"]

LoraInit = Literal["pissa", "olora", "eva", "corda", "loftq", "lora_ga"]
"""Ways to begin that look at the base or at the user's rows."""

Build = Callable[[Any, ModelShape], "PeftConfig"]


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from.

    Attributes:
        authors: the first author, or both of two.
        arxiv: arXiv's id; None for one that is not there.
    """

    authors: str
    year: int
    arxiv: str | None

    def __str__(self) -> str:
        return f"{self.authors}, {self.year}" + (f", arXiv:{self.arxiv}" if self.arxiv else "")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train.

    Attributes:
        name: its word in recipes.
        title: its usual name.
        summary: one sentence that says what it does.
        paper: where it comes from; None for what has no paper of its own.
        options: the keys it takes in the `adapter` section; None for full fine-tuning, which has no adapter.
        build: makes the stock PEFT config of a section on a model; None where PEFT has no part.
        learning_rate: peak rate where the recipe gives none.
        refuses: settings it cannot be used with -> why. Found by running them unless the reason says otherwise.
        proved: ZeRO stages under which it was run, and trained as in one process. Others are let through, and shown as
            not proved.
        folds: whether `peftchat merge` makes plain weights of it.
        instead: for one that does not fold, what to do.
        vllm: how vLLM serves it: beside its base as an adapter, only merged, or not at all.
        rows_inside: whether PEFT can keep the rows of new tokens in the same adapter (`trainable_token_indices`).
        start: how its first values are found, if they are not random.
        starts_on_data: the user's rows are read to find them.
        aliases: other names that a recipe may use.
    """

    name: str
    title: str
    summary: str
    paper: Paper | None
    options: type[AdapterSection] | None
    build: Build | None
    learning_rate: float
    refuses: Mapping[Setting, str] = field(default_factory=dict)
    proved: frozenset[Stage] = frozenset()
    folds: bool = True
    instead: str = ""
    vllm: Literal["adapter", "merged", "no"] = "merged"
    rows_inside: bool = False
    start: LoraInit | None = None
    starts_on_data: bool = False
    aliases: tuple[str, ...] = ()

    def why_not(self, setting: str) -> str | None:
        """Why it cannot be used with a setting (`Setting`, or a word that stands for none); None where it can."""
        return self.refuses.get(cast("Setting", setting))

    @property
    def stages(self) -> str:
        """The ZeRO stages that it works with, for a table: those not proved bear a question mark."""
        stages: tuple[Stage, ...] = get_args(Stage)
        return " ".join(
            f"{stage[-1]}{'' if stage in self.proved else '?'}" for stage in stages if stage not in self.refuses
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that it takes in the `adapter` section beside `variant`."""
        return () if self.options is None else tuple(key for key in self.options.model_fields if key != "variant")


def requires_unquantized(why: str) -> dict[Setting, str]:
    """What to refuse for a variant that computes with the base's weights themselves."""
    return {"4 bits": why, "8 bits": why}


def targets(section: Any, facts: ModelShape) -> str | list[str]:
    """PEFT's `target_modules` for a section."""
    wanted = section.target_modules
    if wanted == "all-linear":
        return "all-linear"
    return facts.endings(wanted) if isinstance(wanted, str) else list(wanted)


def largest_divisor(sizes: list[int], limit: int) -> int:
    """The largest whole number up to `limit` that divides all sizes."""
    return next(number for number in range(limit, 0, -1) if all(size % number == 0 for size in sizes))
