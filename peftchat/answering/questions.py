"""Questions of a file: one prompt, a list of messages, or several turns that are asked one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.answering.records import QuestionId, check_unique, id_of, messages_of, read_records, text_of, texts_of
from peftchat.conversation import Message
from peftchat.errors import UserError

_PROMPTS = ("prompt", "question", "instruction")


@dataclass(frozen=True, slots=True)
class Question:
    """One entry of a question file.

    Attributes:
        id: its own, or its number in the file from 1.
        turns: what the user says, turn by turn; each is asked when the one before is answered.
        before: messages before the first turn: a system message, earlier rounds.
        category: such as `coding`; "" where the file names none.
        references: answers that the file holds, one per turn; a judge may see them.
    """

    id: QuestionId
    turns: tuple[str, ...]
    before: tuple[Message, ...] = ()
    category: str = ""
    references: tuple[str, ...] = ()

    def with_system(self, system: str | None) -> "Question":
        """Return the question with a system message, unless it has one of its own."""
        if system is None or (self.before and self.before[0].role == "system"):
            return self
        before = (Message("system", system), *self.before)
        return Question(self.id, self.turns, before, self.category, self.references)


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a file.

    A record has `turns` (the files of Vicuna and MT-bench), `messages`, or one of `prompt`, `question` and
    `instruction`. An assistant's message at the end is the reference.

    Raises:
        UserError: a record has none of them, two have one id, or the file cannot be read.
    """
    found: list[Question] = []
    ids: dict[QuestionId, str] = {}
    for number, record in enumerate(read_records(path, "questions"), start=1):
        question = parse_question(record.value, record.where, number)
        check_unique(ids, question.id, record.where)
        ids[question.id] = ids[str(question.id)] = record.where
        found.append(question)
    return found


def parse_question(value: Mapping[str, Any], where: str, number: int) -> Question:
    """Return the question that a record holds.

    Args:
        value: its fields.
        where: `file:line`.
        number: the id of a record without one.

    Raises:
        UserError: it holds none.
    """
    question_id = id_of(value, where, number)
    category = value.get("category")
    category = category if isinstance(category, str) else ""
    if value.get("turns") is not None:
        turns = texts_of(value["turns"], "turns", where)
        before = _system(value, where)
        return Question(question_id, turns, before, category, _references(value, len(turns)))
    field = next((name for name in ("messages", *_PROMPTS) if value.get(name) is not None), None)
    if field is None:
        there = ", ".join(f"`{name}`" for name in list(value)[:8]) or "no field"
        what = f"the record has {there}, and no question"
        hint = "Give each record `prompt`, `messages`, or `question_id` and `turns`."
        raise UserError(what, where=where, hint=hint)
    if field == "messages" or isinstance(value[field], list):
        messages = messages_of(value[field], field, where)
        references: tuple[str, ...] = ()
        if messages[-1].role == "assistant":
            references, messages = (messages[-1].content,), messages[:-1]
        return Question(question_id, (messages[-1].content,), messages[:-1], category, references)
    text = text_of(value[field], field, where)
    more = value.get("input")
    if field == "instruction" and isinstance(more, str) and more.strip():
        text = f"{text}\n\n{more}"
    return Question(question_id, (text,), _system(value, where), category, _references(value, 1))


def _system(value: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    system = value.get("system")
    return () if system is None else (Message("system", text_of(system, "system", where)),)


def _references(value: Mapping[str, Any], turns: int) -> tuple[str, ...]:
    """Return the reference of each turn; () where there is none or it is not text."""
    found = value.get("reference")
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or len(texts) != turns or not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(texts)
