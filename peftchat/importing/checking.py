"""The keys of a draft checked as a recipe: what cannot stand there goes back to its line with the reason."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftchat.importing.draft import Assumed, Draft, ImportedLine
from peftchat.recipe.document import Document, Keys, SourceLocation, dotted
from peftchat.recipe.error_messages import Problem, schema_problems
from peftchat.recipe.schema import Recipe
from peftchat.recipe.validation import find_conflicts, invalid_combinations

_ROUNDS = 100
"""Each round takes at least one key away, and a recipe has about as many."""


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Return keys as text as the mappings and lists of a recipe.

    Sources of data that have lost their place in the list, because one before them was refused, move up.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        steps = _steps(key)
        holder = result
        for step in steps[:-1]:
            holder = holder.setdefault(step, {})
        holder[steps[-1]] = value
    data = result.get("data", {})
    for kind in ("train", "eval"):
        if kind in data:
            data[kind] = [data[kind][at] for at in sorted(data[kind], key=int)]
    return result


def _steps(key: str) -> list[str]:
    """Return the steps of a key; a source's own name of a field or role may hold dots."""
    steps = key.split(".")
    if steps[0] == "data" and len(steps) > 5:
        return [*steps[:4], ".".join(steps[4:])]
    return steps


def completed(draft: Draft) -> dict[str, Any]:
    """Return the recipe with something in the place of what the user has still to give."""
    values = dict(draft.values)
    for key in draft.to_give:
        if key in PLACEHOLDERS:
            values.setdefault(key, PLACEHOLDERS[key])
    return nested(values)


PLACEHOLDERS = {"model.name": "MODEL", "data.train.0.path": "CONVERSATIONS.jsonl"}
"""What stands where the user has still to give something."""


def check_draft(draft: Draft) -> None:
    """Take away what no recipe can hold, and say so at the line that it came from."""
    for _ in range(_ROUNDS):
        values = completed(draft)
        try:
            recipe = Recipe.model_validate(values)
        except ValidationError as error:
            document = Document(values, {(): SourceLocation(str(draft.path), None, Path(draft.path))})
            problems = schema_problems(error.errors(include_url=False), document)
            if not _give_back(draft, problems[0]):
                raise
            continue
        problem = next(iter(invalid_combinations(recipe)), None)
        if problem is not None and _give_back(draft, problem):
            continue
        conflict = next((found for found in find_conflicts(recipe) if _is_written(found.keys, draft)), None)
        if conflict is None:
            return
        _drop(draft, conflict.keys, "left out", f"has no effect: {conflict.why}")


def _is_written(keys: Keys, draft: Draft) -> bool:
    key = dotted(keys)
    return any(known == key or known.startswith(f"{key}.") for known in draft.values)


def _give_back(draft: Draft, problem: Problem) -> bool:
    """Refuse the line that a problem is about; return whether there was something to take away."""
    keys = problem.keys
    while keys and not _is_written(keys, draft):
        keys = keys[:-1]
    if not keys:
        return False
    what = "peftchat has no such key" if problem.what.startswith("unknown key") else problem.what
    hint = f". {problem.hint}" if problem.hint and what == problem.what else ""
    _drop(draft, keys, "refused", f"{what}{hint}".rstrip("."))
    return True


def _drop(draft: Draft, keys: Keys, status: str, why: str) -> None:
    key = dotted(keys)
    gone = {
        id(origin): origin for known, origin in draft.origins.items() if known == key or known.startswith(f"{key}.")
    }
    draft.drop(key)
    for origin in gone.values():
        if isinstance(origin, Assumed):
            continue
        assert isinstance(origin, ImportedLine)
        if origin.becomes and status == "left out":
            continue
        origin.status = status  # type: ignore[assignment]
        origin.why = why
    if not gone and status == "refused":
        draft.ask(key, why)
