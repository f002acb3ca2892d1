"""Signals, in every phase of a command: one line, a status that tells the signal, and a folder to resume."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from peftchat.interruption import DeferredSignals, Interrupted, interruption
from tests.support.cli import COMMAND, PROJECT, Started, start, true_peftchat
from tests.support.data import read_json_lines
from tests.support.faults import Scene

SECONDS = 30.0
"""Far more than a process may take to end, and far less than any of these runs would."""

# A run that seems long would be tuned first.
ENDLESS = {"max_steps": 100000, "logging_steps": 1, "autotune": False, "torch_compile": False}
LONG = {**ENDLESS, "save_strategy": "steps", "save_steps": 100000}


def begun(scene: Scene) -> Started:
    return start("-m", "peftchat", "train", scene.recipe, cwd=scene.folder, environment=scene.environment)


def until(ready: Callable[[], bool], started: Started) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert started.poll() is None, started.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def has_trained(scene: Scene) -> bool:
    metrics = scene.run / "metrics.jsonl"
    return metrics.is_file() and metrics.read_text().count("\n") > 2


def own_lines(stderr: str) -> list[str]:
    """What the command itself said at its end: without progress and notes."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("step ", "Loading weights", "Chosen:", "note:"))]


def long_run(folder: Path, **training: object) -> Scene:
    scene = Scene.build(folder)
    scene.sections = {"training": {**LONG, **training}}
    return scene


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_signal_stops_training_after_the_step_with_a_checkpoint(number: int, name: str, tmp_path: Path) -> None:
    scene = long_run(tmp_path)
    started = begun(scene)
    until(lambda: has_trained(scene), started)
    started.send_signal(number)
    assert started.wait(SECONDS) == 128 + number
    _, stderr = started.communicate()
    (line,) = own_lines(stderr)
    step = read_json_lines(scene.run / "metrics.jsonl")[-1]["step"]
    assert line.startswith(f"Stopped at step {step} ({name}). Resume with `peftchat train") and "--resume" in line
    assert [path.name for path in (scene.run / "checkpoints").iterdir()] == [f"checkpoint-{step}"]
    scene.sections["training"]["max_steps"] = step + 1
    scene.train("--resume")
    assert [line["step"] for line in read_json_lines(scene.run / "metrics.jsonl")] == list(range(1, step + 2))


def test_a_checkpoint_is_written_when_it_is_asked_for_and_the_run_goes_on(tmp_path: Path) -> None:
    """By SIGUSR2 or by a file, and with `save_strategy: no` too; SIGUSR1 ends the run as SIGTERM does."""
    scene = long_run(tmp_path, save_strategy="no")
    del scene.sections["training"]["save_steps"]
    started = begun(scene)
    # Long before it trains: nothing is lost, and the run does not end.
    until((scene.run / ".claim").is_file, started)
    started.send_signal(signal.SIGUSR2)
    until(lambda: len(complete(scene)) == 1, started)
    (scene.run / "checkpoint.request").touch()
    until(lambda: len(complete(scene)) == 2, started)
    trained = _lines(scene)
    until(lambda: _lines(scene) > trained + 1, started)
    started.send_signal(signal.SIGUSR1)
    assert started.wait(SECONDS) == 128 + signal.SIGUSR1
    first, second, end = own_lines(started.communicate()[1])
    assert [first, second] == [f"Checkpoint, as asked: {scene.run}/checkpoints/{one}" for one in complete(scene)]
    assert "(SIGUSR1). No checkpoint was written" in end
    assert not (scene.run / "checkpoint.request").exists()


def complete(scene: Scene) -> list[str]:
    """The names of the complete checkpoints, in the order of their steps."""
    found = [one.parent.name for one in scene.run.glob("checkpoints/*/complete.json")]
    return sorted(found, key=lambda name: int(name.rpartition("-")[2]))


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    # Layers are compiled in the first step, which takes far more than two seconds.
    scene = long_run(tmp_path, torch_compile=True, gradient_accumulation_steps=100000)
    started = begun(scene)
    until((scene.run / "choices.json").is_file, started)
    time.sleep(1)
    started.send_signal(signal.SIGINT)
    time.sleep(1)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    status = started.wait(SECONDS)
    _, stderr = started.communicate()
    assert status == 130, stderr
    assert own_lines(stderr) == ["Interrupted."]
    scene.sections["training"] = {"max_steps": 1}
    assert scene.peftchat("train", scene.recipe, "--resume").returncode == 2, "another global batch size"


def test_without_checkpoints_the_line_says_so(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    scene.sections = {"training": ENDLESS}
    started = begun(scene)
    until(lambda: has_trained(scene), started)
    started.send_signal(signal.SIGTERM)
    assert started.wait(SECONDS) == 143
    (line,) = own_lines(started.communicate()[1])
    assert "No checkpoint was written: training.save_strategy is `no`" in line
    assert not (scene.run / "checkpoints").exists()


def test_a_signal_within_an_evaluation_keeps_the_step(tmp_path: Path) -> None:
    scene = long_run(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=1)
    line = scene.data.read_text().splitlines()[0]
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(f"{line}\n" * 20000)
    scene.sections["data"] = {"eval": [{"path": str(held_out)}], "packing": False}
    started = begun(scene)
    until(lambda: has_trained(scene) or _lines(scene) == 2, started)
    time.sleep(0.5)
    started.send_signal(signal.SIGTERM)
    assert started.wait(SECONDS) == 143
    # The line before says that these conversations are trained on too.
    *_, said = own_lines(started.communicate()[1])
    assert said.startswith("Stopped at step 2 (SIGTERM)")
    assert (scene.run / "checkpoints" / "checkpoint-2" / "complete.json").is_file()


def _lines(scene: Scene) -> int:
    metrics = scene.run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_at_any_time_is_one_line_and_the_run_can_be_resumed(
    share: float, number: int, tmp_path: Path, seconds_of_a_run: float
) -> None:
    scene = Scene.build(tmp_path)
    started = begun(scene)
    time.sleep(share * seconds_of_a_run)
    started.send_signal(number)
    status = started.wait(SECONDS)
    _, stderr = started.communicate()
    # Behind the last file, the command gives the signals back to the interpreter, which ends by them at once.
    if status not in (0, -number):
        assert status == 128 + number, stderr
        assert len(own_lines(stderr)) == 1 and "Traceback" not in stderr
        # The signal may come between the last file and the end.
        if not (scene.run / "run.json").is_file():
            scene.train("--resume")
    assert (scene.run / "run.json").is_file()


@pytest.fixture(scope="module")
def seconds_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> float:
    scene = Scene.build(tmp_path_factory.mktemp("timed"))
    begin = time.monotonic()
    scene.train()
    return time.monotonic() - begin


SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000): pass
except BaseException:
    pass
"""


@pytest.mark.parametrize(("name", "status", "line"), [("SIGINT", 130, "Interrupted."), ("SIGTERM", 143, "Stopped")])
def test_no_library_keeps_an_interruption_from_a_command_that_imports_it(
    name: str, status: int, line: str, tmp_path: Path
) -> None:
    """Some catch every exception around an import."""
    (tmp_path / "torch.py").write_text(SWALLOWS.format(name=name))
    scene = Scene.build(tmp_path)
    done = true_peftchat("train", scene.recipe, PYTHONPATH=f"{tmp_path}:{PROJECT}")
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert not scene.run.exists()


@pytest.mark.parametrize("command", ["train", "merge"])
def test_a_signal_while_libraries_are_imported_is_one_line(command: str, tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    arguments = {"merge": [str(scene.run)]}
    process = subprocess.Popen(
        [*COMMAND, command, *arguments.get(command, [str(scene.recipe)])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    # Its handlers are there before the first library is.
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "/torch/lib/" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=SECONDS)
    if process.returncode != 2:
        assert process.returncode == 130
        assert stderr == "Interrupted.\n"


def two_processes(folder: Path, **training: object) -> Scene:
    scene = long_run(folder, **training)
    scene.sections["distributed"] = {"strategy": "ddp", "processes": 2}
    return scene


def workers(started: Started) -> list[psutil.Process]:
    return [child for child in psutil.Process(started.pid).children() if "peftchat" in " ".join(child.cmdline())]


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    return not alive


@pytest.mark.distributed
@pytest.mark.parametrize("target", ["launcher", "worker"])
def test_two_processes_stop_after_the_same_step(target: str, tmp_path: Path) -> None:
    scene = two_processes(tmp_path)
    started = begun(scene)
    until(lambda: has_trained(scene), started)
    both = workers(started)
    assert len(both) == 2
    process = psutil.Process(started.pid) if target == "launcher" else both[1]
    process.send_signal(signal.SIGUSR2)
    until(lambda: bool(complete(scene)), started)
    process.send_signal(signal.SIGTERM)
    assert started.wait(SECONDS) == 143
    told, line = own_lines(started.communicate()[1])
    assert told.startswith("Checkpoint, as asked: ")
    assert line.startswith("Stopped at step ") and "--resume" in line
    assert len(complete(scene)) == len(list((scene.run / "checkpoints").iterdir())) <= 2
    assert gone(both)


@pytest.mark.distributed
def test_workers_end_with_their_launcher_and_with_each_other(tmp_path: Path) -> None:
    scene = two_processes(tmp_path)
    started = begun(scene)
    until(lambda: has_trained(scene), started)
    both = workers(started)
    both[1].kill()
    assert started.wait(SECONDS) == 1
    (line,) = own_lines(started.communicate()[1])
    assert line == "Failed: process 1 was killed by SIGKILL (perhaps out of memory)"
    assert gone(both)
    started = start("-m", "peftchat", "train", scene.recipe, "--resume", cwd=scene.folder)
    until(lambda: len(workers(started)) == 2, started)
    both = workers(started)
    started.kill()
    assert gone(both)


def test_the_first_signal_is_noted_and_one_press_is_one_signal() -> None:
    signals = DeferredSignals()
    signals.begin()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        time.sleep(0.6)
        with pytest.raises(Interrupted, match=r"Stopped by SIGTERM\."):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signals.end()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interruption_is_found_behind_what_libraries_make_of_it() -> None:
    try:
        try:
            raise Interrupted(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("initialization failed") from error
    except ImportError as error:
        found = interruption(error)
    assert found is not None and found.status == 143
    assert interruption(ValueError()) is None and interruption(SystemExit(1)) is None


def test_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    scene = long_run(tmp_path, max_steps=40)
    code = "import signal, runpy, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[0:1] = []; "
    code += "runpy.run_module('peftchat', run_name='__main__', alter_sys=True)"
    started = start("-c", code, "peftchat", "train", scene.recipe, cwd=scene.folder)
    until(lambda: has_trained(scene), started)
    started.send_signal(signal.SIGHUP)
    assert started.wait(120) == 0
