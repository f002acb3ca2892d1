import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peftchat.chat_template.templates import CHAT_TEMPLATES
from peftchat.reports import run_terminal as summary
from peftchat.reports.assessment import run_warnings
from peftchat.reports.model_card import model_card
from peftchat.runs.run_summary import RunSummary
from tests.support.reports import RECIPE, RUN_JSON

TOKENS = ["<|system|>", "<|assistant|>", "<|user|>", "<|end|>"]
BASE_ROWS = 48


def card(recipe: str = RECIPE, **run_json: Any) -> str:
    return model_card(RunSummary.model_validate({**RUN_JSON, **run_json}), recipe)


def python_of(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def front_matter(text: str) -> dict[str, Any]:
    return YAML(typ="safe").load(text.split("---")[1])


def test_front_matter_names_the_base_only_where_others_can_find_it() -> None:
    assert front_matter(card()) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["chat", "peftchat", "lora"],
    }
    assert "base_model" not in front_matter(card(RECIPE.replace("org/base", "/private/models/base")))
    full = RECIPE.replace("method: lora\nadapter: {r: 4, alpha: 8}", "method: full")
    assert front_matter(card(full))["library_name"] == "transformers"
    assert front_matter(card(full))["base_model_relation"] == "finetune"


def test_no_folder_of_the_author_is_told() -> None:
    text = card(RECIPE.replace("org/base", "/private/models/base"))
    assert "secret" not in text
    assert "private" not in text
    for name in ("conversations.jsonl", "org/a-set", "`base`", "# demo"):
        assert name in text


def test_limits_come_from_the_run() -> None:
    limits = card(train_examples=200, eval_loss=None, epochs=9.0).split("## Limits")[1]
    for words in (
        "only 200 conversations",
        "No held-out",
        "about 9 times",
        "10 of the conversations were dropped: 7 longer than",
        "&lt;s&gt;",
        "did not move",
    ):
        assert words in limits
    calm = card(new_tokens=[], dropped={}, special_token_text=0, samples_after=[]).split("## Limits")[1]
    assert calm.count("\n- ") == 1


def test_vllm_is_told_apart_by_what_the_adapter_brings() -> None:
    assert "peftchat merge demo" in card()
    assert "does not serve" in card()
    assert "does not serve" not in card(new_tokens=[])


def test_the_base_is_grown_only_where_it_must_be() -> None:
    assert "model.resize_token_embeddings(49155" in card()
    assert "IndexError" in card()
    assert "resize" not in card(base_vocabulary_size=49155)
    assert "resize" not in card(new_tokens=[])
    assert "num_embeddings < 49155" in card(base_vocabulary_size=None)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {letter: number for number, letter in enumerate(["?", *"abcdefghijklmnopqrstuvwxyz .\n"])}
    plain = Tokenizer(models.BPE(words, [], unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?")
    fast.add_tokens([f"x{number}" for number in range(BASE_ROWS - len(fast))])
    fast.add_special_tokens({"additional_special_tokens": TOKENS})
    fast.chat_template = CHAT_TEMPLATES["starchat"].jinja
    return fast


def test_the_code_of_the_card_runs_and_gives_the_trained_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BASE_ROWS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    words = tokenizer()
    ids = [words.convert_tokens_to_ids(token) for token in TOKENS]
    assert ids == list(range(BASE_ROWS, BASE_ROWS + 4))
    base.resize_token_embeddings(BASE_ROWS + 4)
    adapter = peft.LoraConfig(
        r=2, target_modules="all-linear", trainable_token_indices={"embed_tokens": ids}, init_lora_weights=False
    )
    trained = peft.get_peft_model(base, adapter)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    run = tmp_path / "demo"
    trained.save_pretrained(run, save_embedding_layers=False)
    words.save_pretrained(run)
    GenerationConfig(eos_token_id=ids[3], pad_token_id=ids[3]).save_pretrained(run)
    trained.eval()
    probe = torch.arange(BASE_ROWS + 4)[None]
    torch.save(trained(probe).logits.detach(), tmp_path / "logits.pt")

    new = [{"token": token, "id": number, "seen": 1} for token, number in zip(TOKENS, ids, strict=True)]
    recipe = RECIPE.replace("org/base", str(tmp_path / "base"))
    codes = [python_of(card(recipe, new_tokens=new, base_vocabulary_size=known)) for known in (BASE_ROWS, None)]
    check = (
        "import torch\n"
        f"found = model(torch.arange({BASE_ROWS + 4})[None]).logits\n"
        "torch.testing.assert_close(found, torch.load('logits.pt'), atol=1e-5, rtol=0)\n"
        f"assert output[0, -1] == {ids[3]} or output.shape[1] - inputs['input_ids'].shape[1] == 256\n"
        "print('same')\n"
    )
    program = "".join(code + check for code in codes)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same\n") == 2


@pytest.mark.parametrize("bits", ["bits: 4, type: nf4, double: false", "bits: 8"])
def test_the_code_for_a_quantized_base_is_python(bits: str) -> None:
    recipe = RECIPE.replace("method: lora", f"method: qlora\nquantization: {{{bits}}}")
    code = python_of(card(recipe))
    compile(code, "card", "exec")
    assert "quantization_config=quantization" in code


@pytest.mark.parametrize("facts", [RUN_JSON, {}, dict.fromkeys(RUN_JSON)])
def test_the_summary_shows_what_there_is(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(summary, "stderr", Console(file=text, width=90))
    summary.print_summary(RunSummary.model_validate_json(json.dumps(facts)))
    shown = text.getvalue()
    assert "None" not in shown
    if facts.get("steps"):
        for words in ("2.930", "1.419", "4 min 18 s", "206 tokens/s", "1.27 GB", "<|end|>", "1.205", "63 %"):
            assert words in shown


def test_the_note_about_few_conversations_counts_conversations() -> None:
    """A template that rewrites earlier turns makes several examples of one."""
    known: dict[str, Any] = {
        "method": "lora",
        "base_model": "base",
        "base_vocabulary_size": 9,
        "steps": 1,
        "epochs": 1.0,
    }
    few = RunSummary(**known, train_examples=1200, expanded=300, expanded_examples=1100)
    assert "It was trained on only 400 conversations." in run_warnings(few)
    many = RunSummary(**known, train_examples=1200)
    assert not any("only" in warning for warning in run_warnings(many))
