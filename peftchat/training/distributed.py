"""Distributed setup: the processes of a run, their strategy and their devices."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from peftchat.errors import UserError
from peftchat.recipe.deepspeed_file import read_deepspeed_file
from peftchat.training.launcher_environment import LaunchedProcess, read_environment

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe
    from peftchat.recipe.sections import Dtype, Method


Strategy = Literal["single", "ddp", "zero2", "zero3"]
Launcher = Literal["none", "torchrun", "environment"]


@dataclass(frozen=True, slots=True)
class DistributedSetup:
    """The recipe's `distributed` section, resolved on this machine.

    Attributes:
        strategy: the resolved strategy.
        processes: processes on this machine.
        nodes: machines.
        gpus: GPUs of this machine; 0 trains on the CPU.
        launcher: `none`: this process trains alone; `torchrun`: it has to launch the processes that train;
            `environment`: it was launched as one of them (torchrun, accelerate, Slurm).
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
    """Resolve the recipe's `distributed` section on this machine.

    Raises:
        UserError: the recipe asks for more than this machine has, or for something other than the launcher started.
    """
    import torch

    recipe = loaded.recipe
    gpus = torch.cuda.device_count()
    if not gpus:
        _check_cpu(loaded)
    process = read_environment(environment).process
    if process is not None:
        return _inside_launcher(loaded, process, gpus)
    requested = recipe.distributed.processes
    processes = requested if requested is not None else max(1, gpus)
    if recipe.distributed.strategy == "single" and requested is None:
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
    return DistributedSetup(strategy, processes, recipe.distributed.nodes, gpus, "none" if alone else "torchrun")


def is_sharded(strategy: Strategy) -> bool:
    """Whether DeepSpeed shards anything under a strategy."""
    return strategy in ("zero2", "zero3")


def weight_dtype(method: "Method", dtype: "Dtype", strategy: Strategy, master: "Dtype" = "float32") -> "Dtype":
    """Return the dtype of unquantized weights: the master's for full fine-tuning without DeepSpeed's own masters."""
    return master if method == "full" and not is_sharded(strategy) else dtype


def _inside_launcher(loaded: "LoadedRecipe", process: LaunchedProcess, gpus: int) -> DistributedSetup:
    world, local = process.world_size, process.local_world_size
    recipe = loaded.recipe
    requested = recipe.distributed.processes
    if requested is not None and requested * recipe.distributed.nodes != world:
        raise UserError(
            f"the recipe asks for {requested * recipe.distributed.nodes} processes, but the launcher started {world}",
            where=loaded.where("distributed", "processes"),
            hint=f"Start as many, or add `--set distributed.processes={local}`.",
        )
    if gpus and local > gpus:
        raise UserError(
            f"the launcher started {local} processes on this machine, but it has {gpus} GPUs",
            where="launcher",
            hint="Start one process per GPU; with several machines, set LOCAL_WORLD_SIZE to those of each.",
        )
    return DistributedSetup(_resolve_strategy(recipe, world), local, max(1, world // local), gpus, "environment")


def _resolve_strategy(recipe: "Recipe", world_size: int) -> Strategy:
    requested = recipe.distributed.strategy
    if world_size > 1 and recipe.training.on_oom == "halve":
        raise UserError(
            "several processes have to take each step alike, and only one of them runs out of memory",
            where="training.on_oom: halve",
            hint="Set distributed.processes: 1, or training.on_oom: stop.",
        )
    if requested != "auto":
        return requested
    if world_size == 1:
        return "single"
    # Adapters leave little to shard; full fine-tuning is what ZeRO-3 is for.
    training = recipe.training
    if training.master_weights == "bfloat16" or training.optimizer_in_backward:
        key = "optimizer_in_backward" if training.optimizer_in_backward else "master_weights"
        raise UserError(
            f"only a single process takes it, and this run has {world_size}: DeepSpeed updates the weights by itself",
            where=f"training.{key}",
            hint="Set distributed.strategy: single, or remove the key: ZeRO-3 shards weights and gradients.",
        )
    if recipe.method == "full" and recipe.training.on_spike == "skip":
        raise UserError(
            "DeepSpeed updates the weights by itself, so no update can be left out",
            where="training.on_spike: skip",
            hint="Set distributed.strategy: ddp, or training.on_spike: log or stop.",
        )
    return "zero3" if recipe.method == "full" else "ddp"


_BITSANDBYTES_ON_CPU = ("adamw_8bit", "ademamix_8bit", "lion_8bit")
"""The optimizers of bitsandbytes with states in 8 bits that it has for CPUs too."""


def _check_cpu(loaded: "LoadedRecipe") -> None:
    """Reject settings that need a GPU."""
    recipe = loaded.recipe
    if recipe.model.dtype == "float16":
        raise UserError(
            "float16 needs a GPU, and this machine has none",
            where=loaded.where("model", "dtype"),
            hint="Use bfloat16 or float32.",
        )
    optim = recipe.training.optim
    has_kernels = optim in _BITSANDBYTES_ON_CPU and Version(version("bitsandbytes")) >= Version("0.50")
    if ("8bit" in optim or optim.startswith("paged_")) and not has_kernels:
        likely = [name for name in _BITSANDBYTES_ON_CPU if name in optim]
        raise UserError(
            f"the optimizer {optim} needs a GPU, and this machine has none",
            where=loaded.where("training", "optim"),
            hint=f"Use {' or '.join([*likely, 'adamw_torch_fused'])}.",
        )


def _check_machine(loaded: "LoadedRecipe", processes: int, gpus: int) -> None:
    cores = os.cpu_count() or 1
    available = gpus or cores
    if processes <= available:
        return
    training = loaded.recipe.training
    accumulation = max(1, training.gradient_accumulation_steps * processes // max(1, gpus))
    if gpus:
        raise UserError(
            f"the recipe asks for {processes} GPUs per machine, but this one has {gpus}",
            where=loaded.where("distributed", "processes"),
            hint=f"For the same global batch size, add `--set distributed.processes={gpus} "
            f"--set training.gradient_accumulation_steps={accumulation}`.",
        )
    raise UserError(
        f"the recipe asks for {processes} processes, but this machine has no GPU and {cores} CPU cores",
        where=loaded.where("distributed", "processes"),
        hint=f"Run it on a machine with GPUs, or try it on the CPU with `--set distributed.processes={min(2, cores)}` "
        "and a small model.",
    )


def deepspeed_config(
    recipe: "Recipe", distributed: DistributedSetup, *, added_token_elements: int
) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration for transformers; None without DeepSpeed.

    Args:
        added_token_elements: number of elements of the added tokens' embedding. ZeRO-3 must not shard it, because it
            is read outside the forward of the module that owns it.
    """
    if not distributed.uses_deepspeed:
        return None
    if recipe.distributed.deepspeed_config is not None:
        config = _completed(read_deepspeed_file(recipe.distributed.deepspeed_config), recipe, distributed)
    else:
        config = _default_config(recipe, distributed)
    if distributed.strategy == "zero3":
        zero = config["zero_optimization"]
        threshold = zero.get("stage3_param_persistence_threshold", "auto")
        # DeepSpeed's own default; `auto` would make it depend on the hidden size.
        floor = 100_000 if threshold == "auto" else int(threshold)
        zero["stage3_param_persistence_threshold"] = max(floor, added_token_elements)
    return config


def _completed(content: dict[str, Any], recipe: "Recipe", distributed: DistributedSetup) -> dict[str, Any]:
    """Return a user's DeepSpeed settings with what they leave out.

    DeepSpeed has defaults of its own: no clipping, float32, a learning rate of 0.001. Transformers replaces `auto`
    only: https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/deepspeed.py
    """
    ours = _default_config(recipe, distributed)
    shared = {key: value for key, value in ours.items() if key not in ("zero_optimization", "optimizer")}
    if "bfloat16" in content:
        del shared["bf16"]
    config = {**shared, **content}
    if "optimizer" in content:
        params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        config["optimizer"] = {**content["optimizer"], "params": {**params, **content["optimizer"].get("params", {})}}
    return config


def _default_config(recipe: "Recipe", distributed: DistributedSetup) -> dict[str, Any]:
    on_gpu = distributed.gpus > 0
    zero: dict[str, Any] = {
        "stage": 3 if distributed.strategy == "zero3" else 2,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if distributed.strategy == "zero3":
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
        target = {"device": "cpu", "pin_memory": on_gpu}
        zero["offload_optimizer"] = target
        if recipe.distributed.offload == "all":
            zero["offload_param"] = target
        # Offloaded optimizer states need DeepSpeed's own CPU Adam, which it builds from this block.
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        }
    return config
