"""Time and memory of a merge: peftchat against stock PEFT, on a random model with a real architecture.

    python scripts/bench_merge.py                       # 3.8 GB of weights, both sides twice, then a memory limit
    python scripts/bench_merge.py --gigabytes 8 --folder /big/disk

Stock is `from_pretrained`, `resize_token_embeddings`, `PeftModel.from_pretrained`, `merge_and_unload`,
`save_pretrained`. Each side runs in a process of its own; wall time includes starting Python and importing, and peak
memory is what the kernel counted for that process (`ru_maxrss`). The base's files are read once beforehand, so that
both find them in the page cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 1_500_000_000
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")
_CGROUP_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Measured:
    """One process: wall and processor time, memory at its peak, and whether it came to its end."""

    seconds: float
    processor: float
    peak: int
    status: int


def make_model(folder: Path, gigabytes: float) -> Any:
    """A Llama of about that size in bfloat16, in shards of about 1 GB, written as a stream."""
    import torch
    from transformers import LlamaConfig

    from peftchat.merging.empty_model import build_empty_model
    from peftchat.merging.safetensors_io import ShardWriter, TensorSpec

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    layers = max(1, round((gigabytes * 1e9 - 0.4e9) / 121.7e6))
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=False)
    config.dtype = torch.bfloat16
    empty_model = build_empty_model(config)
    shards: list[list[TensorSpec]] = [[]]
    for name, slot in empty_model.slots.items():
        if sum(spec.bytes for spec in shards[-1]) > 1e9:
            shards.append([])
        shards[-1].append(TensorSpec(name, torch.bfloat16, tuple(slot.shape)))
    torch.manual_seed(0)
    weight_map = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with ShardWriter(folder / file, specs) as writer:
            for spec in specs:
                weight = torch.empty(spec.shape, dtype=torch.bfloat16).normal_(std=0.02)
                writer.append(weight if len(spec.shape) > 1 else weight + 1)
                weight_map[spec.name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    return config


def make_adapter(folder: Path, base: Path, config: Any) -> None:
    """LoRA r=16 on all linear layers and four new tokens, saved by stock PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    from peftchat.merging.empty_model import build_empty_model

    ids = [config.vocab_size + index for index in range(4)]
    settings = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": ids, "lm_head": ids},
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    model = get_peft_model(build_empty_model(config, rows=ids[-1] + 1).model, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(folder, save_embedding_layers=False)
    saved = folder / "adapter_config.json"
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "base_model_name_or_path": str(base)}))


def run_stock(run: Path, out: Path) -> None:
    """The merge as PEFT's documentation has it."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    config = PeftConfig.from_pretrained(run)
    rows = max(index for ids in config.trainable_token_indices.values() for index in ids) + 1
    model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype="auto")
    model.resize_token_embeddings(rows, mean_resizing=False)
    merged = PeftModel.from_pretrained(model, run).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="1GB")


def measure(command: list[str], prepare: Callable[[], None] | None = None) -> Measured:
    """Run a command to its end."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=prepare)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    if code > 0:
        print(complaint.decode()[-2000:], file=sys.stderr)
    return Measured(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, code)


def memory_group(limit: int) -> tuple[Path, str] | None:
    """A control group with a memory limit, and the kind; None where none can be made."""
    for root, file, kind in (
        (_CGROUP_V1, "memory.limit_in_bytes", "cgroup v1"),
        (_CGROUP_V2, "memory.max", "cgroup v2"),
    ):
        group = root / f"peftchat-bench-{os.getpid()}"
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return group, kind
    return None


def limited(command: list[str], limit: int) -> tuple[Measured, str]:
    """Run a command with `limit` bytes of memory; the second value says what kept it there."""
    made = memory_group(limit)
    if made is None:
        import resource

        return measure(command, lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))), "RLIMIT_DATA"
    group, kind = made
    try:
        members = group / "cgroup.procs"

        def join() -> None:
            members.write_text(str(os.getpid()))

        return measure(command, join), kind
    finally:
        group.rmdir()


def show(name: str, measured: Measured) -> None:
    state = "" if measured.status == 0 else f"   did not finish (status {measured.status})"
    spent = f"{measured.seconds:7.1f} s ({measured.processor:.1f} s of processors)"
    print(f"{name:28} {spent}   peak {measured.peak / 1e6:7.0f} MB{state}", flush=True)


def compare(work: Path, gigabytes: float, turns: int) -> None:
    base, run = work / "base", work / "run"
    base.mkdir()
    config = make_model(base, gigabytes)
    make_adapter(run, base, config)
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"{weights / 1e9:.2f} GB of bfloat16 weights, {os.cpu_count()} cores", flush=True)
    out = work / "out"
    ours = [sys.executable, "-m", "peftchat", "merge", str(run), "-o", str(out)]
    stock = [sys.executable, __file__, "--stock", str(run), str(out)]
    sides = {"stock PEFT": stock, "peftchat --no-verify": [*ours, "--no-verify"]}
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, command in sides.items():
            for shard in base.glob("*.safetensors"):
                subprocess.run(["cat", shard], stdout=subprocess.DEVNULL, check=True)
            os.sync()  # what the last side left to be written is not this side's time
            found[name].append(measure(command))
            show(name, found[name][-1])
            shutil.rmtree(out, ignore_errors=True)
    show("peftchat with proof", measure(ours))
    shutil.rmtree(out, ignore_errors=True)
    theirs, mine = found["stock PEFT"], found["peftchat --no-verify"]
    memory = min(one.peak for one in theirs) / max(one.peak for one in mine)
    seconds = min(one.seconds for one in mine) / min(one.seconds for one in theirs)
    print(f"Memory: {memory:.1f} times less than stock. Time: {seconds:.2f} of stock's (best of {turns}).")
    for name, command in (("peftchat with proof", [*ours, "--memory-budget", "256MB"]), ("stock PEFT", stock)):
        measured, kind = limited(command, LIMIT)
        show(f"{name}, {LIMIT / 1e9} GB", measured)
        shutil.rmtree(out, ignore_errors=True)
    print(f"The limit was kept by {kind}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.8, help="size of the base")
    parser.add_argument("--turns", type=int, default=2, help="how often each side runs")
    parser.add_argument("--folder", type=Path, help="where to work; three times the base's size must be free")
    parser.add_argument("--stock", nargs=2, type=Path, metavar=("RUN", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stock:
        run_stock(*arguments.stock)
        return
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=arguments.folder) as work:
        compare(Path(work), arguments.gigabytes, arguments.turns)


if __name__ == "__main__":
    main()
