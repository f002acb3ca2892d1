"""Pairs of answers to judge: two answer files with the same questions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.errors import UserError, first_line

_QUESTIONS_NAMED = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """A question with two answers.

    Attributes:
        id: the question's, as text.
        category: the question's, or an empty text.
        question: what was asked; turns after the first follow their answers.
        answer_a: of the first file.
        answer_b: of the second file.
    """

    id: str
    category: str
    question: str
    answer_a: str
    answer_b: str


def read_pairs(first: Path, second: Path, questions: Path | None = None) -> list[Pair]:
    """Read two answer files of `peftchat generate` or of FastChat; questions of several turns are one text.

    Args:
        first: answers A.
        second: answers B.
        questions: the file of questions, for answer files that do not have them.

    Raises:
        UserError: a file cannot be read, or the files answer other questions.
    """
    if first.exists() and second.exists() and first.samefile(second):
        hint = "Name the answers of two models."
        raise UserError("both files of answers are the same one", where=str(second), hint=hint)
    one, other = _read_answers(first), _read_answers(second)
    missing = sorted(set(one) ^ set(other))
    if missing:
        where = second if missing[0] in one else first
        count = len(missing)
        what = f"{count} question{'s have' if count > 1 else ' has'} one answer only: "
        what += ", ".join(missing[:_QUESTIONS_NAMED]) + (", …" if count > _QUESTIONS_NAMED else "")
        raise UserError(what, where=str(where), hint="Answer the same questions with both models.")
    asked = {} if questions is None else {key: record for key, (record, _) in _records(questions).items()}
    pairs = []
    for key, (record, place) in one.items():
        turns = _turns(asked.get(key, record), record, place)
        theirs = other[key][0]
        if questions is None and "turns" in theirs and list(theirs["turns"]) != turns:
            what = f"question {key} is another one than in {first}"
            raise UserError(what, where=other[key][1], hint="Answer the same questions with both models.")
        answers_a, answers_b = _answers(record, place), _answers(theirs, other[key][1])
        if not turns:
            raise UserError(f"question {key} has no turn", where=place, hint="Remove it from both files.")
        if not len(turns) == len(answers_a) == len(answers_b):
            what = f"question {key} has {len(turns)} turns and {len(answers_a)} and {len(answers_b)} answers"
            raise UserError(what, where=place, hint="Answer every turn with both models.")
        pairs.append(Pair(key, str(record.get("category") or ""), *_dialogue(turns, answers_a, answers_b)))
    return pairs


def read_exam(path: Path) -> list[Pair]:
    """Read objective pairs, one JSON object per line: `prompt`, `good`, `bad`; the good answer is A.

    Raises:
        UserError: a line has another form, or the id of another line, which is its number where it names none.
    """
    pairs: dict[str, Pair] = {}
    for number, record in _lines(path):
        fields = [record.get(name) for name in ("prompt", "good", "bad")] if isinstance(record, dict) else [None]
        if not all(isinstance(value, str) and value for value in fields):
            hint = 'Write {"prompt": "…", "good": "…", "bad": "…"}, texts that are not empty.'
            raise UserError("the line is no objective pair", where=f"{path}:{number}", hint=hint)
        if fields[1] == fields[2]:
            hint = "Give the better answer as `good`, and another one as `bad`."
            raise UserError("both answers of the pair are the same", where=f"{path}:{number}", hint=hint)
        pair = Pair(str(record.get("id", number)), "exam", *map(str, fields))
        if pair.id in pairs:
            hint = "Give each pair an id of its own, or leave all ids out."
            raise UserError(f"the id {pair.id} is there twice", where=f"{path}:{number}", hint=hint)
        pairs[pair.id] = pair
    if not pairs:
        raise UserError("the file has no pairs", where=str(path))
    return list(pairs.values())


def _dialogue(turns: Sequence[str], first: Sequence[str], second: Sequence[str]) -> tuple[str, str, str]:
    if len(turns) == 1:
        return turns[0], first[0], second[0]
    question = "\n\n".join(f"Turn {number}: {turn}" for number, turn in enumerate(turns, 1))
    answers = ["\n\n".join(f"Turn {at}: {text}" for at, text in enumerate(texts, 1)) for texts in (first, second)]
    return question, answers[0], answers[1]


def _lines(path: Path) -> list[tuple[int, Any]]:
    """Return the values of a file with the numbers of their lines; blank lines are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the file cannot be read: {first_line(error)}", where=str(path)) from error
    found = []
    # Not `splitlines`: JSON lines may hold U+2028 and other line ends of Unicode as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except ValueError as error:
                raise UserError(f"the line is no JSON: {first_line(error)}", where=f"{path}:{number}") from error
    return found


def _records(path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for number, record in _lines(path):
        where = f"{path}:{number}"
        if not isinstance(record, dict) or "question_id" not in record:
            raise UserError("the line has no `question_id`", where=where, hint="See docs/evaluate.md for the form.")
        key = str(record["question_id"])
        if key in found:
            raise UserError(f"question {key} is there twice", where=where, hint="Keep one of them.")
        found[key] = (record, where)
    return found


def _read_answers(path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    found = _records(path)
    if not found:
        raise UserError("the file has no answers", where=str(path), hint="Write them with `peftchat generate`.")
    return found


def _turns(asked: dict[str, Any], record: dict[str, Any], where: str) -> list[str]:
    turns = asked.get("turns") or ([asked["text"]] if asked is not record and "text" in asked else None)
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        hint = "Name the file of questions with `--questions`."
        raise UserError("the answer comes without its question", where=where, hint=hint)
    return turns


def _answers(record: dict[str, Any], where: str) -> list[str]:
    """Return the answers to all turns: `choices[0].turns`, or Vicuna's `text`."""
    try:
        texts = [record["text"]] if "choices" not in record else record["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError("the line holds no answer", where=where, hint="See docs/evaluate.md for the form.") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError("the answers are no texts", where=where)
    return texts
