"""Train one recipe in 1, 2, 4 and 8 processes, and go on with a checkpoint in another number of them.

    python scripts/bench_width.py [--processes 2,4,8] [--only TEXT] [--write]

All runs have the same batch in an optimizer step. The first table compares the losses of all steps with those of one
process; the second resumes a run of some processes with others. `--write` puts both into docs/faults.md. The processes
are forks of one that has imported everything, so that eight of them start on two cores.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftchat.files import write_text
from tests.support.data import read_json_lines, write_small_talk
from tests.support.launch import peftchat_in_processes
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- bench_width: begin -->", "<!-- bench_width: end -->"

BATCH = 8
STEPS = 12

SHAPES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA": {"method": "lora"},
    "QLoRA": {"method": "qlora"},
    "full, uneven": {"method": "full", "data": {"packing": False}},
}
"""The last one has 21 conversations: the last step of an epoch has 5 of them instead of 8. Those of the others end
unevenly too.
"""

RESUMES = (
    (("ddp", 2), ("ddp", 4)),
    (("ddp", 4), ("single", 1)),
    (("single", 1), ("ddp", 4)),
    (("zero2", 2), ("zero2", 4)),
    (("zero3", 4), ("zero3", 2)),
    (("zero3", 2), ("single", 1)),
    (("ddp", 2), ("zero3", 2)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4,8")
    parser.add_argument("--only", default="", help="runs that contain this text, or `resumes`; nothing is written")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/faults.md")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    counts = [int(one) for one in chosen.processes.split(",")]
    with tempfile.TemporaryDirectory(prefix="peftchat-width-") as name:
        os.environ["PEFTCHAT_CACHE"] = f"{name}/cache"
        shapes = [shape for shape in SHAPES if chosen.only in shape]
        first = widths(Path(name), counts, shapes) if shapes else ()
        second = resumes(Path(name)) if chosen.only in "resumes" else ()
        text = "\n".join([*first, "", *second])
    if chosen.write and not chosen.only:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        write_text(PAGE, f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


def widths(folder: Path, counts: list[int], shapes: list[str]) -> Iterator[str]:
    yield told(f"| run | {' | '.join(f'{count} processes' for count in counts)} |")
    yield told("| --- |" + " --- |" * len(counts))
    for shape in shapes:
        expected = losses(train(folder, shape, "single", 1)[0])
        for strategy in ("ddp", "zero2", "zero3"):
            cells = [difference(losses(train(folder, shape, strategy, count)[0]), expected) for count in counts]
            yield told(f"| {shape}, {strategy} | {' | '.join(cells)} |")


def resumes(folder: Path) -> Iterator[str]:
    expected = losses(train(folder, "LoRA", "single", 1)[0])
    yield told("| LoRA, checkpoint of | resumed with | what happens |")
    yield told("| --- | --- | --- |")
    for number, (before, after) in enumerate(RESUMES):
        run, status, said = train(folder, "LoRA", *before, steps=STEPS // 2, name=f"resumed{number}")
        assert status == 0, said
        # With other processes each has another share of the batch, which has to be allowed.
        flags = ("--resume", "--allow-changed")
        run, status, said = train(folder, "LoRA", *after, *flags, name=f"resumed{number}")
        error = next((line for line in said.splitlines() if "Error" in line), said).replace(f"{folder}/", "")
        how = f"losses {difference(losses(run), expected)}" if status == 0 else f"status {status}: `{error}`"
        yield told(f"| {before[0]}, {before[1]} | {after[0]}, {after[1]} | {how} |")


def train(
    folder: Path, shape: str, strategy: str, processes: int, *flags: str, steps: int = STEPS, name: str | None = None
) -> tuple[Path, int, str]:
    """Train, or go on; return the run folder, the status and standard error."""
    run = folder / (name or f"{shape}-{strategy}-{processes}".replace(" ", ""))
    uneven = "uneven" in shape
    data = write_small_talk(folder / f"{uneven}.jsonl", 21 if uneven else 96)
    sections = {**SHAPES[shape], "distributed": {"strategy": strategy, "processes": processes}}
    training = {
        "max_steps": steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH // processes,
        "save_strategy": "steps", "save_steps": STEPS // 2, "learning_rate": 1e-3,
    }  # fmt: skip
    recipe = write_training_recipe(
        run.with_suffix(".yaml"), small_model(), data, None, run, training=training, **sections
    )
    done = peftchat_in_processes(processes, "train", recipe, *flags)
    if done.returncode and not flags:
        raise SystemExit(done.stderr)
    return run, done.returncode, done.stderr


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(run / "metrics.jsonl")]


def difference(found: list[float], expected: list[float]) -> str:
    if found == expected:
        return "equal"
    worst = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
    return f"equal to {worst:.0e}"


def told(line: str) -> str:
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
