"""Adapters on mixtures of experts: experts and dense layers get one, what chooses among them does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoConfig

from peftchat.errors import UserError
from peftchat.models.peft_model import model_shape, peft_config
from peftchat.models.saving import as_stored, is_stored_under_other_names, load_full_weights
from peftchat.planning.parameter_counts import parameter_counts, trainable_counts
from peftchat.planning.planner import Planner
from peftchat.recipe import Recipe
from peftchat.recipe.schema import validate_adapter
from peftchat.training.loss import install_supervised_forward
from peftchat.variants import ADAPTERS
from tests.support.models import random_model, small_config

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3")
ROUTERS = ("mlp.gate.", "mlp.router.", "shared_expert_gate.")


def lora(family: str, **section: Any) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """The model with an adapter of random values, and a copy of its weights before."""
    model = random_model(family, 100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = validate_adapter({"variant": "lora", "r": 2, **section}).peft_config(model_shape(model))
    assert config is not None
    config.task_type = "CAUSAL_LM"
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return wrapped.eval(), before


def changed_by(wrapped: PeftModel, before: dict[str, torch.Tensor]) -> set[str]:
    """The base's parameters that stock PEFT's merge changes."""
    after = wrapped.merge_and_unload().state_dict()
    assert set(after) == set(before)
    return {name for name in before if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_matrix_but_routers_embedding_and_head(family: str, tmp_path: Path) -> None:
    wrapped, before = lora(family)
    ids = torch.randint(3, 96, (2, 12))
    logits = wrapped(input_ids=ids, use_cache=False).logits
    wrapped.save_pretrained(str(tmp_path))
    stock = PeftModel.from_pretrained(random_model(family, 100), str(tmp_path)).eval()
    assert torch.equal(stock(input_ids=ids, use_cache=False).logits, logits)  # stock PEFT finds a place for all of it
    matrices = {
        name
        for name, value in before.items()
        if value.dim() >= 2 and "embed_tokens" not in name and "lm_head" not in name and not name.endswith("bias")
    }
    chosen = {name for name in matrices if not any(router in name for router in ROUTERS)}
    assert len(chosen) < len(matrices)
    assert changed_by(wrapped, before) == chosen


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_groups_divide_the_layers(family: str) -> None:
    everything, attention, forward = (
        changed_by(*lora(family, **targets))
        for targets in ({}, {"target_modules": "attention"}, {"target_modules": "feed-forward"})
    )
    assert attention | forward == everything and not attention & forward
    assert all("self_attn" in name for name in attention) and any("experts" in name for name in forward)


@pytest.mark.parametrize(
    ("family", "names", "endings"),
    [
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"], {"gate_up_proj", "down_proj"}),
        ("qwen3_moe", ["experts"], {"gate_up_proj", "down_proj"}),
        ("qwen3_moe", ["gate"], {"gate.weight"}),
        ("qwen2_moe", ["shared_expert_gate"], {"shared_expert_gate.weight"}),
        ("gpt_oss", ["router", "gate_up_proj"], {"router.weight", "gate_up_proj"}),
        ("mixtral", ["w1", "w3"], {"gate_up_proj"}),
        ("deepseek_v3", ["mlp.gate_proj"], {"layers.0.mlp.gate_proj.weight"}),
    ],
)
def test_names_of_experts_and_routers(family: str, names: list[str], endings: set[str]) -> None:
    found = changed_by(*lora(family, target_modules=names))
    assert found and all(any(name.endswith(ending) for ending in endings) for name in found)
    assert all(any(name.endswith(ending) for name in found) for ending in endings)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"target_modules": ["gate_proj", "q_proj"]}, "one parameter"),
        ({"target_modules": ["q_proj", "gate_upproj"]}, "`gate_upproj`"),
        ({"dropout": 0.05}, "got 0.05, expected 0"),
        ({"init_lora_weights": "orthogonal"}, "reads the weight of a linear layer"),
    ],
)
def test_settings_that_experts_do_not_take_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        lora("qwen3_moe", **section)
    assert message in str(refused.value)


@pytest.mark.parametrize(("family", "quantizable"), [("qwen3_moe", True), ("deepseek_v3", False)])
def test_a_plan_offers_quantization_where_training_takes_it(family: str, quantizable: bool, tmp_path: Path) -> None:
    small_config(family).save_pretrained(tmp_path)
    written: dict[str, Any] = {
        "model": {"name": str(tmp_path), "dtype": "bfloat16"},
        "data": {"train": [{"path": "rows/of-a-hub"}]},
        "output_dir": str(tmp_path / "run"),
    }
    planner = Planner(AutoConfig.from_pretrained(str(tmp_path)), Recipe.model_validate({**written, "method": "full"}))
    assert planner.supports("4 bits") == quantizable and planner.supports("unquantized")
    model = random_model(family, 100)
    qlora = Recipe.model_validate({**written, "method": "qlora"})
    if quantizable:
        assert peft_config(qlora, model) is not None
        return
    with pytest.raises(UserError, match="cannot be adapted in 4 bits"):
        peft_config(qlora, model)


def test_dropout_is_kept_where_experts_are_frozen() -> None:
    model = random_model("qwen3_moe", 100)
    shape = model_shape(model)
    assert validate_adapter({"variant": "lora"}).peft_config(shape).lora_dropout == 0.0  # type: ignore[union-attr]
    attention = {"variant": "lora", "target_modules": "attention", "dropout": 0.1}
    assert validate_adapter(attention).peft_config(shape).lora_dropout == 0.1  # type: ignore[union-attr]


def test_no_variant_leaves_experts_frozen_in_silence() -> None:
    """A variant with default targets adapts the experts, is refused, or never adapts linear layers at all."""
    shape = model_shape(random_model("qwen3_moe", 100))
    adapted, refused = set(), set()
    for name, adapter in ADAPTERS.items():
        try:
            config = validate_adapter({"variant": name}).peft_config(shape)
        except UserError as error:
            assert "experts" in str(error) or "parameters" in str(error) or "DoRA" in str(error)
            refused.add(name)
            continue
        if getattr(config, "target_parameters", None):
            adapted.add(name)
        else:
            assert "target_modules" not in adapter.model_fields or name == "ln_tuning"
    assert adapted == {"lora", "rslora", "loraplus"}
    assert {"dora", "pissa", "adalora", "ia3", "vera"} <= refused


def test_peft_adapts_the_router_by_itself() -> None:
    """PEFT's own `all-linear` names the router; the layers are named one by one until it does not."""
    wrapped = get_peft_model(random_model("qwen3_moe", 100), LoraConfig(target_modules="all-linear"))
    assert any(
        name.endswith("mlp.gate") and isinstance(module, BaseTunerLayer) for name, module in wrapped.named_modules()
    )


def test_peft_drops_dense_layers_with_names_of_experts() -> None:
    """PEFT takes dense layers for experts; they are adapted as parameters until it does not."""
    wrapped = get_peft_model(
        random_model("deepseek_v3", 100), LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])
    )
    dense = wrapped.base_model.model.model.layers[0].mlp
    assert not any(isinstance(module, BaseTunerLayer) for module in dense.modules())


@pytest.mark.parametrize("router_logits", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_models_own_forward(family: str, router_logits: bool) -> None:
    ids = torch.randint(3, 96, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if router_logits:
        arguments["output_router_logits"] = True
    expected = random_model(family, 100)(**arguments).loss
    model = random_model(family, 100)
    install_supervised_forward(model)
    outputs = model(**arguments, supervised=True)
    loss = outputs.loss / (labels[:, 1:] != -100).sum()
    assert (outputs.aux_loss is not None) == (router_logits and family != "deepseek_v3")
    if outputs.aux_loss is not None:
        loss = loss + model.router_aux_loss_coef * outputs.aux_loss
    torch.testing.assert_close(loss, expected)


PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    # Qwen3-30B-A3B, Mixtral-8x7B and gpt-oss-20b: config, all and active parameters in 10^9 as their authors count.
    "qwen3_moe": (
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
        }, 30.5, 3.3,
    ),
    "mixtral": (
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        }, 46.7, 12.9,
    ),
    # Its authors count 3.6 without the embedding, which has 0.58.
    "gpt_oss": (
        {
            "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
            "num_experts_per_tok": 4, "tie_word_embeddings": False,
        }, 20.9, 4.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_counts_are_the_published_ones(family: str, tmp_path: Path) -> None:
    values, every, active = PUBLISHED[family]
    config = AutoConfig.for_model(family, **values)
    counts = parameter_counts(config)
    assert counts.parameters / 1e9 == pytest.approx(every, abs=0.05)
    assert counts.active / 1e9 == pytest.approx(active, abs=0.1)
    assert counts.experts > 0.9 * counts.parameters - counts.embedding - counts.lm_head


def test_trained_parameters_are_counted_by_kind(tmp_path: Path) -> None:
    small_config("qwen3_moe").save_pretrained(tmp_path)
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(tmp_path), "dtype": "float32"},
            "method": "lora",
            "adapter": {"variant": "lora", "r": 2},
            "data": {"train": [{"path": "rows/of-a-hub"}]},
            "output_dir": str(tmp_path / "run"),
        }
    )
    counts = trainable_counts(AutoConfig.from_pretrained(str(tmp_path)), recipe, 0)
    # Two blocks of four experts: (64 + 64) and (32 + 64) inputs and outputs at rank 2; half of them are active.
    experts = 2 * 4 * 2 * (64 + 64 + 32 + 64)
    assert counts.modules["mlp.experts"] == (2, experts)
    assert counts.parameters - counts.active == experts // 2
    assert not any("gate" in kind for kind in counts.modules), json.dumps(list(counts.modules))
    assert not counts.notes


@pytest.mark.parametrize("family", FAMILIES)
def test_full_weights_are_read_back_from_the_stored_names(family: str, tmp_path: Path) -> None:
    """A resumed run gets every trained weight, also those that transformers stores under other names."""
    trained = random_model(family, 100)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.5)
    state = trained.state_dict()
    trained.save_pretrained(str(tmp_path))
    resumed = random_model(family, 100)
    assert is_stored_under_other_names(resumed) == (family != "gpt_oss")
    load_full_weights(resumed, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    stored = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
    assert as_stored(resumed, state) == stored
