"""A job for Kubernetes: a Kubeflow TrainJob with its runtime, or the older PyTorchJob.

The recipe lies in a ConfigMap; data, caches and the run folder in one volume, which is the working folder.
"""

import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from peftchat.errors import UserError
from peftchat.launching.job import Job
from peftchat.recipe.validation import recipe_values

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe

Api = Literal["trainjob", "pytorchjob"]

WORKSPACE = "/workspace"
"""The working folder of the image (docker/Dockerfile)."""

_RECIPE_FOLDER = "/etc/peftchat"
_RECIPE_FILE = "recipe.yaml"
_STOP_SECONDS = 600
_RESTARTS = 10
_WRONG_INPUT = 2
_USER = 1000
_SHARED_MEMORY = "8Gi"

_LONGEST_NAME = 40
"""Names of pods are made from it, and a host's name has at most 63 characters."""

_GPU_RESOURCES = {"mi300x": "amd.com/gpu"}


def manifests(
    job: Job, loaded: "LoadedRecipe", *, image: str, volume: str | None, namespace: str | None, api: Api
) -> str:
    """Return the YAML of all objects of a job.

    Args:
        job: the job.
        loaded: its recipe.
        image: the container image.
        volume: an existing PersistentVolumeClaim; None for one of the job's own.
        namespace: where the objects are created; None for that of `kubectl`.
        api: which of Kubeflow's interfaces starts the pods.

    Raises:
        UserError: Kubernetes does not take a name, or the run folder lies outside the volume.
    """
    _check_name(job.name, "--name", longest=_LONGEST_NAME)
    for option, value in (("--volume", volume), ("--namespace", namespace)):
        if value is not None:
            _check_name(value, option)
    if not image or re.search(r"\s", image):
        raise UserError(
            f"`{image}` is not the name of an image", where="--image", hint="Such as ghcr.io/me/peftchat:1."
        )
    _check_inside(loaded)
    claim = volume or f"{job.name}-data"
    objects = [_recipe_map(job, loaded), *([] if volume else [_claim(job, claim)])]
    pod = _pod(job, image, claim)
    objects += _train_job(job, pod) if api == "trainjob" else [_pytorch_job(job, pod)]
    for one in objects:
        if namespace is not None:
            one["metadata"]["namespace"] = namespace
    head = "".join(f"# {line}\n" for line in [*job.lines(), "", "kubectl apply -f FILE"]).replace("# \n", "#\n")
    return head + "---\n".join(["", *map(to_yaml, objects)])


def to_yaml(value: Any) -> str:
    """Return plain values as YAML, in their order."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 4096
    text = StringIO()
    yaml.dump(value, text)
    return text.getvalue()


def _check_name(name: str, option: str, longest: int = 63) -> None:
    if len(name) <= longest and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        return
    raise UserError(
        f"`{name}` is not a name that Kubernetes takes",
        where=option,
        hint=f"Use small letters, digits and hyphens, at most {longest}, a letter first and no hyphen last.",
    )


def _check_inside(loaded: "LoadedRecipe") -> None:
    folder = Path(loaded.recipe.output_dir)
    if folder.is_absolute() and not folder.is_relative_to(WORKSPACE):
        raise UserError(
            f"the run folder {folder} lies outside the volume, which is mounted at {WORKSPACE}",
            where=loaded.where("output_dir"),
            hint="Write a relative path, such as `--set output_dir=runs/assistant`.",
        )


def _recipe_map(job: Job, loaded: "LoadedRecipe") -> dict[str, Any]:
    # With all that it extends and all defaults: the file alone may lack them.
    text = LiteralScalarString(to_yaml(recipe_values(loaded.recipe)))
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-recipe"},
        "data": {_RECIPE_FILE: text},
    }


def _claim(job: Job, name: str) -> dict[str, Any]:
    mode = "ReadWriteMany" if job.nodes > 1 else "ReadWriteOnce"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": [mode], "resources": {"requests": {"storage": f"{job.disk_gib}Gi"}}},
    }


def _resources(job: Job) -> dict[str, Any]:
    amounts = {"cpu": str(job.cores), "memory": f"{job.memory_gib}Gi"}
    if job.gpu:
        amounts[_GPU_RESOURCES.get(job.gpu, "nvidia.com/gpu")] = str(job.processes)
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _command(job: Job, *, torchrun: bool) -> tuple[list[str], list[str]]:
    """Return the container's command and its arguments.

    On one node peftchat starts the processes itself and gives each its time for a checkpoint. On several torchrun does,
    which reads PET_… variables that Kubeflow sets.
    """
    # The recipe in the map has the overrides already.
    arguments = job.arguments(f"{_RECIPE_FOLDER}/{_RECIPE_FILE}", job.own)
    return (["torchrun"], ["-m", "peftchat", *arguments]) if torchrun else (["peftchat"], arguments)


def _pod(job: Job, image: str, claim: str) -> dict[str, Any]:
    """Return the pod's specification, with one container that has no command yet."""
    container = {
        "name": "node",
        "image": image,
        "workingDir": WORKSPACE,
        "env": [
            {"name": "HOME", "value": WORKSPACE},
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}},
            },
        ],
        "volumeMounts": [
            {"name": "workspace", "mountPath": WORKSPACE},
            {"name": "recipe", "mountPath": _RECIPE_FOLDER, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - where NCCL looks
        ],
    }
    return {
        # Time for a step and a checkpoint after SIGTERM.
        "terminationGracePeriodSeconds": _STOP_SECONDS,
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER},
        "containers": [container],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}},
        ],
    }


def _train_job(job: Job, pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a TrainingRuntime and its TrainJob.

    https://github.com/kubeflow/trainer/blob/master/manifests/base/runtimes/torch_distributed.yaml
    """
    group = "trainer.kubeflow.org"
    wrong_input = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "node", "operator": "In", "values": [_WRONG_INPUT]},
    }
    node = {
        "name": "node",
        "template": {
            "metadata": {"labels": {f"{group}/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 0, "podFailurePolicy": {"rules": [wrong_input]}, "template": {"spec": pod}},
        },
    }
    # A pod that was moved away or failed begins again with --resume; a wrong recipe does not.
    failure = {
        "maxRestarts": _RESTARTS,
        "rules": [{"name": "wrongInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    runtime = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": f"{job.name}-runtime", "labels": {f"{group}/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {"spec": {"failurePolicy": failure, "replicatedJobs": [node]}},
        },
    }
    command, arguments = _command(job, torchrun=job.nodes > 1)
    train_job = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": job.name},
        "spec": {
            "runtimeRef": {"apiGroup": group, "kind": "TrainingRuntime", "name": f"{job.name}-runtime"},
            "activeDeadlineSeconds": job.seconds,
            "trainer": {
                "image": pod["containers"][0]["image"],
                "command": command,
                "args": arguments,
                "numNodes": job.nodes,
                "numProcPerNode": job.processes,
                "resourcesPerNode": _resources(job),
            },
        },
    }
    return [runtime, train_job]


def _pytorch_job(job: Job, pod: dict[str, Any]) -> dict[str, Any]:
    """Return a PyTorchJob; its operator sets RANK of the node too, which only torchrun may read."""
    command, arguments = _command(job, torchrun=True)
    (container,) = pod["containers"]
    pod = {key: value for key, value in pod.items() if key != "restartPolicy"}
    pod["containers"] = [
        {**container, "name": "pytorch", "command": command, "args": arguments, "resources": _resources(job)}
    ]
    replica = {"restartPolicy": "OnFailure", "template": {"spec": pod}}
    replicas: dict[str, Any] = {"Master": {"replicas": 1, **replica}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name},
        "spec": {
            "nprocPerNode": str(job.processes),
            "runPolicy": {"activeDeadlineSeconds": job.seconds, "backoffLimit": _RESTARTS},
            "pytorchReplicaSpecs": replicas,
        },
    }
