"""Compiled layers: the same losses and gradients, only for training, only where they can be had and pay."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peftchat.dataset.encode import EncodingStats
from peftchat.errors import UserError
from peftchat.models.compiled import compile_layers, has_compiled_layers, switch_compiled
from peftchat.models.fused_lora import fuse_lora_forward
from peftchat.recipe import load_recipe
from peftchat.training.compiling import MIN_LONG_SECONDS, compile_as_asked, least_training_seconds, may_compile
from peftchat.training.distributed import DistributedSetup
from peftchat.training.loss import install_supervised_forward

ALONE = DistributedSetup(strategy="single", processes=1, nodes=1, gpus=0, launcher="none")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@needs_compiler
def test_losses_and_gradients_are_those_of_the_plain_layers():
    plain = small_model()
    compiled = copy.deepcopy(plain)
    assert compile_layers(compiled) == 2
    for length in (17, 40, 23):
        ids = torch.randint(64, (2, length))
        found = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_adapters_and_loss_are_as_near_to_float32_as_the_plain_ones():
    plain = get_peft_model(small_model(), LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    plain.base_model.model.config.final_logit_softcapping = 5.0
    compiled = copy.deepcopy(plain)
    assert fuse_lora_forward(plain) == fuse_lora_forward(compiled) == 14
    assert compile_layers(compiled) == 2
    for model in (plain, compiled):
        install_supervised_forward(model.base_model.model)
        # As where new tokens are trained: the first layer is then the same program as the others.
        model.enable_input_require_grads()

    def gradient(model, ids, in_bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = model(input_ids=ids, labels=ids, supervised=True).loss
        loss.backward()
        trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == 28
        return torch.cat([loss.detach()[None], *(tensor.flatten() for tensor in trained)])

    off = {True: 0.0, False: 0.0}
    torch.manual_seed(1)
    for length in (17, 40, 23, 17, 40, 23, 30, 12):
        ids = torch.randint(64, (2, length))
        exact = gradient(plain, ids, in_bfloat16=False)
        torch.testing.assert_close(gradient(compiled, ids, in_bfloat16=False), exact, rtol=1e-4, atol=1e-4)
        for model in (plain, compiled):
            off[model is compiled] += float(
                (gradient(model, ids, in_bfloat16=True) - exact)[1:].norm() / exact[1:].norm()
            )
    assert off[True] < 1.5 * off[False]


@needs_compiler
def test_without_gradients_nothing_is_compiled():
    model = small_model()
    before = copy.deepcopy(model)
    compile_layers(model)
    torch._dynamo.utils.counters.clear()
    ids = torch.randint(64, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before(ids).logits)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False)[:, :9], ids)
    assert not torch._dynamo.utils.counters["frames"]


def recipe_file(folder: Path, **training: object) -> Path:
    lines = "".join(f"  {key}: {value}\n" for key, value in training.items())
    path = folder / "recipe.yaml"
    path.write_text(
        "model: {name: some/model, dtype: float32}\nmethod: full\ndata: {train: [{path: rows.jsonl}]}\n"
        f"distributed: {{strategy: single}}\noutput_dir: run\ntraining:\n  num_train_epochs: 1\n{lines}",
        encoding="utf-8",
    )
    return path


def is_tried(folder: Path, tokens: int, placement: DistributedSetup = ALONE, **training: object) -> bool:
    """Whether a run that leaves it open may compile, and is long enough to repay that on fast cores."""
    recipe = load_recipe(recipe_file(folder, **training), to_train=False).recipe
    stats = EncodingStats(examples=10, tokens=tokens)
    seconds = least_training_seconds(recipe, placement, small_model(), stats)
    return may_compile(recipe, placement) and seconds >= MIN_LONG_SECONDS


LONG = 10**12


@needs_compiler
def test_long_runs_may_compile(tmp_path):
    assert is_tried(tmp_path, LONG)


@needs_compiler
@pytest.mark.parametrize(
    ("tokens", "how"),
    [
        (1000, {}),
        (LONG, {"torch_compile": "false"}),
        (LONG, {"max_steps": 2}),
        (LONG, {"max_train_minutes": 1}),
        (LONG, {"placement": replace(ALONE, gpus=1)}),
        (LONG, {"placement": replace(ALONE, strategy="zero3", processes=2)}),
    ],
)
def test_what_would_not_pay_is_left_as_it_is(tmp_path, tokens, how):
    assert not is_tried(tmp_path, tokens, **how)


def ask(folder: Path, placement: DistributedSetup = ALONE) -> LlamaForCausalLM:
    model = small_model()
    compile_as_asked(load_recipe(recipe_file(folder, torch_compile="true"), to_train=False), placement, model)
    return model


@needs_compiler
def test_compiled_layers_can_be_switched_off_and_on(tmp_path):
    model = ask(tmp_path)
    assert has_compiled_layers(model)
    switch_compiled(model, on=False)
    assert not has_compiled_layers(model)
    torch._dynamo.utils.counters.clear()
    ids = torch.randint(64, (1, 9))
    assert torch.equal(model(ids).logits, small_model()(ids).logits)
    assert not torch._dynamo.utils.counters["frames"]
    assert compile_layers(model) == 2
    assert has_compiled_layers(model)


def test_a_wish_that_cannot_be_granted_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="C\\+\\+ compiler") as told:
        ask(tmp_path)
    assert "torch_compile" in str(told.value.where)


def test_a_run_that_turns_out_sharded_refuses_the_key(tmp_path):
    with pytest.raises(UserError, match="cannot be compiled"):
        ask(tmp_path, replace(ALONE, strategy="zero3", processes=2))


def test_sharded_runs_refuse_the_key(tmp_path):
    path = recipe_file(tmp_path, torch_compile="true")
    path.write_text(path.read_text().replace("single", "zero3"), encoding="utf-8")
    with pytest.raises(UserError, match="never compiled"):
        load_recipe(path, to_train=False)


def test_sharded_runs_may_say_that_nothing_is_compiled(tmp_path):
    path = recipe_file(tmp_path, torch_compile="false")
    path.write_text(path.read_text().replace("single", "zero3"), encoding="utf-8")
    assert load_recipe(path, to_train=False).recipe.training.torch_compile is False
