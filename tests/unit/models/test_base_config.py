"""What `config.json` alone says against training a base."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.models.base_config import check_config
from peftchat.models.source import ModelSource
from peftchat.recipe import load_recipe
from tests.support.models import small_config
from tests.support.recipes import write_recipe


def checked(folder: Path, config: dict[str, Any], *, max_length: int = 128, **sections: Any) -> str | None:
    """Check a config for a recipe; return the note."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(json.dumps(config))
    sections.setdefault("data", {"max_length": max_length})
    recipe = write_recipe(folder / "recipe.yaml", base, folder / "x.jsonl", **sections)
    source = ModelSource.open(str(base))
    return check_config(load_recipe(recipe, to_train=False), source, source.config())


LLAMA = small_config("llama").to_dict()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, "got an encoder (bert)"),
        ({"model_type": "xlm-roberta"}, "got an encoder (xlm-roberta)"),
        ({"model_type": "t5"}, "got an encoder-decoder (t5)"),
        ({"model_type": "bart"}, "got an encoder-decoder (bart)"),
        ({"model_type": "vit"}, "transformers has none of the type vit"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "got a classification model"),
        ({**LLAMA, "num_attention_heads": 5}, "not a multiple of the number of attention heads (5)"),
    ],
)
def test_another_kind_of_model_is_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        checked(tmp_path, config)


def test_a_decoder_of_an_encoder_family_is_accepted(tmp_path: Path) -> None:
    assert checked(tmp_path, {"model_type": "bert", "is_decoder": True}) is None


STORED = {
    "gptq, 4 bits": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq, 4 bits": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "bitsandbytes, 4 bits": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "bitsandbytes, 8 bits": {"quantization_config": {"load_in_8bit": True}},
    "mlx, 4 bits": {"quantization": {"group_size": 64, "bits": 4}},
}


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("stored", STORED)
def test_a_quantized_base_is_refused_by_its_config(stored: str, method: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"stored quantized ({stored})")):
        checked(tmp_path, {**LLAMA, **STORED[stored]}, method=method)


@pytest.mark.parametrize("settings", [None, {}])
def test_an_empty_quantization_is_none(settings: Any, tmp_path: Path) -> None:
    assert checked(tmp_path, {**LLAMA, "quantization_config": settings}) is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gpt_bigcode", "opt", "falcon", "gptj", "gemma3_text"])
def test_positions_must_reach_the_longest_example(kind: str, tmp_path: Path) -> None:
    config = small_config(kind).to_dict()
    assert checked(tmp_path, config, max_length=512) is None
    with pytest.raises(UserError, match="513 tokens do not fit the model's 512 positions") as refused:
        checked(tmp_path, config, max_length=513)
    assert "data.max_length" in str(refused.value.where)


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    ],
)
def test_stretched_rotary_embeddings_reach_further(rope: dict[str, Any], tmp_path: Path) -> None:
    config = {**LLAMA, "rope_scaling": rope}
    assert "reach 1024" in str(checked(tmp_path, config, max_length=1024))
    with pytest.raises(UserError, match="the model's 1024 positions"):
        checked(tmp_path, config, max_length=1025)


@pytest.mark.parametrize("kind", ["bloom", "mamba", "falcon"])
def test_an_architecture_without_positions_has_no_limit(kind: str, tmp_path: Path) -> None:
    config = {**small_config(kind).to_dict(), "alibi": True, "max_position_embeddings": 512}
    assert "no limit" in str(checked(tmp_path, config, data={"max_length": 2048, "packing": False}))


def test_virtual_tokens_take_positions(tmp_path: Path) -> None:
    tuning = {"adapter": {"variant": "prompt_tuning", "num_virtual_tokens": 20}}
    with pytest.raises(UserError, match="500 tokens after 20 virtual ones") as refused:
        checked(tmp_path, LLAMA, max_length=500, **tuning)
    assert "at most 492" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model-q4_k_m.gguf", "a GGUF file"),
        ("modules.json", "a sentence-transformers model"),
        ("model_index.json", "a diffusers pipeline"),
        ("model.safetensors", "weights (model.safetensors), without config.json"),
        ("consolidated.00.pth", "in their authors' format"),
    ],
)
def test_a_folder_of_another_kind_is_named(file: str, says: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=re.escape(says)):
        ModelSource.open(str(tmp_path)).require_model()
