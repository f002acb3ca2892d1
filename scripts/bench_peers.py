"""Training speed, memory and losses beside other tools: LLaMA-Factory, TRL, LitGPT and torchtune.

    python scripts/bench_peers.py conversations.jsonl --model FOLDER --environments FOLDER --setup
    python scripts/bench_peers.py conversations.jsonl --model FOLDER --environments FOLDER --write docs/benchmarks.md

`--setup` makes an environment for each tool in the folder with venv and pip, where there is none yet. Then every tool
trains on the same rows, encoded once by peftchat, in turns and in a process of its own: one epoch of `--steps` steps of
`--batch` conversations, LoRA of rank 16 on all linear layers, a constant rate. Where a tool can pack, the conversations
of a step are one pack. peftchat runs with `training.torch_compile: false` and `true`. A tool that cannot be installed
or run is a row with the reason. Results are added to `--results`, and a run that was cut off goes on behind them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_train import RATE, encode, recipe
from page_tables import write_table


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool in an environment of its own.

    Attributes:
        folder: of the environment, below the one that the user names.
        packages: what pip installs there.
        removed: what is removed again: transformers loads it wherever it is, and its build fits torch's for GPUs alone.
        contenders: names of `peer_drivers.DRIVERS`.
    """

    folder: str
    packages: Sequence[str]
    contenders: Sequence[str]
    removed: Sequence[str] = ()


PEERS = (
    Peer("trl", ("trl==1.16.0", "peft", "bitsandbytes", "torch"), ("TRL", "TRL padding-free")),
    Peer(
        "llamafactory", ("llamafactory==0.9.5", "bitsandbytes", "torch"), ("LLaMA-Factory", "LLaMA-Factory packed"),
        removed=("torchvision", "torchaudio"),
    ),
    Peer("litgpt", ("litgpt==0.5.13", "bitsandbytes", "torch"), ("LitGPT",)),
    Peer("torchtune", ("torchtune==0.6.1", "torchao", "torch"), ("torchtune",)),
)  # fmt: skip

OURS = "peftchat"
OWN = (OURS, "peftchat compiled")

DRIVERS = Path(__file__).with_name("peer_drivers.py")

Found = dict[str, Any]


def interpreter(environments: Path, contender: str) -> Path:
    """Return the Python that runs a contender."""
    if contender in OWN:
        return Path(sys.executable)
    folder = next(peer.folder for peer in PEERS if contender in peer.contenders)
    return environments / folder / "bin" / "python"


def set_up(environments: Path, torch: str) -> None:
    """Make the environments that are not there yet.

    Args:
        environments: the folder of all.
        torch: requirement of torch, the same for all of them.
    """
    for peer in PEERS:
        python = environments / peer.folder / "bin" / "python"
        if python.exists():
            continue
        print(f"installing {' '.join(peer.packages)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environments / peer.folder)], check=True)
        pip = [str(python), "-m", "pip", "--quiet"]
        wanted = [torch if package == "torch" else package for package in peer.packages]
        done = subprocess.run([*pip, "install", *wanted], capture_output=True, text=True)
        if done.returncode:
            (environments / peer.folder / "failed.txt").write_text(last_line(done.stderr), encoding="utf-8")
        elif peer.removed:
            subprocess.run([*pip, "uninstall", "--yes", *peer.removed], check=True)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def measure(contender: str, method: str, args: argparse.Namespace, rows: Path, source: Path) -> Found:
    """Train with a contender; return its measurement, or `reason`."""
    python = interpreter(args.environments, contender)
    failed = python.parent.parent / "failed.txt"
    if contender not in OWN and failed.exists():
        return {"reason": f"not installed: {failed.read_text(encoding='utf-8')}"}
    if not python.exists():
        return {"reason": "not installed; see --setup"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = {
            "model": str(Path(args.model).resolve()), "rows": str(rows), "method": method, "batch": args.batch,
            "steps": args.steps, "rate": RATE, "dtype": args.dtype, "on_gpu": args.gpu, "folder": str(folder / "work"),
            "litgpt_config": args.litgpt_config, "recipe": str(folder / "recipe.yaml"),
        }  # fmt: skip
        recipe(source, method, args, folder, contender)
        (folder / "work").mkdir()
        file = folder / "spec.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        if contender not in OWN:
            variables.pop("PYTHONPATH", None)
        done = subprocess.run(
            [str(python), str(DRIVERS), contender, str(file)],
            capture_output=True, text=True, env=variables, cwd=folder / "work",
        )  # fmt: skip
        last = last_line(done.stderr if done.returncode else done.stdout)
        if done.returncode:
            return {"reason": last.replace("|", "/")}
        found: Found = json.loads(done.stdout.strip().splitlines()[-1])
        return found


def row_of(contender: str, runs: Sequence[Found], ours: Sequence[Found]) -> list[str]:
    """Return the cells of one line."""
    reasons = [run["reason"] for run in runs if "reason" in run]
    if reasons:
        return [contender, "", "", "", "", "", reasons[0]]
    speeds = [run["speed"] for run in runs]
    by_cpu = [run["speed"] / run["cpu_share"] for run in runs]
    reference = [run["speed"] / run["cpu_share"] for run in ours if "reason" not in run]
    ratio = f"{statistics.median(reference) / statistics.median(by_cpu):.2f} x" if reference else ""
    losses = runs[0]["losses"]
    return [
        contender, ", ".join(f"{one:.0f}" for one in speeds), ", ".join(f"{one:.0f}" for one in by_cpu), ratio,
        f"{max(run['peak'] for run in runs) / 1e9:.2f}",
        f"{statistics.median(run['to_first_step'] for run in runs):.0f} s",
        ", ".join(f"{loss:.3f}" for loss in losses),
    ]  # fmt: skip


def table(results: Mapping[str, Mapping[str, Sequence[Found]]], args: argparse.Namespace) -> str:
    """Return all results as Markdown."""
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    heads = ["", "real tokens/s", "per CPU second", "peftchat is faster by", "peak GB", "to first step", "losses"]
    parts = [
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {threads} threads, {args.dtype}, {args.steps} steps of "
        f"{args.batch} conversations; one number for each round."
    ]
    for method, runs in results.items():
        lines = [heads, ["---", *["---:"] * 5, "---"]]
        lines += [row_of(name, found, runs.get(OURS, ())) for name, found in runs.items()]
        parts.append(f"{method}:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts)


def read_results(file: Path | None) -> list[Found]:
    """Return the results of an earlier, interrupted run."""
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Set up or measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path, help="JSON lines")
    parser.add_argument("--model", required=True)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the tools' environments")
    parser.add_argument("--setup", action="store_true", help="install what is missing, and measure nothing")
    parser.add_argument("--torch", default="torch", help="pip's requirement of torch for all environments")
    parser.add_argument("--methods", default="lora,qlora,full")
    every = [*OWN, *(name for peer in PEERS for name in peer.contenders)]
    parser.add_argument("--contenders", default=",".join(every))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="conversations of a step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU")
    parser.add_argument("--litgpt-config", default="SmolLM2-135M", help="LitGPT's name of the model")
    parser.add_argument("--results", type=Path, default=None, help="JSON lines of results, to go on behind them")
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="write the table into this page")
    args = parser.parse_args()
    args.environments = args.environments.absolute()
    unknown = set(args.contenders.split(",")) - set(every)
    if unknown:
        parser.error(f"no contender is named {', '.join(sorted(unknown))}; known: {', '.join(every)}")
    if args.setup:
        set_up(args.environments, args.torch)
        return
    results: dict[str, dict[str, list[Found]]] = {}
    known = read_results(args.results)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # As many rows as the steps have, so that all see the same ones in whatever order.
        lines = args.conversations.read_text(encoding="utf-8").splitlines()[: args.steps * args.batch]
        if len(lines) < args.steps * args.batch:
            parser.error(f"{args.conversations} has {len(lines)} rows; {args.steps * args.batch} are needed")
        source = folder / "rows.jsonl"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = encode(source, args, folder)
        for number in range(args.rounds):
            for method in args.methods.split(","):
                for name in args.contenders.split(","):
                    key = {"round": number, "method": method, "contender": name}
                    found = next((one["found"] for one in known if one["key"] == key), None)
                    if found is None:
                        print(f"round {number + 1}, {method}: {name}", file=sys.stderr, flush=True)
                        found = measure(name, method, args, rows, source)
                        if args.results is not None:
                            with args.results.open("a", encoding="utf-8") as stream:
                                stream.write(json.dumps({"key": key, "found": found}) + "\n")
                    results.setdefault(method, {}).setdefault(name, []).append(found)
    shown = table(results, args)
    print(shown)
    if args.write is not None:
        write_table(args.write, "bench_peers", f"\n{shown}\n")


if __name__ == "__main__":
    main()
