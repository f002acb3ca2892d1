"""What launchers, shells and schedulers leave in the environment: taken, ignored with a note, or refused."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from peftchat.errors import UserError
from peftchat.training.launcher_environment import LaunchedProcess, clean_environment, read_environment
from tests.support.faults import Fault, Scene, merge
from tests.support.launch import peftchat_in_processes

TORCH = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "gpu1", "MASTER_PORT": "29501"}
STEP = {
    "SLURM_JOB_ID": "20017",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
INTEL_MPI = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        (TORCH | MEETING, LaunchedProcess(1, 4, 1, 2, "gpu1", "29501")),
        # DeepSpeed's launcher has another name for the processes of a machine.
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"} | MEETING,
            LaunchedProcess(1, 4, 1, 2, "gpu1", "29501"),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | MEETING, LaunchedProcess(0, 1, 0, 1, "gpu1", "29501")),
        (STEP, LaunchedProcess(3, 4, 1, 2, "gpu03", "20017")),
        (STEP | MEETING, LaunchedProcess(3, 4, 1, 2, "gpu1", "29501")),
        (
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "2", "SLURM_STEP_NODELIST": "a-1,b[2,4]"},
            LaunchedProcess(3, 4, 2, 3, "a-1", "20017"),
        ),
        # A script may set some of torch's variables from Slurm's.
        (STEP | {"RANK": "3", "WORLD_SIZE": "4"}, LaunchedProcess(3, 4, 1, 2, "gpu03", "20017")),
        (OPEN_MPI, LaunchedProcess(1, 2, 1, 2, "127.0.0.1", "29500")),
        (INTEL_MPI | MEETING, LaunchedProcess(0, 2, 0, 2, "gpu1", "29501")),
    ],
)
def test_a_complete_set_is_a_launchers(environment: dict[str, str], process: LaunchedProcess) -> None:
    assert read_environment(environment).process == process
    settled = dict(environment)
    assert clean_environment(settled) == ()
    assert settled.items() >= process.variables().items()
    # What the libraries read after that is the same.
    assert read_environment(settled).process == process
    assert not settled.keys() & (OPEN_MPI.keys() | INTEL_MPI.keys())


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        ({"RANK": "", "WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        ({"RANK": ""}, ""),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
        ({"LOCAL_RANK": "abc"}, "LOCAL_RANK=abc"),
        ({"RANK": "3"}, "RANK=3"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 WORLD_SIZE=1"),
        (MEETING, ""),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}, ""),
        # An allocation, a batch script, `srun --pty bash`, and one task of one.
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, "SLURM_NTASKS=4"),
        ({name: value for name, value in STEP.items() if "STEP" not in name}, "SLURM_NTASKS=4"),
        (STEP | {"SLURM_PTY_PORT": "4000"}, "SLURM_NTASKS=4"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "SLURM_NTASKS=4"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "PMI_SIZE=4"),
        ({"MV2_COMM_WORLD_SIZE": "1", "MV2_COMM_WORLD_RANK": "0"}, ""),
        ({"OMP_NUM_THREADS": "4,2"}, "OMP_NUM_THREADS=4,2"),
        ({"OMP_NUM_THREADS": ""}, ""),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "model.dtype"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "NO"}, ""),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "training.gradient_accumulation_steps"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "distributed.strategy"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"}, "ACCELERATE_USE_FSDP=1"),
        ({"ACCELERATE_USE_CPU": "true"}, "CUDA_VISIBLE_DEVICES"),
        ({"DS_ACCELERATOR": "cuda"}, "DS_ACCELERATOR=cuda"),
    ],
)
def test_what_is_no_launchers_is_removed_and_told(environment: dict[str, str], told: str) -> None:
    settled = dict(environment)
    ignored = clean_environment(settled)
    assert bool(ignored) == bool(told) and told in ", ".join(ignored)
    assert read_environment(settled).process is None
    kept = {name for name in settled if name.startswith(("SLURM_", "MASTER_"))}
    assert settled.keys() == kept
    assert all(settled[name] == environment[name] for name in kept)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | MEETING,
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | MEETING,
        {"RANK": "abc", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "2.0"},
        {"RANK": "0", "WORLD_SIZE": "2"} | MEETING,
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "http"},
        TORCH | MEETING | {"LOCAL_RANK": "2"},
        TORCH | MEETING | {"LOCAL_WORLD_SIZE": "8"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MEETING,
        STEP | {"SLURM_PROCID": "4"},
        OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"},
        # Several machines, and none of them named.
        OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    ],
)
def test_contradictions_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError) as refused:
        read_environment(environment)
    assert refused.value.where == "environment" and refused.value.hint


def test_other_commands_are_one_process_whatever_is_set() -> None:
    environment = {**TORCH, **OPEN_MPI, "RANK": "x", "ACCELERATE_USE_FSDP": "true", "PATH": "/bin"}
    assert clean_environment(environment, trains=False) == ()
    assert environment == {"PATH": "/bin"}


def _set(**variables: str) -> dict[str, Any]:
    return {"inject": lambda scene: scene.environment.update(variables)}


def finished(scene: Scene) -> None:
    assert (scene.run / "run.json").is_file() and (scene.run / "adapter_config.json").is_file()


def _used_port(scene: Scene) -> None:
    """Name a port where something else listens."""
    listener = socket.create_server(("127.0.0.1", 0))
    scene.notes["listener"] = listener
    port = str(listener.getsockname()[1])
    scene.environment.update(_alone(port))


def _alone(port: str) -> dict[str, str]:
    return {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "PEFTCHAT_RENDEZVOUS_TIMEOUT": "1",
    }  # fmt: skip


PROMISE = "The environment changes nothing in silence"
FAULTS = (
    Fault(
        "leftovers of many launchers",
        PROMISE,
        **_set(
            WORLD_SIZE="8", LOCAL_RANK="", OMPI_COMM_WORLD_SIZE="4", SLURM_NTASKS="4", PMI_SIZE="3",
            ACCELERATE_MIXED_PRECISION="fp16", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="8",
            ACCELERATE_USE_FSDP="true", ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DYNAMO_BACKEND="inductor",
        ),
        says=("Ignored from the environment", "WORLD_SIZE=8", "model.dtype decides"),
        status=0,
        after=finished,
    ),
    Fault("a rank beyond the processes", PROMISE, **_set(RANK="1", WORLD_SIZE="1"), says=("unset RANK WORLD_SIZE",)),
    Fault(
        "a meeting that nobody comes to",
        PROMISE,
        **_set(**_alone("29876")),
        says=("1 of 2 processes", "PEFTCHAT_RENDEZVOUS_TIMEOUT"),
    ),
    Fault(
        "a meeting that nobody holds",
        PROMISE,
        **_set(**_alone("29877") | {"RANK": "1", "LOCAL_RANK": "1"}),
        says=("nobody answers", "PEFTCHAT_RENDEZVOUS_TIMEOUT"),
    ),
    Fault("a port that is taken", PROMISE, _used_port, says=("no meeting at",)),
    Fault(
        "a command of one process", PROMISE, **_set(RANK="1", WORLD_SIZE="2"), says=("Error:",), command=merge
    ),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, tmp_path: Path) -> None:
    started = time.monotonic()
    fault.check(tmp_path)
    assert time.monotonic() - started < 60


@pytest.mark.distributed
def test_processes_that_srun_starts_train_together(tmp_path: Path) -> None:
    """The variables of a true step; each process finds the others by them."""
    scene = Scene.build(tmp_path)
    scene.sections = {"distributed": {"strategy": "ddp", "processes": 2}}
    done = peftchat_in_processes(2, "train", scene.recipe, launcher="srun")
    assert done.returncode == 0, done.stderr
    finished(scene)
