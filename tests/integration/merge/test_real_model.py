"""A real run of the 135M model, merged: the merged model says what base and adapter say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.cli import peftchat
from tests.support.data import read_json
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_run

PROMPTS = 3
NEW_TOKENS = 8


@pytest.mark.real
def test_merged_and_adapter_continue_alike(demo_model: Path, tmp_path: Path) -> None:
    """In float32, greedy continuations of held-out questions are the same, token for token."""
    made = peftchat(
        "data", "from-code", "json", "textwrap", "shutil", "-o", str(tmp_path / "data"), "--max-samples", "120"
    )
    assert made.returncode == 0, made.stderr
    run = tmp_path / "run"
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", demo_model, tmp_path / "data" / "train.jsonl", None, run,
        data={"max_length": 128},
        training={"learning_rate": 1e-3, "max_steps": 3},
    )  # fmt: skip
    done = peftchat("train", str(recipe), timeout=900)
    assert done.returncode == 0, done.stderr
    merged = peftchat("merge", str(run), "--dtype", "float32", "--json", timeout=900)
    assert merged.returncode == 0, merged.stderr
    folder = Path(json.loads(merged.stdout)["folder"])
    assert read_json(folder / "merge_report.json")

    adapter, tokenizer = stock_run(run, demo_model, "lora")
    whole = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    questions = []
    for name in ("eval.jsonl", "train.jsonl"):
        for line in (tmp_path / "data" / name).read_text(encoding="utf-8").splitlines():
            questions.append(json.loads(line)["messages"][:1])
    for messages in questions[:PROMPTS]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            expected, found = adapter(input_ids=ids).logits, whole(input_ids=ids).logits
            spread = float(expected.max() - expected.min())
            assert float((expected - found).abs().max()) <= 1e-4 * spread
            assert (
                adapter.generate(input_ids=ids, **settings).tolist()
                == whole.generate(input_ids=ids, **settings).tolist()
            )
