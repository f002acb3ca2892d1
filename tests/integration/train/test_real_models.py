"""Real models on real conversations: a base model of 260,032 parameters, and the 135M model by the shipped recipes."""

from pathlib import Path

import pytest

from tests.support.cli import PROJECT, peftchat
from tests.support.data import read_json
from tests.support.machine import needs_bfloat16_kernels
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_loss, stock_run

RECIPES = PROJECT / "recipes"


def test_a_story_model_learns_to_chat(stories: Path, shared_data: Path, tmp_path: Path) -> None:
    """On the OpenAssistant conversations that fit, held-out loss falls from about 4 to below 3.8."""
    run = tmp_path / "run"
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", stories, shared_data / "oasst_trees_en_60.jsonl", None, run,
        method="lora", adapter={"r": 64, "alpha": 64, "dropout": 0.0},
        data={"eval_fraction": 0.3, "max_length": 512},
        training={
            "learning_rate": 5e-3,
            "max_steps": 30,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "eval_strategy": "no",
            "eval_on_start": True,
            "logging_steps": 20,
        },
    )  # fmt: skip
    done = peftchat("train", str(recipe))
    assert done.returncode == 0, done.stderr
    facts = read_json(run / "run.json")
    assert facts["eval_loss_before"] > 3.9
    assert facts["eval_loss"] < 3.8
    assert facts["train_loss"] < 3.4


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about a module of the standard library."""
    folder = tmp_path_factory.mktemp("data") / "json"
    made = peftchat("data", "from-code", "json", "-o", folder, "--max-samples", "24")
    assert made.returncode == 0, made.stderr
    return folder / "train.jsonl"


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("lora_1gpu", 1),
        ("qlora_1gpu", 1),
        pytest.param("zero3_full", 2, marks=[pytest.mark.distributed, needs_bfloat16_kernels]),
    ],
)
def test_the_shipped_recipes_run_here(
    name: str, processes: int, docstrings: Path, demo_model: Path, tmp_path: Path
) -> None:
    """The recipe with small steps, on the real 135M model and a file of conversations, without a GPU."""
    run = tmp_path / "run"
    done = peftchat(
        "train", str(RECIPES / f"{name}.yaml"),
        "--set", f"model.name={demo_model}",
        "--set", f"data.train=[{{path: {docstrings}}}]",
        "--set", f"distributed.processes={processes}",
        "--set", "training.max_steps=2",
        # The recipes accumulate thousands of tokens per step, which take minutes here and show nothing more.
        "--set", "training.gradient_accumulation_steps=1",
        "--set", "training.per_device_train_batch_size=1",
        "--set", "data.max_length=128",
        "--set", f"output_dir={run}",
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = read_json(run / "run.json")
    assert facts["steps"] == 2
    assert facts["world_size"] == processes
    seen = [token for token in facts["new_tokens"] if token["seen"]]
    assert len(seen) >= 3
    assert all(token["output_moved"] > 0 for token in seen)
    if name == "lora_1gpu":
        model, tokenizer = stock_run(run, demo_model, "lora")
        assert stock_loss(model, tokenizer, docstrings) < 8
