"""Questions of a file: one prompt, a list of messages, or several turns that are asked one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.answering.records import QuestionId, check_unique, id_of, messages_of, read_records, text_of, texts_of
from peftchat.conversation import Message
from peftchat.conversations.formats.names import CONTEXT, HISTORY, SYSTEM, TOOLS
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
    `instruction`, with the text that it is about in `input` or `context`, and a system message under the names that
    data files have. An assistant's message at the end is the reference.

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
    _check_beside(value, where)
    if value.get("turns") is not None:
        turns = texts_of(value["turns"], "turns", where)
        _check_one_question(value, "turns", turns, where)
        before = _with_system((), value, where)
        return Question(question_id, turns, before, category, _references(value, len(turns)))
    field = next((name for name in ("messages", *_PROMPTS) if value.get(name) is not None), None)
    if field is None:
        there = ", ".join(f"`{name}`" for name in list(value)[:8]) or "no field"
        what = f"the record has {there}, and no question"
        hint = "Give each record `prompt`, `messages`, or `question_id` and `turns`."
        raise UserError(what, where=where, hint=hint)
    if field == "messages" or isinstance(value[field], list):
        messages = messages_of(value[field], field, where)
        _check_one_question(value, field, [message.content for message in messages], where)
        references: tuple[str, ...] = ()
        if messages[-1].role == "assistant":
            references, messages = (messages[-1].content,), messages[:-1]
        before = _with_system(messages[:-1], value, where)
        return Question(question_id, (messages[-1].content,), before, category, references)
    text = text_of(value[field], field, where)
    _check_one_question(value, field, [text], where)
    about = [value[name] for name in CONTEXT if isinstance(value.get(name), str) and value[name].strip()]
    text = "\n\n".join([text, *about])
    return Question(question_id, (text,), _with_system((), value, where), category, _references(value, 1))


def _check_one_question(value: Mapping[str, Any], field: str, said: Sequence[str], where: str) -> None:
    """Check that no other field asks something else, which nobody would be asked.

    Args:
        value: the record.
        field: the field that is read.
        said: the texts in it.
        where: `file:line`.

    Raises:
        UserError: one does.
    """
    for name in _PROMPTS:
        other = value.get(name)
        if name != field and isinstance(other, str) and other.strip() and other not in said:
            hint = "Remove the one that is not meant, or give each a record of its own."
            raise UserError(f"`{field}` and `{name}` ask different things", where=where, hint=hint)


def _check_beside(value: Mapping[str, Any], where: str) -> None:
    """Check that nothing stands beside the question that the model would have to see and does not.

    Raises:
        UserError: something does.
    """
    if value.get(HISTORY):
        hint = "Write the earlier rounds and the question as `messages`."
        raise UserError(f"`{HISTORY}` is not read from questions", where=where, hint=hint)
    for name in TOOLS:
        if value.get(name):
            hint = "Remove the record: only text is asked and answered here."
            raise UserError(f"`{name}` defines tools", where=where, hint=hint)


def _with_system(before: tuple[Message, ...], value: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """Return the messages before a question with the system message that stands beside them.

    Raises:
        UserError: it is not text, or the messages have another one.
    """
    for name in SYSTEM:
        system = value.get(name)
        if system is None or system == "":
            continue
        content = text_of(system, name, where)
        if not before or before[0].role != "system":
            before = (Message("system", content), *before)
        elif before[0].content != content:
            raise UserError(f"`{name}` and another system message differ", where=where, hint="Keep one of them.")
    return before


def _references(value: Mapping[str, Any], turns: int) -> tuple[str, ...]:
    """Return the reference of each turn; () where there is none or it is not text."""
    found = value.get("reference")
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or len(texts) != turns or not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(texts)
