"""OpenAI's chat format: `messages`, a list of `{"role", "content"}`."""

import reprlib
from typing import Any

import orjson

from peftchat.conversation import Message, Role
from peftchat.conversations.formats.base import Fields, record_format, turn_list, type_name
from peftchat.conversations.problems import RecordError

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def parse_turns(turns: list[Fields]) -> list[Message]:
    """Messages from `role`/`content` objects.

    Raises:
        RecordError: an unknown role, or content that is not text.
    """
    messages = []
    for number, turn in enumerate(turns, start=1):
        name = turn.get("role")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(ROLES)
            raise RecordError("unknown_role", f"unknown role {reprlib.repr(name)} (turn {number}); known: {known}")
        content = turn.get("content")
        if not isinstance(content, str):
            content = _content(turn, role, number)
        elif turn.get("tool_calls") or turn.get("function_call"):
            content = render_tool_calls(content, _calls(turn, number))
        messages.append(Message(role, content))
    return messages


def render_tool_calls(content: str, calls: list[dict[str, Any]]) -> str:
    """An assistant's tool calls as text behind what it said.

    Each call is `<tool_call>`, a line of JSON with `name` and `arguments`, and `</tool_call>`, each on its own line:
    the format that Hermes and Qwen models are trained on. The tool's answer stays a `tool` message.
    """
    blocks = [f"<tool_call>\n{orjson.dumps(call).decode()}\n</tool_call>" for call in calls]
    return "\n".join([content, *blocks] if content else blocks)


def _content(turn: Fields, role: Role, number: int) -> str:
    """Content that is not plain text: null beside tool calls, or a list of text parts."""
    content = turn.get("content")
    if content is None and role == "assistant" and (turn.get("tool_calls") or turn.get("function_call")):
        return render_tool_calls("", _calls(turn, number))
    if isinstance(content, list):
        return "".join(_part(part, number) for part in content)
    if "content" not in turn:
        raise RecordError("missing_field", f"no field 'content' (turn {number})")
    raise RecordError("wrong_type", f"'content' must be text, it is {type_name(content)} (turn {number})")


def _part(part: object, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, dict) else type_name(part)
    raise RecordError("unsupported_content", f"a content part of type {reprlib.repr(kind)} is not text (turn {number})")


def _calls(turn: Fields, number: int) -> list[dict[str, Any]]:
    """Name and arguments of each call, arguments as an object (OpenAI sends them as JSON text)."""
    calls = turn.get("tool_calls") or [{"function": turn["function_call"]}]
    if not isinstance(calls, list):
        raise RecordError("wrong_type", f"'tool_calls' must be a list, it is {type_name(calls)} (turn {number})")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError("unsupported_content", f"a tool call without a function name (turn {number})")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments)
            except ValueError:
                raise RecordError("not_json", f"a tool call's arguments are not JSON (turn {number})") from None
        found.append({"name": function["name"], "arguments": arguments})
    return found


FORMAT = record_format(
    "messages",
    "messages: a list of {role, content} (OpenAI's chat format; tool calls become <tool_call> text)",
    lambda fields: "messages" in fields,
    lambda fields: parse_turns(turn_list(fields, "messages")),
)
