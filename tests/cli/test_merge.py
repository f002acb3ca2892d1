"""`peftchat merge` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftchat.cli.main import main
from tests.support.adapters import IDS, apart, make_base, merged_logits, train_by_noise
from tests.support.cli import peftchat, true_peftchat

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
TOKENS = ["<|system|>", "<|assistant|>", "<|user|>", "<|end|>"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with everything that training leaves for a merge."""
    base = make_base(tmp_path / "base", "llama-tied")
    run = tmp_path / "run"
    ids = list(range(96, 100))
    train_by_noise(
        base, run, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices={"embed_tokens": ids}), rows=100
    )
    alphabet = {"<unk>": 0, **{chr(ord(" ") + index): 1 + index for index in range(95)}}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    assert tokenizer.convert_tokens_to_ids(TOKENS) == ids
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(run)
    (run / "generation_config.json").write_text(json.dumps({"eos_token_id": 99, "pad_token_id": 0, "do_sample": False}))
    data = tmp_path / "conversations.jsonl"
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Forty-two."}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    (run / "recipe.yaml").write_text(
        f"model: {{name: {base}}}\nmethod: lora\ndata: {{train: [{{path: {data}}}]}}\noutput_dir: {run}\n"
    )
    return run


def merge(*arguments: object) -> subprocess.CompletedProcess[str]:
    return peftchat("merge", *arguments)


def test_a_run_folder_becomes_a_model(run: Path) -> None:
    result = true_peftchat("merge", run, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    merged = run / "merged"
    assert Path(report["folder"]) == merged
    proof = report["verification"]
    assert proof["passed"] and proof["top1_agreement"] == 1.0 and proof["special_tokens"] == [96, 97, 98, 99]
    assert json.loads((merged / "merge_report.json").read_text())["verification"] == proof
    assert (report["vocabulary"], report["added_rows"], report["tied"]) == (100, 4, True)
    config = json.loads((merged / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (100, True)
    assert (config["eos_token_id"], config["pad_token_id"]) == (99, 0)
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == 99
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.convert_tokens_to_ids("<|end|>") == 99
    left = {file.name for file in merged.iterdir()}
    assert not {name for name in left if "part" in name or "state" in name or "unverified" in name or "lock" in name}
    assert merged_logits(merged).shape == (*IDS.shape, 100)


def test_the_words_a_user_sees(run: Path) -> None:
    result = merge(run, "-o", run / "here", "--dtype", "bfloat16", "--memory-budget", "1MB")
    assert result.returncode == 0, result.stderr
    assert "computes what base and adapter compute" in result.stdout and str(run / "here") in result.stdout
    assert apart(merged_logits(run / "here"), merged_logits_of(run)) < 0.05


def merged_logits_of(run: Path):
    assert merge(run, "--no-verify").returncode == 0
    return merged_logits(run / "merged")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such folder"),
        (["{run}", "--base", "dequantized"], "not trained on a quantized base"),
        (["{run}", "--adapter", "{run}=much"], "not a number"),
        (["{run}", "--memory-budget", "lots"], "not a size"),
        (["{base}"], "nothing to merge"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], words: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(run=run, base=run.parent / "base") for text in arguments]
    assert words in refused(filled, monkeypatch, capsys)
    assert not list(run.glob("merged*"))


def test_a_full_run_is_already_a_model(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("method: lora", "method: full"))
    assert "already a model" in refused([str(run)], monkeypatch, capsys)


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What standard error says of a command that must end with status 2 and print nothing else."""
    monkeypatch.setattr(sys, "argv", ["peftchat", "merge", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and "Traceback" not in said.err
    return " ".join(said.err.split())
