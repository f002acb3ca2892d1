"""A task for SkyPilot: a machine of a cloud, or several, rented for one run."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from ruamel.yaml.scalarstring import LiteralScalarString

from peftchat.errors import UserError
from peftchat.launching.job import Job
from peftchat.launching.kubernetes import to_yaml

_VOLUME_FOLDER = "/workspace"
_RESTARTS = 3

ACCELERATORS = {
    "a100-40gb": "A100",
    "a100-80gb": "A100-80GB",
    "h100": "H100",
    "h100-pcie": "H100",
    "h200": "H200",
    "b200": "B200",
    "l4": "L4",
    "l40s": "L40S",
    "a10": "A10",
    "a10g": "A10G",
    "a40": "A40",
    "t4": "T4",
    "v100": "V100-32GB",
    "v100-16gb": "V100",
    "a6000": "RTXA6000",
    "rtx3060-12gb": "RTX3060",
    "rtx3090": "RTX3090",
    "rtx4080": "RTX4080",
    "rtx4090": "RTX4090",
    "rtx5090": "RTX5090",
    "mi300x": "MI300X",
}
"""Our catalog's names and SkyPilot's (`sky gpus list --all`)."""


def sky_task(job: Job, output_dir: str, *, image: str | None, volume: str | None) -> str:
    """Return the YAML of a task.

    Args:
        job: the job.
        output_dir: the recipe's run folder.
        image: a container image with peftchat; None if the job's setup installs it.
        volume: an existing SkyPilot volume, on which the run folder lies; None for the machine's own disk.

    Raises:
        UserError: SkyPilot does not know the GPU, nothing installs peftchat, the recipe lies outside the working
            folder, or the machines share no folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?", job.name):
        hint = "Use letters, digits, `_`, `.` and `-`."
        raise UserError(f"`{job.name}` is not a name that SkyPilot takes", where="--name", hint=hint)
    if job.gpu and job.gpu not in ACCELERATORS:
        raise UserError(
            f"SkyPilot's name of {job.gpu_label} is unknown",
            where="--gpu",
            hint=f"Use one of {', '.join(ACCELERATORS)}.",
        )
    if job.nodes > 1 and volume is None:
        raise UserError(
            f"{job.nodes} machines have to see the same run folder, and those of a cloud share none",
            where="distributed.nodes",
            hint="Name a volume that all can mount with --volume, or set distributed.nodes=1.",
        )
    if image is None and not job.setup:
        raise UserError(
            "the rented machine has no peftchat",
            where="--image",
            hint="Name a container image that has it, or install it with --setup 'pip install …'.",
        )
    recipe = Path(os.path.relpath(job.recipe.absolute()))
    if recipe.parts[0] == os.pardir:
        raise UserError(
            "the recipe lies outside the working folder, which SkyPilot copies to the machine",
            where=str(job.recipe),
            hint="Change to a folder that holds the recipe and its data.",
        )
    resources: dict[str, Any] = {}
    if job.gpu:
        resources["accelerators"] = f"{ACCELERATORS[job.gpu]}:{job.processes}"
    resources |= {"cpus": f"{job.cores}+", "memory": f"{job.memory_gib}+", "disk_size": max(job.disk_gib, 50)}
    if image is not None:
        resources["image_id"] = f"docker:{image}"
    # Used by `sky jobs launch`, which also takes another machine when a spot machine is reclaimed.
    resources["job_recovery"] = {"max_restarts_on_errors": _RESTARTS}
    task: dict[str, Any] = {
        "name": job.name,
        "workdir": ".",
        "num_nodes": job.nodes,
        "resources": resources,
        "secrets": {"HF_TOKEN": ""},
    }
    if volume is not None:
        task["volumes"] = {_VOLUME_FOLDER: volume}
    if job.setup:
        task["setup"] = LiteralScalarString("\n".join([*job.setup, ""]))
    # The recipe's paths hold in the copied folder; what the run writes goes to the volume.
    own = job.own if volume is None else (*job.own, f"output_dir={_VOLUME_FOLDER}/{output_dir.lstrip('/')}")
    arguments = shlex.join(job.arguments(str(recipe), (*job.overrides, *own)))
    task["run"] = LiteralScalarString("\n".join([*_run(job, arguments), ""]))
    kept = "the volume" if volume else "the machine's disk, so copy it before `sky down`"
    head = [*job.lines(), f"The run folder lies on {kept}.", "", f"sky launch --cluster {job.name} FILE"]
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + to_yaml(task)


def _run(job: Job, arguments: str) -> list[str]:
    # `timeout` asks with SIGTERM, which writes a checkpoint.
    limit = f"timeout --signal=TERM --kill-after=10m {job.seconds}"
    if job.nodes == 1:
        return [f"{limit} peftchat {arguments}"]
    return [
        'MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n1)',
        f'{limit} torchrun --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" \\',
        f'  --nproc-per-node={job.processes} --master-addr="$MASTER_ADDR" --master-port=29500 -m peftchat {arguments}',
    ]
