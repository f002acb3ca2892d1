"""Rounding of merged weights to bfloat16: an update below the distance of two values is there on average."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig

from peftchat.merging import MergeOptions, merge_run
from peftchat.models.rounding import noise_of_rows
from tests.support.adapters import load, make_base, oracle, tensors_of, train_by_noise
from tests.support.cli import peftchat

_CONFIGS = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    # All of a weight is computed at once.
    "loha": lambda: LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "up_proj"]),
}


def kept(base: Path, exact: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> float:
    """Return the share of an exact update, as a scalar product, that merged weights have; fused experts aside."""
    found = wanted = 0.0
    old = load(base).state_dict()
    for name in old.keys() & merged.keys():
        before = old[name]
        update = (exact[name] - before).double()
        found += float((update * (merged[name].double() - before)).sum())
        wanted += float(update.square().sum())
    return found / wanted


@pytest.mark.parametrize(
    ("variant", "kind", "noise"),
    [("lora", "llama", 1e-4), ("lora", "mixtral", 1e-4), ("lora", "gpt2", 1e-4), ("loha", "llama", 5e-4)],
)
def test_a_small_update_is_kept(variant: str, kind: str, noise: float, tmp_path: Path) -> None:
    config: Any = _CONFIGS[variant]()
    base, run = make_base(tmp_path / "base", kind, torch.bfloat16), tmp_path / "run"
    exact = train_by_noise(base, run, config, noise=noise).merged
    # Of an update this small, only a part is there where it is rounded to the nearest value.
    for rounding, least, most in (("stochastic", 0.9, 1.1), ("nearest", 0.0, 0.5)):
        options = MergeOptions(output=tmp_path / rounding, rounding=rounding, verify=False)
        assert least < kept(base, exact, tensors_of(merge_run(run, options).folder)) < most


def test_the_nearest_values_are_those_of_peft(tmp_path: Path) -> None:
    base, run = make_base(tmp_path / "base", "llama", torch.bfloat16), tmp_path / "run"
    train_by_noise(base, run, _CONFIGS["lora"](), noise=0.02)
    done = peftchat("merge", run, "-o", tmp_path / "merged", "--rounding", "nearest")
    assert done.returncode == 0, done.stderr
    expected = oracle(base, run).merged
    for name, value in tensors_of(tmp_path / "merged").items():
        # PEFT sums products in another order.
        torch.testing.assert_close(value, expected[name].bfloat16(), rtol=2**-7, atol=0)
        assert (value == expected[name].bfloat16()).float().mean() > 0.98


def test_the_bytes_do_not_depend_on_the_blocks(tmp_path: Path) -> None:
    base, run = make_base(tmp_path / "base", "llama", torch.bfloat16), tmp_path / "run"
    train_by_noise(base, run, _CONFIGS["lora"](), noise=1e-3)
    results = [
        tensors_of(merge_run(run, MergeOptions(output=tmp_path / str(budget), memory_budget=budget)).folder)
        for budget in (None, 7 << 10)
    ]
    again = tensors_of(merge_run(run, MergeOptions(output=tmp_path / "again")).folder)
    for name, value in results[0].items():
        assert torch.equal(again[name], value)
        # Blocks of another size are multiplied in another order, which moves a value at a border.
        assert (results[1][name] == value).float().mean() > 0.995


def test_what_has_no_update_keeps_its_bytes(tmp_path: Path) -> None:
    base, run = make_base(tmp_path / "base", "llama", torch.bfloat16), tmp_path / "run"
    train_by_noise(base, run, LoraConfig(r=4, target_modules=["q_proj"]), noise=0.0)
    merged = tensors_of(merge_run(run, MergeOptions()).folder)
    assert all(torch.equal(merged[name], value) for name, value in tensors_of(base).items())


def test_the_noise_of_a_row_is_its_own() -> None:
    whole = noise_of_rows("layer.weight", 0, torch.Size((300, 3, 7)))
    parts = [
        noise_of_rows("layer.weight", start, torch.Size((stop - start, 3, 7)))
        for start, stop in ((0, 1), (1, 90), (90, 300))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(noise_of_rows("other.weight", 0, whole.shape), whole)
    assert whole.min() >= 0 and whole.max() < 2**16
    # Uniform: mean and deviation of 6,300 numbers, within five standard errors.
    assert whole.double().mean() == pytest.approx(2**15, abs=5 * 2**16 / 12**0.5 / 6300**0.5)
    assert len(whole.unique()) > 5900
