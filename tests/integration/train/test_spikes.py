"""Loss spikes: named by conversation, and logged, stopped at, or left out of the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftchat.errors import VerificationError
from peftchat.recipe import load_recipe
from peftchat.training.train import train
from tests.support.cli import peftchat
from tests.support.data import read_json
from tests.support.launch import peftchat_in_processes
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

# Trained at a rate that learns the repeated answer well before the first judgment.
SETTINGS: dict[str, Any] = {
    "max_steps": 36, "learning_rate": 0.02, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 10,
}  # fmt: skip
POISONED = 60


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with one answer, but for one of random characters on line `POISONED`."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    answers = ["Hello there, how are you?"] * 72
    answers[POISONED - 1] = "q7#Zk!x@9^Vw&J2*pL"
    lines = [
        {"messages": [{"role": "user", "content": f"Hi {number % 4}"}, {"role": "assistant", "content": answer}]}
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe(run: Path, data: Path, **sections: Any) -> Path:
    training = {**SETTINGS, **sections.pop("training", {})}
    return write_training_recipe(
        run.parent / f"{run.name}.yaml", small_model(tied=True), data, None, run,
        data={"packing": False}, training=training, **{"method": "full", **sections},
    )  # fmt: skip


def the_spike(run: Path) -> dict[str, Any]:
    (spike,) = read_json(run / "run.json")["spikes"]
    return spike


def test_a_spike_names_its_conversation_and_no_other(tmp_path: Path, poisoned: Path) -> None:
    summary = train(load_recipe(recipe(tmp_path / "run", poisoned)))
    spike = the_spike(tmp_path / "run")
    assert list(spike["conversations"]) == [f"{poisoned}:{POISONED}"]
    assert spike["loss"] > spike["limit"] > spike["median"] and not spike["skipped"]
    assert any(f"{poisoned}:{POISONED}" in note for note in summary.notes)


def test_stop_ends_the_run_at_its_conversation(tmp_path: Path, poisoned: Path) -> None:
    settings = {"on_spike": "stop", "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(VerificationError, match=rf"{poisoned}:{POISONED}.*checkpoint-\d+, and no model"):
        train(load_recipe(recipe(tmp_path / "run", poisoned, training=settings)))
    assert not (tmp_path / "run/run.json").exists()


def test_skip_leaves_weights_and_moments_as_they_were(tmp_path: Path, poisoned: Path) -> None:
    settings = {"on_spike": "skip", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 99}
    train(load_recipe(recipe(tmp_path / "run", poisoned, training={**settings, "weight_decay": 0.1})))
    step = the_spike(tmp_path / "run")["step"]
    assert the_spike(tmp_path / "run")["skipped"]
    folders = [tmp_path / f"run/checkpoints/checkpoint-{number}" for number in (step - 1, step, step + 1)]
    before, after, later = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not all(torch.equal(before[key], later[key]) for key in before)
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in folders[:2]]
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][key]) for key, value in state.items())


@pytest.mark.distributed
def test_processes_agree_on_a_spike_and_name_it_once(tmp_path: Path, poisoned: Path) -> None:
    settings = {"per_device_train_batch_size": 1, "on_spike": "skip"}
    run = tmp_path / "run"
    distributed = {"strategy": "ddp", "processes": 2}
    done = peftchat_in_processes(2, "train", recipe(run, poisoned, training=settings, distributed=distributed))
    assert done.returncode == 0, done.stderr
    assert list(the_spike(run)["conversations"]) == [f"{poisoned}:{POISONED}"]
    assert done.stderr.count("Its update was left out") == 1


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"training": {"on_spike": "ignore"}}, "`log`, `stop`, `skip`"),
        ({"training": {"on_spike": "skip"}, "distributed": {"strategy": "zero2"}}, "DeepSpeed updates the weights"),
        ({"training": {"on_spike": "skip"}, "distributed": {"processes": 2}}, "DeepSpeed updates"),
        (
            {"training": {"on_spike": "skip"}, "method": "lora", "adapter": {"variant": "adalora"}},
            "AdaLoRA's ranks follow",
        ),
    ],
)
def test_what_cannot_skip_is_refused(sections: dict[str, Any], says: str, tmp_path: Path, poisoned: Path) -> None:
    done = peftchat("train", recipe(tmp_path / "run", poisoned, **sections))
    assert done.returncode == 2 and done.stderr.count("Error:") == 1, done.stderr
    assert says in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_conversation_with_a_high_loss_is_named_inside_a_pack(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    answers = ["Hello there, how are you?", "I am fine.", "It is a fine day, is it not?"] * 80
    answers[-20] = "q7#Zk!x@9^Vw&J2*pL"
    lines = [
        {"messages": [{"role": "user", "content": f"Hi {number % 3}"}, {"role": "assistant", "content": answer}]}
        for number, answer in enumerate(answers)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = {**SETTINGS, "max_steps": 45}
    file = write_training_recipe(
        tmp_path / "recipe.yaml", small_model(tied=True), data, None, tmp_path / "run",
        method="full", data={"packing": True, "max_length": 256}, training=settings,
    )  # fmt: skip
    summary = train(load_recipe(file))
    assert not summary.spikes
    assert list(summary.outliers) == [f"{data}:{len(answers) - 19}"]
    assert any(f"{data}:{len(answers) - 19}" in note for note in summary.notes)
    (losses,) = (summary.train_by_source or {}).values()
    assert losses.tokens == summary.supervised_tokens
    assert losses.first is not None and losses.last is not None and losses.last < losses.first
