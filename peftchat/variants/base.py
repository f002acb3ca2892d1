"""The interface of a variant: what it is, what it works with, its settings, and how it joins a model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum, auto
from inspect import cleandoc, get_annotations
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, cast, get_args

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from peftchat.errors import UserError
from peftchat.strict_model import StrictModel
from peftchat.variants.model_shape import ModelShape, Targets

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

CalibrationBatches: TypeAlias = "Callable[[int], Iterator[dict[str, Tensor]]]"
"""Number of training examples -> batches of one: `input_ids`, `attention_mask` and `labels`, shape (1, T)."""

Setting = Literal["unquantized", "4 bits", "8 bits", "ddp", "zero2", "zero3", "packing", "checkpointing", "budget"]
"""What a recipe may combine with a variant. `budget` is one of tokens or of minutes."""

Stage = Literal["zero2", "zero3"]

VllmSupport = Literal["adapter", "merged", "no"]
"""How vLLM serves a variant: as an adapter beside its base, only merged, or not at all."""


@dataclass(frozen=True, slots=True)
class Paper:
    """The publication that describes a method.

    Attributes:
        authors: the first author, or both of two.
        arxiv: arXiv's id; None for one that is not there.
    """

    authors: str
    year: int
    arxiv: str | None

    def __str__(self) -> str:
        return f"{self.authors}, {self.year}" + (f", arXiv:{self.arxiv}" if self.arxiv else "")


class Mark(Enum):
    """Properties of a setting beside its type and default."""

    TYPE_SPECIFIC = auto()
    """The value means something else in every variant, such as a rank that is counted in its own way. A recipe that
    changes the variant of another one does not take the value over."""

    NOT_IN_CONFIG = auto()
    """The setting is no parameter of the variant's PEFT config."""


@dataclass(frozen=True, slots=True)
class Formerly:
    """The name that a setting had in earlier versions."""

    name: str


T = TypeVar("T")
TypeSpecific = Annotated[T, Mark.TYPE_SPECIFIC]
NotInConfig = Annotated[T, Mark.NOT_IN_CONFIG]


class Variant(StrictModel):
    """A way to train. The docstring of a subclass is the summary that users read.

    Attributes:
        name: its word in recipes.
        title: its usual name.
        summary: one sentence that says what it does.
        paper: None for a method without a paper of its own.
        aliases: other names that a recipe may use.
        learning_rate: its own peak learning rate, which a recipe that sets none gets where no rule by width is known.
        auto_factor: its learning rate as a multiple of the rule for LoRA by width; None where no such rule is known.
        incompatible_with: settings that it does not work with -> the reason, found by running them unless it says
            otherwise.
        tested_zero_stages: ZeRO stages under which it was run, and trained as in one process. Others are allowed, and
            shown as untested.
        mergeable: whether `peftchat merge` can turn it into plain weights.
        unmergeable_because: the reason, where it cannot.
        merge_hint: what to do instead of merging.
        vllm: how vLLM serves it.
        supports_trainable_tokens: whether PEFT can keep the embeddings of added tokens in the same adapter
            (`trainable_token_indices`).
        needs_calibration_data: whether its initialization reads training examples.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    aliases: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float]
    auto_factor: ClassVar[float | None] = None
    incompatible_with: ClassVar[Mapping[Setting, str]] = MappingProxyType({})
    tested_zero_stages: ClassVar[frozenset[Stage]] = frozenset()
    mergeable: ClassVar[bool] = True
    unmergeable_because: ClassVar[str] = ""
    merge_hint: ClassVar[str] = ""
    vllm: ClassVar[VllmSupport] = "merged"
    supports_trainable_tokens: ClassVar[bool] = False
    needs_calibration_data: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.summary = " ".join(cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())

    @classmethod
    def incompatibility(cls, setting: str) -> str | None:
        """Return why it does not work with a `Setting`; None if it does, or for another word."""
        return cls.incompatible_with.get(cast("Setting", setting))

    @classmethod
    def zero_stages(cls) -> str:
        """Return the ZeRO stages that it works with, for a table; untested ones carry a question mark."""
        stages: tuple[Stage, ...] = get_args(Stage)
        return " ".join(
            f"{stage[-1]}{'' if stage in cls.tested_zero_stages else '?'}"
            for stage in stages
            if stage not in cls.incompatible_with
        )

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """Return the keys that it takes in the `adapter` section beside `variant`."""
        return tuple(name for name in cls.model_fields if name != "variant")

    @classmethod
    def has_mark(cls, setting: str, mark: Mark) -> bool:
        """Return whether a setting carries a mark."""
        return mark in cls.model_fields[setting].metadata

    @classmethod
    def new_name(cls, old_name: str) -> str | None:
        """Return what a setting of earlier versions is called now; None if there was none of that name."""
        return next(
            (name for name, info in cls.model_fields.items() if Formerly(old_name) in info.metadata),
            None,
        )


class TrainerHooks:
    """What a variant does in the training loop beside training its parameters; by default nothing."""

    def lr_multiplier(self, parameter: str) -> float:
        """Return the learning rate of a parameter, by its name, as a multiple of the recipe's."""
        return 1.0

    def penalty(self) -> "Tensor | None":
        """Return a term that is added to the loss of each optimizer step, shape (); None for none."""
        return None

    def on_train_begin(self, total_steps: int) -> None:
        """Prepare for a run of `total_steps` optimizer steps.

        Raises:
            UserError: the settings do not fit that number.
        """

    def on_optimizer_step(self, step: int) -> None:
        """Act after the optimizer step of that number, counted from 1, while gradients are still held."""

    def save_state(self, checkpoint: Path) -> None:
        """Write what a resumed run needs into a checkpoint; called on the main process."""

    def load_state(self, checkpoint: Path) -> None:
        """Read what `save_state` wrote.

        Raises:
            UserError: the checkpoint does not hold it.
        """


class Adapter(Variant):
    """The `adapter` section of a recipe, and how PEFT makes an adapter of it.

    A new adapter is a subclass in a module of this package: a docstring, `variant: Literal["name"] = "name"`, the
    class attributes that differ from the defaults, and settings by the names of PEFT's parameters. Methods are
    overridden only where the adapter needs more than its PEFT config.

    Attributes:
        peft_class: name of the config class in `peft`; None for what is trained without an adapter of PEFT.
        peft_alpha: PEFT's name of the setting `alpha`.
        peft_dropout: PEFT's name of the setting `dropout`.
        supports_conv1d: whether PEFT has layers of this kind for GPT-2's Conv1D.
        shared_tensors: parts of the names of tensors that all layers share: a file holds them once.
        no_experts_because: why it cannot adapt the fused experts of a mixture; empty if it can.
    """

    peft_class: ClassVar[str | None]
    peft_alpha: ClassVar[str] = "alpha"
    peft_dropout: ClassVar[str] = "dropout"
    supports_conv1d: ClassVar[bool] = True
    shared_tensors: ClassVar[tuple[str, ...]] = ()
    no_experts_because: ClassVar[str] = "PEFT has `target_parameters`, which adapts parameters, for LoRA alone"

    variant: str = Field("lora", description="The kind of adapter; `peftchat variants` lists them.")

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.name = cls.model_fields["variant"].default

    @classmethod
    def is_concrete(cls) -> bool:
        """Return whether a recipe can name this class, which then has a `variant` of its own."""
        return "variant" in get_annotations(cls)

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of the PEFT config class for these settings on a model.

        Raises:
            UserError: the settings do not fit the model.
        """
        peft_names = {"alpha": self.peft_alpha, "dropout": self.peft_dropout}
        return {
            peft_names.get(name, name): getattr(self, name)
            for name in self.setting_names()
            if not self.has_mark(name, Mark.NOT_IN_CONFIG)
        }

    def peft_config(self, shape: ModelShape) -> "PeftConfig | None":
        """Return the stock PEFT config for these settings on a model; None where PEFT has no part.

        Raises:
            UserError: the settings do not fit the model.
            ValueError: PEFT rejects the settings.
        """
        if self.peft_class is None:
            return None
        if shape.is_conv1d and not self.supports_conv1d:
            raise UserError(
                f"PEFT has no `{self.variant}` for Conv1D, the kind of linear layer of `{shape.model_type}`",
                where=f"adapter.variant: {self.variant}",
                hint="Choose another variant, such as `lora`.",
            )
        self.check_shape(shape)
        import peft

        config_class = getattr(peft, self.peft_class)
        settings = self.peft_settings(shape)
        if "fan_in_fan_out" in {field.name for field in fields(config_class)}:
            settings["fan_in_fan_out"] = shape.is_conv1d
        config: PeftConfig = config_class(**settings)
        return config

    def wrong_settings(self) -> Iterator[tuple[str, str]]:
        """Yield each setting that does not go with another one, whatever the model, and what is wrong with it."""
        yield from ()

    def check_shape(self, shape: ModelShape) -> None:
        """Refuse a model whose layers the variant cannot adapt, such as fused experts.

        Raises:
            UserError: the reason.
        """

    def precompute_init(self, model: "PreTrainedModel", config: "PeftConfig", batches: CalibrationBatches) -> None:
        """Compute, before PEFT wraps the base of a new run, what the initialization needs from the base alone."""

    def restore_init(self, config: "PeftConfig", checkpoint: Path) -> None:
        """Give the config of a resumed run the shapes that the initialization had found."""

    def wrap(self, model: "PreTrainedModel", config: "PeftConfig") -> "PeftModel":
        """Put the adapter around the base; also called on models without weights."""
        from peft import get_peft_model

        return get_peft_model(model, config)

    def initialize(self, model: "PeftModel", batches: CalibrationBatches) -> None:
        """Set the adapter's first values in a new run, where PEFT's own are not enough."""

    def trainer_hooks(self, model: "PeftModel | PreTrainedModel") -> TrainerHooks:
        """Return what the variant does in the training loop."""
        return TrainerHooks()

    def adapter_state(self, model: "PeftModel", tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return the tensors of the adapter's file by the names that PEFT gives them.

        Args:
            tensors: the model's trained parameters and its buffers by their names in the model.
        """
        from peft import get_peft_model_state_dict

        # By default PEFT adds the complete embedding where the vocabulary was resized.
        state: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
        return state

    def load_adapter_state(self, model: "PeftModel", state: "dict[str, Tensor]") -> list[str]:
        """Put the tensors of an adapter's file into a model that was wrapped in the same way.

        Returns:
            Names of the tensors that the model has no place for.
        """
        from peft import set_peft_model_state_dict

        return list(set_peft_model_state_dict(model, state).unexpected_keys)

    def training_modules(self, model: "PeftModel") -> "dict[str, nn.Module]":
        """Return modules that are trained and that an adapter's file does not hold, for checkpoints, by name."""
        return {}

    def export_config(self, config: "PeftConfig") -> None:
        """Change a copy of the PEFT config into the one for the adapter's file."""


def list_or(*words: str) -> Callable[[object], object]:
    """Return a check for a key that takes one of these words or a list of module names."""

    def check(value: object) -> object:
        if value in words:
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
            return tuple(value)
        raise PydanticCustomError("module_list", f"expected `{words[0]}` or a list of module names")

    return check


Preset = Literal["all-linear", "attention", "feed-forward"]
"""Groups of layers that exist in every architecture and have one name in recipes."""

Modules = Annotated[Preset | tuple[str, ...], BeforeValidator(list_or(*get_args(Preset)))]

Dropout = Annotated[float, Field(ge=0, lt=1, description="Fraction of the adapter's inputs dropped during training.")]


class TargetedAdapter(Adapter):
    """An adapter that changes layers of the base."""

    target_modules: Modules = Field(
        "all-linear",
        description="The layers that get an adapter: `all-linear` (all linear layers except the LM head, and all "
        "experts, but no router), `attention` or `feed-forward` (the layers of that kind), or a list of module names "
        "such as `[q_proj, v_proj]`.",
    )

    def peft_settings(self, shape: ModelShape) -> dict[str, Any]:
        """Return the keyword arguments of the PEFT config class, with the model's own module names.

        Raises:
            UserError: the targets are not in the model.
        """
        targets = self._targets(shape)
        settings = {**super().peft_settings(shape), "target_modules": targets.modules}
        if targets.parameters:
            settings["target_parameters"] = list(targets.parameters)
        return settings

    def check_shape(self, shape: ModelShape) -> None:
        """Refuse targets that are parameters, such as fused experts, if PEFT has no such adapter.

        Raises:
            UserError: the reason.
        """
        parameters = self._targets(shape).parameters
        if parameters:
            require_parameters(self, shape, parameters[0])

    def _targets(self, shape: ModelShape) -> Targets:
        targets = shape.peft_targets(self.target_modules)
        return shape.without_renamed(targets) if self.peft_class == "LoraConfig" else targets


def require_parameters(adapter: Adapter, shape: ModelShape, parameter: str) -> None:
    """Refuse a variant that cannot adapt a parameter that it should, such as that of fused experts.

    Raises:
        UserError: the reason.
    """
    if adapter.no_experts_because:
        raise UserError(
            f"`{adapter.variant}` cannot adapt `{parameter}` of this `{shape.model_type}`: "
            f"{adapter.no_experts_because}",
            where=f"adapter.variant: {adapter.variant}",
            hint="Use `lora`, `rslora` or `loraplus`. To leave the experts frozen, name the layers of the attention in "
            "target_modules.",
        )


class LowRankAdapter(TargetedAdapter):
    """An adapter whose update is a product of two thin matrices, scaled by `alpha / r`."""

    r: int = Field(16, ge=1, description="Rank of the update. A higher rank can learn more and needs more memory.")
    alpha: int = Field(
        32,
        ge=1,
        description="Scale of the update: the adapter's output times `alpha / r` (rslora: times `alpha / sqrt(r)`).",
    )


def unquantized_only(reason: str) -> dict[Setting, str]:
    """Return the incompatibilities of a variant that computes with the base's own weights."""
    return {"4 bits": reason, "8 bits": reason}


def incompatible(*groups: Mapping[Setting, str], **reasons: str) -> Mapping[Setting, str]:
    """Return a read-only mapping of settings to reasons: those of all groups, and those given by name."""
    joined = {setting: reason for group in groups for setting, reason in group.items()}
    return MappingProxyType({**joined, **cast("dict[Setting, str]", reasons)})
