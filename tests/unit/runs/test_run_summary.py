"""`run.json`: what is written is read back, old files keep their meaning, and mistakes name the file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.runs.run_folder import RunFolder
from peftchat.runs.run_summary import AddedToken, AutoSetting, MemoryParts, RunSummary, SampleAnswer

SUMMARY = RunSummary(
    method="lora",
    base_model="org/base",
    train_examples=12,
    dropped={"too_long": 2, "nothing_to_learn": 1},
    tokens=100,
    supervised_tokens=40,
    train_loss=math.inf,
    memory_bytes=MemoryParts(baseline=1, optimizer=2, activations_and_other=3),
    new_tokens=(AddedToken("<|end|>", 7, 3, 0.5, None),),
    samples_after=(SampleAnswer("Hi", "Grüße 🌍", True),),
    auto_settings=(AutoSetting("training.torch_compile", "true", "long"),),
)


def test_a_written_summary_reads_back_equal(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    SUMMARY.write(folder)
    assert RunSummary.read(folder) == SUMMARY
    assert folder.is_finished
    assert "Grüße 🌍" in folder.summary.read_text(encoding="utf-8")


def test_the_contract_keys_are_in_the_file(tmp_path: Path) -> None:
    SUMMARY.write(RunFolder(tmp_path))
    written = json.loads((tmp_path / "run.json").read_text())
    assert written.keys() >= {
        "tokens", "supervised_tokens", "tokens_per_second", "seconds", "padding_fraction", "peak_memory_bytes",
        "trainable_parameters", "train_loss", "eval_loss_before", "eval_loss", "new_tokens", "versions", "world_size",
        "model_flops_utilisation", "base_model", "train_examples", "eval_examples", "formats", "truncated",
        "special_token_text", "auto_settings",
    }  # fmt: skip
    assert written["new_tokens"] == [{"token": "<|end|>", "id": 7, "seen": 3, "input_moved": 0.5, "output_moved": None}]
    assert written["memory_bytes"].keys() == MemoryParts.model_fields.keys()


def test_a_file_with_the_old_keys_keeps_its_meaning(tmp_path: Path) -> None:
    old = {
        "base": "org/base", "rows": 5, "eval_rows": 2, "forms": {"a.jsonl": "messages"}, "shortened": 1,
        "special_text": 3, "choices": [{"key": "k", "value": "v", "reason": "r"}],
        "memory_bytes": {"start": 1, "activations_and_rest": 2}, "a_newer_key": 1, "eval_loss": None, "versions": None,
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(old), encoding="utf-8")
    assert RunSummary.read(RunFolder(tmp_path)) == RunSummary(
        base_model="org/base",
        train_examples=5,
        eval_examples=2,
        formats={"a.jsonl": "messages"},
        truncated=1,
        special_token_text=3,
        auto_settings=(AutoSetting("k", "v", "r"),),
        memory_bytes=MemoryParts(baseline=1, activations_and_other=2),
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no run.json"), ("{", "not a JSON file"), ("[]", "not a JSON object"), ('{"steps": "many"}', "`steps`")],
)
def test_a_file_that_is_no_summary_is_an_error(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        RunSummary.read(RunFolder(tmp_path))


def test_the_size_of_a_run_counts_the_adapter_of_its_tokens_and_not_its_merged_model(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "adapter_model.safetensors": 10,
        "token_rows/adapter_model.safetensors": 5,
        "token_rows/adapter_config.json": 2,
        "merged/model.safetensors": 1000,
        "checkpoints/checkpoint-1/adapter_model.safetensors": 100,
    }
    assert RunFolder(tmp_path).weights_bytes() is None
    for name, size in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert RunFolder(tmp_path).weights_bytes() == 15
