"""Read every configuration in folders of Axolotl, LLaMA-Factory, TRL and torchtune, and write docs/import.md's table.

    python scripts/survey_imports.py axolotl/examples LLaMA-Factory/examples trl/examples torchtune/recipes/configs
    python scripts/survey_imports.py --train MODEL --data CONVERSATIONS FILE…

The folders are clones of those projects; nothing of them is copied. With `--train`, each FILE is imported and trained
for a few steps on a small model and small data, which take the place of those that the file names.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click

from peftchat.errors import UserError
from peftchat.importing.draft import STATUSES
from peftchat.importing.importing import Imported, import_file
from peftchat.importing.writing import recipe_text
from peftchat.recipe import load_recipe

_SUFFIXES = (".yaml", ".yml", ".json", ".sh")
_STEPS = 3


@dataclass
class Survey:
    """What was found in the files of one folder."""

    files: int = 0
    other: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)


def survey(folder: Path, scratch: Path) -> Survey:
    """Import every file below a folder, and load each recipe that comes of it."""
    found = Survey()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES):
        found.files += 1
        try:
            imported = import_file(path)
        except UserError as error:
            found.other[error.message.partition(":")[0].partition(";")[0]] += 1
            continue
        found.outcomes["whole" if not imported.refused else "none" if imported.blocking else "partial"] += 1
        for line in imported.lines:
            found.lines[line.status] += 1
            if line.status == "refused":
                found.reasons[f"{line.source.keys[0]}: {line.why}"] += 1
            if "that is known here" in line.why:
                found.unknown[line.source.key] += 1
        _load(imported, scratch)
    return found


def _load(imported: Imported, scratch: Path) -> None:
    target = scratch / "recipe.yaml"
    target.write_text(recipe_text(imported, target), encoding="utf-8")
    load_recipe(target, to_train=False)


def train(path: Path, model: str, data: str, scratch: Path) -> tuple[int, str]:
    """Import a file and train a few steps; return the status and what was said at the end."""
    imported = import_file(path)
    target = scratch / f"{path.stem}.yaml"
    target.write_text(recipe_text(imported, target), encoding="utf-8")
    values = {
        "model.name": model,
        "model.dtype": "float32",
        "model.attention": "auto",
        "data.train": f"[{{path: {data}}}]",
        "data.eval": "null",
        "data.max_length": "256",
        "data.max_train_samples": "64",
        "chat.template": "chatml",
        "chat.template_kwargs": "{}",
        "distributed.strategy": "auto",
        "distributed.offload": "none",
        "training.max_steps": str(_STEPS),
        "training.lr_scheduler_type": "linear",
        "training.warmup_steps": "0",
        "training.per_device_train_batch_size": "2",
        "training.gradient_accumulation_steps": "1",
        "training.optim": "adamw_torch",
        "training.torch_compile": "false",
        "training.report_to": "none",
        "output_dir": str(scratch / f"run-{path.stem}"),
    }
    flags = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "peftchat", "train", str(target), *flags], capture_output=True, text=True, check=False
    )
    summary = scratch / f"run-{path.stem}" / "run.json"
    if done.returncode or not summary.exists():
        return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    told = json.loads(summary.read_text(encoding="utf-8"))
    return 0, f"{told.get('steps', _STEPS)} steps, method {imported.values['method']}"


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--train", "model", metavar="MODEL", help="Train each file for a few steps on this model.")
@click.option("--data", metavar="CONVERSATIONS", help="The data of `--train`.")
def main(paths: tuple[Path, ...], model: str | None, data: str | None) -> None:
    """Survey folders, or train files."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if model is not None:
            for number, path in enumerate(paths):
                (scratch / str(number)).mkdir()
                status, said = train(path, model, str(data), scratch / str(number))
                click.echo(f"{'trained' if status == 0 else f'status {status}'}  {path}: {said}")
            return
        click.echo("| folder | files | whole recipe | recipe without lines | no recipe | trains nothing | " + _heads())
        click.echo("|---|" + "---:|" * (5 + len(STATUSES)))
        for path in paths:
            found = survey(path, scratch)
            counts = [found.files, *(found.outcomes[kind] for kind in ("whole", "partial", "none"))]
            counts += [found.other.total(), *(found.lines[status] for status in STATUSES)]
            click.echo(f"| `{path.name}` | " + " | ".join(f"{count:,}" for count in counts) + " |")
            for title, counted in (("refused", found.reasons), ("unknown", found.unknown), ("other", found.other)):
                for what, count in counted.most_common(15):
                    click.echo(f"    {title} {count}: {what}", err=True)


def _heads() -> str:
    return " | ".join(f"lines {status}" for status in STATUSES) + " |"


if __name__ == "__main__":
    main()
