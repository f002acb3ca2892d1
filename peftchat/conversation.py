"""The one type between files of conversations and their encoding."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from peftchat.json_text import split_json_list

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)

RankPairs = Literal["best_worst", "adjacent", "all"]
"""Which ranked replies to one prompt are preference pairs (`peftchat.conversations.formats.oasst_pairs`)."""


class ToolCall(NamedTuple):
    """One call of a tool, as an assistant's turn holds it.

    Attributes:
        name: of the function.
        arguments: JSON text. Keys keep their order and numbers their spelling (`1.50`); "" where the call has none.
        id: what the result refers to by `tool_call_id`.
        as_text: whether the record holds the arguments as JSON text, which is then `arguments` to the letter. An object
            is written with `, ` and `: ` between its values.
    """

    name: str
    arguments: str = ""
    id: str | None = None
    as_text: bool = False

    def parsed(self) -> Any:
        """The arguments as a value: `{}` where there are none, the text itself where it is not JSON.

        The text stands for a number beyond those of a double, too (1e400), which templates would write as `Infinity`.
        """
        try:
            return json.loads(self.arguments, parse_float=_finite) if self.arguments.strip() else {}
        except (ValueError, RecursionError):
            return self.arguments


def _finite(spelling: str) -> float:
    value = float(spelling)
    if math.isinf(value):
        raise ValueError(f"{spelling} is beyond the numbers of a double")
    return value


def _finite_or_text(spelling: str) -> float | str:
    value = float(spelling)
    return spelling if math.isinf(value) else value


class Message(NamedTuple):
    """One turn: who speaks, what they say, and what belongs to it.

    What a record does not say is absent: None, or no calls. A tuple is made in half the time of a frozen data class.

    Attributes:
        content: plain text; "" for an answer that is nothing but calls or reasoning.
        tool_calls: of an assistant.
        tool_call_id: of a tool's result: the call that it answers.
        name: of a tool's result: the function. Of other turns: the speaker.
        reasoning: of an assistant: the thoughts before the content.
        train: False makes the turn context, whatever `chat.loss_on` says. True is the same as None.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    train: bool | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the turn is a role and a content and nothing else."""
        return self[2:] == NOTHING_ELSE

    def as_dict(self) -> dict[str, Any]:
        """The message with the names of OpenAI and transformers, arguments as objects; `train` is not among them."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.is_plain:
            return turn
        if self.reasoning is not None:
            turn["reasoning_content"] = self.reasoning
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    **({} if call.id is None else {"id": call.id}),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.parsed()},
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            turn["name"] = self.name
        return turn


NOTHING_ELSE: tuple[Any, ...] = ((), None, None, None, None)
"""What a plain message has behind its role and content."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation, in order.

    Attributes:
        messages: the turns, system message first where there is one.
        source: where the conversation came from, as `file:line` (lines count from 1; for files that are one JSON array,
            the number of the element, from 1).
        tools: the definitions of the tools that the assistant may call: JSON text of a list, keys in their order and
            numbers as written; None where the record has none.
        columns: the other fields of the record, such as `id`, `lang` or `category`. They are kept, nothing is
            trained on them, and conversations that differ in nothing else are equal.
        rejected: of a pair: the same turns with the rejected answer instead, which `messages` end with the chosen one;
            None for a conversation that is no pair.
        label: whether the last answer is a good one, for an objective with labels; None where that is not asked.
    """

    messages: tuple[Message, ...]
    source: str = ""
    tools: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    rejected: tuple[Message, ...] | None = None
    label: bool | None = None

    @property
    def shared_turns(self) -> int:
        """Of a pair: the number of turns before its two answers part."""
        others = self.rejected or ()
        turns = enumerate(zip(self.messages, others, strict=False))
        shortest = min(len(self.messages), len(others))
        return next((number for number, (one, other) in turns if one != other), shortest)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The messages in the form that chat templates use."""
        return [message.as_dict() for message in self.messages]

    def tool_schemas(self) -> list[dict[str, Any]] | None:
        """The tools in the form that chat templates use: each is `{"type": "function", "function": …}`.

        Records also hold the bare function, which is put into that form here. A number beyond those of a double is its
        text (`"1e400"`), because templates would write `Infinity`, which is no JSON.
        """
        if self.tools is None:
            return None
        return [as_tool_schema(tool) for tool in json.loads(self.tools, parse_float=_finite_or_text)]

    def documents(self) -> list[Any] | None:
        """The record's `documents` in the form that chat templates use; None where it has no list of them.

        A table holds them as JSON text.
        """
        found = self.columns.get("documents")
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError):
                return None
        return found if isinstance(found, list) and found else None

    def tool_texts(self) -> list[str]:
        """Each of the tools as JSON text, numbers as written."""
        return [] if self.tools is None else split_json_list(self.tools)


def as_tool_schema(tool: Any) -> Any:
    """Return a tool's definition as `{"type": "function", "function": …}`, which most are already."""
    bare = isinstance(tool, dict) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool
