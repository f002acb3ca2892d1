"""`ModelSource`: what a name stands for, where each part comes from, and one error per fault."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftchat.errors import UserError
from peftchat.models.source import ModelKind, ModelSource


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a full model, and `adapter`, a LoRA on it with its config and weights only."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 5
    model.save_pretrained(folder / "base", max_shard_size="1KB")
    words = models.WordLevel({str(number): number for number in range(8)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="5")
    tokenizer.save_pretrained(folder / "base")
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapter.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that a test may damage."""
    shutil.copytree(saved, tmp_path / "copy")
    config = tmp_path / "copy" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(saved), str(tmp_path / "copy")))
    return tmp_path / "copy"


def test_a_name_has_a_kind(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "recipe.yaml").write_text("method: lora\n")
    kinds = {name: ModelSource.open(str(folder / name)).kind for name in ("base", "adapter", "empty", "unfinished")}
    assert kinds == {
        "base": ModelKind.FULL,
        "adapter": ModelKind.ADAPTER,
        "empty": ModelKind.EMPTY,
        "unfinished": ModelKind.UNFINISHED,
    }
    assert ModelSource.open("owner/name").kind is ModelKind.HUB


def test_an_adapter_takes_from_its_base_what_it_lacks(folder: Path) -> None:
    source = ModelSource.open(str(folder / "adapter"))
    assert source.base().path == folder / "base"
    assert source.config().hidden_size == 8
    assert source.tokenizer().eos_token == "5"
    assert source.generation_config().eos_token_id == 5


def test_an_adapter_keeps_what_it_has(folder: Path) -> None:
    source = ModelSource.open(str(folder / "adapter"))
    tokenizer = source.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(source.path)
    (source.path / "generation_config.json").write_text(json.dumps({"eos_token_id": 8}))
    assert source.tokenizer().eos_token == "<|end|>"
    assert source.generation_config().eos_token_id == 8


def test_a_run_names_its_base_and_whether_code_is_trusted(folder: Path) -> None:
    run = folder / "adapter"
    (run / "recipe.yaml").write_text(
        f"model: {{name: {folder / 'other'}, revision: main, trust_remote_code: true}}\nmethod: lora\n"
        "adapter: {variant: lora}\ndata: {train: [{path: gone.jsonl}]}\noutput_dir: gone\n"
    )
    shutil.copytree(folder / "base", folder / "other")
    base = ModelSource.open(str(run)).base()
    assert (base.path, base.revision, base.trust_remote_code) == (folder / "other", "main", True)


def test_generation_settings_without_a_file_are_those_of_the_config(folder: Path) -> None:
    (folder / "base" / "generation_config.json").unlink()
    config = folder / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 3}))
    assert ModelSource.open(str(folder / "base")).generation_config().eos_token_id == 3


@pytest.mark.parametrize("names", [("default", "tool_use"), ("rag", "tool_use")])
def test_of_several_chat_templates_the_default_is_taken_and_told(
    names: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "base" / "tokenizer_config.json"
    templates = [{"name": name, "template": f"the {name} one"} for name in names]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))
    tokenizer = ModelSource.open(str(folder / "base")).tokenizer()
    assert tokenizer.chat_template == ("the default one" if "default" in names else None)
    told = capsys.readouterr().err
    assert all(f"`{name}`" in " ".join(told.split()) for name in names)


def test_a_forward_returns_the_same_whatever_the_config_asks_for(folder: Path) -> None:
    file = folder / "base" / "config.json"
    asked = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **asked}))
    source = ModelSource.open(str(folder / "base"))
    output = source.load_model()(torch.tensor([[1, 2]]))
    assert output.logits.shape[:2] == (1, 2)
    assert (output.hidden_states, output.attentions) == (None, None)
    source.config().save_pretrained(folder / "saved")


def test_a_model_loads_with_its_weights(folder: Path) -> None:
    source = ModelSource.open(str(folder / "base"))
    model = source.load_model(dtype=torch.float64)
    assert model.dtype == torch.float64
    assert torch.equal(model.lm_head.weight.float(), LlamaForCausalLM.from_pretrained(source.path).lm_head.weight)
    assert source.download() == source.path


def remove(*names: str) -> Callable[[Path], None]:
    """Delete the files of the base that match."""

    def damage(base: Path) -> None:
        for name in names:
            for file in base.glob(name):
                file.unlink()

    return damage


def pickle(base: Path) -> None:
    remove("*.safetensors*")(base)
    (base / "pytorch_model.bin").write_bytes(b"pickle")


def one_shard_less(base: Path) -> None:
    sorted(base.glob("*.safetensors"))[1].unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("*.safetensors*"), r"no safetensors weights \(model.safetensors or its index\)"),
        (one_shard_less, r"1 of \d+ weight files are missing, the first is model-00002"),
        (pickle, r"pickled \(pytorch_model.bin\)"),
        (remove("*"), "no config.json or adapter_config.json"),
    ],
)
def test_weights_are_checked_without_loading(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    source = ModelSource.open(str(folder / "base"))
    source.check_weights()
    damage(source.path)
    with pytest.raises(UserError, match=message) as error:
        ModelSource.open(str(folder / "base")).check_weights()
    assert error.value.where == str(folder / "base") and error.value.hint


def test_one_message_for_one_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(folder / "gone"), "./gone", "~/gone", "a/b/c"):
        with pytest.raises(UserError, match="there is no such folder"):
            ModelSource.open(name)
    with pytest.raises(UserError, match="there is no such folder"):
        ModelSource.open("gone", local=True)
    with pytest.raises(UserError, match="expected a model folder, got a file"):
        ModelSource.open(str(folder / "base" / "config.json"))
    (folder / "base" / "config.json").write_text("{")
    with pytest.raises(UserError, match="the model's config cannot be loaded"):
        ModelSource.open(str(folder / "base")).config()
    (folder / "base" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        ModelSource.open(str(folder / "base")).tokenizer()
    (folder / "base" / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="the generation settings cannot be loaded"):
        ModelSource.open(str(folder / "base")).generation_config()
    (folder / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="the file cannot be read"):
        ModelSource.open(str(folder / "adapter")).base()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not name its base"):
        ModelSource.open(str(folder / "adapter")).base()


def test_opening_a_model_imports_no_torch() -> None:
    code = "import sys, peftchat.models.source; print(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
