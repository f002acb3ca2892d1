"""Predictions against figures that others have published with their settings."""

from dataclasses import replace
from pathlib import Path

import pytest

from peftchat.models.loading import load_config
from peftchat.planning.hardware import find_hardware
from peftchat.planning.parameter_counts import parameter_counts
from peftchat.planning.planner import Planner
from peftchat.planning.settings import settings_on
from peftchat.recipe import Recipe
from tests.support.planning import SHAPES, recipe_dict, recipe_on

GIB = 2**30


def allocated(recipe: Recipe) -> float:
    """GiB that torch would allocate on one A100 at most."""
    settings = settings_on(recipe, find_hardware("a100-80gb", 1), None)
    return Planner(load_config(recipe, need_weights=False), recipe).memory(settings).allocated / GIB


def torchtune(name: str, parent: Path, method: str, rank: int, modules: list[str], length: int) -> Recipe:
    """torchtune's recipe by its own config: packed rows, two at a time, checkpointing, fused AdamW, no dropout."""
    written = recipe_dict(
        name, parent, method, per_device_train_batch_size=2, gradient_checkpointing=True, optim="adamw_torch_fused"
    )
    written["adapter"] = {"r": rank, "alpha": 2 * rank, "dropout": 0.0, "target_modules": modules}
    written["data"]["max_length"] = length
    return Recipe.model_validate(written)


MLP = ["gate_proj", "up_proj", "down_proj"]


def test_8b_qlora_is_near_what_torchtune_publishes(tmp_path: Path) -> None:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]
    assert allocated(torchtune("llama-3.1-8b", tmp_path, "qlora", 8, modules, 2048)) == pytest.approx(7.4, rel=0.15)


def offloaded(name: str, rows: int, length: int) -> float:
    """GiB of the blocks' inputs, which torchtune's activation offloading holds in main memory and peftchat does not."""
    shape = SHAPES[name]
    return shape["num_hidden_layers"] * rows * length * shape["hidden_size"] * 2 / GIB


@pytest.mark.parametrize(("method", "published"), [("lora", 8.5), ("qlora", 4.6)])
def test_3b_adapters_are_near_what_torchtune_publishes(tmp_path: Path, method: str, published: float) -> None:
    modules = ["q_proj", "v_proj", "o_proj", *MLP]
    ours = allocated(torchtune("llama-3.2-3b", tmp_path, method, 64, modules, 4096))
    assert ours - offloaded("llama-3.2-3b", 2, 4096) == pytest.approx(published, rel=0.15)


def test_starchat_fits_eight_a100_and_not_one(tmp_path: Path) -> None:
    recipe = recipe_on(
        "starcoderbase",
        tmp_path,
        "full",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        gradient_checkpointing=True,
    )
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 1024})})
    card = find_hardware("a100-80gb", 8)
    planner = Planner(load_config(recipe, need_weights=False), recipe)
    settings = settings_on(recipe, card, None)
    assert settings.strategy == "zero3"
    total = planner.memory(settings).total
    # Sixteen bytes a weight on eight cards are more than a third of each.
    assert 31e9 < total < 60e9 < card.memory
    assert planner.memory(settings_on(recipe, replace(card, count=1), None)).total > card.memory


def test_parameters_are_the_published_ones(tmp_path: Path) -> None:
    counts = {
        name: parameter_counts(load_config(recipe_on(name, tmp_path, "full"), need_weights=False)).parameters
        for name in ("llama-3.1-8b", "llama-3.2-3b", "starcoderbase")
    }
    assert counts == {"llama-3.1-8b": 8_030_261_248, "llama-3.2-3b": 3_212_749_824, "starcoderbase": 15_517_456_384}
