"""The parts of a prediction against plain counting, and against what torch really keeps."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from peftchat.planning.activations import LossProfile, activation_profile
from peftchat.planning.auto_settings import choose_batch, choose_checkpointing, upper_bound
from peftchat.planning.memory import base_bytes, static_memory
from peftchat.planning.planner import Planner, changes, cheapest_fix, largest_batch, largest_length
from peftchat.planning.settings import AttentionKind, PlanSettings, plan_settings
from peftchat.planning.tracing import fake_mode, fake_model, trace_backbone
from peftchat.recipe import Recipe
from tests.support.planning import recipe_on


def settings_of(recipe: Recipe, attention: AttentionKind = "fused", **changed: object) -> PlanSettings:
    settings = plan_settings(
        recipe, strategy="single", processes=1, device="cpu", attention=attention, conversation=64, new_tokens=0
    )
    return settings.with_changes(**changed)


@pytest.fixture(scope="module")
def planners(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Planner]:
    """Planners for the small model by method; each traces a way of training once for all tests."""
    folder = tmp_path_factory.mktemp("planners")

    @cache
    def planner(method: str) -> Planner:
        recipe = recipe_on("small", folder, method)
        return Planner(AutoConfig.from_pretrained(recipe.model.name), recipe)

    return planner


def saved_bytes(recipe: Recipe, batch: int, length: int, *, checkpointing: bool) -> int:
    """What autograd keeps for the backward pass of a real forward: the storages it packs, weights aside."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(recipe.model.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(1000, (batch, length))
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, position_ids=torch.arange(length)[None], attention_mask=mask, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_activations_are_those_that_autograd_really_saves(tmp_path: Path, checkpointing: bool) -> None:
    recipe = recipe_on("small", tmp_path, "full")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "float32"})})
    settings = settings_of(recipe, "masked", dtype="float32", checkpointing=checkpointing)
    config = AutoConfig.from_pretrained(recipe.model.name)
    profile = activation_profile(config, recipe, settings.trace_config)
    batch, length = 3, 192
    real = saved_bytes(recipe, batch, length, checkpointing=checkpointing)
    # The ids and the last hidden state are alive too, and not saved.
    alive_too = batch * length * (2 * 8 + 4 * 64) + batch * length * length
    assert profile.at(batch, length).saved == pytest.approx(real, abs=2 * alive_too, rel=0.02)


@pytest.mark.parametrize(
    ("method", "attention"), [("full", "fused"), ("lora", "fused"), ("lora", "masked"), ("qlora", "eager")]
)
def test_the_law_through_two_layers_holds_for_all(tmp_path: Path, method: str, attention: AttentionKind) -> None:
    recipe = recipe_on("small", tmp_path, method)
    config = AutoConfig.from_pretrained(recipe.model.name)
    config.num_hidden_layers = 5
    key = settings_of(recipe, attention).trace_config
    step = activation_profile(config, recipe, key).at(3, 384)
    with fake_mode():
        whole = trace_backbone(fake_model(config, recipe, key, 5), 3, 384, torch.bfloat16)
    assert step.saved == pytest.approx(whole.saved, rel=0.01)
    assert step.forward == pytest.approx(whole.forward_peak, rel=0.03)
    assert step.backward == pytest.approx(whole.first_layer_peak, rel=0.05)


def test_a_chunk_of_the_loss_is_as_large_as_the_device_lets_it_be() -> None:
    from peftchat.planning.tracing import LossTrace

    def trace(targets: int) -> LossTrace:
        return LossTrace(forward=100 + 7 * targets + 50 * min(targets, 20), backward=3 * targets, gradients=5)

    profile = LossProfile(trace, 20, lambda targets: min(targets, 300))
    assert profile.at(200) == LossTrace(100 + 7 * 200 + 50 * 200, 600, 5)
    assert profile.at(1000) == LossTrace(100 + 7 * 1000 + 50 * 300, 3000, 5)


def test_quantized_weights_are_as_large_as_those_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peftchat.planning.memory import quantized_bytes

    weight = torch.randn(512, 1024)
    for double in (False, True):
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        scales = [state.absmax] if not double else [state.absmax, state.state2.absmax]
        real = sum(part.numel() * part.element_size() for part in (packed, *scales))
        predicted = quantized_bytes(weight.numel(), _with(bits=4, double=double), outputs=512)
        assert predicted == pytest.approx(real, rel=0.001)


def _with(**changed: object) -> PlanSettings:
    settings = PlanSettings(
        method="qlora", dtype="bfloat16", compute_dtype="bfloat16", bits=4, double=True,
        optimizer="adamw_torch", strategy="single", processes=1,
        offload="none", checkpointing=False, batch=1, length=128, accumulation=1, supervised=0.5, attention="masked",
        conversation=64, device="cuda", new_tokens=0,
    )  # fmt: skip
    return settings.with_changes(**changed)


def test_full_training_holds_sixteen_bytes_a_weight_and_zero_shares_them(planners: Callable[[str], Planner]) -> None:
    planner = planners("full")
    settings = _with(method="full", bits=None, double=False)
    weights = planner.counts.parameters
    trained = planner.trainable(settings)
    alone = static_memory(settings, planner.counts, trained)
    assert alone.weights + alone.gradients + alone.optimizer == 16 * weights
    eight = settings.with_changes(processes=8, strategy="zero3")
    shared = static_memory(eight, planner.counts, trained)
    assert shared.weights + shared.gradients + shared.optimizer == pytest.approx(16 * weights / 8)
    two = static_memory(eight.with_changes(strategy="zero2"), planner.counts, trained)
    assert two.weights == 2 * weights
    assert two.gradients + two.optimizer == pytest.approx(14 * weights / 8)
    away = static_memory(eight.with_changes(offload="all"), planner.counts, trained)
    assert away.weights == away.optimizer == 0
    assert away.host >= 14 * weights / 8


def test_an_adapter_trains_what_peft_says_and_keeps_no_state_of_the_base(planners: Callable[[str], Planner]) -> None:
    planner = planners("lora")
    settings = settings_of(planner.recipe)
    # Per block: q and o 64x64, k and v 64x32, three of 64x160; r is 16.
    block = 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))
    assert planner.trainable(settings).parameters == 3 * block
    static = static_memory(settings, planner.counts, planner.trainable(settings))
    assert static.optimizer == 8 * 3 * block
    assert base_bytes(settings, planner.counts) == 2 * planner.counts.parameters


def test_saving_memory_saves_memory(planners: Callable[[str], Planner]) -> None:
    planner = planners("full")
    settings = settings_of(planner.recipe, batch=4, length=1024, method="full")
    before = planner.memory(settings)
    found = changes(planner, settings)
    names = {"gradient checkpointing", "a batch of 1 with accumulation", "weights in bfloat16"}
    assert names <= {change.name for change in found}
    assert all(change.memory.total < before.total for change in found)
    assert sum(before.parts.values()) == before.total == before.phases[before.peak_phase] == max(before.phases.values())


def test_freed_gradients_are_not_accumulated(planners: Callable[[str], Planner]) -> None:
    planner = planners("full")
    settings = settings_of(planner.recipe, batch=4, length=1024, method="full")
    assert any("accumulation" in change.name for change in changes(planner, settings))
    freed = settings.with_changes(in_backward=True)
    assert not any("accumulation" in change.name for change in changes(planner, freed))


def test_the_largest_batch_fits_and_one_more_row_does_not(planners: Callable[[str], Planner]) -> None:
    planner = planners("lora")
    settings = settings_of(planner.recipe, length=512)
    room = 1_500_000_000
    rows = largest_batch(planner, settings, room)
    assert planner.memory(settings.with_changes(batch=rows)).total <= room
    assert planner.memory(settings.with_changes(batch=rows + 1)).total > room
    length = largest_length(planner, settings, room)
    assert planner.memory(settings.with_changes(length=length)).total <= room
    assert largest_batch(planner, settings, 1000) == 0


def test_what_does_not_fit_is_made_to_fit_at_the_least_cost(planners: Callable[[str], Planner]) -> None:
    planner = planners("lora")
    settings = settings_of(planner.recipe, batch=64, length=1024)
    checkpointed = planner.memory(settings.with_changes(checkpointing=True)).total
    alone = cheapest_fix(planner, settings, checkpointed)
    assert alone is not None
    assert alone.flags == ("training.gradient_checkpointing=true",)
    both = cheapest_fix(planner, settings, min(change.memory.total for change in changes(planner, settings)) - 1)
    if both is not None:
        assert len(both.flags) > 1
    assert cheapest_fix(planner, settings, 1000) is None


def test_accumulated_gradients_stay_through_the_forward_pass(planners: Callable[[str], Planner]) -> None:
    planner = planners("full")
    once = settings_of(planner.recipe, method="full")
    more = planner.memory(replace(once, accumulation=4)).phases["forward"]
    extra = more - planner.memory(once).phases["forward"]
    assert extra >= 4 * planner.counts.parameters


def test_checkpointing_is_chosen_only_where_memory_needs_it(planners: Callable[[str], Planner]) -> None:
    planner = planners("lora")
    settings = settings_of(planner.recipe, batch=64, length=1024)
    plain = planner.memory(settings).total
    assert not choose_checkpointing(planner, settings, 2 * plain).settings.checkpointing
    tight = choose_checkpointing(planner, settings, plain)
    assert tight.settings.checkpointing
    assert tight.peak_bytes < plain


def test_a_chosen_batch_fits_and_leaves_the_step_as_it_is(planners: Callable[[str], Planner]) -> None:
    planner = planners("lora")
    settings = settings_of(planner.recipe, batch=2, length=512, accumulation=12)
    roomy = choose_batch(planner, settings, 10**12, max_tokens=4096)
    assert (roomy.settings.batch, roomy.settings.accumulation) == (8, 3)
    tight = choose_batch(planner, settings, int(1.2 * planner.memory(settings.with_changes(batch=3)).total), 4096)
    assert tight.settings.batch * tight.settings.accumulation == 24
    assert tight.peak_bytes <= 1.2 * planner.memory(settings.with_changes(batch=3)).total


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("attention", ["fused", "masked"])
def test_the_upper_bound_is_above_what_is_traced(
    planners: Callable[[str], Planner], method: str, attention: str
) -> None:
    """Where it fits into half of the memory nothing is traced, so it must never be too low."""
    planner = planners(method)
    bits = {"bits": None, "double": False}
    for batch, length in ((1, 128), (8, 512), (4, 2048)):
        settings = _with(
            method=method, **bits, dtype="float32", compute_dtype="float32", attention=attention, device="cpu",
            batch=batch, length=length,
        )  # fmt: skip
        assert upper_bound(planner, settings) > planner.memory(settings).total
