"""Layouts: what of a checkpoint another number of processes can go on with."""

from dataclasses import replace
from pathlib import Path

import pytest

from peftchat.runs.checkpoint import Checkpoint
from peftchat.runs.layout import Layout, layout_change

DDP = Layout("ddp", 2, "none", "adamw_torch_fused", 8)
ZERO = replace(DDP, strategy="zero2")


def checkpoint(folder: Path, layout: Layout | None, *, processes: int = 2, shards: bool = False) -> Checkpoint:
    made = Checkpoint.at_step(folder, 2)
    made.begin()
    if shards:
        (made.path / "global_step2").mkdir()
    made.mark_complete([{}] * processes, {} if layout is None else {"layout": layout.as_dict()})
    return made


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (replace(ZERO, optimizer="lion_32bit"), replace(ZERO, optimizer="lion_32bit", processes=1)),
        (replace(ZERO, offload="optimizer"), replace(ZERO, offload="optimizer", processes=1)),
        (ZERO, replace(ZERO, strategy="zero3")),
        (ZERO, replace(ZERO, offload="optimizer")),
        (ZERO, DDP),
        (DDP, ZERO),
        (replace(ZERO, strategy="zero3"), Layout("single", 1, "none", "adamw_torch_fused", 8)),
        (DDP, replace(DDP, optimizer="sgd")),
    ],
)
def test_what_needs_a_fresh_optimizer_is_told_with_both_layouts(before: Layout, now: Layout, tmp_path: Path) -> None:
    change = layout_change(checkpoint(tmp_path, before), now)
    assert change.fresh_optimizer
    if before.optimizer == now.optimizer:
        assert str(before) in change.changes[0]
        assert str(now) in change.changes[0]


def test_processes_without_shards_go_on_with_a_note(tmp_path: Path) -> None:
    change = layout_change(checkpoint(tmp_path, DDP), Layout("single", 1, "none", "adamw_torch_fused", 8))
    assert not change.changes
    assert not change.fresh_optimizer
    assert "2 processes, strategy: ddp" in change.notes[0]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_shards_of_adamw_go_on_in_other_processes_with_a_note(strategy: str, tmp_path: Path) -> None:
    before = replace(ZERO, strategy=strategy)
    change = layout_change(checkpoint(tmp_path, before), replace(before, processes=4))
    assert not change.changes and not change.fresh_optimizer
    assert f"2 processes, strategy: {strategy}" in change.notes[0]


def test_another_batch_is_a_change(tmp_path: Path) -> None:
    change = layout_change(checkpoint(tmp_path, DDP), Layout("single", 1, "none", "adamw_torch_fused", 4))
    assert "4 examples per optimizer step" in change.changes[0]
    assert not change.fresh_optimizer


@pytest.mark.parametrize("now", [DDP, ZERO])
def test_the_same_layout_changes_nothing(now: Layout, tmp_path: Path) -> None:
    change = layout_change(checkpoint(tmp_path, now), now)
    assert not change.changes
    assert not change.notes


def test_a_checkpoint_of_an_older_version_is_known_by_its_files(tmp_path: Path) -> None:
    assert layout_change(checkpoint(tmp_path / "a", None, shards=True), DDP).fresh_optimizer
    assert not layout_change(checkpoint(tmp_path / "b", None, shards=True), ZERO).fresh_optimizer
    assert not layout_change(checkpoint(tmp_path / "c", None), replace(DDP, processes=1)).changes
