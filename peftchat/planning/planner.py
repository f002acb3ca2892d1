"""The planner: what is known of one model, and predictions for any settings of it."""

import functools
from typing import TYPE_CHECKING

from peftchat.planning.activations import (
    ActivationKey,
    ActivationProfile,
    LossProfile,
    activation_profile,
    estimated_profile,
    loss_profile,
)
from peftchat.planning.facts import ModelFacts, TrainedFacts, model_facts, trained_facts
from peftchat.planning.memory import MemoryPlan, memory_plan
from peftchat.planning.settings import PlanSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftchat.recipe import Recipe
    from peftchat.recipe.sections import Method


class Planner:
    """Predicts memory for one model and adapter; every trace is made once.

    Attributes:
        facts: counts of the model.
        estimated: whether some activations are a rule of thumb, because the architecture cannot run on shapes.

    Args:
        config: the base model's config; no weight is read.
        recipe: names the adapter, or none, and then its defaults stand in for other methods.
    """

    def __init__(self, config: "PretrainedConfig", recipe: "Recipe") -> None:
        self.config = config
        self.recipe = recipe
        self.facts: ModelFacts = model_facts(config)
        self.estimated = False
        self._trained: dict[tuple[bool, int], TrainedFacts] = {}
        self._profiles: dict[tuple[ActivationKey, bool], ActivationProfile] = {}
        self._losses: dict[tuple[str, str | None, bool, int, str], LossProfile] = {}

    def memory(self, settings: PlanSettings) -> MemoryPlan:
        """The predicted peak of one device under these settings."""
        trained = self.trained(settings)
        return memory_plan(settings, self.facts, trained, self._activations(settings), self._loss(settings))

    def trained(self, settings: PlanSettings) -> TrainedFacts:
        """What is trained: the model, or the recipe's adapter (the default one where it has none)."""
        full = settings.method == "full"
        key = (full, 0 if full else settings.new_tokens)
        if key not in self._trained:
            self._trained[key] = trained_facts(self.config, self._as("full" if full else "lora"), key[1])
        return self._trained[key]

    @functools.cache  # noqa: B019 - a planner lives as long as one command
    def _as(self, method: "Method") -> "Recipe":
        """The recipe as it would be by another method."""
        if (self.recipe.method == "full") == (method == "full"):
            return self.recipe
        written = self.recipe.model_dump(exclude={"adapter", "quantization"}, exclude_unset=True)
        return type(self.recipe).model_validate({**written, "method": method})

    def _activations(self, settings: PlanSettings) -> ActivationProfile:
        key = settings.activation_key
        full = settings.method == "full"
        if (key, full) not in self._profiles:
            try:
                recipe = self._as("full" if full else "lora")
                self._profiles[key, full] = activation_profile(self.config, recipe, key)
            except Exception:
                # Shapes alone do not tell where a router sends its tokens, for one, and every architecture that
                # cannot run on them says so in its own way.
                self.estimated = True
                self._profiles[key, full] = estimated_profile(self.facts, key)
        return self._profiles[key, full]

    def _loss(self, settings: PlanSettings) -> LossProfile:
        key, full = settings.activation_key, settings.method == "full"
        place = (key.held, key.autocast, full, key.new_tokens, settings.device)
        if place not in self._losses:
            self._losses[place] = loss_profile(self.config, self.facts, key, trains_head=full, device=settings.device)
        return self._losses[place]
