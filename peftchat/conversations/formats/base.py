"""What an input format is: how to recognize its records, and how to turn them into conversations."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftchat.conversation import Conversation, Message, Role
from peftchat.conversations.languages import is_in_languages
from peftchat.conversations.problems import Problem, ProblemLog, RawRecord, ReadOptions, RecordError

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """One input format.

    Attributes:
        name: as written in a recipe's `format`.
        summary: one line: its fields.
        matches: whether a record has this format, judged by its fields alone.
        read: the conversations in a stream of records; bad records go to the log.
        ranked: whether its answers come with ranks, so that `ReadOptions.oasst_top_k` means something.
    """

    name: str
    summary: str
    matches: Callable[[Fields], bool]
    read: Callable[[Iterable[RawRecord], ReadOptions, ProblemLog], Iterator[Conversation]]
    ranked: bool = False


_MAY_BE_EMPTY = ("system", "tool")
_MAY_REPEAT = ("tool",)


def record_format(
    name: str, summary: str, matches: Callable[[Fields], bool], parse: Callable[[Fields], list[Message]]
) -> Format:
    """A format in which each record is one conversation; `parse` raises `RecordError` for a record it cannot read."""

    def read(records: Iterable[RawRecord], options: ReadOptions, problems: ProblemLog) -> Iterator[Conversation]:
        for record in records:
            try:
                if not matches(record.value):
                    raise RecordError("other_format", f"not in {name} format; fields: {field_names(record.value)}")
                messages = validate_messages(parse(record.value), problems)
            except RecordError as error:
                problems.add(Problem(record.where, error.kind, error.detail), record.as_bytes())
                continue
            if options.languages and not is_in_languages(record.value, messages, options.languages, problems):
                problems.skipped["other_language"] += 1
            else:
                yield Conversation(messages, record.where)

    return Format(name, summary, matches, read)


def validate_messages(messages: Sequence[Message], problems: ProblemLog) -> tuple[Message, ...]:
    """The conversation's messages, a trailing user turn taken off and counted.

    Raises:
        RecordError: no answer, nothing said, a role twice, a system message in the middle, or text that no tokenizer
            should see (NUL, half a surrogate pair).
    """
    before: Role | None = None
    for number, message in enumerate(messages, start=1):
        role = message.role
        if role == before and role not in _MAY_REPEAT:
            raise RecordError("repeated_role", f"two {role} turns in a record (turns {number - 1} and {number})")
        if role == "system" and before is not None:
            raise RecordError("system_not_first", f"a system message behind other turns (turn {number})")
        _check_content(message.content, role, number)
        before = role
    end = len(messages)
    while end and messages[end - 1].role in ("user", "tool"):
        end -= 1
    if not any(message.role == "assistant" for message in messages[:end]):
        raise RecordError("no_answer", "the conversation has no assistant message")
    if end < len(messages):
        problems.notes["trailing_user_trimmed"] += 1
    return tuple(messages[:end])


def _check_content(content: str, role: Role, number: int) -> None:
    if (not content or content.isspace()) and role not in _MAY_BE_EMPTY:
        raise RecordError("empty_content", f"the {role} message is empty (turn {number})")
    if "\x00" in content:
        raise RecordError("nul_character", f"the {role} turn holds a NUL character (turn {number})")
    if content.isascii():
        return
    try:
        content.encode()
    except UnicodeEncodeError as error:
        # The readers of text files mark bytes that are not UTF-8 by surrogates from U+DC80 on.
        if "\udc80" <= content[error.start] <= "\udcff":
            raise RecordError("not_utf8", f"the {role} turn is not UTF-8 (turn {number})") from None
        raise RecordError("lone_surrogate", f"the {role} turn holds half a surrogate pair (turn {number})") from None


def text_field(fields: Fields, name: str) -> str:
    """A field that must be text.

    Raises:
        RecordError: it is absent or something else.
    """
    if name not in fields:
        raise RecordError("missing_field", f"no field {name!r}; fields: {field_names(fields)}")
    value = fields[name]
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{name!r} must be text, it is {type_name(value)}")
    return value


def optional_text(fields: Fields, name: str) -> str:
    """A field that may be absent, null or text; "" if it is empty."""
    return "" if fields.get(name) is None else text_field(fields, name)


def turn_list(fields: Fields, name: str) -> list[Fields]:
    """A field that must be a list of objects.

    Raises:
        RecordError: it is not.
    """
    turns = fields.get(name)
    if not isinstance(turns, list):
        raise RecordError("wrong_type", f"{name!r} must be a list of turns, it is {type_name(turns)}")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RecordError("wrong_type", f"turn {number} must be an object, it is {type_name(turn)}")
    return turns


def field_names(fields: Fields) -> str:
    """The names of a record's fields, for messages; at most ten of them."""
    names = [name if name.isprintable() else reprlib.repr(name) for name in map(str, list(fields)[:10])]
    more = ", …" if len(fields) > len(names) else ""
    return (", ".join(names) or "none") + more


def type_name(value: object) -> str:
    """The type of a JSON value in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
