"""The schedulers that a job can be written for, and what each needs to know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from peftchat.errors import UserError
from peftchat.launching.job import Job
from peftchat.launching.kubernetes import Api, manifests
from peftchat.launching.skypilot import sky_task
from peftchat.launching.slurm import sbatch_file

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe

Target = Literal["slurm", "kubernetes", "skypilot"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, slots=True)
class JobPlaces:
    """Where a job runs. What is None is the cluster's default, or the job's own.

    Attributes:
        partition: Slurm's partition.
        account: Slurm's account.
        image: the container image.
        volume: an existing volume that holds run folder and, on Kubernetes, data.
        namespace: the namespace on Kubernetes.
        api: Kubeflow's interface.
    """

    partition: str | None = None
    account: str | None = None
    image: str | None = None
    volume: str | None = None
    namespace: str | None = None
    api: Api | None = None


_USED: dict[Target, tuple[str, ...]] = {
    "slurm": ("partition", "account"),
    "kubernetes": ("image", "volume", "namespace", "api"),
    "skypilot": ("image", "volume"),
}


def check_places(target: Target, places: JobPlaces) -> None:
    """Refuse what a scheduler does not use.

    Raises:
        UserError: such an option is given, or the image is missing.
    """
    for name in JobPlaces.__slots__:
        if getattr(places, name) is not None and name not in _USED[target]:
            used = ", ".join(f"--{one}" for one in _USED[target])
            raise UserError(f"`--to {target}` does not use the option", where=f"--{name}", hint=f"It uses {used}.")
    if target == "kubernetes" and places.image is None:
        raise UserError(
            "pods need an image with peftchat",
            where="--image",
            hint="Build it from docker/Dockerfile, push it to a registry of the cluster, and name it.",
        )


def job_text(target: Target, job: Job, loaded: "LoadedRecipe", places: JobPlaces, tell: Callable[[str], None]) -> str:
    """Return the file of a job.

    Args:
        target: the scheduler.
        job: the job.
        loaded: its recipe.
        places: where it runs.
        tell: prints what the cluster's limits changed, and what else has to be there.

    Raises:
        UserError: the cluster takes a name or a number not.
    """
    check_places(target, places)
    if target == "slurm":
        return sbatch_file(job, tell, partition=places.partition, account=places.account)
    local = sorted({str(one.path) for one in loaded.inputs()[1:] if one.path.exists() and one.path != loaded.path})
    if target == "skypilot":
        for path in local:
            tell(f"The recipe reads {path}; SkyPilot copies it if it lies in the working folder.")
        return sky_task(job, loaded.recipe.output_dir, image=places.image, volume=places.volume)
    for path in local:
        tell(f"The recipe reads {path}; it has to be in the volume, below its root for a relative path.")
    return manifests(
        job,
        loaded,
        image=places.image or "",
        volume=places.volume,
        namespace=places.namespace,
        api=places.api or "trainjob",
    )
