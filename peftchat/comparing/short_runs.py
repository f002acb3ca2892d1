"""Short runs: the settings that train a part of a run's length with the schedule of the whole."""

import math
from typing import TYPE_CHECKING

from peftchat.comparing.candidates import Settings
from peftchat.comparing.hyperparameter_search import SHORT_SHARE

if TYPE_CHECKING:
    from peftchat.recipe import Recipe

_MIN_STEPS = 5
"""Optimizer steps of a short run, if the full one has as many."""

_NEVER = 10**9

_STEP_OPTIONS = ("num_decay_steps", "num_stable_steps")
"""Options of schedules that count steps."""


def short_share(recipe: "Recipe") -> float:
    """Return the length of short runs as a part of the full one; runs of few steps keep enough of them."""
    steps = recipe.training.max_steps
    return SHORT_SHARE if steps <= 0 else min(1.0, max(SHORT_SHARE, _MIN_STEPS / steps))


def short_settings(recipe: "Recipe", share: float) -> Settings:
    """Return the settings that shorten a run, with its schedule, and evaluate it at the end alone.

    Warm-up and decay take the same part of a short run as of the full one.

    Args:
        recipe: of the full run.
        share: the part of its length.
    """
    training = recipe.training
    settings: dict[str, object] = {
        # `no` would contradict a recipe that sets the number of steps.
        "training.eval_strategy": "steps",
        "training.eval_steps": _NEVER,
        "training.save_strategy": "steps",
        "training.save_steps": _NEVER,
        "training.eval_on_start": False,
        "training.load_best_model_at_end": False,
        "training.metric_for_best_model": "eval_loss",
        "training.early_stopping_patience": None,
        "training.early_stopping_threshold": 0.0,
    }
    if training.max_steps > 0:
        settings["training.max_steps"] = math.ceil(training.max_steps * share - 1e-9)
    elif training.max_train_tokens is not None:
        settings["training.max_train_tokens"] = math.ceil(training.max_train_tokens * share)
    elif training.max_train_minutes is not None:
        settings["training.max_train_minutes"] = training.max_train_minutes * share
    else:
        settings["training.num_train_epochs"] = training.num_train_epochs * share
    if training.warmup_steps >= 1:
        settings["training.warmup_steps"] = math.ceil(training.warmup_steps * share)
    if training.lr_scheduler_kwargs:
        settings["training.lr_scheduler_kwargs"] = {
            key: math.ceil(value * share) if key in _STEP_OPTIONS else value
            for key, value in training.lr_scheduler_kwargs.items()
        }
    return settings
