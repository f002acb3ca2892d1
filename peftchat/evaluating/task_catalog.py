"""The tasks of an evaluation: by the harness's names or from files of one's own, loaded with their data.

Every mistake is found here, before a model is loaded.
"""

import difflib
import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError, first_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

DEFAULT_TASKS = "arc_challenge,hellaswag,mmlu,truthfulqa_mc1,truthfulqa_mc2"

LEADERBOARD_SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0}
"""Shots of the Open LLM Leaderboard of 2023, for the tasks that name none themselves."""

_CLUSTERS = {
    "boolq": "passage", "drop": "passage", "hellaswag": "source_id", "multirc": "paragraph", "record": "passage",
    "squadv2": "context",
}  # fmt: skip
"""Tasks with several questions about one text: the field of a question that holds or names the text."""

_SPEC = re.compile(r"(?P<name>[^@\s]+)(@(?P<shots>\d+))?")


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task that the user asked for.

    Attributes:
        name: the name of a task, a group or a tag.
        shots: examples before each question; None for the task's own number.
    """

    name: str
    shots: int | None = None


@dataclass(frozen=True)
class ChosenTask:
    """What a name stands for, loaded.

    Attributes:
        name: the task, group or tag that was asked for.
        tasks: the harness's task objects by name.
        groups: its groups by name; empty for a task or a tag.
        clusters: task -> the field by which its questions are related; only for tasks that have one.
    """

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any] = field(default_factory=dict)
    clusters: Mapping[str, str] = field(default_factory=dict)


def parse_tasks(text: str) -> list[TaskSpec]:
    """Read `NAME[@SHOTS],…`.

    Raises:
        UserError: it is empty, has another form, or names a task twice.
    """
    specs: list[TaskSpec] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _SPEC.fullmatch(part)
        if match is None:
            raise UserError(
                f"{part!r} is not the name of a task",
                where="--tasks",
                hint="Write names, with their shots if you wish: `--tasks arc_challenge@25,hellaswag`.",
            )
        shots = match["shots"]
        specs.append(TaskSpec(match["name"], int(shots) if shots is not None else None))
        if any(spec.name == match["name"] for spec in specs[:-1]):
            raise UserError(f"{match['name']} is named twice", where="--tasks", hint="Name each task once.")
    if not specs:
        raise UserError("no task is named", where="--tasks", hint="Leave the option out for the four default tasks.")
    return specs


def require_harness() -> None:
    """Check that the harness is installed, and restrict what it prints.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "tasks are evaluated by EleutherAI's harness, which is not installed",
            hint="Install it: `pip install 'peftchat[evaluate]'`. The loss on conversations needs none "
            "(`peftchat evaluate MODEL --data FILE`).",
        )
    # Its bars would interrupt ours; tqdm reads the variable when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_tasks(
    specs: Sequence[TaskSpec], include: Sequence[Path] = (), *, cluster: str | None = None
) -> list[ChosenTask]:
    """Load tasks with their data.

    Args:
        specs: the tasks that were asked for.
        include: folders with task files (YAML) of one's own; they come before tasks of the harness of the same name.
        cluster: the field of every question by which questions are related; None for what the tasks say.

    Raises:
        UserError: a task is unknown, its data is not here, or it cannot be evaluated as asked.
    """
    require_harness()
    _check_folders(include)
    manager = _manager(specs, include)
    chosen = [_load(manager, spec, include, cluster) for spec in specs]
    owners: dict[str, str] = {}
    for one in chosen:
        for name in one.tasks:
            if name in owners:
                what = f"{name} is a part of both {owners[name]} and {one.name}"
                raise UserError(what, where="--tasks", hint="Name one of them.")
            owners[name] = one.name
    return chosen


def _check_folders(folders: Iterable[Path]) -> None:
    """Check that the task files can be read: the harness passes over those that cannot."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    for folder in folders:
        where = f"--include {folder}"
        if not folder.is_dir():
            raise UserError("there is no such folder", where=where, hint="Name the folder with the task files.")
        files = sorted(folder.glob("**/*.yaml"))
        if not files:
            raise UserError("the folder has no task files (*.yaml)", where=where, hint="See docs/evaluate.md for one.")
        for file in files:
            try:
                found = load_yaml(file, resolve_func=False, recursive=True)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
                what = " ".join(str(error).split())
                raise UserError(f"the task file cannot be read: {what}", where=str(file)) from error
            if not isinstance(found, dict):
                raise UserError("the task file holds no YAML mapping", where=str(file))


def _manager(specs: Sequence[TaskSpec], include: Sequence[Path]) -> "TaskManager":
    """Return the harness's manager of tasks; its own 14,000 tasks are read only if they are needed."""
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in include]
    if folders:
        manager = TaskManager(include_path=folders, include_defaults=False)
        if all(spec.name in manager.task_index for spec in specs):
            return manager
    manager = TaskManager(include_path=folders or None)
    for spec in specs:
        if spec.name not in manager.task_index:
            raise unknown_task(spec.name, manager.all_tasks)
    return manager


def unknown_task(name: str, known: Iterable[str]) -> UserError:
    """Return the error of a name that no task has, with the nearest names."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"The nearest are {', '.join(near)}." if near else "`lm_eval ls tasks` lists all."
    return UserError(f"there is no task {name!r}", where="--tasks", hint=hint)


def _load(manager: "TaskManager", spec: TaskSpec, include: Sequence[Path], cluster: str | None) -> ChosenTask:
    where = f"task {spec.name}"
    if (manager.task_index[spec.name].cfg or {}).get("unsafe_code"):
        raise _runs_code(where)
    try:
        found = manager.load([spec.name])
    except (ConnectionError, FileNotFoundError) as error:
        raise _missing_data(where, error, include) from error
    except Exception as error:  # Task files may hold functions, which may raise anything.
        if _is_missing_data(error):
            raise _missing_data(where, error, include) from error
        what = f"the task cannot be loaded: {_reason(error)}"
        raise UserError(what, where=where, hint="Check its task file and its data.") from error
    clusters = {}
    for name, task in found["tasks"].items():
        _check_task(name, task)
        if (entry := manager.task_index.get(name)) is not None and _is_own(entry, include):
            _check_questions(name, task)
        _set_shots(name, task, spec)
        field_name = _cluster(name, task, cluster)
        if field_name is not None:
            clusters[name] = field_name
    return ChosenTask(spec.name, found["tasks"], found.get("groups") or {}, clusters)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if isinstance(error, KeyError) else first_line(error)


def _is_missing_data(error: Exception) -> bool:
    from datasets.exceptions import DatasetNotFoundError

    return isinstance(error, DatasetNotFoundError) or "offline" in str(error).lower()


def _missing_data(where: str, error: Exception, include: Sequence[Path]) -> UserError:
    if isinstance(error, FileNotFoundError) and include:
        hint = "Names in `data_files` are relative to the working folder."
        return UserError(f"the task's data is not there: {first_line(error)}", where=where, hint=hint)
    return UserError(
        f"the task's data is not on this disk, and the hub was not reached: {first_line(error)}",
        where=where,
        hint="Download it once with a network, or evaluate a task file of your own (`--include`, docs/evaluate.md).",
    )


def _runs_code(where: str) -> UserError:
    what = "the harness would run the model's code in this process, without a sandbox"
    return UserError(what, where=where, hint="Evaluate programs with `--code FILE --run-code`.")


def _check_task(name: str, task: Any) -> None:
    where = f"task {name}"
    if getattr(task, "UNSAFE_CODE", False):
        raise _runs_code(where)
    if getattr(task, "MULTIMODAL", False):
        raise UserError("the task has images or sound, and only texts are evaluated", where=where)
    try:
        empty = len(task.eval_docs) == 0
    except Exception as error:  # `process_docs` may raise anything.
        raise UserError(f"the task's questions cannot be read: {_reason(error)}", where=where) from error
    if empty:
        raise UserError("the task has no questions", where=where)


def _is_own(entry: Any, include: Sequence[Path]) -> bool:
    file = entry.yaml_path
    return file is not None and any(Path(file).resolve().is_relative_to(folder.resolve()) for folder in include)


def _check_questions(name: str, task: Any) -> None:
    """Check every question of a task file: the harness counts a wrong target as an answer that no model finds."""
    where = f"task {name}"
    for number, question in enumerate(task.eval_docs, start=1):
        try:
            task.doc_to_text(question)
            target = task.doc_to_target(question)
            choices = task.doc_to_choice(question) if task.OUTPUT_TYPE == "multiple_choice" else None
        except Exception as error:  # The task file's own templates and functions.
            what = f"question {number} does not fit the task file: {_reason(error)}"
            raise UserError(what, where=where, hint=f"Its fields are {', '.join(map(str, question))}.") from error
        is_place = isinstance(target, int) and not isinstance(target, bool)
        if choices is not None and is_place and not 0 <= target < len(choices):
            what = f"question {number} has {len(choices)} choices, and its right one is number {target}, from 0 on"
            raise UserError(what, where=where, hint="Mend the question, or `doc_to_target`.")
        if choices is not None and isinstance(target, str) and target not in choices:
            what = f"question {number} has no choice {target!r}, which is its right one"
            raise UserError(what, where=where, hint="Mend the question, or `doc_to_target`.")


def _set_shots(name: str, task: Any, spec: TaskSpec) -> None:
    """Set the number of shots: what was asked for, the task's own, that of the leaderboard, or none."""
    own = task.get_config("num_fewshot")
    if spec.shots is not None and own == 0 and spec.shots > 0:
        raise UserError(
            f"the task has no examples to show: its file sets num_fewshot to 0, and {spec.shots} shots are asked for",
            where=f"task {name}",
            hint="Leave the shots out.",
        )
    default = LEADERBOARD_SHOTS.get(spec.name, 0) if own is None else own
    shots = default if spec.shots is None else spec.shots
    task.set_config(key="num_fewshot", value=shots)
    if not shots:
        return
    try:
        examples = task.fewshot_docs()
        available = len(examples) if examples is not None else 0
    except Exception as error:  # `process_docs` may raise anything.
        raise UserError(f"the task's examples cannot be read: {_reason(error)}", where=f"task {name}") from error
    if available <= shots:
        raise UserError(
            f"{shots} shots are asked for, and the task has {available} examples to draw them from",
            where=f"task {name}",
            hint=f"Ask for fewer: `--tasks {spec.name}@{max(0, available - 1)}`.",
        )


def _cluster(name: str, task: Any, asked: str | None) -> str | None:
    """Return the field by which questions are related; None for independent questions."""
    metadata = task.get_config("metadata")
    own = metadata.get("cluster") if isinstance(metadata, dict) else None
    chosen = asked or own or _CLUSTERS.get(name)
    if chosen is None:
        return None
    question = task.eval_docs[0]
    if chosen in question:
        return str(chosen)
    if asked is None and own is None:
        return None
    raise UserError(
        f"the questions have no field {chosen!r}",
        where="--cluster" if asked else f"task {name}: metadata.cluster",
        hint=f"Their fields are {', '.join(map(str, question))}.",
    )
