"""Train one recipe in 1, 2, 4 and 8 processes, and go on with a checkpoint in another number of them.

    python scripts/bench_width.py [--processes 2,4,8] [--only TEXT] [--json FILE] [--write]

All runs have the same batch in an optimizer step. The first table compares the losses of all steps with those of one
process; the second resumes a run of some processes with others. `--write` puts both into docs/faults.md. The processes
are forks of one that has imported everything, so that eight of them start on two cores.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from page_tables import write_table

from peftchat.files import write_text
from tests.support.data import read_json_lines, write_small_talk
from tests.support.launch import peftchat_in_processes
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "faults.md"

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

Layout = tuple[str, int]
STRATEGIES = ("ddp", "zero2", "zero3")

RESUMES: tuple[tuple[Layout, Layout], ...] = (
    (("ddp", 2), ("ddp", 4)),
    (("ddp", 4), ("single", 1)),
    (("single", 1), ("ddp", 4)),
    (("zero2", 2), ("zero2", 4)),
    (("zero3", 4), ("zero3", 2)),
    (("zero3", 2), ("single", 1)),
    (("ddp", 2), ("zero3", 2)),
)


@dataclass
class Cells:
    """The cells of both tables, kept in a file as they come.

    Attributes:
        file: None keeps them in memory alone.
        known: text of each cell by its name.
    """

    file: Path | None
    known: dict[str, str]

    @classmethod
    def read(cls, file: Path | None) -> "Cells":
        return cls(file, json.loads(file.read_text()) if file and file.is_file() else {})

    def keep(self, name: str, text: str) -> None:
        self.known[name] = text
        print(f"{name}: {text}", flush=True)
        if self.file:
            write_text(self.file, json.dumps(self.known, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4,8")
    parser.add_argument("--only", default="", help="cells that contain this text")
    parser.add_argument("--json", type=Path, help="keep the cells here as they come, and go on with them")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/faults.md")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PEFTCHAT_TEST_IMPORTS", "deepspeed")
    counts = [int(one) for one in chosen.processes.split(",")]
    cells = Cells.read(chosen.json)
    with tempfile.TemporaryDirectory(prefix="peftchat-width-") as name:
        os.environ["PEFTCHAT_CACHE"] = f"{name}/cache"
        folder = Path(name)
        expected = cache(lambda shape: losses(train(folder, shape, "single", 1)[0]))
        for strategy, count, shape in ((a, b, c) for b in counts for a in STRATEGIES for c in SHAPES):
            cell = width_cell(shape, strategy, count)
            if chosen.only in cell and cell not in cells.known:
                found = losses(train(folder, shape, strategy, count)[0])
                cells.keep(cell, difference(found, expected(shape)))
        for number, (before, after) in enumerate(RESUMES):
            cell = resume_cell(before, after)
            if chosen.only in cell and cell not in cells.known:
                cells.keep(cell, resume(folder, number, before, after, expected("LoRA")))
    if chosen.write:
        text = "\n".join([*widths(cells.known, counts), "", *resumes(cells.known)])
        write_table(PAGE, "bench_width", f"\n\n{text}\n\n")


def width_cell(shape: str, strategy: str, count: int) -> str:
    return f"{shape}, {strategy}, {count}"


def resume_cell(before: Layout, after: Layout) -> str:
    return f"resume, {before[0]}, {before[1]} with {after[0]}, {after[1]}"


def widths(known: Mapping[str, str], counts: list[int]) -> Iterable[str]:
    """Yield the lines of the first table."""
    yield f"| run | {' | '.join(f'{count} processes' for count in counts)} |"
    yield "| --- |" + " --- |" * len(counts)
    for shape in SHAPES:
        for strategy in STRATEGIES:
            found = [known.get(width_cell(shape, strategy, count), "not run") for count in counts]
            yield f"| {shape}, {strategy} | {' | '.join(found)} |"


def resumes(known: Mapping[str, str]) -> Iterable[str]:
    """Yield the lines of the second table."""
    yield "| LoRA, checkpoint of | resumed with | what happens |"
    yield "| --- | --- | --- |"
    for before, after in RESUMES:
        found = known.get(resume_cell(before, after), "not run")
        yield f"| {before[0]}, {before[1]} | {after[0]}, {after[1]} | {found} |"


def resume(folder: Path, number: int, before: Layout, after: Layout, expected: list[float]) -> str:
    """Train half the steps with one layout and the rest with another; return what happened."""
    run, status, said = train(folder, "LoRA", *before, steps=STEPS // 2, name=f"resumed{number}")
    assert status == 0, said
    flags = ("--resume", "--allow-changed")
    run, status, said = train(folder, "LoRA", *after, *flags, name=f"resumed{number}")
    error = next((line for line in said.splitlines() if "Error" in line), said).replace(f"{folder}/", "")
    if status:
        return f"status {status}: `{error}`"
    fresh = "; the optimizer starts from zero" if "optimizer starts from zero" in said else ""
    return f"losses {difference(losses(run), expected)}{fresh}"


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
    done = peftchat_in_processes(processes, "train", recipe, *flags, timeout=900)
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


if __name__ == "__main__":
    main()
