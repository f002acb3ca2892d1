"""The `adapter` section: each variant takes settings of its own."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from peftchat.chat_template.templates import CHAT_TEMPLATES
from peftchat.recipe.document import Document
from peftchat.recipe.objectives import (
    LABEL_OBJECTIVES,
    PAIR_OBJECTIVES,
    REFERENCE_OBJECTIVES,
    CpoSection,
    DpoSection,
    KtoSection,
    Objective,
    OrpoSection,
    SimpoSection,
)
from peftchat.recipe.sections import (
    REPORTERS,
    BestMetric,
    ChatSection,
    DataSection,
    DistributedSection,
    EvalStrategy,
    EvaluationSection,
    MasterWeights,
    Method,
    ModelSection,
    Optimizer,
    QuantizationSection,
    Reporter,
    SaveStrategy,
    Schedule,
)
from peftchat.strict_model import StrictModel
from peftchat.variants import ADAPTERS, Adapter, canonical_name, get_adapter
from peftchat.variants.base import Mark

_AnyName: Any = Literal[tuple(ADAPTERS)]
_Named: type[BaseModel] = create_model("_Named", variant=(_AnyName, ...))


def validate_adapter(given: Any) -> Any:
    """Validate an `adapter` section by the settings of the variant that it names."""
    if not isinstance(given, Mapping):
        return given
    name = "lora" if given.get("variant") is None else given["variant"]
    adapter = get_adapter(name)
    if adapter is None:
        _Named.model_validate({"variant": name})  # raises, and lists the names there are
    assert adapter is not None
    return adapter.model_validate({**given, "variant": canonical_name(name)})


def drop_settings_of_other_variants(document: Document) -> None:
    """Remove the settings that do not belong to a variant of a higher layer, such as `--set adapter.variant`.

    Type-specific settings are removed as well: their values mean something else in every variant.
    """
    adapter = get_adapter(document.value(("adapter", "variant")))
    layer = document.layer(("adapter", "variant"))
    section = document.value(("adapter",))
    if adapter is None or layer is None or not isinstance(section, dict):
        return
    for key in [key for key in section if key != "variant"]:
        own = document.layer(("adapter", key))
        if own is not None and own < layer and not _is_inherited(adapter, key):
            document.remove(("adapter", key))


def drop_options_of_other_objectives(document: Document) -> None:
    """Remove the options of the objectives that one of a higher layer replaces, such as `--set objective=simpo`."""
    layer, chosen = document.layer(("objective",)), document.value(("objective",))
    for name in PAIR_OBJECTIVES:
        own = document.layer((name,))
        if layer is not None and own is not None and own < layer and name != chosen:
            document.remove((name,))


def _is_inherited(adapter: type[Adapter], key: str) -> bool:
    """Return whether a variant takes a setting over from another one."""
    if key in adapter.model_fields:
        return not adapter.has_mark(key, Mark.TYPE_SPECIFIC)
    # A key that no variant knows is a mistake, and stays to be reported.
    return not any(key in other.model_fields or other.new_name(key) for other in ADAPTERS.values())


OWN_KEYS = (
    "max_train_tokens",
    "max_train_minutes",
    "global_batch_size",
    "torch_compile",
    "autotune",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
    "on_spike",
    "on_oom",
    "hang_timeout",
    "master_weights",
    "optimizer_in_backward",
)
"""The keys that transformers does not have, or that are not passed to it."""


def _metric_name(value: object) -> object:
    """Accept a metric without its prefix, as transformers does."""
    return f"eval_{value}" if value in ("loss", "accuracy") else value


def _reporter_list(value: object) -> object:
    """Accept one name, a list of names, or `none`."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple):
        return () if list(names) == ["none"] else tuple(names)
    return value


_REPORTERS_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"enum": ["none", *REPORTERS], "type": "string"},
            {"items": {"enum": list(REPORTERS), "type": "string"}, "type": "array"},
        ]
    }
)


_CHECKPOINTING: Mapping[str, tuple[object, ...]] = {
    "use_reentrant": (True, False),
    "preserve_rng_state": (True, False),
    "determinism_check": ("default", "none"),
    "early_stop": (True, False),
    "debug": (True, False),
}
"""Option of `torch.utils.checkpoint` -> its values; the first step would fail at others."""


def _checkpointing_options(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse what `torch.utils.checkpoint` does not take."""
    for name, value in options.items():
        values = _CHECKPOINTING.get(name)
        if values is None:
            known = ", ".join(f"`{name}`" for name in _CHECKPOINTING)
            what = "expected the options {known}"
            raise PydanticCustomError("checkpointing", what, {"known": known})
        if not any(value is one or (isinstance(one, str) and value == one) for one in values):
            expected = " or ".join(str(one).lower() for one in values)
            raise PydanticCustomError(
                "checkpointing", "expected {expected} for `{name}`", {"expected": expected, "name": name}
            )
    return options


CheckpointingOptions = Annotated[dict[str, Any], AfterValidator(_checkpointing_options)]


def _rate(value: object) -> object:
    """Refuse what is neither `auto` nor a number above 0, in one message."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "auto" or (is_number and 0 < value < math.inf):  # type: ignore[operator]
        return value
    raise PydanticCustomError("learning_rate", "expected `auto` or a finite number above 0")


_RATE_SCHEMA = WithJsonSchema(
    {"anyOf": [{"const": "auto", "type": "string"}, {"exclusiveMinimum": 0, "type": "number"}]}
)


class TrainingSection(StrictModel):
    """Optimization, evaluation, checkpoints and logging, by the names of transformers' TrainingArguments."""

    learning_rate: Annotated[float | Literal["auto"], BeforeValidator(_rate), _RATE_SCHEMA] = Field(
        "auto",
        description="Peak learning rate. `auto` chooses it from the model's width, the variant and its scale, and says "
        "why (docs/training.md).",
    )
    max_steps: int = Field(
        -1, description="Stop after this many optimizer steps; beats `num_train_epochs`. -1 trains by epochs."
    )
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training data.")
    max_train_tokens: int | None = Field(
        None,
        ge=1,
        description="Also stop after this many tokens, padding not counted. The learning rate then follows the share "
        "that is used up.",
    )
    max_train_minutes: float | None = Field(
        None,
        gt=0,
        description="Also stop after this many minutes of training; evaluating and saving do not count. The learning "
        "rate then follows the share that is used up.",
    )
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="Examples (packs, with `data.packing`) per optimizer step, over all processes. Given instead "
        "of the next key and `gradient_accumulation_steps`, which then follow from memory and a token budget.",
    )
    per_device_train_batch_size: int = Field(
        2, ge=1, description="Examples (packs, with `data.packing`) in one forward pass of one process."
    )
    per_device_eval_batch_size: int = Field(2, ge=1, description="The same for evaluation.")
    gradient_accumulation_steps: int = Field(
        4, ge=1, description="Forward passes in an optimizer step. The update is that of the larger batch."
    )
    lr_scheduler_type: Schedule = Field("cosine", description="How the learning rate moves after the warm-up.")
    lr_scheduler_kwargs: dict[str, Any] | None = Field(
        None, description="The schedule's own options, such as `{min_lr_rate: 0.1}` for `cosine_with_min_lr`."
    )
    warmup_steps: float = Field(
        0.03,
        ge=0,
        description="Steps in which the learning rate rises, from above zero. Below 1 it is a share of all steps.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of the trained weights; biases and norms are exempt.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm. 0 clips nothing.")
    optim: Optimizer = Field(
        "adamw_torch_fused",
        description="The optimizer. 8-bit and paged ones come from bitsandbytes. Paged ones want a GPU.",
    )
    optim_args: str | None = Field(None, description="The optimizer's own options, as `name=value,name=value`.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the mean of gradients.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's decay of the mean of squared gradients.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's guard against division by zero.")
    master_weights: MasterWeights = Field(
        "float32",
        description="What `method: full` keeps the trained weights in. `bfloat16` takes half the memory; each update "
        "is rounded up or down at random, so that small ones are not lost (docs/training.md).",
    )
    optimizer_in_backward: bool = Field(
        False,
        description="Update each weight of `method: full` in the backward pass, once its gradient is there, and free "
        "the gradient. It then clips nothing and accumulates nothing: `max_grad_norm` is 0 and "
        "`gradient_accumulation_steps` 1.",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations in the backward pass: much less memory, about a third more time. Without "
        "it: only if the run would not fit otherwise, by the estimate of `peftchat plan`.",
    )
    gradient_checkpointing_kwargs: CheckpointingOptions | None = Field(
        None, description="Options of `torch.utils.checkpoint`, such as `{use_reentrant: false}`."
    )
    torch_compile: bool | None = Field(
        None,
        description="Compile the model's layers: faster steps and less memory, after a wait of some seconds at the "
        "start. Without it: on a CPU with a C++ compiler, if the run is long and that was measured to be faster here.",
    )
    autotune: bool | None = Field(
        None,
        description="Measure on a few batches before the first step which attention, threads, chunk of the loss, way "
        "to add an adapter, and compiled or plain layers are fastest here, and keep the result for later runs. Where "
        "`per_device_train_batch_size` is not given, half and twice as many packs at a time are tried too; a step has "
        "the same packs. Without it: within a hundredth of the run's planned time, so only in long runs on a CPU. "
        "`true`: in any run; `false`: never.",
    )
    seed: int = Field(
        42, ge=0, le=2**32 - 1, description="Seed of adapter weights, dropout, and the split by `data.eval_fraction`."
    )
    data_seed: int | None = Field(
        None, ge=0, le=2**32 - 1, description="Seed of the order of examples. Without it `seed` is used."
    )
    save_strategy: SaveStrategy = Field(
        "steps",
        description="When to write a checkpoint that `--resume` can go on from. The final model is always saved.",
    )
    save_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints (`save_strategy: steps`).")
    save_total_limit: int = Field(
        2,
        ge=1,
        description="Checkpoints kept; the oldest goes first. Write a large number to keep all. "
        "`load_best_model_at_end` keeps the best one besides.",
    )
    eval_strategy: EvalStrategy = Field(
        "epoch",
        description="When to evaluate on the held-out examples. Giving `eval_steps` alone means `steps`.",
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between evaluations. Without it `logging_steps` is used."
    )
    eval_on_start: bool = Field(True, description="Evaluate before the first step, to have a figure to compare with.")
    load_best_model_at_end: bool = Field(
        False,
        description="Finish with the weights of the best evaluation instead of the last step's. An evaluation that is "
        "the best so far writes a checkpoint, whatever `save_strategy` is.",
    )
    metric_for_best_model: Annotated[BestMetric, BeforeValidator(_metric_name)] = Field(
        "eval_loss",
        description="What makes an evaluation the best: the lowest `eval_loss` (nats per supervised token), or the "
        "highest `eval_accuracy` (share of supervised tokens that are the most likely ones).",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations in a row without an improvement."
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="The least improvement that counts for `early_stopping_patience`."
    )
    on_spike: Literal["log", "stop", "skip"] = Field(
        "log",
        description="What to do at a step whose loss is far above those before. `log` names its conversations, `stop` "
        "ends the run, `skip` leaves the step's update out (on a GPU each step then waits for its loss).",
    )
    on_oom: Literal["stop", "halve"] = Field(
        "stop",
        description="What to do where memory runs out in a forward or backward pass. `stop` says what would need less, "
        "`halve` does the step again with smaller micro-batches and the same update (one process only).",
    )
    hang_timeout: float | None = Field(
        45.0,
        gt=0,
        description="Seconds without progress after which a report says which process stands still: its step, its "
        "conversations and its innermost calls. Ten times the longest wait so far, if that is more. The run goes on "
        "waiting. `null` turns the watch off.",
    )
    logging_steps: int = Field(10, ge=1, description="Optimizer steps between lines of `metrics.jsonl`.")
    report_to: Annotated[tuple[Reporter, ...], BeforeValidator(_reporter_list), _REPORTERS_SCHEMA] = Field(
        (), description="Experiment trackers to report to, one or a list. Each needs its package."
    )
    run_name: str | None = Field(
        None, min_length=1, description="The run's name in the trackers. Without it the output folder's name."
    )
    dataloader_num_workers: int = Field(
        0,
        ge=0,
        description="Extra processes that prepare batches. Examples are encoded in advance, so 0 rarely waits.",
    )

    @property
    def peak_rate(self) -> float:
        """The learning rate of a run, in which it is a number.

        Raises:
            ValueError: it is `auto` still (`peftchat.planning.auto_settings` chooses it).
        """
        if self.learning_rate == "auto":
            raise ValueError("training.learning_rate is `auto` and was not resolved")
        return self.learning_rate

    @model_validator(mode="before")
    @classmethod
    def _eval_steps_mean_steps(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        if given.get("eval_steps") is not None and given.get("eval_strategy") is None:
            return {**given, "eval_strategy": "steps"}
        return given


class AnswersRead(TypedDict):
    """What is read besides conversations: rejected answers too, or labels."""

    pairs: bool
    labels: bool


class Recipe(StrictModel):
    """A complete recipe. `adapter` and `quantization` are set exactly where `method` uses them."""

    model: ModelSection = Field(description="The base model and how it is loaded.", examples=["{name: MODEL}"])
    method: Method = Field(
        description="What is trained: all weights (`full`), an adapter (`lora`), or an adapter on a "
        "quantized base (`qlora`)."
    )
    adapter: Annotated[SerializeAsAny[Adapter], BeforeValidator(validate_adapter)] | None = Field(
        None, description="The adapter that is trained beside the frozen base (methods `lora` and `qlora`)."
    )
    quantization: QuantizationSection | None = Field(None, description="The quantized base, for `qlora`.")
    objective: Objective = Field(
        "sft",
        description="What is learned: the answers of conversations (`sft`), or to prefer the chosen answer of a pair "
        "to the rejected one (`dpo`, and without a reference `orpo`, `simpo`, `cpo`), or which answers are good "
        "(`kto`; docs/preferences.md).",
    )
    dpo: DpoSection | None = Field(None, description="Options of direct preference optimization, for `objective: dpo`.")
    orpo: OrpoSection | None = Field(
        None, description="Options of odds ratio preference optimization, for `objective: orpo`."
    )
    simpo: SimpoSection | None = Field(
        None, description="Options of simple preference optimization, for `objective: simpo`."
    )
    cpo: CpoSection | None = Field(
        None, description="Options of contrastive preference optimization, for `objective: cpo`."
    )
    kto: KtoSection | None = Field(None, description="Options of Kahneman-Tversky optimization, for `objective: kto`.")
    chat: ChatSection = Field(
        ChatSection(),
        description="How a conversation becomes tokens, and which of them are trained.",
    )
    data: DataSection = Field(
        description="What the model is trained and evaluated on.",
        examples=["{train: [{path: conversations.jsonl}]}"],
    )
    training: TrainingSection = Field(
        TrainingSection(),
        description="Optimization, evaluation, checkpoints and logging, by the names of transformers' "
        "TrainingArguments.",
    )
    evaluation: EvaluationSection = Field(
        EvaluationSection(), description="Questions that are answered while the model is trained."
    )
    distributed: DistributedSection = Field(
        DistributedSection(), description="How many processes train, and what they share."
    )
    output_dir: str = Field(
        min_length=1,
        description="The run folder: model or adapter, tokenizer, resolved recipe, metrics, checkpoints.",
        examples=["runs/my-assistant"],
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, given: Any) -> Any:
        """Fill in what a method implies: its sections, and `packing` where its variant needs it off."""
        if not isinstance(given, Mapping):
            return given
        method = given.get("method")
        if not isinstance(method, str) or method not in get_args(Method):
            return given
        filled = dict(given)
        if method != "full" and filled.get("adapter") is None:
            filled["adapter"] = {}
        if method == "qlora" and filled.get("quantization") is None:
            filled["quantization"] = {}
        if filled.get("objective") in PAIR_OBJECTIVES:
            _fill_in_objective(filled)
        training = filled.get("training")
        if isinstance(training, Mapping) and training.get("optimizer_in_backward") is True:
            filled["training"] = _with_implied(training, {"max_grad_norm": 0, "gradient_accumulation_steps": 1})
        data = filled.get("data")
        if isinstance(data, Mapping):
            implied: dict[str, Any] = {"packing": False} if _needs_unpacked(filled) else {}
            implied |= {"consecutive": "keep"} if _has_other_template(filled) else {}
            filled["data"] = _with_implied(data, implied)
        return filled

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares the model with a reference."""
        return self.objective in REFERENCE_OBJECTIVES

    @property
    def has_pairs(self) -> bool:
        """Whether the objective learns from pairs of answers, each of two examples; labeled answers are such too."""
        return self.objective in PAIR_OBJECTIVES

    @property
    def has_labels(self) -> bool:
        """Whether the objective learns from labeled answers."""
        return self.objective in LABEL_OBJECTIVES

    @property
    def answers_read(self) -> AnswersRead:
        """What is read besides conversations (`peftchat.conversations.reading.read_numbered`)."""
        return AnswersRead(pairs=self.has_pairs and not self.has_labels, labels=self.has_labels)


def _with_implied(section: Mapping[str, Any], implied: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with values for the keys that it leaves open."""
    return {**section, **{key: value for key, value in implied.items() if section.get(key) is None}}


def _fill_in_objective(filled: dict[str, Any]) -> None:
    """Fill in what pairs of answers imply where a recipe leaves it open."""
    name = filled["objective"]
    if filled.get(name) is None:
        filled[name] = {}
    if isinstance(filled.get("data"), Mapping):
        filled["data"] = _with_implied(filled["data"], {"packing": False, "truncation": "drop"})
    training = {} if filled.get("training") is None else filled["training"]
    if isinstance(training, Mapping):
        filled["training"] = _with_implied(training, {"torch_compile": False})
    section = filled.get("adapter")
    if isinstance(section, Mapping) and filled.get("method") != "full":
        variant = get_adapter("lora" if section.get("variant") is None else section["variant"])
        # TRL switches dropout off too: the reference has none, and the difference of the two is what is learned from.
        if variant is not None and "dropout" in variant.model_fields:
            filled["adapter"] = _with_implied(section, {"dropout": 0.0})


def _needs_unpacked(given: Mapping[str, Any]) -> bool:
    variant = None if given.get("method") == "full" else _named_adapter(given.get("adapter"))
    return variant is not None and variant.incompatibility("packing") is not None


def _has_other_template(given: Mapping[str, Any]) -> bool:
    """Return whether the chat template is not one of peftchat's own; it decides by itself which turns it takes."""
    chat = given.get("chat")
    name = chat.get("template") if isinstance(chat, Mapping) else None
    return isinstance(name, str) and name not in CHAT_TEMPLATES


def _named_adapter(section: Any) -> type[Adapter] | None:
    """Return the variant that an unvalidated `adapter` section names."""
    return get_adapter(section.get("variant")) if isinstance(section, Mapping) else None
