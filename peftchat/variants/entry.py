"""What the registry knows about one variant."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from peftchat.variants.facts import ModelFacts
from peftchat.variants.options import AdapterSection

if TYPE_CHECKING:
    from peft import PeftConfig

Setting = Literal["unquantised", "4 bits", "8 bits", "ddp", "zero2", "zero3", "packing", "checkpointing"]
"""What may surround a variant in a recipe."""

Stage = Literal["zero2", "zero3"]

Start = Literal["pissa", "olora", "eva", "corda", "loftq", "lora_ga"]
"""Ways to begin that look at the base or at the user's rows."""

Build = Callable[[Any, ModelFacts], "PeftConfig"]


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
    start: Start | None = None
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


def needs_floats(why: str) -> dict[Setting, str]:
    """What to refuse for a variant that computes with the base's weights themselves."""
    return {"4 bits": why, "8 bits": why}


def targets(section: Any, facts: ModelFacts) -> str | list[str]:
    """PEFT's `target_modules` for a section."""
    wanted = section.target_modules
    if wanted == "all-linear":
        return "all-linear"
    return facts.endings(wanted) if isinstance(wanted, str) else list(wanted)


def largest_divisor(sizes: list[int], limit: int) -> int:
    """The largest whole number up to `limit` that divides all sizes."""
    return next(number for number in range(limit, 0, -1) if all(size % number == 0 for size in sizes))
