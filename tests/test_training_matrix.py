"""Every method, tied and untied, on one process, DDP and ZeRO: new rows train, nothing else does, stock agrees."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training_helpers import (
    peftchat,
    read_json,
    read_json_lines,
    small_model,
    stock_loss,
    stock_run,
    write_conversations,
    write_recipe,
)

NEW_TOKENS = ("<|system|>", "<|assistant|>", "<|user|>", "<|end|>")
PLACES = [
    pytest.param("single", 1, id="single"),
    pytest.param("ddp", 2, id="ddp2", marks=pytest.mark.distributed),
    pytest.param("zero2", 2, id="zero2x2", marks=pytest.mark.distributed),
    pytest.param("zero3", 2, id="zero3x2", marks=pytest.mark.distributed),
]


def quantization():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )


@pytest.mark.parametrize(("strategy", "processes"), PLACES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_stock_libraries_see_what_was_trained(
    method: str, tied: bool, strategy: str, processes: int, tmp_path: Path
) -> None:
    base = small_model(tmp_path / "base", tied=tied)
    train, held_out = (
        write_conversations(tmp_path / "train.jsonl"),
        write_conversations(tmp_path / "eval.jsonl", 7, seed=1),
    )
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml", base, train, held_out, run,
        method=method, distributed={"strategy": strategy, "processes": processes},
    )  # fmt: skip
    done = peftchat("train", str(recipe))
    assert done.returncode == 0, done.stderr
    assert not done.stdout

    facts = read_json(run / "run.json")
    assert facts["world_size"] == processes
    assert [entry["token"] for entry in facts["new_tokens"]] == list(NEW_TOKENS)
    for entry in facts["new_tokens"]:
        assert entry["seen"] > 0
        assert entry["input_moved"] > 1e-3
        assert entry["output_moved"] > 1e-3
        assert (entry["input_moved"] == entry["output_moved"]) == tied
    assert facts["eval_loss"] < facts["eval_loss_before"]

    model, tokenizer = stock_run(run, base, method, quantization() if method == "qlora" else None)
    assert tokenizer.convert_tokens_to_ids(list(NEW_TOKENS)) == [entry["id"] for entry in facts["new_tokens"]]
    assert stock_loss(model, tokenizer, held_out) == pytest.approx(facts["eval_loss"], rel=1e-5)

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


def test_every_strategy_takes_the_same_steps(tmp_path: Path) -> None:
    """DDP and ZeRO-3 shard the work, not the result: the losses of every step are those of one process."""
    base, train = small_model(tmp_path / "base", tied=False), write_conversations(tmp_path / "train.jsonl", 48)
    losses = {}
    for name, strategy, processes, accumulation in (("one", "single", 1, 2), ("two", "zero3", 2, 1)):
        run = tmp_path / name
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", base, train, None, run, method="full",
            distributed={"strategy": strategy, "processes": processes},
            training={"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1},
        )  # fmt: skip
        done = peftchat("train", str(recipe))
        assert done.returncode == 0, done.stderr
        losses[name] = [line["loss"] for line in read_json_lines(run / "metrics.jsonl")]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
