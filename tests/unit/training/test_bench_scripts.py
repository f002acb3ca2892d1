"""What the scripts that measure speed rest on: isolated packs, counted weights, parts of a profile, clocks."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch

from peftchat.models.fused_lora import fuse_lora_forward
from peftchat.models.loading import VARLEN
from tests.support.cli import PROJECT


def _script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module(name)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Any]:
    """The script for GPUs, and a model of its smallest shape."""
    script = _script(monkeypatch, "bench_gpu")
    return script, script.make_model(script.config_of("tiny", 64), torch.device("cpu"), torch.float32).eval()


@pytest.mark.parametrize("attention", [VARLEN, "sdpa"])
def test_the_second_conversation_of_a_pack_moves_only_without_a_border(
    tiny: tuple[ModuleType, Any], attention: str
) -> None:
    script, model = tiny
    assert script.leak(model, attention, 24) == 0
    assert script.leak(model, attention, 24, apart=False) > 0


def test_a_leaking_pack_stops_the_measurement(tiny: tuple[ModuleType, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    script, model = tiny
    losses = script.second_losses
    monkeypatch.setattr(script, "second_losses", lambda *args, **kwargs: losses(*args, **{**kwargs, "apart": False}))
    with pytest.raises(SystemExit, match="not isolated"):
        script.prove_isolation(model, 24)


def test_weights_are_counted_as_the_model_has_them(tiny: tuple[ModuleType, Any]) -> None:
    script, model = tiny
    weights = script.Weights.of(model.config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = linear.pop("lm_head").weight.numel()
    assert (weights.head, weights.body) == (head, sum(module.weight.numel() for module in linear.values()))
    assert weights.adapter == sum(script.RANK * sum(module.weight.shape) for module in linear.values())


def test_the_shapes_have_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    script = _script(monkeypatch, "bench_gpu")
    for shape, published in (("llama-3.2-3b", 3.21e9), ("llama-3.1-8b", 8.03e9)):
        config = script.config_of(shape, 64)
        weights = script.Weights.of(config)
        heads = 1 if config.tie_word_embeddings else 2
        assert weights.body + heads * weights.head == pytest.approx(published, rel=0.003)


def test_a_profile_gives_every_operator_to_one_part(
    tiny: tuple[ModuleType, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.profiler import ProfilerActivity, profile

    _, model = tiny
    script = _script(monkeypatch, "profile_step")
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    assert fuse_lora_forward(adapted)
    ids = torch.arange(40)[None]
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad])
    script.mark_parts(model)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    events = found.events()
    parts = script.seconds_by_part(events, 3, 100.0)
    assert sum(parts.values()) == pytest.approx(100.0)
    # Attention is stock here, and so is the loss: neither has a name of its own.
    expected = {*script.PARTS} - {"LM head and loss", script.COMPILED}
    assert {part for part, seconds in parts.items() if seconds} >= expected
    # Without knowing the rank, the adapter's products are the base's.
    others = script.seconds_by_part(events, 0, 100.0)
    products = script.PARTS[:2]
    assert others[products[1]] == 0
    assert others[products[0]] == pytest.approx(parts[products[0]] + parts[products[1]])


def test_a_peers_pack_has_the_targets_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    script = _script(monkeypatch, "peer_drivers")
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    (pack,) = script.packs(rows, 2)
    assert pack["input_ids"] == [5, 6, 7, 8, 9, 0, 0, 0]
    assert pack["labels"] == [-100, 6, 7, -100, 9, -100, -100, -100]
    assert pack["attention_mask"] == [1, 1, 1, 2, 2, 0, 0, 0]
    assert pack["position_ids"] == [0, 1, 2, 0, 1, 0, 0, 0]


def test_the_clock_counts_real_tokens_behind_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    script = _script(monkeypatch, "peer_drivers")
    clock = script.Clock(2, ends=True)
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight])
    row = {"input_ids": [1, 2, 3, 0], "labels": [-100, -100, 3, -100], "attention_mask": [1, 1, 1, 0]}
    clock.count([row], 1, 0)
    optimizer.step()
    clock.count([row], 1, 1)
    with pytest.raises(script.Enough):
        optimizer.step()
    clock.hook.remove()
    clock.stamps[:], clock.cpu_stamps[:] = [10.0, 12.0], [1.0, 2.0]
    found = clock.measured()
    assert (found["speed"], found["supervised"], found["cpu_share"]) == (1.5, 0.5, 0.5)
