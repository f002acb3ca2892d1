"""What the user asks for: the typed recipe, how it is read, and what is said when it is wrong."""

from peftchat.recipe.load import LoadedRecipe, load_recipe
from peftchat.recipe.schema import Recipe, TrainingSection
from peftchat.recipe.sections import (
    ChatSection,
    DataEntry,
    DataSection,
    DistributedSection,
    ModelSection,
    QuantizationSection,
)
from peftchat.recipe.validation import dump_recipe, training_arguments
from peftchat.variants.base import Adapter

__all__ = [
    "Adapter",
    "ChatSection",
    "DataEntry",
    "DataSection",
    "DistributedSection",
    "LoadedRecipe",
    "ModelSection",
    "QuantizationSection",
    "Recipe",
    "TrainingSection",
    "dump_recipe",
    "load_recipe",
    "training_arguments",
]
