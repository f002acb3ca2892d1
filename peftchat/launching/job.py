"""A job: what a recipe's run needs on a cluster, from its plan, with margins."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.errors import UserError
from peftchat.formatting import format_bytes, format_duration

if TYPE_CHECKING:
    from peftchat.planning.plan import TrainingPlan
    from peftchat.recipe import LoadedRecipe

_GIB = 2**30

_TIME_FACTOR = 1.5
"""The plan assumes a constant share of the peak rate, and no time for communication."""

_EXTRA_SECONDS = 1800
"""Loading, evaluating and saving, which the plan leaves out."""

_TIME_UNIT = 600

_PROCESS_MEMORY = 6 * _GIB
"""Libraries, batches and pinned buffers of a process."""

_CORES_PER_PROCESS = 4

_SYSTEM_DISK = 30 * _GIB
"""The environment, compiled kernels and encoded conversations."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job needs beside its recipe.

    Attributes:
        gpu: a GPU of the catalog, or `cpu`.
        gpus: GPUs of each node that the job takes; None for the recipe's.
        node_gpus: GPUs that one node has.
        name: the job's name; None for one made from the recipe's.
        seconds: its time limit; None for one from the plan.
        setup: shell commands before the run, such as `module load cuda`.
    """

    gpu: str | None = None
    gpus: int | None = None
    node_gpus: int = 8
    name: str | None = None
    seconds: int | None = None
    setup: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """A run on a cluster.

    Attributes:
        name: its name: small letters, digits and hyphens.
        recipe: the recipe's path, as it was given.
        overrides: the user's `--set` values.
        own: further ones, which the job needs.
        nodes: machines.
        processes: processes on each.
        gpu: the catalog's name of the GPU; None on CPUs.
        gpu_label: its full name.
        gpu_memory: bytes of each GPU that the plan predicts.
        cores: CPU cores of each node.
        memory: bytes of RAM of each node.
        disk: bytes of disk for model, checkpoints and environment.
        seconds: the time limit.
        predicted: seconds of training that the plan predicts; None if it cannot.
        setup: shell commands before the run.
    """

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    own: tuple[str, ...]
    nodes: int
    processes: int
    gpu: str | None
    gpu_label: str
    gpu_memory: int
    cores: int
    memory: int
    disk: int
    seconds: int
    predicted: float | None
    setup: tuple[str, ...]

    @property
    def memory_gib(self) -> int:
        """RAM of each node, in whole GiB."""
        return math.ceil(self.memory / _GIB)

    @property
    def disk_gib(self) -> int:
        """Disk, in whole GiB."""
        return math.ceil(self.disk / _GIB)

    @property
    def clock(self) -> str:
        """The time limit as `days-hours:minutes:seconds`, or without days."""
        days, rest = divmod(self.seconds, 86400)
        clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
        return f"{days}-{clock}" if days else clock

    def arguments(self, recipe: str, settings: Sequence[str]) -> list[str]:
        """Return the words after `peftchat`; the run goes on where an interrupted job was."""
        words = ["train", recipe, "--resume"]
        for setting in settings:
            words += ["--set", setting]
        return words

    def lines(self) -> list[str]:
        """Return what the file's head tells: what the plan predicts, and how the rest follows from it."""
        devices = f"{self.nodes} x {self.processes} x {self.gpu_label}" if self.gpu else f"{self.nodes} x CPU"
        time = "unknown" if self.predicted is None else format_duration(self.predicted)
        return [
            f"Written by `peftchat launch` from {self.recipe}. What the plan predicts on {devices}:",
            f"{format_bytes(self.gpu_memory)} on each device; training takes {time}, without loading, evaluating "
            "and saving.",
            f"RAM and disk are upper estimates. The time limit is {format_duration(self.seconds)}. Started again, the "
            "job goes on from its checkpoint.",
        ]


def make_job(loaded: "LoadedRecipe", plan: "TrainingPlan", options: JobOptions) -> Job:
    """Return the job of a recipe.

    Args:
        loaded: the recipe.
        plan: its plan on all devices of the job.
        options: the rest.

    Raises:
        UserError: the run does not fit the devices, or the plan cannot tell its time.
    """
    if not plan.fits:
        raise _does_not_fit(plan)
    nodes, processes = nodes_and_processes(loaded, options)
    predicted = None if plan.cost is None else plan.cost.seconds
    seconds = options.seconds
    if seconds is None:
        if predicted is None:
            reason = plan.unread_reason or "the number of steps is unknown"
            raise UserError(
                f"the plan cannot tell how long the run takes: {reason}",
                where="--time",
                hint="Give the time limit, such as `--time 8:00:00`, or set training.max_steps.",
            )
        seconds = math.ceil((predicted * _TIME_FACTOR + _EXTRA_SECONDS) / _TIME_UNIT) * _TIME_UNIT
    # Elsewhere an open number would be that of the node's GPUs.
    own = [] if loaded.recipe.distributed.processes else [f"distributed.processes={processes}"]
    # Each process reads the base into RAM before it goes to its GPU.
    weights = plan.counts.parameters * (4 if plan.settings.weight_dtype == "float32" else 2)
    each = weights + plan.memory.host + _PROCESS_MEMORY
    if plan.settings.device == "cpu":
        each = max(each, plan.memory.total + _PROCESS_MEMORY)
    return Job(
        name=options.name or _name(loaded.path),
        recipe=loaded.path,
        overrides=tuple(loaded.overrides),
        own=tuple(own),
        nodes=nodes,
        processes=processes,
        gpu=plan.hardware.name if plan.settings.device == "cuda" else None,
        gpu_label=plan.hardware.label,
        gpu_memory=plan.memory.total,
        cores=_CORES_PER_PROCESS * processes,
        memory=each * processes,
        disk=weights + plan.checkpoint_bytes(loaded.recipe) + _SYSTEM_DISK,
        seconds=seconds,
        predicted=predicted,
        setup=tuple(options.setup),
    )


def nodes_and_processes(loaded: "LoadedRecipe", options: JobOptions) -> tuple[int, int]:
    """Return how many machines a job takes, and how many processes on each.

    Raises:
        UserError: a node has fewer GPUs, or recipe and options contradict each other.
    """
    distributed = loaded.recipe.distributed
    wanted = distributed.processes
    if options.gpus is not None and wanted is not None and options.gpus != wanted:
        raise UserError(
            f"--gpus {options.gpus}, but the recipe asks for {wanted} processes on each machine",
            where=loaded.where("distributed", "processes"),
            hint=f"Leave out --gpus, or add `--set distributed.processes={options.gpus}`.",
        )
    processes = options.gpus or wanted or 1
    on_gpus = options.gpu is None or options.gpu.lower() != "cpu"
    if on_gpus and processes > options.node_gpus:
        nodes = distributed.nodes * math.ceil(processes / options.node_gpus)
        raise UserError(
            f"the job asks for {processes} GPUs on each node, and a node has {options.node_gpus}",
            where=loaded.where("distributed", "processes") if wanted else "--gpus",
            hint=f"Take more nodes: `--set distributed.nodes={nodes} --set distributed.processes="
            f"{math.ceil(distributed.nodes * processes / nodes)}`; or say `--node-gpus {processes}` if they have more.",
        )
    if distributed.strategy == "single" and processes * distributed.nodes > 1:
        raise UserError(
            f"`single` is one process, and the job has {processes * distributed.nodes}",
            where=loaded.where("distributed", "strategy"),
            hint="Write `ddp`, `zero2` or `zero3`.",
        )
    return distributed.nodes, processes


def parse_time(text: str) -> int:
    """Return the seconds of a time limit as Slurm writes it: `MINUTES`, `H:MM:SS`, `D-H`, `D-H:MM:SS` and so on.

    Raises:
        UserError: it is not one.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if found is None:
        raise _not_a_time(text)
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None:
        seconds = days * 86400 + first * 3600 + second * 60 + third
    elif found[4] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    if seconds <= 0:
        raise _not_a_time(text)
    return seconds


def _name(recipe: Path) -> str:
    """Return a name that all schedulers take: small letters, digits and hyphens, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe.stem.lower()).strip("-")
    return (name if name[:1].isalpha() else f"peftchat-{name}")[:40].rstrip("-")


def _not_a_time(text: str) -> UserError:
    hint = "Write it as Slurm does: 8:00:00, 2-12:00:00, or 90 (minutes)."
    return UserError(f"`{text}` is not a time limit", where="--time", hint=hint)


def _does_not_fit(plan: "TrainingPlan") -> UserError:
    change = plan.cheapest_fix
    hint = "`peftchat plan` lists GPUs and settings that fit."
    if change is not None:
        flags = " ".join(f"--set {flag}" for flag in change.flags)
        hint = f"The cheapest change: {change.name} (`{flags}`). It costs: {change.costs}."
    return UserError(
        f"the run needs {format_bytes(plan.memory.total)} on each device, and {plan.hardware.label} has "
        f"{format_bytes(plan.hardware.memory)}",
        where="--gpu",
        hint=hint,
    )
