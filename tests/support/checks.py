"""What has to hold of every finished run."""

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support.data import read_json
from tests.support.stock import nf4, stock_loss, stock_run

NEW_TOKENS = ("<|system|>", "<|assistant|>", "<|user|>", "<|end|>")


def check_run(run: Path, base: Path, held_out: Path, *, method: str, tied: bool, processes: int) -> None:
    """Check that the new tokens were trained, that nothing else was, and that stock libraries see the same loss."""
    summary = read_json(run / "run.json")
    assert summary["world_size"] == processes
    assert [entry["token"] for entry in summary["new_tokens"]] == list(NEW_TOKENS)
    for entry in summary["new_tokens"]:
        assert entry["seen"] > 0
        assert entry["input_moved"] > 1e-3
        assert entry["output_moved"] > 1e-3
        assert (entry["input_moved"] == entry["output_moved"]) == tied
    assert summary["eval_loss"] < summary["eval_loss_before"]

    model, tokenizer = stock_run(run, base, method, nf4() if method == "qlora" else None)
    assert tokenizer.convert_tokens_to_ids(list(NEW_TOKENS)) == [entry["id"] for entry in summary["new_tokens"]]
    assert stock_loss(model, tokenizer, held_out) == pytest.approx(summary["eval_loss"], rel=1e-5)

    if method == "full":
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head.data_ptr() == embedding.data_ptr()) == tied
        return
    with safe_open(str(run / "adapter_model.safetensors"), framework="pt") as file:
        names = set(file.keys())
        rows = {name for name in names if "trainable_tokens_delta" in name}
        assert len(rows) == (1 if tied else 2)
        assert all(file.get_tensor(name).shape == (4, 32) for name in rows)
        assert all(".lora_" in name for name in names - rows)
