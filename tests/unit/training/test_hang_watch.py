"""The hang watch: it names who is behind, and is silent where nobody is stuck."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peftchat.training.hang_watch import FOLDER, HangWatch, Heartbeat, describe
from peftchat.training.position import Position, RunPosition


def watch(
    folder: Path, told: list[str], *, rank: int = 0, processes: int = 1, limit: float = 0.4
) -> tuple[RunPosition, HangWatch]:
    position = RunPosition()
    sources: Callable[[Position], list[str]] = lambda now: [f"data.jsonl:{one}" for one in now.examples]  # noqa: E731
    return position, HangWatch(
        position, folder, limit, rank=rank, processes=processes, sources=sources, tell=told.append
    )


def train(position: RunPosition, steps: int, seconds: float = 0.0) -> None:
    for step in range(1, steps + 1):
        for part in ("waiting for the next batch", "the forward pass", "the backward pass", "the optimizer's update"):
            position.enter(part, step, [step])
            time.sleep(seconds)


def until(ready: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_process_that_is_behind_is_named_once_by_the_first(tmp_path: Path) -> None:
    told: list[list[str]] = [[], []]
    both = [watch(tmp_path, told[rank], rank=rank, processes=2) for rank in (0, 1)]
    for _, one in both:
        one.start()
    for position, _ in both:
        train(position, 5)
    both[0][0].enter("the forward pass", 6, [40, 41])
    both[1][0].enter("the forward pass", 6, [42, 43])
    both[1][0].enter("the backward pass", 6, [42, 43])
    until(lambda: told[0])
    time.sleep(0.3)
    (report,) = told[0]
    assert report.startswith("No progress for ") and not told[1]
    assert "Process 0 (pid " in report and "is stuck in the forward pass of step 6" in report
    assert "2 conversations: data.jsonl:40, data.jsonl:41" in report
    assert "in test_the_process_that_is_behind_is_named_once_by_the_first\n    until" in report.replace(
        "    time.sleep(0.02)", ""
    )
    assert " waits in the backward pass of step 6." in report
    assert "Thread" in (tmp_path / FOLDER / "rank-1.stacks").read_text()
    both[0][0].enter("the backward pass", 6, [40, 41])
    until(lambda: len(told[0]) == 2)
    assert told[0][1].startswith("The run goes on, after about ")
    for _, one in both:
        one.stop()
    assert not (tmp_path / FOLDER).exists()


def test_a_process_without_a_sign_of_life_is_named_and_the_next_one_speaks(tmp_path: Path) -> None:
    told: list[list[str]] = [[], []]
    both = [watch(tmp_path, told[rank], rank=rank, processes=2) for rank in (0, 1)]
    both[1][1].start()
    train(both[1][0], 5)
    both[1][0].enter("the forward pass", 6, [42])
    until(lambda: told[1])
    assert "Of process 0 nothing is known here" in told[1][0]
    both[1][1].stop()


@pytest.mark.parametrize("part", ["the evaluation", "writing a checkpoint", "the forward pass"])
def test_slow_parts_and_first_steps_are_no_hang(part: str, tmp_path: Path) -> None:
    told: list[str] = []
    position, one = watch(tmp_path, told, limit=0.2)
    one.start()
    if part != "the forward pass":
        train(position, 5)
    position.enter(part, 1 if part == "the forward pass" else 5)  # type: ignore[arg-type]
    time.sleep(0.8)
    one.stop()
    assert not told


def test_a_slow_model_has_slow_steps(tmp_path: Path) -> None:
    told: list[str] = []
    position, one = watch(tmp_path, told, limit=0.1)
    one.start()
    train(position, 4, seconds=0.09)
    position.enter("the forward pass", 5)
    time.sleep(0.25)
    one.stop()
    assert not told


def test_of_those_that_are_equally_far_the_one_that_does_not_wait_is_stuck() -> None:
    waiting = Heartbeat(0, 1, "here", 9, 30, "the forward pass of step 3", idle=50, waits=True)
    stuck = Heartbeat(1, 2, "there", 9, 30, "the forward pass of step 3", ["a.jsonl:1"], 50, stack="  File x\n")
    report = describe([stuck, waiting], set(), 50)
    assert (
        "Process 1 (pid 2 on there) is stuck in the forward pass of step 3, with 1 conversation: a.jsonl:1." in report
    )
    assert "Process 0 (pid 1 on here) waits" in report and "File x" in report
    assert "look for it on there" in describe([stuck, waiting], {1}, 50)
