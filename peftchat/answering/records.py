"""Records of a file of questions or answers: JSON lines and the other data files, the first problem as an error."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftchat.conversation import ROLES, Message
from peftchat.conversations.problems import MAX_RECORD_BYTES, ProblemLog, RawRecord
from peftchat.conversations.readers import find_files, reader_for
from peftchat.errors import UserError

ID_FIELDS = ("question_id", "id", "prompt_id", "task_id")
"""Fields that name a question; the first that is there counts."""

QuestionId = int | str


def read_records(path: Path, kind: str) -> Iterator[RawRecord]:
    """Yield the records of one file.

    Args:
        path: a file of any kind that conversations are read from.
        kind: what the records are, in the plural: `questions`.

    Raises:
        UserError: there is no such file, a record cannot be read, or there is none.
    """
    files = find_files(str(path))
    if files is None or len(files) != 1 or path.is_dir():
        found = "there is no such file" if files is None else "expected one file, got a folder or a pattern"
        raise UserError(found, where=str(path), hint=f"Name a file with {kind}.")
    reader = reader_for(files[0])
    if reader is None:
        raise UserError("the file is of an unknown kind", where=str(path), hint="Name a .jsonl file.")
    problems = ProblemLog()
    count = 0
    for record in reader(files[0], MAX_RECORD_BYTES, problems):
        _check(problems)
        count += 1
        yield record
    _check(problems)
    if not count:
        raise UserError(f"the file holds no {kind}", where=str(path), hint="Give at least one.")


def _check(problems: ProblemLog) -> None:
    if problems.first is not None:
        raise UserError(problems.first.detail, where=problems.first.where, hint="Repair the record.")


def id_of(value: Mapping[str, Any], where: str, number: int) -> QuestionId:
    """Return the id of a record: its own, or its number in the file.

    Raises:
        UserError: its id is neither text nor an integer.
    """
    for field in ID_FIELDS:
        found = value.get(field)
        if found is None:
            continue
        if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
            what = f"`{field}` is {found!r}, expected text or an integer"
            raise UserError(what, where=where, hint="Give each question an id of its own.")
        return str(found) if isinstance(found, str) else int(found)
    return number


def text_of(value: Any, field: str, where: str) -> str:
    """Return a field that must be text with more than blanks.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, str):
        raise UserError(f"`{field}` is {_kind(value)}, expected text", where=where, hint="Write it as a JSON string.")
    if not value.strip():
        raise UserError(f"`{field}` is empty", where=where, hint="Give it text, or remove the record.")
    return value


def texts_of(value: Any, field: str, where: str) -> tuple[str, ...]:
    """Return a field that must be a list of texts.

    Raises:
        UserError: it is something else, or is empty.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _kind(value)
        raise UserError(f"`{field}` is {found}, expected a list of texts", where=where, hint='Write ["question"].')
    return tuple(text_of(item, f"{field}[{index}]", where) for index, item in enumerate(value))


def messages_of(value: Any, field: str, where: str) -> tuple[Message, ...]:
    """Return a field that must be a list of text messages: system first if at all, then user and assistant in turn.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"`{field}` is {_kind(value)}, expected a list of messages", where=where)
    messages = []
    for index, item in enumerate(value):
        place = f"{field}[{index}]"
        if not isinstance(item, dict) or item.get("role") not in ROLES:
            role = item.get("role") if isinstance(item, dict) else item
            raise UserError(f"{place} has the role {role!r}, expected one of {', '.join(ROLES)}", where=where)
        if item["role"] == "tool" or item.get("tool_calls"):
            hint = "Remove the record: only text is asked and answered here."
            raise UserError(f"{place} belongs to a call of a tool", where=where, hint=hint)
        content = item.get("content")
        if content == "" and item["role"] == "system":
            messages.append(Message("system", ""))
            continue
        messages.append(Message(item["role"], text_of(content, f"{place}.content", where)))
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(turns)) or not turns:
        what = f"the roles of `{field}` are {', '.join(roles)}, expected user and assistant in turn"
        raise UserError(
            what, where=where, hint="A system message stands first, and the user speaks before the assistant."
        )
    return tuple(messages)


def check_unique(ids: Mapping[QuestionId, str], question_id: QuestionId, where: str) -> None:
    """Check that an id is new; an integer and the text of its digits are the same id to a reader.

    Args:
        ids: the ids so far, and where each stands.

    Raises:
        UserError: it is there already.
    """
    for known in (question_id, str(question_id)):
        if known in ids:
            what = f"the id {question_id!r} is that of {ids[known]} too"
            raise UserError(what, where=where, hint="Give each question an id of its own.")


def _kind(value: Any) -> str:
    names = {type(None): "missing", bool: "a boolean", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
