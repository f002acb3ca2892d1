"""New tokens: rows, growth, ties and biases."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftchat.merging import MergeOptions, merge_run
from tests.support.adapters import (
    IDS,
    VOCABULARY,
    apart,
    load,
    make_base,
    merged_logits,
    oracle,
    tensors_of,
    train_by_noise,
)

NEW = [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2, VOCABULARY + 3]
SPARE = [90, 91, 92, 93]

MODELS = {
    "llama": ("embed_tokens", "lm_head"),
    "llama-tied": ("embed_tokens", None),
    "qwen2-tied": ("embed_tokens", None),
    "gemma2": ("embed_tokens", None),
    "mistral": ("embed_tokens", "lm_head"),
    "phi": ("embed_tokens", "lm_head"),
    "opt": ("embed_tokens", None),
    "falcon": ("word_embeddings", None),
    "gpt2": ("wte", None),
    "gpt_bigcode": ("wte", None),
}


@pytest.mark.parametrize("ids", [NEW, SPARE], ids=["grown", "spare rows"])
@pytest.mark.parametrize("kind", MODELS)
def test_token_rows(kind: str, ids: list[int], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", kind)
    embedding, head = MODELS[kind]
    rows = max(ids) + 1
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        trainable_token_indices={name: ids for name in (embedding, head) if name is not None},
    )
    trained = train_by_noise(base, tmp_path / "run", config, rows)
    result = merge_run(tmp_path / "run", MergeOptions())
    proof = result.report.verification
    assert proof is not None and proof.passed and proof.special_tokens == ids
    assert apart(merged_logits(result.folder), trained.merged_logits) < 1e-5
    config = json.loads((result.folder / "config.json").read_text())
    assert config["vocab_size"] == max(rows, VOCABULARY)
    # A tie stays one tensor, and rows of other tokens stay bit for bit.
    before, after = tensors_of(base), tensors_of(result.folder)
    assert after.keys() == before.keys()
    assert result.report.tied == (head is None)
    name = next(name for name in after if name.endswith(f"{embedding}.weight"))
    old = [index for index in range(VOCABULARY) if index not in ids]
    assert torch.equal(after[name][old], before[name][old])
    assert not torch.equal(after[name][ids[0]], before[name][min(ids[0], VOCABULARY - 1)])


def test_a_head_with_a_bias_keeps_it(tmp_path: Path) -> None:
    """Phi has a bias on its head. The unmerged forward of stock PEFT drops it (peft#3649): once it does not, the last
    assertion fails and the note in `reference.py` can go."""
    base = make_base(tmp_path / "base", "phi")
    config = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": SPARE, "lm_head": SPARE}
    )
    trained = train_by_noise(base, tmp_path / "run", config)
    result = merge_run(tmp_path / "run", MergeOptions())
    assert apart(merged_logits(result.folder), trained.merged_logits) < 1e-5
    bias = tensors_of(base)["lm_head.bias"]
    assert apart(trained.logits + bias, trained.merged_logits) < 1e-5
    assert apart(trained.logits, trained.merged_logits) > 1e-3, "peft#3649 is fixed"


def test_a_grown_head_bias_gets_the_mean(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "phi")
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": NEW, "lm_head": NEW})
    train_by_noise(base, tmp_path / "run", config, rows=max(NEW) + 1)
    merged = tensors_of(merge_run(tmp_path / "run", MergeOptions()).folder)
    old = tensors_of(base)["lm_head.bias"]
    assert torch.equal(merged["lm_head.bias"][:VOCABULARY], old)
    torch.testing.assert_close(merged["lm_head.bias"][VOCABULARY:], old.mean().expand(len(NEW)))


@pytest.mark.parametrize("change", ["lora on the embedding", "lora on the head", "head trained whole"])
def test_a_tie_that_training_broke_is_written_as_two_tensors(change: str, tmp_path: Path) -> None:
    """Unmerged, one side is trained and the other is not; folding into the shared weight would change both."""
    base = make_base(tmp_path / "base", "llama-tied")
    options = {
        "lora on the embedding": {"target_modules": ["embed_tokens"]},
        "lora on the head": {"target_modules": ["lm_head"]},
        "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    trained = train_by_noise(base, tmp_path / "run", LoraConfig(r=4, **options[change]))
    result = merge_run(tmp_path / "run", MergeOptions())
    assert not result.report.tied
    assert json.loads((result.folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert apart(merged_logits(result.folder), trained.logits) < 1e-5


@pytest.mark.parametrize("rows", [0, VOCABULARY + 4], ids=["as it was", "grown"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "mamba"])
@pytest.mark.parametrize("trained", ["other layers", "whole", "lora on the embedding", "lora on the head", "rows"])
def test_an_adapter_that_peft_saved_with_its_embeddings(trained: str, kind: str, rows: int, tmp_path: Path) -> None:
    """Stock PEFT adds them by itself to the file of a model whose vocabulary grew, or whose embedding it adapts."""
    layer, embedding = {"gpt2": ("c_attn", "wte"), "mamba": ("x_proj", "embeddings")}.get(
        kind, ("q_proj", "embed_tokens")
    )
    options: dict[str, dict[str, Any]] = {
        "other layers": {},
        "whole": {"modules_to_save": [embedding, *(["lm_head"] if kind == "llama" else [])]},
        "lora on the embedding": {"target_modules": [layer, embedding]},
        "lora on the head": {"target_modules": [layer, "lm_head"]},
        "rows": {"trainable_token_indices": [3, VOCABULARY - 1]},
    }
    base = make_base(tmp_path / "base", kind)
    config = LoraConfig(r=4, **{"target_modules": [layer], **options[trained]})
    stock = train_by_noise(base, tmp_path / "run", config, rows, save_embeddings="auto")
    result = merge_run(tmp_path / "run", MergeOptions())
    assert result.report.verification is not None and result.report.verification.passed
    # Of new rows that are in no file, each load draws its own.
    known = (merged_logits(result.folder)[..., :VOCABULARY], stock.logits[..., :VOCABULARY])
    assert apart(*known) < 1e-5


def test_a_head_that_one_adapter_replaces_and_another_changes(tmp_path: Path) -> None:
    """The update is added to the trained copy, which stays as it is in memory."""
    base = make_base(tmp_path / "base", "llama")
    replaced = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    train_by_noise(base, tmp_path / "one", replaced)
    train_by_noise(base, tmp_path / "two", LoraConfig(r=4, target_modules=["lm_head"]))
    both = merge_run(tmp_path / "one", MergeOptions(adapters=((tmp_path / "two", 1.0),)))
    assert both.report.verification is not None and both.report.verification.passed
    whole = load_file(tmp_path / "one" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    two = load_file(tmp_path / "two" / "adapter_model.safetensors")
    left, right = (two[f"base_model.model.lm_head.lora_{side}.weight"] for side in "BA")
    torch.testing.assert_close(tensors_of(both.folder)["lm_head.weight"], whole + 2 * left @ right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype)
    trained = train_by_noise(base, tmp_path / "run", LoraConfig(r=4, target_modules="all-linear"))
    result = merge_run(tmp_path / "run", MergeOptions())
    for name, value in tensors_of(result.folder).items():
        assert value.dtype == dtype
        torch.testing.assert_close(value, trained.merged[name].to(dtype), atol=0, rtol=0.01)
    wide = merge_run(tmp_path / "run", MergeOptions(output=tmp_path / "wide", dtype=torch.float32))
    assert apart(merged_logits(wide.folder), trained.merged_logits) < 1e-5
    assert AutoModelForCausalLM.from_pretrained(wide.folder, dtype="auto").dtype == torch.float32


def test_scale_multiplies_the_update(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    train_by_noise(base, tmp_path / "run", LoraConfig(r=4, target_modules="all-linear"))
    model = PeftModel.from_pretrained(load(base), tmp_path / "run")
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.25)
    result = merge_run(tmp_path / "run", MergeOptions(scale=0.25))
    assert result.report.verification is not None and result.report.verification.passed
    with torch.no_grad():
        assert apart(merged_logits(result.folder), model(IDS).logits) < 1e-5


def test_several_adapters_add_up(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    train_by_noise(base, tmp_path / "one", LoraConfig(r=4, target_modules="all-linear"))
    train_by_noise(base, tmp_path / "two", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), noise=0.1)
    model = PeftModel.from_pretrained(load(base), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    result = merge_run(tmp_path / "one", MergeOptions(adapters=((tmp_path / "two", 0.5),)))
    with torch.no_grad():
        assert apart(merged_logits(result.folder), model(IDS).logits) < 1e-5


def test_the_same_tokens_of_two_runs_are_averaged_by_weight(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama-tied")
    for run, noise in (("one", 0.05), ("two", 0.2)):
        config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": NEW})
        train_by_noise(base, tmp_path / run, config, rows=max(NEW) + 1, noise=noise)
    rows = {
        run: oracle(base, tmp_path / run, max(NEW) + 1).merged["model.embed_tokens.weight"][NEW]
        for run in ("one", "two")
    }
    result = merge_run(tmp_path / "one", MergeOptions(adapters=((tmp_path / "two", 3.0),)))
    found = tensors_of(result.folder)["model.embed_tokens.weight"][NEW]
    torch.testing.assert_close(found, 0.25 * rows["one"] + 0.75 * rows["two"])
