"""`peftchat export --to ollama` and `--to vllm`."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from peftchat.errors import UserError
from peftchat.export.ollama import go_template, modelfile, read_frames
from peftchat.export.vllm import vllm_support
from tests.support.chat_models import in_format, save_adapter_run, save_model
from tests.support.cli import peftchat
from tests.support.tokenizers import byte_level

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
CONVERSATIONS = [
    [("user", "one")],
    [("user", "one"), ("assistant", "two\n\nthree"), ("user", "four")],
    [("system", "brief"), ("user", "one"), ("assistant", "two"), ("user", "three")],
]

# What Ollama does: https://github.com/ollama/ollama/blob/main/template/template.go
_GO = """
package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }
type Case struct { System string; Messages []Message }

func main() {
	text, _ := os.ReadFile(os.Args[1])
	data, _ := os.ReadFile(os.Args[2])
	var cases []Case
	if err := json.Unmarshal(data, &cases); err != nil { panic(err) }
	parsed := template.Must(template.New("chat").Parse(string(text)))
	for _, one := range cases {
		values := map[string]any{"System": one.System, "Messages": one.Messages}
		if err := parsed.Execute(os.Stdout, values); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""


def chat_tokenizer(template: str, system: str | None) -> Any:
    if template != "llama3":
        return in_format(byte_level(), template, system)
    tokenizer = in_format(byte_level())
    tokenizer.chat_template = LLAMA3
    return tokenizer


def rendered_by_go(template: str, cases: list[dict[str, Any]], folder: Path) -> list[str]:
    (folder / "main.go").write_text(_GO, encoding="utf-8")
    (folder / "template").write_text(template, encoding="utf-8")
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    command = ["go", "run", "main.go", "template", "cases.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.split("\x00")[:-1]


@pytest.mark.parametrize(
    ("template", "system"),
    [("starchat", None), ("starchat", ""), ("starchat", "Be kind."), ("chatml", "Be kind."), ("llama3", None)],
)
def test_the_go_template_writes_what_the_chat_template_writes(
    tmp_path: Path, template: str, system: str | None
) -> None:
    tokenizer = chat_tokenizer(template, system)
    frames = read_frames(tokenizer, "here")
    assert frames.default_system == system
    if shutil.which("go") is None:
        pytest.skip("no Go to run Ollama's template language")
    cases, expected = [], []
    for conversation in CONVERSATIONS:
        dicts = [{"role": role, "content": content} for role, content in conversation]
        expected.append(tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True))
        # Ollama puts the Modelfile's SYSTEM, if there is one, before a conversation that has none.
        if system and dicts[0]["role"] != "system":
            dicts = [{"role": "system", "content": system}, *dicts]
        told = dicts[0]["content"] if dicts[0]["role"] == "system" else ""
        cases.append({"System": told, "Messages": dicts})
    assert rendered_by_go(go_template(frames, writes_bos=True), cases, tmp_path) == expected


def test_a_template_that_rewrites_messages_is_refused() -> None:
    tokenizer = in_format(byte_level())
    for template in (
        LLAMA3.replace("m['content']", "m['content'] | upper"),
        LLAMA3.replace("<|end|>", "{% if loop.index0 == 2 %}!{% endif %}<|end|>"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="no equivalent for Ollama"):
            read_frames(tokenizer, "here")


def test_the_modelfile_says_when_to_stop_and_how_to_sample() -> None:
    frames = read_frames(in_format(byte_level(), "starchat", "Be kind."), "here")
    sampling = GenerationConfig(do_sample=True, temperature=0.2, top_p=0.95, top_k=50, repetition_penalty=1.1)
    text = modelfile("m.gguf", frames, ["<|end|>", "<|endoftext|>"], sampling, writes_bos=True)
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert 'SYSTEM """Be kind."""' in lines
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "<|end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER temperature 0.2",
        "PARAMETER top_p 0.95",
        "PARAMETER top_k 50",
        "PARAMETER repeat_penalty 1.1",
    ]
    assert "PARAMETER temperature 0\n" in modelfile("m.gguf", frames, [], GenerationConfig(), writes_bos=True)
    quoting = read_frames(in_format(byte_level(), "starchat", 'Use """.'), "here")
    with pytest.raises(UserError, match="cannot quote"):
        modelfile("m.gguf", quoting, [], sampling, writes_bos=True)


def test_an_ollama_folder_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = save_model(tmp_path / "model")
    done = peftchat("export", model, "--to", "ollama", "--type", "f16", "-o", tmp_path / "out")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "out" / "Modelfile"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model-f16.gguf"]
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model-f16.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|end|>"' in text


def test_vllm_serves_whole_weights_and_names_what_they_lack(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    assert vllm_support(str(model)).command == f"vllm serve {model} --served-model-name model"
    (model / "chat_template.jinja").unlink()
    (model / "generation_config.json").unlink()
    done = peftchat("export", model, "--to", "vllm")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no chat template" in done.stderr
    assert "names no end token" in done.stderr


def test_vllm_serves_a_plain_adapter_beside_its_base(tmp_path: Path) -> None:
    run = save_adapter_run(tmp_path / "base", tmp_path / "run", in_format(byte_level()), r=12)
    verdict = vllm_support(str(run))
    assert verdict.command is None
    assert verdict.reasons[0] == "vLLM does not load adapters with embeddings of new tokens"
    assert "peftchat merge" in verdict.reasons[-1]
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    (run / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": None}), encoding="utf-8")
    command = vllm_support(str(run)).command
    assert command is not None
    assert command.startswith(f"vllm serve {tmp_path / 'base'} ")
    assert f"--lora-modules run={run}" in command
    assert "--max-lora-rank 16" in command
    for change in ({"use_dora": True}, {"bias": "all"}, {"r": 1024}, {"peft_type": "LOHA"}, {"modules_to_save": ["x"]}):
        altered = {**config, "trainable_token_indices": None, **change}
        (run / "adapter_config.json").write_text(json.dumps(altered), encoding="utf-8")
        assert vllm_support(str(run)).command is None
