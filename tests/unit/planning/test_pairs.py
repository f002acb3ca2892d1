"""Plans of preference runs: what they say of a step is what the trainer lays out."""

from pathlib import Path
from typing import Any

import pytest

from peftchat.models.source import ModelSource
from peftchat.planning.hardware import find_hardware
from peftchat.planning.measure import long_pairs
from peftchat.planning.planner import pair_layout
from peftchat.planning.settings import DatasetSize, PlanSettings, read_dataset_size, settings_for, total_steps
from peftchat.recipe import Recipe, load_recipe
from tests.support.models import small_model
from tests.support.pairs import open_trainer, pair_recipe, write_labels, write_pairs


@pytest.mark.parametrize(
    ("objective", "attention", "rows", "text"),
    [
        ("dpo", "auto", 1, "2 pairs of "),
        ("simpo", "sdpa", 2, "2 pairs of "),
        ("kto", "auto", 1, "2 labeled answers of "),
    ],
)
def test_a_plan_counts_what_the_trainer_lays_out(
    objective: str, attention: str, rows: int, text: str, tmp_path: Path
) -> None:
    has_labels = objective == "kto"
    file = (write_labels if has_labels else write_pairs)(tmp_path / "train.jsonl", 9)
    sections: dict[str, Any] = {"objective": objective, "model": {"attention": attention}, "data": {"max_length": 512}}
    if not has_labels:
        write_pairs(file, 9, rounds=4)
    sections["training"] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "max_steps": -1,
        "gradient_accumulation_steps": 1,
    }
    recipe = pair_recipe(tmp_path, small_model(tied=True), file, None, **sections)
    loaded = load_recipe(recipe).recipe
    trainer = open_trainer(recipe)
    batches = [trainer._collators["train"]([pack]) for pack in trainer.train_dataset]
    settings, dataset = planned(loaded)
    assert dataset.sequences == 9 and total_steps(loaded, dataset, settings) == 5
    assert dataset.tokens == sum(int(batch["real_tokens"]) for batch in batches)
    assert settings.rows == rows and settings.tokens == 2 * rows * dataset.longest
    assert dataset.longest == max(batch["input_ids"].shape[1] for batch in batches)
    targets = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    assert dataset.tokens * dataset.supervised == pytest.approx(targets, rel=1e-6)
    assert settings.pass_text.startswith(text)
    # What a probe trains on is as long as the longest of the data.
    probe = tmp_path / "probe.jsonl"
    probe.write_text(long_pairs(loaded, settings))
    again, _ = planned(load_recipe(recipe, [f"data.train=[{{path: {probe}}}]"]).recipe)
    assert 0.8 * settings.length <= again.length <= settings.length


def planned(recipe: Recipe) -> tuple[PlanSettings, DatasetSize]:
    layout = pair_layout(recipe, "cpu", ModelSource.of_recipe(recipe).config())
    dataset = read_dataset_size(recipe, layout)
    assert isinstance(dataset, DatasetSize)
    return settings_for(recipe, find_hardware("cpu", 1), dataset, layout=layout), dataset
