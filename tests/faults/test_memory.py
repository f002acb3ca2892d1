"""Memory that runs out: the message says where and what to change, or the step is done again in smaller parts."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import peftchat
from peftchat.errors import UserError, VerificationError
from peftchat.training import train as training
from peftchat.training.out_of_memory import deal_out, is_out_of_memory
from tests.support.data import read_json, read_json_lines, write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

LIMIT = 200
"""Tokens of a backward pass: more than the longest conversation has, and fewer than a pack."""

CUDA_WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB."


def recipe(folder: Path, name: str, **sections: Any) -> Path:
    data = write_small_talk(folder / "train.jsonl", 24)
    return write_training_recipe(folder / f"{name}.yaml", small_model(), data, None, folder / name, **sections)


def run_out(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Let each backward pass of more tokens fail behind the first layer; return the sizes of the others."""
    build, seen = training.build_trainer, []

    def hooked(*arguments: Any) -> Any:
        trainer = build(*arguments)

        def fail(gradient: torch.Tensor) -> None:
            size = gradient.shape[0] * gradient.shape[1]
            if size > tokens:
                raise torch.OutOfMemoryError(CUDA_WORDS)
            seen.append(size)

        def watch(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad and trainer.state.global_step + trainer.position.now.step:
                hidden.register_hook(fail)

        # Behind it the later layers have their gradients, and this one has not.
        trainer.causal_model.model.layers[0].register_forward_hook(watch)
        return trainer

    monkeypatch.setattr(training, "build_trainer", hooked)
    return seen


@pytest.mark.parametrize(
    ("method", "packing", "attention", "batch"),
    [("full", True, "auto", 1), ("lora", True, "sdpa", 2), ("lora", False, "sdpa", 4)],
    ids=["one pack in a line", "packs in rows", "padded"],
)
def test_a_step_in_halves_is_the_same_update(
    method: str, packing: bool, attention: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2, "optim": "sgd"}
    sections = {"method": method, "data": {"packing": packing, "max_length": 512}, "model": {"attention": attention}}
    peftchat.train(recipe(tmp_path, "whole", training=settings, **sections))
    seen = run_out(monkeypatch, LIMIT)
    halved = {**settings, "on_oom": "halve"}
    summary = peftchat.train(recipe(tmp_path, "halved", training=halved, **sections))
    assert 0 < max(seen) <= LIMIT
    whole, parts = (read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "halved"))
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-6)
    assert [line["grad_norm"] for line in parts] == pytest.approx([line["grad_norm"] for line in whole], rel=1e-5)
    weights = [load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("whole", "halved")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)
    counts = [read_json(tmp_path / name / "run.json") for name in ("whole", "halved")]
    for key in ("tokens", "supervised_tokens", "padding_fraction"):
        assert counts[0][key] == counts[1][key]
    assert any("in 2 parts" in note for note in summary.notes)


def test_without_halving_the_message_says_where_and_the_cheapest_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, 0)
    with pytest.raises(VerificationError) as failed:
        peftchat.train(recipe(tmp_path, "run", training={"max_steps": 2}))
    said = str(failed.value)
    assert "out of memory in the backward pass of step 1, with " in said and f"{tmp_path}/train.jsonl:" in said
    assert CUDA_WORDS in said and "By the plan the cheapest change is a batch of 1 with accumulation" in said
    assert "--set training.per_device_train_batch_size=1" in said and "on_oom=halve" in said


def test_a_single_conversation_cannot_be_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out(monkeypatch, 5)
    # Planning takes seconds, and the other test has it.
    monkeypatch.setattr("peftchat.planning.memory_advice.memory_advice", lambda *_: "")
    with pytest.raises(VerificationError, match="out of memory in the backward pass of step 1"):
        peftchat.train(recipe(tmp_path, "run", training={"on_oom": "halve"}))


def test_several_processes_refuse_it(tmp_path: Path) -> None:
    for distributed in ({"strategy": "ddp"}, {"strategy": "zero3"}, {"processes": 2}):
        with pytest.raises(UserError, match="several processes have to take each step alike"):
            peftchat.load_recipe(recipe(tmp_path, "run", training={"on_oom": "halve"}, distributed=distributed))


def test_the_words_of_libraries_are_known() -> None:
    """torch's own error on a CPU is a plain `RuntimeError`; the system gives no more than a limit of this process."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, before[1]))
    try:
        for allocate in (lambda: torch.empty(2**30), lambda: np.empty(2**33), lambda: bytearray(2**33)):
            with pytest.raises((RuntimeError, MemoryError)) as failed:
                allocate()
            assert is_out_of_memory(failed.value)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_conversations_are_dealt_out_in_order() -> None:
    assert deal_out([4, 5, 6, 7], [10, 10, 10, 10], 2) == [[4, 5], [6, 7]]
    assert deal_out([4, 5, 6], [1, 1000, 1], 4) == [[4], [5], [6]]
    assert deal_out([4], [9], 2) == [[4]]
    lengths = np.random.default_rng(0).integers(1, 100, 50).tolist()
    for parts in (2, 4, 8, 64):
        dealt = deal_out(range(50), lengths, parts)
        assert [one for part in dealt for one in part] == list(range(50)) and len(dealt) <= parts
    assert json.dumps(dealt)
