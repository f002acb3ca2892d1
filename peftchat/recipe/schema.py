"""The recipe: everything a run is asked to do, as one frozen, strictly typed object."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from peftchat.recipe.choices import Method
from peftchat.recipe.section import Section
from peftchat.recipe.sections import (
    AdapterSection,
    ChatSection,
    DataSection,
    DistributedSection,
    ModelSection,
    QuantizationSection,
)
from peftchat.recipe.training import LEARNING_RATES, TrainingSection


class Recipe(Section):
    """What the user asks for. `adapter` and `quantization` are set exactly where `method` uses them."""

    model: ModelSection = Field(description="The base model and how it is held in memory.", examples=["{name: MODEL}"])
    method: Method = Field(
        description="What is trained: all weights (`full`), an adapter (`lora`), or an adapter on a "
        "quantised base (`qlora`)."
    )
    adapter: AdapterSection | None = Field(None, description="The adapter, for `lora` and `qlora`.")
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
            filled["training"] = {**training, "learning_rate": LEARNING_RATES[method]}
        return filled
