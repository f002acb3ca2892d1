"""A base's files against what its architecture needs: what is refused, and what published checkpoints look like."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftchat.errors import UserError
from peftchat.models.base_check import check_stored_values, check_tensors, check_tokenizer, check_values
from peftchat.models.loading import quantization_config
from peftchat.models.safetensors_files import SafetensorsCheckpoint
from peftchat.models.source import ModelSource
from peftchat.recipe import load_recipe
from tests.support.models import random_model, small_model
from tests.support.recipes import write_recipe

Tensors = dict[str, torch.Tensor]

KINDS = (
    *("llama", "llama-bias", "llama-tied", "qwen2-tied", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2"),
    *("gemma3_text", "phi", "falcon", "opt", "opt-projected", "gpt_neox", "gpt2", "gpt_bigcode"),
    *("mistral", "bloom", "mpt", "gptj", "mamba", "gpt_oss", "deepseek_v3", "starcoder2"),
)

MASK = torch.ones(1, 1, 512, 512, dtype=torch.uint8)


def saved(folder: Path, kind: str, **changes: object) -> Path:
    """Save a random model of an architecture with stock transformers."""
    random_model(kind, 96).save_pretrained(folder, **changes)
    return folder


def changed(folder: Path, change: Callable[[Tensors], Tensors], **config: object) -> Path:
    """Change the tensors and the config of a saved model."""
    tensors = change(load_file(folder / "model.safetensors"))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def check(folder: Path) -> None:
    """Check a folder as training does."""
    source = ModelSource.open(str(folder))
    source.check_weights()
    check_tensors(SafetensorsCheckpoint.open(folder), source.config(), source)


def refusal(folder: Path) -> UserError:
    """Return the error of a folder that is refused."""
    with pytest.raises(UserError) as refused:
        check(folder)
    return refused.value


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_is_accepted(kind: str, tmp_path: Path) -> None:
    check(saved(tmp_path / "whole", kind))
    check(saved(tmp_path / "shards", kind, max_shard_size="60KB"))


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def adding(**added: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in added.items()}}


PUBLISHED: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "GPT-2 without its prefix, with masks": (
        "gpt2",
        lambda tensors: {**without("transformer.")(tensors), "h.0.attn.bias": MASK, "h.0.attn.masked_bias": MASK[0, 0]},
    ),
    "masks of StarCoder": ("gpt_bigcode", adding(transformer__h__0__attn__bias=MASK)),
    "masks and frequencies of Pythia": (
        "gpt_neox",
        adding(
            gpt_neox__layers__0__attention__bias=MASK,
            gpt_neox__layers__0__attention__rotary_emb__inv_freq=torch.ones(4),
        ),
    ),
    "frequencies of Llama": ("llama", adding(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))),
    "a tied head saved": ("llama-tied", lambda all: {**all, "lm_head.weight": all["model.embed_tokens.weight"]}),
    "the head alone of a tied pair": (
        "llama-tied",
        lambda all: {"lm_head.weight" if "embed_tokens" in name else name: tensor for name, tensor in all.items()},
    ),
    "the body alone of a tied model": ("llama-tied", without("model.")),
    "OPT as first published": ("opt", without("model.")),
    "BLOOM without its prefix": ("bloom", without("transformer.")),
    "a value head": ("llama", adding(v_head__summary__weight=torch.ones(1, 32))),
    "several precisions": ("llama", lambda all: {name: t.half() if "norm" in name else t for name, t in all.items()}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_accepted(name: str, tmp_path: Path) -> None:
    kind, change = PUBLISHED[name]
    check(changed(saved(tmp_path, kind), change))


def dropping(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(p in name for p in parts)}


QUERY = "model.layers.1.self_attn.q_proj"

REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, object], str]] = {
    "no head": ("llama", dropping("lm_head"), {}, "lack the language-model head (lm_head.weight)"),
    "a projection is missing": ("llama", dropping(QUERY), {}, f"lack 1 of the 21 tensors that .* needs: {QUERY}"),
    "a norm is missing": ("gpt2", dropping("ln_f.bias"), {}, "lack 1 of the .*ln_f.bias"),
    "no tensor of a tied pair": ("llama-tied", dropping("embed_tokens"), {}, "lack 2 of the"),
    "one expert is missing": ("mixtral", dropping("layers.0.block_sparse_moe.experts.2.w1"), {}, "experts.2.w1"),
    "more layers than in the files": ("llama", dict, {"num_hidden_layers": 3}, "lack 9 of the 30"),
    "a bias too many": ("llama", adding(**{f"{QUERY}.bias": torch.ones(32)}), {}, f"no place for: {QUERY}.bias"),
    "a layer too many": ("llama", dict, {"num_hidden_layers": 1}, "hold 9 tensors that .* has no place for"),
    "a tensor of nobody": ("llama", adding(junk=torch.ones(3)), {}, "1 tensor that .* has no place for: junk"),
    "weights of Qwen3 as Llama": (
        "qwen3",
        dict,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "no place for: .*k_norm",
    ),
    "another width": ("llama", dict, {"intermediate_size": 100}, r"the shape \[32, 64\] .*, expected \[32, 100\]"),
    "another vocabulary": ("llama", dict, {"vocab_size": 100}, r"has 96 rows .*, expected 100 \(vocab_size"),
    "more positions than rows": ("gpt2", dict, {"n_positions": 600}, r"wpe.weight has the shape \[512, 32\]"),
    "tied, and two matrices": ("llama", dict, {"tie_word_embeddings": True}, "two different matrices"),
    "untied, and one matrix": ("llama-tied", dict, {"tie_word_embeddings": False}, "does not tie it"),
    "integers for weights": (
        "llama",
        lambda all: {name: t.to(torch.int8) if QUERY in name else t for name, t in all.items()},
        {},
        "holds integers",
    ),
    "8-bit floats": (
        "llama",
        lambda all: {name: t.to(torch.float8_e4m3fn) if QUERY in name else t for name, t in all.items()},
        {},
        "stored as F8_E4M3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    kind, change, config, says = REFUSED[name]
    error = refusal(changed(saved(tmp_path, kind), change, **config))
    says = says if ".*" in says or "\\" in says else re.escape(says)
    assert re.search(says, error.message), error
    assert error.hint


def damaged(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change the bytes of a saved model's weights."""
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    return folder


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"

DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "it is empty"),
    "short": (lambda all: all[:-5], "expected"),
    "long": (lambda all: all + b"\n", "expected"),
    "zeros": (lambda all: bytes(len(all)), "header cannot be read"),
    "a web page": (lambda _: b"<!doctype html><html>404</html>", "header is incomplete"),
    "a git-lfs pointer": (lambda _: POINTER, "git-lfs pointer"),
    "a hole between tensors": (lambda all: all.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1), "match"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    change, says = DAMAGED[name]
    error = refusal(damaged(saved(tmp_path, "llama"), change))
    assert says in error.message, error
    assert "model.safetensors" in str(error.where)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_pointer_in_place_of_a_small_file_is_called_one(file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(small_model(), tmp_path / "base")
    (folder / file).write_bytes(POINTER)
    source = ModelSource.open(str(folder))
    read = {"config.json": source.config, "generation_config.json": source.generation_config}
    with pytest.raises(UserError, match="git-lfs pointer") as refused:
        read.get(file, source.tokenizer)()
    assert "git lfs pull" in str(refused.value.hint)


def test_the_index_must_be_that_of_the_shards(tmp_path: Path) -> None:
    index = saved(tmp_path, "llama", max_shard_size="60KB") / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    files = sorted(set(whole["weight_map"].values()))
    other = {name: files[0] if file == files[1] else file for name, file in whole["weight_map"].items()}
    index.write_text(json.dumps({**whole, "weight_map": other}))
    assert "the file that the index names" in refusal(tmp_path).message
    index.write_text("{}")
    assert "`weight_map`" in refusal(tmp_path).message
    shutil.copyfile(tmp_path / files[0], tmp_path / files[1])
    index.write_text(json.dumps(whole))
    assert re.search("is in model-.*safetensors and in model-", refusal(tmp_path).message)


def test_a_single_file_comes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    saved(tmp_path / "shards", "llama", max_shard_size="60KB")
    shutil.copyfile(saved(tmp_path / "whole", "llama") / "model.safetensors", tmp_path / "shards/model.safetensors")
    assert SafetensorsCheckpoint.open(tmp_path / "shards").files == ("model.safetensors",)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_must_be_finite(value: float, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def spoil(tensors: Tensors) -> Tensors:
        tensors[name][3, 4] = value
        return tensors

    source = ModelSource.open(str(changed(saved(tmp_path, "llama"), spoil)))
    with pytest.raises(UserError, match=f"not finite numbers: {name}"):
        check_values(source.load_model(dtype=torch.bfloat16), source)
    with pytest.raises(UserError, match=f"not finite numbers: {name}"):
        check_stored_values(source)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_a_quantized_model_are_no_values(bits: int, tmp_path: Path) -> None:
    """In 4 bits, codes are stored as the bytes of bfloat16 numbers, and some of those are not finite."""
    folder = saved(tmp_path, "llama")
    write_recipe(
        tmp_path / "recipe.yaml",
        folder,
        tmp_path / "none.jsonl",
        method="qlora",
        quantization={"bits": bits},
    )
    recipe = load_recipe(tmp_path / "recipe.yaml", to_train=False).recipe
    source = ModelSource.open(str(folder))
    model = source.load_model(dtype=torch.bfloat16, quantization_config=quantization_config(recipe))
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    if bits == 4:
        weight.data.view(torch.uint8).fill_(0xFF)
        assert not torch.isfinite(weight.data.view(torch.bfloat16)).any()
    check_values(model, source)


def test_a_value_beyond_float16_is_found_once_it_is_loaded(tmp_path: Path) -> None:
    source = ModelSource.open(
        str(changed(saved(tmp_path, "llama"), lambda all: {name: tensor * 1e6 for name, tensor in all.items()}))
    )
    check_values(source.load_model(dtype=torch.bfloat16), source)
    with pytest.raises(UserError, match="not finite"):
        check_values(source.load_model(dtype=torch.float16), source)


def test_a_special_token_may_lie_below_the_added_ones() -> None:
    source = ModelSource.open(str(small_model()))
    tokenizer, config = source.tokenizer(), source.config()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(UserError, match="1 token beyond"):
        check_tokenizer(tokenizer, source, config)
    tokenizer.add_tokens(["<user>"], special_tokens=True)
    check_tokenizer(tokenizer, source, config, [config.vocab_size + 1])


def test_every_token_needs_a_row() -> None:
    source = ModelSource.open(str(small_model(spare_rows=2)))
    tokenizer, config = source.tokenizer(), source.config()
    tokenizer.add_tokens(["<one>", "<two>"])
    check_tokenizer(tokenizer, source, config)
    tokenizer.add_tokens(["<three>"])
    with pytest.raises(UserError, match=f"the first is '<three>' = {config.vocab_size}"):
        check_tokenizer(tokenizer, source, config)
