"""The recipe's questions, read and checked before anything heavy is imported."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftchat.errors import UserError, first_line

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe

_KEYS = ("evaluation", "questions")


def read_questions(loaded: "LoadedRecipe") -> tuple[str, ...]:
    """Return the recipe's questions, those of a file read.

    Raises:
        UserError: the file cannot be read, or a line is no question.
    """
    given = loaded.recipe.evaluation.questions
    if given is None:
        return ()
    where = loaded.where(*_KEYS)
    questions = tuple(given) if isinstance(given, list) else _read(Path(given), where)
    blank = next((number for number, question in enumerate(questions, 1) if not question.strip()), None)
    if blank is not None:
        raise UserError(f"question {blank} is empty", where=where, hint="Give it some text, or remove it.")
    return tuple(dict.fromkeys(questions))


def _read(file: Path, where: str) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"the file of questions cannot be read: {first_line(error)}"
        raise UserError(what, where=where, hint="Name a text file with a question on each line.") from error
    found = [
        _of_json(line, f"{file}:{number}") if file.suffix == ".jsonl" else line.strip()
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise UserError("the file has no questions", where=where, hint="Write one on each line.")
    return tuple(found)


def _of_json(line: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is no JSON: {first_line(error)}", where=where) from error
    question = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(question, str):
        raise UserError("the line holds no question", where=where, hint='Write a text, or {"prompt": "…"}.')
    return question
