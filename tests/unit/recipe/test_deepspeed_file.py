"""A user's own DeepSpeed file: contradictions are refused by key, and gaps are filled from the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.recipe import Recipe, load_recipe
from peftchat.training.distributed import DistributedSetup, deepspeed_config

RECIPE = """
model: {name: org/base}
method: full
data: {train: [{path: data.jsonl}]}
training: {learning_rate: 0.0001, weight_decay: 0.01, per_device_train_batch_size: 2, gradient_accumulation_steps: 4}
distributed: {strategy: zero3, deepspeed_config: ds.json, processes: 2}
output_dir: run
"""
ADAM = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def load(content: Any, **overrides: object) -> Recipe:
    text = (
        content if isinstance(content, bytes) else json.dumps({"zero_optimization": {"stage": 3}, **content}).encode()
    )
    Path("ds.json").write_bytes(text)
    flags = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return load_recipe(Path("recipe.yaml"), flags).recipe


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"optimizer": {"type": "AdamW", "params": {**ADAM, "lr": 1e-3}}}, "optimizer.params.lr"),
        ({"optimizer": {"type": "AdamW", "params": {**ADAM, "betas": [0.9, 0.95]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW", "params": {**ADAM, "betas": [0.9]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW", "params": {**ADAM, "eps": 1e-6}}}, "optimizer.params.eps"),
        ({"optimizer": {"type": "AdamW", "params": {**ADAM, "weight_decay": 0.1}}}, "optimizer.params.weight_decay"),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode"),
        ({"optimizer": {"type": "AdamW", "params": "fast"}}, "optimizer.params"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type"),
        ({"optimizer": {"params": {}}}, "optimizer.type"),
        ({"optimizer": "AdamW"}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 10}}}, "scheduler"),
        ({"gradient_clipping": 0.3}, "gradient_clipping"),
        ({"gradient_clipping": True}, "gradient_clipping"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu"),
        ({"train_batch_size": 8}, "train_batch_size"),
        ({"train_batch_size": "16"}, "train_batch_size"),
        ({"bf16": {"enabled": False}}, "bf16.enabled"),
        ({"bf16": {}}, "bf16.enabled"),
        ({"bfloat16": {"enabled": False}}, "bfloat16.enabled"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"bf16": True}, "bf16"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast"),
        ({"zero_optimization": {"stage": 2}}, "ZeRO stage 2"),
        ({"zero_optimization": {"stage": True}}, "ZeRO stage True"),
        ({"zero_optimization": []}, "zero_optimization"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
        ({"compression_training": {"weight_quantization": {}}}, "compression_training"),
        ({"wandb": {"enabled": True}}, "wandb"),
    ],
)
def test_a_contradiction_is_refused_by_key(content: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as error:
        load(content)
    assert f"`{key}`" in str(error.value) or key in str(error.value)
    assert "recipe.yaml:6: distributed.deepspeed_config" in str(error.value)
    assert "`ds.json`" in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1 is not JSON"),
        (
            b'{\n  // ZeRO\n  "a": 1}',
            "line 2 is not JSON: Expecting property name enclosed in double quotes; JSON has no comments",
        ),
        (b"[]", "does not hold a JSON object"),
        (b'{"a": 1, "a": 2}', "the key `a` occurs twice"),
        (b'{"gradient_clipping": NaN}', "NaN is not a number of JSON"),
        (b'{"a": Infinity}', "Infinity"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_not_json(content: bytes, says: str) -> None:
    with pytest.raises(UserError) as error:
        load(content)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"optimizer": {"type": "adamw", "params": ADAM}},
        {"optimizer": {"type": "AdamW", "params": dict.fromkeys(ADAM, "auto")}},
        {"train_batch_size": 16, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 2},
        {"gradient_clipping": 1, "bf16": {"enabled": True}, "fp16": {"enabled": False}},
        {
            "wall_clock_breakdown": True,
            "amp": {"enabled": False},
            "zero_optimization": {"stage": 3, "overlap_comm": True},
        },
    ],
)
def test_a_file_that_agrees(content: dict[str, Any]) -> None:
    load(content)


def test_a_byte_order_mark_is_skipped() -> None:
    load(b"\xef\xbb\xbf" + json.dumps({"zero_optimization": {"stage": 3}}).encode())


def test_a_global_batch_size_decides_alone() -> None:
    sizes: dict[str, Any] = {"training__global_batch_size": 32}
    load({"train_batch_size": "auto"}, **sizes)
    with pytest.raises(UserError, match=r"`training\.global_batch_size` decides"):
        load({"train_batch_size": 32}, **sizes)


def test_what_the_file_leaves_out_is_the_recipes() -> None:
    """DeepSpeed's own defaults clip nothing, train in float32, and begin at a rate of 0.001."""
    recipe = load({"optimizer": {"type": "AdamW"}})
    config = deepspeed_config(recipe, DistributedSetup("zero3", 2, 1, 0, "none"), added_token_elements=0)
    assert config is not None
    assert config["gradient_clipping"] == "auto"
    assert config["bf16"] == {"enabled": True}
    assert config["optimizer"]["params"] == dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
