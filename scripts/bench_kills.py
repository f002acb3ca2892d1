"""Kill real runs at random moments, resume each, and compare what comes out with a run that nobody disturbed.

    python scripts/bench_kills.py [--kills 12] [--seed 0] [--only single] [--json FILE] [--write]

`--kills` is the number for each kind of run. A run is killed by SIGKILL: its only process, its launcher, one of its
processes, or all of them. It is then resumed, and the resumed run may be killed again. Once it has ended, the losses of
all steps and every byte of the weights must be those of a run that was never killed. `--write` puts the table into
docs/faults.md. All processes are forks of one that has imported everything, so that most kills hit a run at work.
"""

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from page_tables import write_table

from peftchat.files import write_text
from tests.support.cli import Started, start
from tests.support.data import read_json_lines, write_small_talk
from tests.support.faults import Scene

PAGE = Path(__file__).resolve().parent.parent / "docs" / "faults.md"

STEPS = 24
KILLS_A_RUN = 4
"""A run that was killed this often is left to its end."""

IN_TRAINING = 0.75
"""Share of the kills that wait until the run trains: processes spend most of their time on imports."""

TRAINING = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 1,
            "eval_strategy": "steps", "eval_steps": 8, "eval_on_start": True}  # fmt: skip

PHASES = ("before the first step", "in a step", "in a checkpoint", "while the model is written")


@dataclass
class Outcome:
    """What became of the runs of one kind.

    Attributes:
        kills: how often one was killed.
        targets: what was killed.
        phases: what the run was doing.
        lost: how many runs could not be resumed; what the last one said is in `said`.
        runs: how many ended.
        equal_losses: how many of those had the same losses in every step and evaluation.
        equal_weights: how many of those had the same bytes of weights.
        left: processes that outlived their launcher.
    """

    kills: int = 0
    targets: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    runs: int = 0
    equal_losses: int = 0
    equal_weights: int = 0
    left: int = 0
    said: str = ""


KINDS: dict[str, dict[str, Any]] = {
    f"{strategy}, {method}, {'packed' if packing else 'not packed'}": {
        "method": method,
        "distributed": {"strategy": strategy, "processes": 1 if strategy == "single" else 2},
        "data": {"packing": packing, "max_length": 64},
    }
    for strategy, method, packing in (
        ("single", "full", True),
        ("single", "lora", True),
        ("single", "lora", False),
        ("single", "qlora", True),
        ("ddp", "full", True),
        ("ddp", "lora", False),
        ("ddp", "qlora", True),
        ("zero3", "full", True),
        ("zero3", "lora", True),
        ("zero3", "qlora", False),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="for each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds that contain this text")
    parser.add_argument("--json", type=Path, help="keep the counts here after each kind, and go on with them")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PEFTCHAT_TEST_IMPORTS", "deepspeed")
    outcomes: dict[str, Outcome] = {}
    if chosen.json and chosen.json.is_file():
        outcomes = {name: Outcome(**one) for name, one in json.loads(chosen.json.read_text()).items()}
        for one in outcomes.values():
            one.targets, one.phases = Counter(one.targets), Counter(one.phases)
    for name, sections in KINDS.items():
        if chosen.only not in name or name in outcomes:
            continue
        with tempfile.TemporaryDirectory(prefix="peftchat-kills-") as folder:
            outcomes[name] = try_kind(Path(folder), sections, chosen.kills, random.Random(f"{chosen.seed} {name}"))
        print(name, json.dumps(vars(outcomes[name])), flush=True)
        if chosen.json:
            write_text(chosen.json, json.dumps({name: vars(one) for name, one in outcomes.items()}, indent=1))
    print(table(outcomes))
    if chosen.write:
        write_table(PAGE, "bench_kills", f"\n\n{table(outcomes)}\n")


def try_kind(folder: Path, sections: Mapping[str, Any], kills: int, chance: random.Random) -> Outcome:
    """Kill runs of one kind until there were enough kills, and let the last one end."""
    outcome = Outcome()
    undisturbed = scene(folder / "undisturbed", sections)
    process = begin(undisturbed)
    began = claimed(undisturbed, process)
    trains = until_it_trains(undisturbed, process)
    if process.wait():
        raise SystemExit(process.communicate()[1])
    spans = time.monotonic() - began, time.monotonic() - trains
    expected = result(undisturbed.run)
    while outcome.kills < kills and not outcome.lost:
        one = scene(folder / f"run{outcome.runs}", sections)
        left = min(KILLS_A_RUN, kills - outcome.kills)
        while left and not outcome.lost:
            process = begin(one)
            claimed(one, process)
            in_training = chance.random() < IN_TRAINING
            if in_training:
                until_it_trains(one, process)
            time.sleep(chance.uniform(0, spans[in_training]))
            if kill(process, one.run, chance, outcome):
                left -= 1
            elif process.wait():
                failed(process, outcome)
            else:
                break
        if not outcome.lost:
            process = begin(one)
            # A run that has ended says so with status 2, and does nothing.
            if process.wait() and not (one.run / "run.json").is_file():
                failed(process, outcome)
        if not outcome.lost:
            outcome.runs += 1
            found = result(one.run)
            outcome.equal_losses += found[0] == expected[0]
            outcome.equal_weights += found[1] == expected[1]
    return outcome


def scene(folder: Path, sections: Mapping[str, Any]) -> Scene:
    """Return a run of its own on the same base and the same conversations."""
    folder.mkdir()
    made = Scene.build(folder)
    write_small_talk(made.data, 48)
    held_out = write_small_talk(folder / "eval.jsonl", 6, seed=1)
    data = {**sections["data"], "eval": [{"path": str(held_out)}]}
    made.sections = {**sections, "training": TRAINING, "data": data}
    made.environment = {"PEFTCHAT_CACHE": str(folder.parent / "cache")}
    return made


def begin(one: Scene) -> Started:
    arguments = ("train", str(one.recipe), "--resume")
    code = f"from tests.support.forked_workers import launch_with_forks; launch_with_forks({arguments})"
    return start("-c", code, cwd=one.folder, environment=one.environment)


def claimed(one: Scene, process: Started) -> float:
    """Wait until the run has its folder; return when that was."""
    old = one.notes.get("claim")
    while process.poll() is None:
        try:
            new = (one.run / ".claim").stat().st_ino
        except FileNotFoundError:
            new = None
        if new not in (None, old):
            one.notes["claim"] = new
            break
        time.sleep(0.002)
    return time.monotonic()


def until_it_trains(one: Scene, process: Started) -> float:
    """Wait until the run logs a step; return when that was."""
    metrics = one.run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.is_file() else 0
    while process.poll() is None:
        # A resumed run first drops the steps behind its checkpoint.
        size = metrics.stat().st_size if metrics.is_file() else 0
        if size > before:
            break
        before = min(before, size)
        time.sleep(0.002)
    return time.monotonic()


def kill(process: Started, run: Path, chance: random.Random, outcome: Outcome) -> bool:
    """Kill the run, or a part of it; return whether it was still running."""
    if process.poll() is not None:
        return False
    launcher = psutil.Process(process.pid)
    workers = launcher.children()
    target = chance.choice(["the launcher", "one process", "all processes"]) if workers else "the process"
    phase = doing(run)
    if target == "one process":
        chance.choice(workers).kill()
    elif target == "all processes":
        for one in (launcher, *workers):
            one.kill()
    else:
        launcher.kill()
    if target == "one process" and process.wait(120) == 0:
        return False
    process.wait(120)
    _, alive = psutil.wait_procs(workers, timeout=30)
    outcome.left += len(alive)
    outcome.kills += 1
    outcome.targets[target] += 1
    outcome.phases[phase] += 1
    return True


def doing(run: Path) -> str:
    """Return what a run is doing, by the files that it has."""
    if (run / ".model.tmp").exists():
        return PHASES[3]
    if any(run.glob("checkpoints/*/saving.json")):
        return PHASES[2]
    metrics = run / "metrics.jsonl"
    return PHASES[1] if metrics.is_file() and metrics.stat().st_size else PHASES[0]


def failed(process: Started, outcome: Outcome) -> None:
    outcome.lost += 1
    outcome.said = process.communicate()[1]


def result(run: Path) -> tuple[list[Any], dict[str, str]]:
    """Return the losses of a finished run, and a digest of each file of weights."""
    lines = read_json_lines(run / "metrics.jsonl")
    losses = [[line["step"], line.get("loss"), line.get("eval_loss"), line.get("grad_norm")] for line in lines]
    weights = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in run.glob("*.safetensors")}
    return losses, weights


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Return the outcomes as a table in Markdown."""
    rows = [
        "| run | kills | what was killed | when | runs lost | runs with equal losses | with equal weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    total = Outcome()
    for name, one in outcomes.items():
        rows.append(row(name, one))
        total.targets.update(one.targets)
        total.phases.update(one.phases)
        for key in ("kills", "lost", "runs", "equal_losses", "equal_weights", "left"):
            setattr(total, key, getattr(total, key) + getattr(one, key))
    rows.append(row("**all**", total))
    return "\n".join(rows) + "\n"


def row(name: str, one: Outcome) -> str:
    targets = ", ".join(f"{what} {count}" for what, count in sorted(one.targets.items()))
    phases = ", ".join(f"{phase} {one.phases[phase]}" for phase in PHASES if one.phases[phase])
    equal = [f"{count} of {one.runs}" for count in (one.equal_losses, one.equal_weights)]
    return f"| {name} | {one.kills} | {targets} | {phases} | {one.lost} | {equal[0]} | {equal[1]} |"


if __name__ == "__main__":
    main()
