"""Where a run takes place: how many processes, on what, started by whom."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.recipe.sections import Dtype, Method

Strategy = Literal["single", "ddp", "zero2", "zero3"]
Launcher = Literal["none", "elastic", "environment"]


@dataclass(frozen=True, slots=True)
class Placement:
    """How the recipe's `distributed` section turns out on this machine.

    Attributes:
        strategy: the settled strategy.
        processes: processes on this machine.
        nodes: machines.
        gpus: GPUs that this machine has; 0 trains on the CPU.
        launcher: `none`: this process trains; `elastic`: it has to start the others; `environment`: it was started as
            one of them (torchrun, accelerate, Slurm).
    """

    strategy: Strategy
    processes: int
    nodes: int
    gpus: int
    launcher: Launcher

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.nodes

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return "cuda" if self.gpus else "cpu"

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed shards anything."""
        return is_sharded(self.strategy)


def settle(loaded: "LoadedRecipe", environment: Mapping[str, str] = os.environ) -> Placement:
    """Decide where the run takes place.

    Raises:
        InputError: the recipe asks for more than there is, or contradicts the launcher that started this process.
    """
    import torch

    recipe = loaded.recipe
    gpus = torch.cuda.device_count()
    if not gpus:
        _check_cpu(loaded)
    started = _started_by(environment)
    if started is not None:
        return _inside_launcher(loaded, started, gpus)
    wanted = recipe.distributed.processes
    processes = wanted if wanted is not None else max(1, gpus)
    if recipe.distributed.strategy == "single" and wanted is None:
        processes = 1
    _check_machine(loaded, processes, gpus)
    strategy = _strategy(recipe, processes * recipe.distributed.nodes)
    if strategy == "single" and processes * recipe.distributed.nodes > 1:
        raise UserError(
            f"`single` is one process, and the recipe asks for {processes * recipe.distributed.nodes}",
            where=loaded.where("distributed", "strategy"),
            cure="Write `ddp`, `zero2` or `zero3`, or set distributed.processes: 1.",
        )
    alone = strategy == "single" or (strategy == "ddp" and processes * recipe.distributed.nodes == 1)
    return Placement(strategy, processes, recipe.distributed.nodes, gpus, "none" if alone else "elastic")


def is_sharded(strategy: Strategy) -> bool:
    """Whether DeepSpeed shards anything under a strategy."""
    return strategy in ("zero2", "zero3")


def held_dtype(method: "Method", dtype: "Dtype", strategy: Strategy) -> "Dtype":
    """The dtype of unquantised weights: what is trained without DeepSpeed's masters is held in float32."""
    return "float32" if method == "full" and not is_sharded(strategy) else dtype


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch expects, from those that `srun` sets; empty outside a Slurm step of several tasks."""
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in environment:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": environment.get("SLURM_NTASKS_PER_NODE", environment["SLURM_NTASKS"]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment["SLURM_JOB_NODELIST"]),
        # Every task of a job derives the same port from the job's number.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + int(environment["SLURM_JOB_ID"]) % 20000),
    }


def _first_host(nodes: str) -> str:
    if shutil.which("scontrol") is None:
        return nodes.split(",")[0]
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]


def _started_by(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(world size, processes on this machine) if a launcher started this process."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    world = int(environment["WORLD_SIZE"])
    return world, int(environment.get("LOCAL_WORLD_SIZE", str(world)))


def _inside_launcher(loaded: "LoadedRecipe", started: tuple[int, int], gpus: int) -> Placement:
    world, local = started
    recipe = loaded.recipe
    wanted = recipe.distributed.processes
    if wanted is not None and wanted * recipe.distributed.nodes != world:
        raise UserError(
            f"the recipe asks for {wanted * recipe.distributed.nodes} processes, and the launcher started {world}",
            where=loaded.where("distributed", "processes"),
            cure=f"Start as many, or add `--set distributed.processes={local}`.",
        )
    if gpus and local > gpus:
        raise UserError(
            f"the launcher started {local} processes on this machine, which has {gpus} GPUs",
            where="launcher",
            cure="Start one process a GPU.",
        )
    return Placement(_strategy(recipe, world), local, max(1, world // local), gpus, "environment")


def _strategy(recipe: "Recipe", world_size: int) -> Strategy:
    wanted = recipe.distributed.strategy
    if wanted != "auto":
        return wanted
    if world_size == 1:
        return "single"
    # Adapters leave little to shard; full fine-tuning is what ZeRO-3 is for.
    return "zero3" if recipe.method == "full" else "ddp"


def _check_cpu(loaded: "LoadedRecipe") -> None:
    """Refuse what only a GPU can do."""
    recipe = loaded.recipe
    if recipe.model.dtype == "float16":
        raise UserError(
            "float16 needs a GPU, and there is none here",
            where=loaded.where("model", "dtype"),
            cure="Use bfloat16 or float32.",
        )
    if "8bit" in recipe.training.optim or recipe.training.optim.startswith("paged_"):
        raise UserError(
            f"the optimizer {recipe.training.optim} needs a GPU, and there is none here",
            where=loaded.where("training", "optim"),
            cure="Use adamw_torch_fused.",
        )


def _check_machine(loaded: "LoadedRecipe", processes: int, gpus: int) -> None:
    cores = os.cpu_count() or 1
    there = gpus or cores
    if processes <= there:
        return
    training = loaded.recipe.training
    accumulation = max(1, training.gradient_accumulation_steps * processes // max(1, gpus))
    if gpus:
        raise UserError(
            f"the recipe asks for {processes} GPUs on each machine, and there {'is' if gpus == 1 else 'are'} {gpus}",
            where=loaded.where("distributed", "processes"),
            cure=f"For the same batch on what is here: `--set distributed.processes={gpus} "
            f"--set training.gradient_accumulation_steps={accumulation}`.",
        )
    raise UserError(
        f"the recipe asks for {processes} GPUs, there is none, and as processes on {cores} CPU cores they are too many",
        where=loaded.where("distributed", "processes"),
        cure=f"Run it where the GPUs are, or try it on the CPU with `--set distributed.processes={min(2, cores)}` "
        "and a small model.",
    )
