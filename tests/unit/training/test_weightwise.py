"""Updates weight by weight: as by the optimizer alone, rounded without bias, resumed exactly; computing in float32."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW as EightBit
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Adafactor

from peftchat.models.widened import compute_in_float32
from peftchat.planning.tracing import LiveBytes
from peftchat.training import weightwise
from peftchat.training.weightwise import WeightwiseOptimizer, round_stochastically
from tests.support.models import random_model

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw_torch_fused": lambda groups: AdamW(groups, lr=1e-2, fused=True),
    "adamw_8bit": lambda groups: EightBit(groups, lr=1e-2, optim_bits=8),
    "adafactor": lambda groups: Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False),
}


def weights_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix of several parts, one of a single part, and a vector."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((1500, 64), (96, 64), (64,))]


def weightwise_on(weights: Sequence[nn.Parameter], optim: str, *, in_backward: bool = False) -> WeightwiseOptimizer:
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
    return WeightwiseOptimizer(OPTIMIZERS[optim], groups, optim=optim, seed=7, in_backward=in_backward)


def give_gradients(weights: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_float32_weights_are_updated_as_by_the_optimizer_alone(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weightwise, "PART_ELEMENTS", 2**15)
    ours, stock = weights_of(), weights_of()
    optimizer = weightwise_on(ours, optim)
    alone = OPTIMIZERS[optim]([{"params": stock[:2], "weight_decay": 0.1}, {"params": stock[2:], "weight_decay": 0.0}])
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(stock, step)
        optimizer.step()
        alone.step()
    for one, other in zip(ours, stock, strict=True):
        assert one.grad is None
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_loss_that_updates_in_its_backward_pass_does_what_a_step_does() -> None:
    def loss_of(weights: Sequence[nn.Parameter]) -> Tensor:
        return (torch.tanh(weights[1] * weights[2]) @ weights[0].T).square().mean() * 100

    ours, stock = weights_of(), weights_of()
    optimizer, alone = (
        weightwise_on(ours, "adamw_torch_fused", in_backward=True),
        weightwise_on(stock, "adamw_torch_fused"),
    )
    loss_of(ours).backward()
    assert all(weight.grad is not None for weight in ours), "a backward pass of another kind updates nothing"
    optimizer.zero_grad()
    for _ in range(3):
        with optimizer.training():
            loss_of(ours).backward()
        assert all(weight.grad is None for weight in ours)
        loss_of(stock).backward()
        norm = torch.linalg.vector_norm(
            torch.cat([weight.grad.flatten() for weight in stock if weight.grad is not None])
        )
        torch.testing.assert_close(optimizer.take_norm(), norm)
        optimizer.step()
        alone.step()
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_rounding_keeps_the_mean_and_takes_one_of_the_two_neighbors() -> None:
    generator = torch.Generator().manual_seed(0)
    for value in (1.001, -1.001, 3e-5, -7.77e20):
        values = torch.full((200_000,), value)
        rounded = round_stochastically(values, generator).double()
        neighbors = rounded.unique()
        gap = float(neighbors.max() - neighbors.min())
        assert len(neighbors) == 2 and neighbors.min() < value < neighbors.max()
        assert gap <= abs(value) * 2**-7
        # The mean of so many is this near in all but one of 10,000 cases.
        assert abs(float(rounded.mean()) - float(values[0])) < 4 * gap / 2 / 200_000**0.5
    special = torch.tensor([0.0, -0.0, 1.5, float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(round_stochastically(special, generator).float(), special, equal_nan=True)
    every_nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(every_nan, generator).isnan().all()


def test_small_updates_move_bfloat16_weights_that_plain_rounding_leaves() -> None:
    """A thousandth of the gap between two numbers, a thousand times."""
    weight, plain = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)), torch.ones(4096, dtype=torch.bfloat16)
    optimizer = WeightwiseOptimizer(
        lambda groups: torch.optim.SGD(groups, lr=1.0), [{"params": [weight]}], optim="sgd", seed=0, in_backward=False
    )
    for _ in range(200):
        weight.grad = torch.full_like(weight, 2**-7 / 200)
        optimizer.step()
        plain = (plain.float() - 2**-7 / 200).to(torch.bfloat16)
    assert bool((plain == 1).all())
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 2**-7, abs=3e-4)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_exactly(optim: str) -> None:
    whole, first = weights_of(torch.bfloat16), weights_of(torch.bfloat16)
    uninterrupted, interrupted = weightwise_on(whole, optim), weightwise_on(first, optim)
    for step in range(4):
        give_gradients(whole, step)
        uninterrupted.step()
        if step < 2:
            give_gradients(first, step)
            interrupted.step()
    saved = copy.deepcopy(interrupted.state_dict())
    second = [nn.Parameter(weight.detach().clone()) for weight in first]
    resumed = weightwise_on(second, optim)
    resumed.load_state_dict(saved)
    for step in (2, 3):
        give_gradients(second, step)
        resumed.step()
    for one, other in zip(whole, second, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "gemma2", "qwen3_moe"])
def test_bfloat16_weights_compute_as_their_float32_copies(kind: str, checkpointing: bool) -> None:
    narrow = random_model(kind, 96).to(torch.bfloat16).train()
    wide = copy.deepcopy(narrow).float()
    compute_in_float32(narrow)
    ids = torch.arange(24)[None] % 90
    if checkpointing:
        narrow.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)  # Of dropout.
    loss = narrow(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.manual_seed(1)
    expected = wide(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for (name, one), (_, other) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert one.dtype == torch.bfloat16, name
        if other.grad is not None:
            assert one.grad is not None
            error = (one.grad.float() - other.grad).norm() / other.grad.norm().clamp(min=1e-12)
            assert error < 2**-7, name
    assert set(narrow.state_dict()) == set(wide.state_dict())


def test_no_float32_copy_of_a_weight_is_kept_for_the_backward_pass() -> None:
    narrow = random_model("llama", 96).to(torch.bfloat16).train()
    wide = copy.deepcopy(narrow).float()
    compute_in_float32(narrow)
    kept = []
    for model in (narrow, wide):
        live = LiveBytes()
        live.ignore(model)
        with live:
            loss = model(input_ids=torch.arange(24)[None], use_cache=False).logits.sum()
            kept.append(live.now)
            loss.backward()
    assert kept[0] <= 1.01 * kept[1]


def test_a_weight_that_changes_before_its_backward_pass_is_an_error() -> None:
    model = random_model("llama", 96).to(torch.bfloat16)
    compute_in_float32(model)
    loss = model(input_ids=torch.arange(24)[None], use_cache=False).logits.sum()
    with torch.no_grad():
        next(model.model.layers[0].parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="changed"):
        loss.backward()
