"""The recipe: everything a run is asked to do, as one frozen, strictly typed object."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from peftchat.recipe.adapter import section_of_variant
from peftchat.recipe.choices import Method
from peftchat.recipe.sections import ChatSection, DataSection, DistributedSection, ModelSection, QuantizationSection
from peftchat.recipe.training import LEARNING_RATES, TrainingSection
from peftchat.strict_model import StrictModel
from peftchat.variants import VARIANTS, AdapterSection, Variant, proper_name


class Recipe(StrictModel):
    """What the user asks for. `adapter` and `quantization` are set exactly where `method` uses them."""

    model: ModelSection = Field(description="The base model and how it is held in memory.", examples=["{name: MODEL}"])
    method: Method = Field(
        description="What is trained: all weights (`full`), an adapter (`lora`), or an adapter on a "
        "quantised base (`qlora`)."
    )
    adapter: Annotated[SerializeAsAny[AdapterSection], BeforeValidator(section_of_variant)] | None = Field(
        None, description="The adapter that is trained beside the frozen base (methods `lora` and `qlora`)."
    )
    quantization: QuantizationSection | None = Field(None, description="The quantised base, for `qlora`.")
    chat: ChatSection = Field(
        ChatSection(),
        description="How a dialogue becomes tokens, and which of them are learned.",
    )
    data: DataSection = Field(
        description="What the model is trained and evaluated on.",
        examples=["{train: [{path: dialogues.jsonl}]}"],
    )
    training: TrainingSection = Field(
        TrainingSection(),
        description="Optimisation, evaluation, checkpoints and logging, by the names of transformers' "
        "TrainingArguments.",
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
        """Fill what a method implies: its sections, and its learning rate where none was given."""
        if not isinstance(given, Mapping):
            return given
        method = given.get("method")
        if not isinstance(method, str) or method not in LEARNING_RATES:
            return given
        filled = dict(given)
        if method != "full" and filled.get("adapter") is None:
            filled["adapter"] = {}
        if method == "qlora" and filled.get("quantization") is None:
            filled["quantization"] = {}
        training = {} if filled.get("training") is None else filled["training"]
        if isinstance(training, Mapping) and training.get("learning_rate") is None:
            filled["training"] = {**training, "learning_rate": _learning_rate(method, filled.get("adapter"))}
        if _refuses_packing(filled):
            data = filled.get("data")
            if isinstance(data, Mapping) and data.get("packing") is None:
                filled["data"] = {**data, "packing": False}
        return filled


def _learning_rate(method: str, adapter: Any) -> float:
    """What the recipe trains with where it gives no rate: the variant's own."""
    variant = None if method == "full" else _variant(adapter)
    return LEARNING_RATES[method] if variant is None else variant.learning_rate


def _refuses_packing(given: Mapping[str, Any]) -> bool:
    variant = None if given.get("method") == "full" else _variant(given.get("adapter"))
    return variant is not None and variant.why_not("packing") is not None


def _variant(adapter: Any) -> Variant | None:
    """The variant that an `adapter` section names, before anything in it has been checked."""
    name = adapter.get("variant") if isinstance(adapter, Mapping) else None
    return VARIANTS.get(proper_name(name)) if isinstance(name, str) else None
