"""Loading a checkpoint of ZeRO, also one that another number of processes has written.

Each process of ZeRO writes the shard of the optimizer's state that it holds. For another number of processes, a program
of DeepSpeed joins the shards of each parameter to one tensor, of which every process then reads its part: a "universal"
checkpoint (Lian et al., https://arxiv.org/abs/2406.18820).
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from peftchat.child_process import child_environment
from peftchat.errors import VerificationError
from peftchat.runs.checkpoint import Checkpoint
from peftchat.runs.layout import Layout

if TYPE_CHECKING:
    from accelerate import Accelerator

_FOLDER = ".universal"
"""Within the checkpoint; a hidden name is none of a checkpoint's files."""

_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_of_other_processes(checkpoint: Checkpoint, processes: int) -> bool:
    """Return whether a checkpoint holds the shards of another number of processes."""
    layout = Layout.of_checkpoint(checkpoint)
    return layout is not None and layout.is_sharded and layout.processes != processes


def load_sharded(engine: Any, accelerator: "Accelerator", checkpoint: Checkpoint, *, whole: bool) -> None:
    """Load weights and optimizer from a checkpoint into DeepSpeed's engine; every process must call it.

    Args:
        engine: the model as DeepSpeed has wrapped it.
        accelerator: knows the processes.
        checkpoint: the checkpoint.
        whole: whether it holds every weight, not those of an adapter alone.

    Raises:
        VerificationError: the shards cannot be joined.
    """
    if not is_of_other_processes(checkpoint, accelerator.num_processes):
        deepspeed_load_checkpoint(engine, str(checkpoint.path), load_module_strict=whole)
        return
    (failure,) = broadcast_object_list([_join(checkpoint) if accelerator.is_main_process else None])
    if failure is not None:
        raise VerificationError(
            f"{checkpoint.path}: DeepSpeed cannot join the shards of {Layout.of_checkpoint(checkpoint)}: {failure}"
        )
    # DeepSpeed gives every group of ZeRO-3 the settings of the first one: weight decay where there is none.
    settings = [_settings(group) for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(checkpoint.path / _FOLDER), load_module_strict=whole)
    finally:
        engine._config.load_universal_checkpoint = False
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(checkpoint.path / _FOLDER, ignore_errors=True)
    for state in engine.optimizer.optimizer.state.values():
        # One tensor would count the steps of all groups of ZeRO-3.
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    for group, before in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(before)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _join(checkpoint: Checkpoint) -> str | None:
    """Write the universal checkpoint; return what went wrong."""
    shutil.rmtree(checkpoint.path / _FOLDER, ignore_errors=True)
    tag = (checkpoint.path / "latest").read_text(encoding="utf-8").strip()
    # Relative names: the program takes a path for a pattern of `glob`.
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", tag,
        "--output_folder", str(Path(_FOLDER) / tag), "--inject_missing_state",
        "--num_extract_workers", "1", "--num_merge_workers", "1",
    ]  # fmt: skip
    environment = {name: value for name, value in child_environment().items() if name not in _LAUNCHERS}
    done = subprocess.run(
        command, cwd=checkpoint.path, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"its program ended with status {done.returncode}"
