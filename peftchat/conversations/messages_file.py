"""Files in messages format: how a conversation is written, so that it is the same one when it is read again.

A preference pair is written as two conversations, `chosen` and `rejected`.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from peftchat.conversation import Conversation, Message, ToolCall
from peftchat.conversations.dataset_card import SizeOf, SplitCount
from peftchat.json_text import Number, write_json

_OWN = ("messages", "tools", "chosen", "rejected")


def record_line(conversation: Conversation) -> bytes:
    """A conversation as a line of a file in messages format. Read again, it is the same conversation.

    `source` is where it came from, unless the record has a column of that name.
    """
    turns = list(map(_turn, conversation.messages))
    record: dict[str, Any] = {"messages": turns}
    if conversation.rejected is not None:
        record = {"chosen": turns, "rejected": list(map(_turn, conversation.rejected))}
    if conversation.tools is not None:
        record["tools"] = orjson.Fragment(conversation.tools)
    record["source"] = conversation.source
    record |= {name: value for name, value in conversation.columns.items() if name not in _OWN}
    if record["source"] == "":  # an empty cell of a table
        record["source"] = conversation.source
    try:
        return orjson.dumps(record, _other_value, orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        # An integer of more than 64 bits, which orjson does not write.
        columns = {name: _fragment(value) for name, value in conversation.columns.items() if name not in _OWN}
        return orjson.dumps({**record, **columns}, _other_value, orjson.OPT_APPEND_NEWLINE)


def _fragment(value: object) -> object:
    try:
        return orjson.Fragment(write_json(value))
    except ValueError:
        return str(value)


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.is_plain:
        return turn
    turn |= {
        "reasoning_content": message.reasoning,
        "tool_calls": [_call(call) for call in message.tool_calls] or None,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "train": message.train,
    }
    return {name: value for name, value in turn.items() if value is not None}


def _call(call: ToolCall) -> dict[str, Any]:
    function: dict[str, Any] = {"name": call.name}
    if call.as_text:
        function["arguments"] = call.arguments
    elif call.arguments:
        function["arguments"] = orjson.Fragment(call.arguments)
    identity = {} if call.id is None else {"id": call.id}
    return {**identity, "type": "function", "function": function}


def _other_value(value: object) -> object:
    """What orjson writes for a value that it does not know: a number by its spelling, anything else as text."""
    return orjson.Fragment(value.spelling) if isinstance(value, Number) else str(value)


class ConversationFile:
    """A `.jsonl` file in messages format that counts what it holds."""

    def __init__(self, path: Path, count: SplitCount) -> None:
        self.count = count
        self._file = path.open("wb")

    def write(self, conversation: Conversation) -> None:
        """Append one conversation: its messages, tools and columns, and where it came from."""
        self.write_line(record_line(conversation), SizeOf.of(conversation))

    def write_line(self, line: bytes, size: SizeOf) -> None:
        """Append one conversation, given as `record_line` makes it."""
        self._file.write(line)
        self.count.add(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
