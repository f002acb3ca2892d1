"""`peftchat serve` without an engine: what each can serve, the command, and what is refused with which reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.engines.commands import EngineCommand, EngineName, Place, check_place, engine_command
from peftchat.engines.served import open_served
from peftchat.errors import UserError
from peftchat.serving import chat_model

ALL: dict[EngineName, str] = {"vllm": "vllm", "transformers": "transformers", "llama.cpp": "llama-server"}
HERE = Place("127.0.0.1", 8123)


def adapter(folder: Path, base: Path, template: str = "T", **changes: Any) -> str:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 12, "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text("{}")
    return str(folder)


def model(folder: Path, **generation: Any) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("T")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **generation}))
    save_file({"a.weight": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def command(*names: str | Path, place: Place = HERE, **options: Any) -> EngineCommand:
    return engine_command(open_served([str(name) for name in names]), place, **{"installed": ALL, **options})


def value(found: EngineCommand, option: str) -> str:
    return found.arguments[found.arguments.index(option) + 1]


def test_vllm_serves_several_adapters_of_one_base(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    one, two = adapter(tmp_path / "one", base), adapter(tmp_path / "two", base, r=40)
    found = command(one, two)
    assert found.engine == "vllm"
    assert found.models == ("one", "two")
    assert found.arguments[:3] == ("vllm", "serve", str(base))
    assert found.arguments[found.arguments.index("--lora-modules") + 1 :][:2] == (f"one={one}", f"two={two}")
    assert value(found, "--max-lora-rank") == "64"
    assert value(found, "--max-loras") == "2"
    assert value(found, "--tokenizer") == one
    assert value(found, "--port") == "8123"
    odd = adapter(tmp_path / "r=8,a=16" / "three", base)
    assert json.loads(command(odd).arguments[command(odd).arguments.index("--lora-modules") + 1])["path"] == odd
    with_base = command(one, base)
    assert with_base.models == ("one", "base")
    assert value(with_base, "--served-model-name") == "base"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trainable_token_indices": [5]}, "embeddings of new tokens"),
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "got IA3"),
        ({"r": 1024}, "ranks up to 512"),
    ],
)
def test_what_no_engine_loads_has_to_be_merged(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    run = adapter(tmp_path / "run", model(tmp_path / "base"), **changes)
    with pytest.raises(UserError, match=reason) as caught:
        command(run)
    assert caught.value.hint == f"Merge first: `peftchat merge {run}`."
    for name in ALL:
        assert f"{name}: " in caught.value.message
    merged = model(tmp_path / "run" / "merged")
    found = command(run)
    assert found.arguments[:3] == ("vllm", "serve", str(merged))
    assert found.models == ("run",)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    base, other = model(tmp_path / "base"), model(tmp_path / "other")
    one = adapter(tmp_path / "one", base)
    for names, reason in (
        ((one, adapter(tmp_path / "two", other)), "different bases"),
        ((one, adapter(tmp_path / "three", base, "another")), "different chat templates"),
        ((one, other), "not the base of the adapters"),
        ((base, other), "serves one full model"),
        ((one, str(tmp_path / "one")), "both be called `one`"),
    ):
        with pytest.raises(UserError, match=reason):
            command(*names)


@pytest.mark.parametrize(("is_slow", "dtype"), [(True, "float32"), (False, "auto")])
def test_transformers_serves_bfloat16_in_float32_where_the_cpu_has_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_slow: bool, dtype: str
) -> None:
    monkeypatch.setattr(chat_model, "bfloat16_is_slow", lambda: is_slow)
    folder = model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}))
    found = command(folder, engine="transformers")
    assert value(found, "--dtype") == dtype
    assert any("float32" in note for note in found.notes) == is_slow


def test_the_engine_is_the_first_that_is_here_and_can(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF....")
    assert command(folder).engine == "vllm"
    assert command(folder, installed={"transformers": "/bin/t"}).arguments[0] == "/bin/t"
    assert command(gguf).engine == "llama.cpp"
    assert command(gguf, engine="llama.cpp", extra=["--n", "1"]).arguments[-2:] == ("--n", "1")
    with pytest.raises(UserError, match=r"vllm: it is not installed.*llama\.cpp: .*is no GGUF file"):
        command(folder, installed={})
    # A command may be read where the engine is not.
    assert command(folder, installed={}, dry_run=True).engine == "vllm"
    with pytest.raises(UserError, match="is a GGUF file"):
        command(gguf, engine="vllm")


def test_a_model_that_would_not_stop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no end token"):
        command(model(tmp_path / "model", eos_token_id=None))


def test_keys_are_in_no_command_line(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    found = command(folder, place=Place("0.0.0.0", 8000, "a-secret"))
    assert "a-secret" not in " ".join(found.arguments)
    assert "a-secret" in found.environment.values()
    with pytest.raises(UserError, match="knows no key"):
        command(folder, place=Place("0.0.0.0", 8000, "a-secret"), engine="transformers")
    with pytest.raises(UserError, match="no key"):
        check_place("0.0.0.0", 8000, None, needs_port=False)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("no")
    for name, reason in ((tmp_path / "x.gguf", "no GGUF file"), (tmp_path / "y.gguf", "no such file")):
        with pytest.raises(UserError, match=reason):
            command(name)
