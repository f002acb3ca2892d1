"""`peftchat export --to gguf`: what comes back from the file is what went in.

transformers reads GGUF with code of its own, and llama.cpp, where llama-cpp-python is installed, is the target itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from peftchat.errors import UserError
from peftchat.export.run_export import ExportOptions, export_gguf
from tests.support.chat_models import QUESTIONS, in_format, save_adapter_run, save_model
from tests.support.cli import peftchat
from tests.support.machine import needs_bfloat16_kernels
from tests.support.tokenizers import TEXT, byte_level

gguf = pytest.importorskip("gguf")

DIGITS = pre_tokenizers.Digits(individual_digits=True)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
QWEN = pre_tokenizers.Split(Regex(_WORDS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def exported(folder: Path, type_name: str | None = None) -> Path:
    return export_gguf(str(folder), ExportOptions(folder / "model.gguf", type_name)).path


def read_back(path: Path) -> Any:
    settings = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **settings)


def asked(folder: Path, question: str) -> dict[str, torch.Tensor]:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def greedy(model: Any, inputs: dict[str, torch.Tensor], count: int = 16) -> list[int]:
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, length:].tolist()


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "llama-bias", "mistral", "qwen2-tied"])
def test_transformers_reads_the_same_model_back(tmp_path: Path, kind: str) -> None:
    split = QWEN if kind.startswith("qwen") else DIGITS
    folder = save_model(tmp_path / "model", kind, in_format(byte_level(split=split)))
    model, back = AutoModelForCausalLM.from_pretrained(folder), read_back(exported(folder))
    # The reader of transformers drops biases of llama's projections, which GGUF holds.
    if kind != "llama-bias":
        for question in QUESTIONS:
            inputs = asked(folder, question)
            with torch.no_grad():
                assert torch.allclose(model(**inputs).logits, back(**inputs).logits, atol=1e-5)
            assert greedy(model, inputs) == greedy(back, inputs)
    names = {tensor.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert ("blk.0.ffn_gate.bias" in names) == (kind == "llama-bias")


@pytest.mark.parametrize(("type_name", "largest"), [("bf16", 2**-8), ("f16", 2**-11), ("q8_0", 1 / 127)])
def test_smaller_types_stay_within_their_rounding(tmp_path: Path, type_name: str, largest: float) -> None:
    folder = save_model(tmp_path / "model")
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = read_back(exported(folder, type_name)).state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        scale = weight.abs() if type_name != "q8_0" else weight.abs().max()
        assert ((weight - after[name]).abs() <= largest * scale + 1e-7).all(), name


def test_the_tokenizer_and_the_chat_template_travel_along(tmp_path: Path) -> None:
    tokenizer = in_format(byte_level(split=DIGITS))
    # Away from the folder, so that nothing else can be read.
    path = exported(save_model(tmp_path / "model", tokenizer=tokenizer)).rename(tmp_path / "model.gguf")
    fields = gguf.GGUFReader(path).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    for token in ("<|system|>", "<|assistant|>", "<|user|>", "<|end|>", "<|endoftext|>"):
        index = tokenizer.convert_tokens_to_ids(token)
        assert (tokens[index], types[index]) == (token, gguf.TokenType.CONTROL)
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.convert_tokens_to_ids("<|end|>")
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    back = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for opening in (True, False):
        rendered = back.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opening)
        assert rendered == tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opening)
    # Some engines do not know this tag, and it changes no text.
    assert "generation %}" not in fields["tokenizer.chat_template"].contents()


def test_rows_without_a_token_are_filled_up(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    known = model.config.vocab_size
    model.resize_token_embeddings(known + 3, mean_resizing=False)
    model.save_pretrained(folder)
    types = gguf.GGUFReader(exported(folder)).fields["tokenizer.ggml.token_type"].contents()
    assert types[known:] == [gguf.TokenType.UNUSED] * 3


def test_an_adapter_is_merged_first(tmp_path: Path) -> None:
    run = save_adapter_run(tmp_path / "base", tmp_path / "run", in_format(byte_level()))
    done = peftchat("export", run, "--to", "gguf")
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "run.gguf"))
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    inputs = asked(run, QUESTIONS[0])
    with pytest.raises(UserError, match="already exists"):
        export_gguf(str(run), ExportOptions())
    # Beside an adapter's config, transformers would take the file for a base.
    alone = (run / "run.gguf").rename(tmp_path / "run.gguf")
    assert greedy(merged, inputs) == greedy(read_back(alone), inputs)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the architecture gemma2 is not exported to GGUF .*llama"):
        exported(save_model(tmp_path / "gemma", "gemma2"))
    with pytest.raises(UserError, match="does not compute llama with gelu"):
        exported(save_model(tmp_path / "gelu", hidden_act="gelu"))
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(UserError, match="`yarn`"):
        exported(save_model(tmp_path / "yarn", rope_parameters=yarn))
    words = byte_level(split=pre_tokenizers.Split(Regex(r"\w+"), "isolated"))
    with pytest.raises(UserError, match="rules for splitting text"):
        exported(save_model(tmp_path / "words", tokenizer=in_format(words)))
    for folder in tmp_path.iterdir():
        assert not list(folder.glob("*.gguf*")) + list(folder.glob(".*"))


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    path = exported(save_model(tmp_path / "model", "mistral", sliding_window=64, max_position_embeddings=512))
    assert gguf.GGUFReader(path).fields["llama.context_length"].contents() == 64


@pytest.mark.parametrize(
    ("kind", "split", "changes"),
    [
        ("llama-bias", DIGITS, {}),
        ("llama-tied", None, {"rope_parameters": LLAMA3, "max_position_embeddings": 256}),
        ("qwen2-tied", QWEN, {}),
        ("qwen3-tied", QWEN, {}),
        ("gpt_bigcode", DIGITS, {}),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path: Path, kind: str, split: Any, changes: dict[str, Any]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = save_model(tmp_path / "model", kind, in_format(byte_level(split=split)), **changes)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    engine = llama_cpp.Llama(str(exported(folder, "f32")), n_ctx=128, verbose=False, logits_all=True)
    for text in (*TEXT, *QUESTIONS, "<|user|>\nx<|end|>\n", "a   12\n   3"):
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)
    for question in QUESTIONS:
        inputs = asked(folder, question)
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        engine.reset()
        engine.eval(inputs["input_ids"][0].tolist())
        theirs = torch.tensor(engine.scores[: len(logits)])
        assert (theirs - logits).abs().max() < 2e-3 * (logits.max() - logits.min())


def test_sentencepiece_travels_with_its_byte_tokens(tmp_path: Path, stories: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = export_gguf(str(stories), ExportOptions(tmp_path / "stories.gguf")).path
    engine = llama_cpp.Llama(str(path), n_ctx=128, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    for text in ("Once upon a time", "  two  spaces\n\nand 日本 🎉", *TEXT):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert engine.tokenize(text.encode(), add_bos=False) == ids


@needs_bfloat16_kernels
@pytest.mark.real
def test_the_real_model_says_the_same(tmp_path: Path, demo_model: Path) -> None:
    path = export_gguf(str(demo_model), ExportOptions(tmp_path / "smollm.gguf")).path
    model, back = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32), read_back(path)
    inputs = asked(demo_model, QUESTIONS[0])
    assert greedy(model, inputs) == greedy(back, inputs)
