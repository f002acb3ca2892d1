"""Files in messages format: how a conversation is written, so that it is the same one when it is read again.

A preference pair is written as two conversations, `chosen` and `rejected`; a labeled answer has its `label` in front.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from peftchat.conversation import NOTHING_ELSE, Conversation, Message, ToolCall
from peftchat.conversations.dataset_card import SizeOf, SplitCount
from peftchat.json_text import Number, write_json

_OWN = ("messages", "tools", "chosen", "rejected")
_BUFFER = 2**17


def record_line(conversation: Conversation) -> bytes:
    """A conversation as a line of a file in messages format. Read again, it is the same conversation.

    `source` is where it came from, unless the record has a column of that name.
    """
    return turns_text(conversation) + columns_text(conversation)


def turns_text(conversation: Conversation) -> bytes:
    """The beginning of `record_line`: the turns and the tools. It is equal for conversations in which these are."""
    turns = _turns(conversation.messages)
    if conversation.rejected is not None:
        tools = {} if conversation.tools is None else {"tools": orjson.Fragment(conversation.tools)}
        return orjson.dumps({"chosen": turns, "rejected": _turns(conversation.rejected), **tools})[:-1]
    if conversation.label is None and conversation.tools is None:
        return written_turns(turns)
    label = {} if conversation.label is None else {"label": conversation.label}
    tools = {} if conversation.tools is None else {"tools": orjson.Fragment(conversation.tools)}
    return orjson.dumps({**label, "messages": turns, **tools})[:-1]


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [
        {"role": message.role, "content": message.content} if message[2:] == NOTHING_ELSE else _turn(message)
        for message in messages
    ]


def written_turns(turns: Sequence[Mapping[str, Any]]) -> bytes:
    """What `turns_text` returns for a conversation without tools, given its turns as they are written."""
    return b'{"messages":%b' % orjson.dumps(turns)


def written_place(source: str) -> bytes:
    """What `columns_text` returns for a conversation without columns."""
    return b',"source":%b}\n' % orjson.dumps(source)


def columns_text(conversation: Conversation) -> bytes:
    """The rest of `record_line`, from the comma behind the turns and tools on: the place and the other columns."""
    if not conversation.columns:
        return written_place(conversation.source)
    own = _OWN if conversation.label is None else (*_OWN, "label")
    columns = {name: value for name, value in conversation.columns.items() if name not in own}
    record = {"source": conversation.source, **columns}
    if record["source"] == "":  # an empty cell of a table
        record["source"] = conversation.source
    try:
        text = orjson.dumps(record, _other_value, orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        # An integer of more than 64 bits, which orjson does not write.
        fragments = {name: _fragment(value) for name, value in columns.items()}
        text = orjson.dumps({**record, **fragments}, _other_value, orjson.OPT_APPEND_NEWLINE)
    return b"," + text[1:]


def _fragment(value: object) -> object:
    try:
        return orjson.Fragment(write_json(value))
    except ValueError:
        return str(value)


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
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
        self._file = path.open("wb", buffering=_BUFFER)

    def write(self, conversation: Conversation) -> None:
        """Append one conversation: its messages, tools and columns, and where it came from."""
        self._file.write(record_line(conversation))
        self.count.add(SizeOf.of(conversation))

    def write_lines(self, blocks: Iterable[memoryview], count: SplitCount) -> None:
        """Append conversations, given as `record_line` makes them, and how many they are."""
        for block in blocks:
            self._file.write(block)
        self.count.include(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
