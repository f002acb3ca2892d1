"""Recipes in files."""

import json
from pathlib import Path
from typing import Any

FEW_STEPS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    # Left open, it is chosen by a plan of the run's memory, which takes longer than these steps.
    "gradient_checkpointing": False,
}
"""The `training` section of a run that ends within a second."""


def write_recipe(path: Path, model: Path, train: Path, /, **sections: Any) -> Path:
    """Write a recipe; return its path.

    Args:
        path: the file; JSON is YAML.
        model: folder of the base model.
        train: file of conversations.
        sections: merged over `method: lora` and these paths, one level deep.
    """
    recipe: dict[str, Any] = {
        "model": {"name": str(model)},
        "method": "lora",
        "data": {"train": [{"path": str(train)}]},
        "output_dir": str(path.parent / "run"),
    }
    for section, values in sections.items():
        recipe[section] = {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
    path.write_text(json.dumps(recipe, ensure_ascii=False), encoding="utf-8")
    return path


def write_training_recipe(
    path: Path, model: Path, train: Path, evaluation: Path | None, run: Path, /, **sections: Any
) -> Path:
    """Write a recipe in float32 with few steps; return its path.

    Args:
        path: the file.
        model: folder of the base model.
        train: file of conversations.
        evaluation: file of held-out conversations, read before training and after each epoch.
        run: the run folder.
        sections: merged over these settings, one level deep.
    """
    data: dict[str, Any] = {"max_length": 128}
    training = dict(FEW_STEPS)
    if evaluation is not None:
        data["eval"] = [{"path": str(evaluation)}]
        training |= {"eval_strategy": "epoch", "eval_on_start": True}
    data = {"train": [{"path": str(train)}], **data, **sections.pop("data", {})}
    training |= sections.pop("training", {})
    model_section = {"name": str(model), "dtype": "float32", **sections.pop("model", {})}
    return write_recipe(
        path, model, train, **{"output_dir": str(run), **sections}, model=model_section, data=data, training=training
    )
