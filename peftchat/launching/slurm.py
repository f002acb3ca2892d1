"""A job for Slurm: a batch file that is queued again until the run is complete."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from peftchat.errors import UserError
from peftchat.formatting import format_duration
from peftchat.launching.job import Job, parse_time

_SIGNAL_SECONDS = 300
_ASK_SECONDS = 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, slots=True)
class Partition:
    """What Slurm says of a partition.

    Attributes:
        name: its name.
        seconds: its longest time limit; None without one.
        gpus: the most GPUs of one of its nodes.
        cores: the most CPU cores of one.
        memory_gib: the most RAM of one.
    """

    name: str
    seconds: int | None
    gpus: int
    cores: int
    memory_gib: int


def sbatch_file(job: Job, tell: Callable[[str], None], *, partition: str | None, account: str | None) -> str:
    """Return the text of a batch file.

    Args:
        job: the job.
        tell: prints what Slurm's own limits changed.
        partition: where it runs; None for the cluster's default.
        account: who pays; None for the user's default.

    Raises:
        UserError: a name is impossible or unknown to Slurm, or the partition's nodes have too few GPUs.
    """
    from jinja2 import Environment, StrictUndefined, select_autoescape

    for option, value in (("--name", job.name), ("--partition", partition), ("--account", account)):
        if value is not None and not _NAME.fullmatch(value):
            raise UserError(
                f"`{value}` is not a name that Slurm takes",
                where=option,
                hint="Use letters, digits, `_`, `.`, `+` and `-`.",
            )
    if partition is not None:
        known = read_partitions()
        if known is None:
            tell("Slurm is not installed here, so the partition was not checked.")
        else:
            job = _within(job, partition, known, tell)
    several = job.nodes > 1
    # Without `B:` it goes to the processes of `srun`; with it, to the shell.
    signal = f"{'' if several else 'B:'}USR1@{min(_SIGNAL_SECONDS, job.seconds // 3)}"
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=select_autoescape(default_for_string=False),
    )
    template = Path(__file__).with_name("slurm.sbatch.jinja").read_text(encoding="utf-8")
    return environment.from_string(template, {"job": job}).render(
        partition=partition,
        account=account,
        tasks=job.processes if several else 1,
        signal=signal,
        command=shlex.join(["peftchat", *job.arguments(str(job.recipe), (*job.overrides, *job.own))]),
    )


def read_partitions() -> dict[str, Partition] | None:
    """Ask Slurm for its partitions; None where it is not installed or does not answer."""
    program = shutil.which("sinfo")
    if program is None:
        return None
    try:
        asked = subprocess.run(
            [program, "--noheader", "--format=%R|%l|%G|%c|%m"],
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_partitions(asked.stdout)


def parse_partitions(text: str) -> dict[str, Partition]:
    """Read lines of `sinfo --format=%R|%l|%G|%c|%m`: one for each kind of node of a partition."""
    found: dict[str, Partition] = {}
    for name, limit, gres, cores, memory in _lines(text):
        seconds = None if limit in ("infinite", "UNLIMITED", "n/a") else parse_time(limit)
        before = found.get(name, Partition(name, seconds, 0, 0, 0))
        found[name] = Partition(
            name,
            seconds,
            max(before.gpus, _gpus(gres)),
            max(before.cores, _number(cores)),
            max(before.memory_gib, _number(memory) // 1024),
        )
    return found


def _lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) == 5:
            yield fields


def _gpus(gres: str) -> int:
    """Count the GPUs of `gpu:a100:8(S:0-1),nvme:1` and the like."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres)
    return sum(map(int, counts))


def _number(text: str) -> int:
    """Read the number of `64+`: some nodes have more."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def _within(job: Job, name: str, known: dict[str, Partition], tell: Callable[[str], None]) -> Job:
    """Return the job within the limits of a partition; estimates of RAM and time are upper ones."""
    partition = known.get(name)
    if partition is None:
        raise UserError(
            f"Slurm has no partition `{name}`", where="--partition", hint=f"Choose one of {', '.join(sorted(known))}."
        )
    if job.gpu and job.processes > partition.gpus:
        raise UserError(
            f"the job takes {job.processes} GPUs of each node, and those of partition `{name}` have {partition.gpus}",
            where="--partition",
            hint="Choose another partition, or lower distributed.processes and take more nodes.",
        )
    if partition.seconds is not None and job.seconds > partition.seconds:
        tell(
            f"The time limit is that of partition {name}, {format_duration(partition.seconds)}, instead of "
            f"{format_duration(job.seconds)}; the job is queued again until the run is complete."
        )
        job = replace(job, seconds=partition.seconds)
    if 0 < partition.cores < job.cores:
        tell(f"The nodes of partition {name} have {partition.cores} cores; the job takes them instead of {job.cores}.")
        job = replace(job, cores=max(1, partition.cores))
    if 0 < partition.memory_gib < job.memory_gib:
        tell(
            f"The nodes of partition {name} have {partition.memory_gib} GiB of RAM; the job takes them instead of "
            f"{job.memory_gib} GiB, an upper estimate."
        )
        job = replace(job, memory=partition.memory_gib << 30)
    return job
