"""Tasks that are named one by one, by the harness's name or by the file of one's own task."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peftchat.errors import UserError
from peftchat.evaluating.task_catalog import ChosenTask, TaskSpec, load_tasks, parse_tasks, require_harness

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class NamedTasks:
    """Tasks that were asked for.

    Attributes:
        specs: their names and shots.
        files: task -> its file, for those that are named by a file.
    """

    specs: Sequence[TaskSpec]
    files: dict[str, Path]


def parse_named_tasks(texts: Iterable[str]) -> NamedTasks:
    """Read `NAME[@SHOTS]` and `FILE.yaml[@SHOTS]`, separated by commas.

    Raises:
        UserError: a name has another form or is there twice, a file cannot be read, or the harness is missing.
    """
    parts: list[str] = []
    files: dict[str, Path] = {}
    for part in filter(None, (part.strip() for text in texts for part in text.split(","))):
        match = re.fullmatch(r"(?P<file>.+?)(?P<shots>@\d+)?", part)
        assert match is not None
        if not match["file"].endswith(_SUFFIXES):
            parts.append(part)
            continue
        require_harness()
        file = Path(match["file"])
        name = _task_name(file)
        files[name] = file.absolute()
        parts.append(name + (match["shots"] or ""))
    # Blanks in the name of a file's task are none in ours.
    return NamedTasks(parse_tasks(",".join(parts)), files)


def load_named_tasks(named: NamedTasks) -> list[ChosenTask]:
    """Load tasks with their data.

    Raises:
        UserError: a task is unknown, its data is not here, or it cannot be evaluated as asked.
    """
    with _folders_of(named.files) as folders:
        return load_tasks(named.specs, folders)


@contextmanager
def _folders_of(files: dict[str, Path]) -> Iterator[list[Path]]:
    """Yield folders that hold these task files alone: the harness reads whole folders, with whatever else is there."""
    if not files:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="peftchat-tasks-") as folder:
        for number, (name, file) in enumerate(files.items()):
            kind = "group" if "group" in _read(file) else "task"
            text = f"include: {json.dumps(str(file))}\n{kind}: {json.dumps(name)}\n"
            (Path(folder) / f"{number}.yaml").write_text(text, encoding="utf-8")
        yield [Path(folder)]


def _task_name(file: Path) -> str:
    found = _read(file)
    name = found.get("task") if isinstance(found.get("task"), str) else found.get("group")
    if not isinstance(name, str) or not name:
        raise UserError(
            "the file names no task: it has no `task:` with a name",
            where=f"--tasks {file}",
            hint="See docs/evaluate.md.",
        )
    return name


def _read(file: Path) -> dict[str, object]:
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    where = f"--tasks {file}"
    if not file.is_file():
        raise UserError("there is no such file", where=where, hint="Name a task file (YAML), or a task of the harness.")
    try:
        return load_yaml(file, resolve_func=False, recursive=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"the task file cannot be read: {what}", where=where) from error
