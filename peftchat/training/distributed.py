"""Where a run takes place: how many processes, on what, started by whom."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftchat.errors import UserError, VerificationError

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.recipe.sections import Dtype, Method


Strategy = Literal["single", "ddp", "zero2", "zero3"]
Launcher = Literal["none", "elastic", "environment"]


@dataclass(frozen=True, slots=True)
class DistributedSetup:
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


def resolve_distributed(loaded: "LoadedRecipe", environment: Mapping[str, str] = os.environ) -> DistributedSetup:
    """Decide where the run takes place.

    Raises:
        UserError: the recipe asks for more than there is, or contradicts the launcher that started this process.
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
    strategy = _resolve_strategy(recipe, processes * recipe.distributed.nodes)
    if strategy == "single" and processes * recipe.distributed.nodes > 1:
        raise UserError(
            f"`single` is one process, and the recipe asks for {processes * recipe.distributed.nodes}",
            where=loaded.where("distributed", "strategy"),
            hint="Write `ddp`, `zero2` or `zero3`, or set distributed.processes: 1.",
        )
    alone = strategy == "single" or (strategy == "ddp" and processes * recipe.distributed.nodes == 1)
    return DistributedSetup(strategy, processes, recipe.distributed.nodes, gpus, "none" if alone else "elastic")


def is_sharded(strategy: Strategy) -> bool:
    """Whether DeepSpeed shards anything under a strategy."""
    return strategy in ("zero2", "zero3")


def weight_dtype(method: "Method", dtype: "Dtype", strategy: Strategy) -> "Dtype":
    """The dtype of unquantized weights: what is trained without DeepSpeed's masters is held in float32."""
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


def _inside_launcher(loaded: "LoadedRecipe", started: tuple[int, int], gpus: int) -> DistributedSetup:
    world, local = started
    recipe = loaded.recipe
    wanted = recipe.distributed.processes
    if wanted is not None and wanted * recipe.distributed.nodes != world:
        raise UserError(
            f"the recipe asks for {wanted * recipe.distributed.nodes} processes, and the launcher started {world}",
            where=loaded.where("distributed", "processes"),
            hint=f"Start as many, or add `--set distributed.processes={local}`.",
        )
    if gpus and local > gpus:
        raise UserError(
            f"the launcher started {local} processes on this machine, which has {gpus} GPUs",
            where="launcher",
            hint="Start one process a GPU.",
        )
    return DistributedSetup(_resolve_strategy(recipe, world), local, max(1, world // local), gpus, "environment")


def _resolve_strategy(recipe: "Recipe", world_size: int) -> Strategy:
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
            hint="Use bfloat16 or float32.",
        )
    if "8bit" in recipe.training.optim or recipe.training.optim.startswith("paged_"):
        raise UserError(
            f"the optimizer {recipe.training.optim} needs a GPU, and there is none here",
            where=loaded.where("training", "optim"),
            hint="Use adamw_torch_fused.",
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
            hint=f"For the same batch on what is here: `--set distributed.processes={gpus} "
            f"--set training.gradient_accumulation_steps={accumulation}`.",
        )
    raise UserError(
        f"the recipe asks for {processes} GPUs, there is none, and as processes on {cores} CPU cores they are too many",
        where=loaded.where("distributed", "processes"),
        hint=f"Run it where the GPUs are, or try it on the CPU with `--set distributed.processes={min(2, cores)}` "
        "and a small model.",
    )


def launch(placement: DistributedSetup, arguments: Sequence[str]) -> int:
    """Run `peftchat` with these arguments in every process and wait for all of them.

    Args:
        arguments: the command line after `peftchat`.

    Returns:
        0, or the status with which the first process to fail ended; it has told why.

    Raises:
        UserError: several machines are asked for and nothing says how they find each other.
        VerificationError: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # The launcher would give every process a single thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // placement.processes)))
    config = LaunchConfig(
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        nproc_per_node=placement.processes,
        run_id="peftchat",
        rdzv_backend="c10d",
        rdzv_endpoint=_meeting_point(placement),
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "peftchat", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        raise VerificationError(
            f"process {rank} was ended by signal {-failure.exitcode}"
            + (" (the machine ran out of memory?)" if failure.exitcode == -9 else "")
        ) from error
    return 0


def _meeting_point(placement: DistributedSetup) -> str:
    if placement.nodes == 1:
        return "localhost:0"
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise UserError(
            f"the recipe asks for {placement.nodes} machines, and nothing says where they meet",
            where="distributed.nodes",
            hint="Set MASTER_ADDR (and MASTER_PORT) to the first machine everywhere, or start with srun or torchrun.",
        )
    return f"{host}:{os.environ.get('MASTER_PORT', '29500')}"


def deepspeed_config(recipe: "Recipe", placement: DistributedSetup, *, row_elements: int) -> dict[str, Any] | None:
    """The configuration to hand to transformers; None where DeepSpeed has no part.

    Args:
        row_elements: elements of the largest parameter that must stay whole on every process: the rows of new tokens,
            which are read outside the forward of the module that owns them.
    """
    if not placement.uses_deepspeed:
        return None
    if recipe.distributed.deepspeed_config is not None:
        config: dict[str, Any] = json.loads(Path(recipe.distributed.deepspeed_config).read_text(encoding="utf-8"))
    else:
        config = _own_config(recipe, placement)
    if placement.strategy == "zero3":
        zero = config["zero_optimization"]
        threshold = zero.get("stage3_param_persistence_threshold", "auto")
        # DeepSpeed's own default; `auto` would make it depend on the hidden size.
        floor = 100_000 if threshold == "auto" else int(threshold)
        zero["stage3_param_persistence_threshold"] = max(floor, row_elements)
    return config


def _own_config(recipe: "Recipe", placement: DistributedSetup) -> dict[str, Any]:
    on_gpu = placement.gpus > 0
    zero: dict[str, Any] = {
        "stage": 3 if placement.strategy == "zero3" else 2,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if placement.strategy == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    config: dict[str, Any] = {
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "fp16": {"enabled": recipe.model.dtype == "float16"},
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    if recipe.distributed.offload != "none":
        place = {"device": "cpu", "pin_memory": on_gpu}
        zero["offload_optimizer"] = place
        if recipe.distributed.offload == "all":
            zero["offload_param"] = place
        # Offloaded states want DeepSpeed's own CPU Adam, which it builds from this block.
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        }
    return config
