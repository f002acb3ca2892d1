"""TRL's own configuration classes say what a file of TRL means; the recipe has to say the same."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from trl import DPOConfig, ModelConfig, SFTConfig, get_peft_config

from peftchat.importing.importing import import_file
from peftchat.importing.writing import recipe_text
from peftchat.recipe import load_recipe
from peftchat.recipe.schema import Recipe
from peftchat.recipe.validation import training_arguments

SAME = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
)

TRAINING = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.sampled_from([1e-5, 3e-4]),
        "num_train_epochs": st.sampled_from([1.0, 2.5]),
        "max_steps": st.sampled_from([-1, 1000]),
        "per_device_train_batch_size": st.integers(1, 16),
        "gradient_accumulation_steps": st.integers(1, 16),
        "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant_with_warmup", "inverse_sqrt"]),
        "warmup_steps": st.sampled_from([0, 0.1, 25]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "max_grad_norm": st.sampled_from([0.5, 1.0]),
        "adam_beta2": st.sampled_from([0.95, 0.999]),
        "seed": st.integers(0, 100),
    },
)
ADAPTER = st.fixed_dictionaries(
    {"use_peft": st.just(True)},
    optional={
        "lora_r": st.integers(1, 64),
        "lora_alpha": st.integers(1, 64),
        "lora_dropout": st.sampled_from([0.0, 0.1]),
        "lora_target_modules": st.sampled_from([["q_proj", "v_proj"], ["all-linear"]]),
        "use_dora": st.booleans(),
    },
)


def recipe_of(folder: Path, values: dict[str, Any]) -> Recipe:
    source, target = folder / "trl.yaml", folder / "recipe.yaml"
    with source.open("w", encoding="utf-8") as file:
        YAML().dump({"model_name_or_path": "org/base", "dataset_name": "org/talks", **values}, file)
    imported = import_file(source, "trl")
    assert not imported.refused, imported.refused
    target.write_text(recipe_text(imported, target), encoding="utf-8")
    return load_recipe(target, to_train=False).recipe


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(training=TRAINING)
@pytest.mark.parametrize(("config", "own"), [(SFTConfig, {}), (DPOConfig, {"beta": 0.3})])
def test_the_recipe_trains_as_trl_would(tmp_path: Path, config: type, own: dict[str, Any], training: Any) -> None:
    stock = config(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **training, **own)
    recipe = recipe_of(tmp_path, {**training, **own})
    ours = training_arguments(recipe)
    for key in SAME:
        stocks = getattr(stock, key)
        assert ours.get(key, stocks) == getattr(stocks, "value", stocks), key
    assert ours.get("warmup_steps", 0) == stock.warmup_steps
    assert recipe.data.max_length == stock.max_length
    if config is DPOConfig:
        assert recipe.objective == "dpo"
        assert recipe.dpo is not None
        assert recipe.dpo.beta == stock.beta


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=ADAPTER)
def test_the_adapter_is_that_of_trl(tmp_path: Path, adapter: Any) -> None:
    stock = get_peft_config(ModelConfig(model_name_or_path="org/base", **adapter))
    ours = recipe_of(tmp_path, adapter).adapter
    assert ours is not None
    assert (ours.r, ours.alpha, ours.dropout) == (stock.r, stock.lora_alpha, stock.lora_dropout)  # type: ignore[attr-defined]
    assert (ours.variant == "dora") == stock.use_dora
    if "lora_target_modules" in adapter and adapter["lora_target_modules"] != ["all-linear"]:
        assert set(ours.target_modules) == set(stock.target_modules)  # type: ignore[attr-defined]
