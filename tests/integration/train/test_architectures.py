"""New tokens' rows on every family of models, in one process: trained, exact, and read alike by stock libraries."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from peftchat.models.added_tokens import AddedTokenEmbeddings, is_tied, register_hooks
from peftchat.training.loss import install_supervised_forward
from tests.support.cli import peftchat
from tests.support.data import read_json, write_small_talk
from tests.support.models import random_model, small_model
from tests.support.recipes import write_training_recipe
from tests.support.stock import stock_loss, stock_run

FAMILIES = [
    "llama", "gpt2", "gpt_bigcode", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "falcon",
    "opt-projected", "starcoder2", "gpt_neox", "cohere", "granite", "olmo2", "llama4_text",
]  # fmt: skip


@pytest.mark.parametrize("architecture", FAMILIES)
def test_rows_around_the_model_equal_a_resized_model(architecture: str) -> None:
    """Logits, loss and gradients of hooked rows are those of a model that was resized and given the same rows."""
    vocabulary, ids = 100, [97, 100, 101, 103]
    model = random_model(architecture, vocabulary)
    grown = random_model(architecture, vocabulary)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grown.resize_token_embeddings(104, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model)
    rows = AddedTokenEmbeddings(
        ids,
        torch.randn(4, embedding.weight.shape[1]),
        None if tied else torch.randn(4, head.weight.shape[1]),
        None if head.bias is None else torch.randn(4),
        vocabulary,
        float(getattr(embedding, "embed_scale", 1.0)),
    )
    with torch.no_grad():
        grown.get_input_embeddings().weight[ids] = rows.input_embeddings
        if rows.output_embeddings is not None:
            grown.get_output_embeddings().weight[ids] = rows.output_embeddings
        if rows.output_bias is not None:
            grown.get_output_embeddings().bias[ids] = rows.output_bias
    model.requires_grad_(False)
    register_hooks(model, rows)
    install_supervised_forward(model)

    tokens = torch.randint(97, (2, 12))
    tokens[0, 3], tokens[0, 5], tokens[1, 2], tokens[1, 9] = 97, 100, 103, 101
    labels = tokens.clone()
    labels[:, :4] = -100
    expected = grown(input_ids=tokens, use_cache=False).logits
    logits = model(input_ids=tokens, use_cache=False).logits
    known = [token for token in range(104) if token != 102]
    torch.testing.assert_close(logits[..., known], expected[..., known])

    output = model(input_ids=tokens, labels=labels, supervised=True)
    # Id 102 has no row: it is nobody's token, and takes no part.
    masked = expected.index_fill(-1, torch.tensor([102]), torch.finfo().min)
    plain = F.cross_entropy(masked[:, :-1].reshape(-1, 104), labels[:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(output.loss, plain)
    output.loss.backward()
    plain.backward()
    torch.testing.assert_close(
        rows.input_embeddings.grad, grown.get_input_embeddings().weight.grad[ids], atol=1e-5, rtol=1e-4
    )
    if rows.output_embeddings is not None:
        torch.testing.assert_close(
            rows.output_embeddings.grad, grown.get_output_embeddings().weight.grad[ids], atol=1e-5, rtol=1e-4
        )
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "added_tokens" not in name)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "architecture",
    [
        *("gpt_bigcode", "gemma", "qwen2", "falcon", "opt-projected", "phi"),
        *("mamba", "qwen3_5_text", "granitemoehybrid-dense", "llama4_text"),
    ],
)
def test_a_run_on_each_family_is_read_by_stock_libraries(architecture: str, method: str, tmp_path: Path) -> None:
    base = small_model(architecture)
    train, held_out = (
        write_small_talk(tmp_path / "train.jsonl", 12),
        write_small_talk(tmp_path / "eval.jsonl", 5, seed=1),
    )
    run = tmp_path / "run"
    # transformers keeps packed conversations apart in most models; where it does not, training refuses to pack.
    packing = architecture not in ("falcon", "opt-projected", "mamba", "qwen3_5_text")
    targets = {"gpt_bigcode": ["c_attn", "c_proj", "c_fc"]}.get(architecture, "all-linear")
    adapter = {"adapter": {"target_modules": targets}} if method == "lora" else {}
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", base, train, held_out, run, method=method, data={"packing": packing}, **adapter
    )
    done = peftchat("train", str(recipe))
    assert done.returncode == 0, done.stderr
    facts = read_json(run / "run.json")
    assert all(entry["input_moved"] > 0 and entry["output_moved"] > 0 for entry in facts["new_tokens"])
    model, tokenizer = stock_run(run, base, method)
    if architecture == "phi" and method == "lora":
        # PEFT's wrapper around a head leaves the head's bias out until it is merged:
        # https://github.com/huggingface/peft/issues/3649
        assert stock_loss(model, tokenizer, held_out) != pytest.approx(facts["eval_loss"], rel=1e-5)
        model = model.merge_and_unload()
    assert stock_loss(model, tokenizer, held_out) == pytest.approx(facts["eval_loss"], rel=1e-5)


def test_spare_rows_of_the_base_need_no_resize(tmp_path: Path) -> None:
    """With room in the vocabulary, a stock adapter load on the untouched base is all it takes."""
    base = small_model(tied=False, spare_rows=16)
    train, held_out = write_small_talk(tmp_path / "train.jsonl"), write_small_talk(tmp_path / "eval.jsonl", 5, seed=1)
    run = tmp_path / "run"
    done = peftchat("train", str(write_training_recipe(tmp_path / "recipe.yaml", base, train, held_out, run)))
    assert done.returncode == 0, done.stderr
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32), str(run))
    _, tokenizer = stock_run(run, base, "lora")
    assert stock_loss(model.eval(), tokenizer, held_out) == pytest.approx(
        read_json(run / "run.json")["eval_loss"], rel=1e-5
    )


@pytest.mark.parametrize("architecture", ["falcon", "afmoe"])
def test_packing_is_refused_where_conversations_would_see_each_other(architecture: str, tmp_path: Path) -> None:
    """AFMoE's leak only where a pack is longer than the window of its layers, here 64 of 128 tokens."""
    base, train = small_model(architecture), write_small_talk(tmp_path / "train.jsonl")
    run = tmp_path / "run"
    done = peftchat("train", str(write_training_recipe(tmp_path / "recipe.yaml", base, train, None, run)))
    assert done.returncode == 2
    assert "packing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not run.exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_layer_between_the_hidden_states_and_the_head_is_refused(method: str, tmp_path: Path) -> None:
    """Each token's loss is compared: near an even distribution the sums of all tokens hardly differ."""
    base, train = small_model("modernbert-decoder"), write_small_talk(tmp_path / "train.jsonl")
    run = tmp_path / "run"
    recipe = write_training_recipe(tmp_path / "recipe.yaml", base, train, None, run, method=method)
    done = peftchat("train", recipe)
    assert (done.returncode, "does not match the model's own logits" in done.stderr) == (2, True), done.stderr
    assert not run.exists()


def test_an_adapter_that_peft_would_not_find_again_is_refused_before_training(tmp_path: Path) -> None:
    base, train = small_model("laguna"), write_small_talk(tmp_path / "train.jsonl")
    held_out = write_small_talk(tmp_path / "eval.jsonl", 5, seed=1)
    run = tmp_path / "run"
    recipe = write_training_recipe(tmp_path / "recipe.yaml", base, train, held_out, run)
    done = peftchat("train", recipe)
    assert done.returncode == 2 and "step 1/" not in done.stderr
    assert "would not find 6 of the adapter's" in done.stderr and "shared_experts.up_proj" in done.stderr
    # What the message advises helps, and stock PEFT reads the result.
    done = peftchat("train", recipe, "--set", "adapter.target_modules=attention")
    assert done.returncode == 0, done.stderr
    model, tokenizer = stock_run(run, base, "lora")
    expected = read_json(run / "run.json")["eval_loss"]
    assert stock_loss(model, tokenizer, held_out) == pytest.approx(expected, rel=1e-5)
