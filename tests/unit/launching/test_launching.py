"""Jobs for clusters: complete files whose parts agree, numbers of the plan, and refusals before anything is written."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytest import MonkeyPatch, raises

from peftchat import api
from peftchat.errors import UserError
from peftchat.launching import slurm
from peftchat.launching.job import JobOptions, make_job, nodes_and_processes, parse_time
from peftchat.launching.slurm import Partition, parse_partitions
from peftchat.launching.targets import JobPlaces, Target, check_places, job_text
from peftchat.planning.plan import TrainingPlan
from peftchat.recipe import LoadedRecipe, load_recipe
from tests.support.data import write_small_talk
from tests.support.in_process import peftchat_in_process
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

IMAGE = "registry.example/peftchat:1"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launching")
    data = write_small_talk(folder / "talk.jsonl", 8)
    training = {"max_steps": 3}
    sections = {"method": "lora", "training": training, "distributed": {"strategy": "ddp", "processes": 4, "nodes": 2}}
    return write_training_recipe(folder / "my recipe.yaml", small_model(), data, None, Path("runs/it's me"), **sections)


@pytest.fixture(scope="module")
def loaded(recipe: Path) -> LoadedRecipe:
    return load_recipe(recipe, to_train=False)


@pytest.fixture(scope="module")
def plan(loaded: LoadedRecipe) -> TrainingPlan:
    return api.plan(loaded, gpu="l4", gpus=8)


@pytest.fixture
def write(
    loaded: LoadedRecipe, plan: TrainingPlan, recipe: Path, monkeypatch: MonkeyPatch
) -> Callable[..., tuple[str, list[str]]]:
    """Write a job as a user in the recipe's folder does; return it and what was told."""
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr(slurm, "read_partitions", lambda: None)

    def text(target: Target, *settings: str, **given: Any) -> tuple[str, list[str]]:
        changed = load_recipe(recipe, settings, to_train=False) if settings else loaded
        places = JobPlaces(**{name: given.pop(name) for name in JobPlaces.__slots__ if name in given})
        job = make_job(changed, plan, JobOptions(**given))
        told: list[str] = []
        return job_text(target, job, changed, places, told.append), told

    return text


def objects(text: str) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_batch_file_runs_the_recipe_and_is_queued_again(
    nodes: int, write: Any, plan: TrainingPlan, tmp_path: Path
) -> None:
    text, _ = write("slurm", f"distributed.nodes={nodes}", partition="gpu", setup=("module load cuda",))
    file = tmp_path / "job.sbatch"
    file.write_text(text)
    subprocess.run(["bash", "-n", str(file)], check=True)
    # Slurm reads options up to the first command.
    head, _, body = text.partition("set -euo pipefail")
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1) for line in head.splitlines() if "=" in line and "#SBATCH" in line
    )
    assert "#SBATCH" not in body and text.endswith('exit "$status"\n')
    assert options["nodes"] == str(nodes) and options["gpus-per-node"] == "4" and options["partition"] == "gpu"
    assert int(options["ntasks-per-node"]) * int(options["cpus-per-task"]) == 16
    assert options["signal"] == ("B:USR1@300" if nodes == 1 else "USR1@300")
    assert plan.cost is not None and parse_time(options["time"]) > plan.cost.seconds + 300
    assert body.index("module load cuda") < body.index("my recipe.yaml' --resume")
    assert ("srun" in body) == (nodes == 2)


def test_the_objects_of_a_train_job_name_each_other(write: Any, loaded: LoadedRecipe, tmp_path: Path) -> None:
    text, told = write("kubernetes", image=IMAGE, namespace="team")
    found = objects(text)
    assert all(one["metadata"]["namespace"] == "team" for one in found.values())
    spec, runtime = found["TrainJob"]["spec"], found["TrainingRuntime"]
    assert spec["runtimeRef"]["name"] == runtime["metadata"]["name"] and spec["runtimeRef"]["kind"] == runtime["kind"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
    assert (
        volumes["workspace"]["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["metadata"]["name"]
    )
    assert volumes["recipe"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    # Both nodes write into the volume.
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert spec["trainer"]["numNodes"] == 2 and spec["trainer"]["numProcPerNode"] == 4
    assert spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "4"
    assert spec["trainer"]["command"] == ["torchrun"]
    # The recipe in the map is the one that was planned.
    file = tmp_path / "recipe.yaml"
    file.write_text(found["ConfigMap"]["data"]["recipe.yaml"])
    assert load_recipe(file, to_train=False).recipe == loaded.recipe
    assert any(str(loaded.recipe.model.name) in line for line in told)


def test_an_existing_volume_is_taken_and_one_node_needs_no_torchrun(write: Any) -> None:
    text, _ = write("kubernetes", "distributed.nodes=1", image=IMAGE, volume="data", name="sft-1")
    found = objects(text)
    assert "PersistentVolumeClaim" not in found
    assert found["TrainJob"]["metadata"]["name"] == "sft-1"
    assert found["TrainJob"]["spec"]["trainer"]["command"] == ["peftchat"]


def test_a_pytorch_job_has_a_master_and_workers(write: Any) -> None:
    text, _ = write("kubernetes", image=IMAGE, api="pytorchjob")
    job = objects(text)["PyTorchJob"]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: one["replicas"] for name, one in replicas.items()} == {"Master": 1, "Worker": 1}
    # The operator sets RANK of a node, which peftchat itself would take for that of a process.
    for one in replicas.values():
        (container,) = one["template"]["spec"]["containers"]
        assert container["name"] == "pytorch" and container["command"] == ["torchrun"]
    assert job["spec"]["nprocPerNode"] == "4"


def test_a_task_for_skypilot_writes_to_the_volume_that_its_machines_share(write: Any) -> None:
    with raises(UserError, match="2 machines have to see the same run folder"):
        write("skypilot", image=IMAGE)
    with raises(UserError, match="--image: the rented machine has no peftchat"):
        write("skypilot", volume="shared")
    text, _ = write("skypilot", volume="shared", image=IMAGE)
    task = yaml.safe_load(text)
    assert task["resources"]["accelerators"] == "L4:4" and task["num_nodes"] == 2
    assert task["volumes"] == {"/workspace": "shared"} and "output_dir=/workspace/runs/it" in task["run"]
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    task = yaml.safe_load(write("skypilot", "distributed.nodes=1", setup=("pip install x",))[0])
    assert "torchrun" not in task["run"] and "volumes" not in task and task["setup"] == "pip install x\n"


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        ("slurm", {"name": "two words"}, "--name: `two words` is not a name that Slurm takes"),
        ("slurm", {"partition": "a b"}, "--partition: `a b` is not a name"),
        ("slurm", {"image": IMAGE}, "--image: `--to slurm` does not use the option"),
        ("kubernetes", {}, "--image: pods need an image"),
        ("kubernetes", {"image": "a b"}, "--image: `a b` is not the name of an image"),
        ("kubernetes", {"image": IMAGE, "name": "My_Run"}, "--name: `My_Run` is not a name that Kubernetes takes"),
        ("kubernetes", {"image": IMAGE, "name": "a" * 41}, "at most 40"),
        ("kubernetes", {"image": IMAGE, "name": "run-"}, "no hyphen last"),
        ("kubernetes", {"image": IMAGE, "volume": "Data"}, "--volume: `Data`"),
        ("kubernetes", {"image": IMAGE, "namespace": "1st"}, "--namespace: `1st`"),
        ("kubernetes", {"image": IMAGE, "account": "me"}, "--account: `--to kubernetes` does not use the option"),
        ("skypilot", {"volume": "v", "name": "-x"}, "--name: `-x` is not a name that SkyPilot takes"),
    ],
)
def test_what_a_cluster_does_not_take_is_refused(
    target: Target, given: dict[str, Any], message: str, write: Any
) -> None:
    with raises(UserError) as raised:
        write(target, **given)
    assert message in str(raised.value)


def test_a_run_folder_outside_the_volume_is_refused(write: Any) -> None:
    with raises(UserError, match="/scratch/run lies outside the volume"):
        write("kubernetes", "output_dir=/scratch/run", image=IMAGE)
    write("kubernetes", "output_dir=/workspace/run", image=IMAGE)


def test_a_run_that_does_not_fit_and_one_of_unknown_length_are_refused(
    loaded: LoadedRecipe, plan: TrainingPlan
) -> None:
    small = replace(plan, hardware=replace(plan.hardware, memory=1 << 20))
    with raises(UserError, match=r"the run needs .* on each device, and NVIDIA L4 24 GB has 1"):
        make_job(loaded, small, JobOptions())
    unknown = replace(plan, cost=None, unread_reason="the data is on the hub")
    with raises(UserError, match="--time: the plan cannot tell how long the run takes: the data is on the hub"):
        make_job(loaded, unknown, JobOptions())
    assert make_job(loaded, unknown, JobOptions(seconds=3600)).clock == "01:00:00"


def test_more_gpus_than_a_node_has_are_spread(recipe: Path) -> None:
    def shape(*settings: str, **options: Any) -> tuple[int, int]:
        return nodes_and_processes(load_recipe(recipe, settings, to_train=False), JobOptions(gpu="l4", **options))

    with raises(UserError, match="asks for 4 GPUs on each node, and a node has 2") as raised:
        shape(node_gpus=2)
    assert "`--set distributed.nodes=4 --set distributed.processes=2`" in str(raised.value)
    assert shape("distributed.nodes=4", "distributed.processes=2", node_gpus=2) == (4, 2)
    with raises(UserError, match="--gpus 2, but the recipe asks for 4 processes"):
        shape(gpus=2)
    assert shape("distributed.processes=null", gpus=2) == (2, 2)


SINFO = """\
gpu|2-00:00:00|gpu:a100:4(S:0-1)|64|515000
gpu|2-00:00:00|gpu:a100:8(S:0-1),nvme:1|128+|1031000+
debug|30:00|(null)|8|16000
long|infinite|gpu:2|8|n/a
"""


def test_slurms_partitions_are_read_and_bound_the_job(write: Any, monkeypatch: MonkeyPatch) -> None:
    known = parse_partitions(SINFO)
    assert known["gpu"] == Partition("gpu", 2 * 86400, 8, 128, 1006)
    assert known["debug"] == Partition("debug", 1800, 0, 8, 15)
    assert known["long"] == Partition("long", None, 2, 8, 0)
    monkeypatch.setattr(slurm, "read_partitions", lambda: known)
    assert write("slurm", partition="gpu")[1] == []
    with raises(UserError, match=r"Slurm has no partition `gpus`\. Choose one of debug, gpu, long"):
        write("slurm", partition="gpus")
    for name, count in (("debug", 0), ("long", 2)):
        with raises(UserError, match=f"takes 4 GPUs of each node, and those of partition `{name}` have {count}"):
            write("slurm", partition=name)
    text, told = write("slurm", partition="gpu", seconds=3 * 86400)
    assert "--time=2-00:00:00" in text and "queued again until the run is complete" in told[0]
    monkeypatch.setattr(slurm, "read_partitions", lambda: {"gpu": Partition("gpu", None, 4, 2, 12)})
    text, told = write("slurm", partition="gpu")
    assert "--cpus-per-task=1\n" in text and "--mem=12G" in text and len(told) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("10:30", 630), ("8:00:00", 28800), ("2-12", 216000), ("1-00:30", 88200), ("1-0:0:5", 86405)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    """As in `man sbatch`, --time."""
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "8h", "1:2:3:4", "-5", "00:00:00"])
def test_other_time_limits_are_refused(text: str) -> None:
    with raises(UserError, match="is not a time limit"):
        parse_time(text)


def test_every_target_says_which_options_it_uses() -> None:
    for name in JobPlaces.__slots__:
        with raises(UserError, match=f"--{name}"):
            check_places("slurm" if name not in ("partition", "account") else "skypilot", JobPlaces(**{name: "x"}))


@pytest.mark.parametrize("stem", ["My Recipe", "7b.v2", "Ünïcode", "---", "x" * 80, "9" * 80, "a-" * 30])
def test_every_scheduler_takes_the_name_of_any_recipe(
    stem: str, loaded: LoadedRecipe, plan: TrainingPlan, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "read_partitions", lambda: None)
    named = replace(loaded, path=Path(f"{stem}.yaml"))
    job = make_job(named, plan, JobOptions())
    for target in ("slurm", "kubernetes", "skypilot"):
        image = None if target == "slurm" else IMAGE
        volume = None if target == "slurm" else "data"
        text = job_text(target, job, named, JobPlaces(image=image, volume=volume), lambda line: None)
        assert job.name in text


def test_a_file_that_is_there_stays(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.sbatch"
    file.write_text("mine")
    done = peftchat_in_process(capsys, "launch", recipe, "--to", "slurm", "--gpu", "l4", "-o", file)
    assert done.returncode == 2 and done.stdout == "" and "the file already exists" in done.stderr
    assert file.read_text() == "mine"
