"""The hang watch: silent while a run goes on, and one report where it does not, by the process that can speak."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import FrameType

import pytest
import torch.distributed as dist

from peftchat.training.hang_watch import HangWatch, Sign, frame_of, report

LIMIT = 0.2


def stuck_in_own_code(seconds: float) -> None:
    time.sleep(seconds)


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def watches() -> Iterator[list[HangWatch]]:
    begun: list[HangWatch] = []
    yield begun
    for one in begun:
        one.end()


def begun(watches: list[HangWatch], told: list[str], **settings: object) -> HangWatch:
    watch = HangWatch(LIMIT, lambda: "1 conversation: a.jsonl:7", tell=told.append, **settings)
    watch._steps_seen = 9
    watch.go_on(10, "in step")
    watch.begin()
    watches.append(watch)
    return watch


def test_a_loop_that_stands_still_is_reported_once_with_place_and_conversation(watches: list[HangWatch]) -> None:
    told: list[str] = []
    watch = begun(watches, told)
    for _ in range(10):
        time.sleep(LIMIT / 10)
        watch.go_on(10, "in step")
    assert told == []
    stuck_in_own_code(4 * LIMIT)
    watch.go_on(11, "in step")
    until(lambda: len(told) == 2)
    assert told[0].startswith("No progress for ") and "in step 10." in told[0]
    assert "Its micro-batch has 1 conversation: a.jsonl:7" in told[0]
    assert "stuck_in_own_code" in told[0]
    assert told[1].startswith("Step 11: it goes on after ")


def test_waits_that_are_usual_are_not_reported() -> None:
    watch = HangWatch(60, str)
    assert watch.allowed() == 600, "the first steps may compile"
    watch._steps_seen = 2
    watch.go_on(3, "in step")
    assert watch.allowed() == 60
    watch._went_on -= 100
    watch.go_on(3, "in step")
    assert watch.allowed() == pytest.approx(1000, rel=0.01), "ten times the longest wait"
    watch.go_on(3, "after step")
    assert watch.allowed() == 600, "a checkpoint or an evaluation may follow"
    watch = HangWatch(900, str)
    assert watch.allowed() == 900


def test_one_of_two_processes_names_the_other(watches: list[HangWatch]) -> None:
    """Rank 1 stands still in its own code, rank 0 behind it; rank 0 alone reports both."""
    store, told_0, told_1 = dist.HashStore(), [], []
    ready = threading.Event()

    def other() -> None:
        begun(watches, told_1, rank=1, processes=2, store=store)
        ready.set()
        stuck_in_own_code(8 * LIMIT)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(20)
    begun(watches, told_0, rank=0, processes=2, store=store)
    until(lambda: told_0)
    thread.join()
    assert told_1 == []
    assert "Rank 1 has stood still for " in told_0[0] and "stuck_in_own_code" in told_0[0]


def test_a_process_without_a_sign_of_life_is_named(watches: list[HangWatch]) -> None:
    told: list[str] = []
    begun(watches, told, rank=1, processes=2, store=dist.HashStore())
    until(lambda: told)
    assert "Rank 0 has given no sign of life ever: it hangs in native code, or is stopped." in told[0]


def test_a_process_that_falls_silent_is_named_with_its_conversations(watches: list[HangWatch]) -> None:
    """What it has said stays in the store; its clock does not count."""
    store, told = dist.HashStore(), []
    silent = begun(watches, [], rank=1, processes=2, store=store)
    until(lambda: silent._beat)
    silent._ended.set()
    silent._thread.join()
    begun(watches, told, rank=0, processes=2, store=store)
    until(lambda: told)
    assert "Rank 1 gives no sign of life; the last was in step 10." in told[0]
    assert f"Process {os.getpid()} on " in told[0] and "Its micro-batch has 1 conversation: a.jsonl:7" in told[0]


def test_a_process_whose_training_has_ended_is_waited_for(watches: list[HangWatch]) -> None:
    """It was ended by an error, which it tells seconds later, or waits for nobody any more."""
    store, told = dist.HashStore(), []
    begun(watches, [], rank=1, processes=2, store=store).end()
    begun(watches, told, rank=0, processes=2, store=store)
    time.sleep(4 * LIMIT)
    assert told == []


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGSTOP, "is stopped; `kill -CONT"), (signal.SIGKILL, "has ended")]
)
def test_a_process_that_was_stopped_or_has_ended_is_named_behind_a_step_too(
    number: int, state: str, watches: list[HangWatch]
) -> None:
    """A checkpoint may take minutes, but not where nobody writes it."""
    store, told = dist.HashStore(), []
    process = subprocess.Popen(["sleep", "60"])
    process.send_signal(number)
    sign = Sign(1, 10, "after step", 0.0, False, "", "", "", 1, process.pid, socket.gethostname())
    store.set("peftchat/hang_watch/1", json.dumps(asdict(sign)))
    begun(watches, told, rank=0, processes=2, store=store).go_on(10, "after step")
    until(lambda: told)
    process.kill()
    process.wait()
    assert f"Process {process.pid} on {socket.gethostname()} {state}" in told[0]


def test_a_process_that_was_stopped_itself_does_not_take_that_for_a_hang(
    watches: list[HangWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspended job, or a machine that slept."""
    told: list[str] = []
    clock = time.monotonic
    watch = begun(watches, told)
    monkeypatch.setattr("peftchat.training.hang_watch.time.monotonic", lambda: clock() + 3600)
    time.sleep(LIMIT / 2)
    watch.go_on(11, "in step")
    time.sleep(LIMIT / 2)
    assert told == []


def test_those_that_wait_for_others_are_listed_shortly() -> None:
    def sign(rank: int, *, waits: bool) -> Sign:
        return Sign(rank, 5, "in step", 61.0, waits, "", "1 conversation: b.jsonl:2", f"frame {rank}", 1)

    told = report([sign(0, waits=True), sign(1, waits=False), sign(2, waits=True)], [])
    assert "frame 1" in told and "frame 0" not in told
    assert "Ranks that wait in a collective, the backward pass or for a GPU: 0, 2." in told
    # Where all wait, nobody is to blame by its place, so all places are shown.
    told = report([sign(0, waits=True), sign(1, waits=True)], [])
    assert "frame 0" in told and "frame 1" in told


@pytest.mark.parametrize("is_enabled", [True, False])
def test_nothing_is_collected_while_frames_are_listed(is_enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that was freed there waited for the training loop, and the loop for a new thread."""
    listed, seen = sys._current_frames, []

    def list_frames() -> dict[int, FrameType]:
        seen.append(gc.isenabled())
        return listed()

    monkeypatch.setattr(sys, "_current_frames", list_frames)
    (gc.enable if is_enabled else gc.disable)()
    try:
        frame = frame_of(threading.get_ident())
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
    assert frame is not None and frame.f_code.co_name == "list_frames"
    assert seen == [False]
