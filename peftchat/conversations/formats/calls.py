"""Tool calls and definitions of tools, with their JSON as it was written."""

import reprlib
from collections.abc import Sequence
from typing import Any

from peftchat.conversation import Role, ToolCall
from peftchat.conversations.formats.fields import Fields, Notes, optional_id, parse_text, type_name
from peftchat.conversations.problems import RecordError
from peftchat.json_text import TextObject, normalize_json, write_json

_ARGUMENTS = ("arguments", "parameters", "args", "input")
"""Names of a call's arguments: OpenAI's, Llama's, LangChain's and Anthropic's."""


def read_calls(turn: Fields, role: Role, number: int, notes: Notes) -> tuple[ToolCall, ...]:
    """The calls of a turn: `tool_calls`, or OpenAI's earlier `function_call`.

    Raises:
        RecordError: a call has no name, or its arguments are not JSON.
    """
    calls = turn.get("tool_calls")
    if not calls and turn.get("function_call"):
        calls = [{"function": turn["function_call"]}]
    elif calls and turn.get("function_call"):
        raise RecordError("wrong_type", f"'tool_calls' and 'function_call' in one turn (turn {number})")
    if not calls:
        return ()
    if isinstance(calls, str):
        try:
            calls = parse_text(calls)
        except ValueError:
            raise RecordError("wrong_type", f"'tool_calls' must be a list, it is text (turn {number})") from None
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise RecordError("wrong_type", f"'tool_calls' must be a list, it is {type_name(calls)} (turn {number})")
    return tuple(_call(call, number, notes) for call in calls)


def _call(call: object, number: int, notes: Notes) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, str) and isinstance(call, dict):
        function = {"name": function, **{name: call[name] for name in _ARGUMENTS if name in call}}
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError("unsupported_content", f"a tool call without a function name (turn {number})")
    spelled = next((name for name in _ARGUMENTS if function.get(name) is not None), "arguments")
    own = {"name", spelled}
    known = {"id", "function", *(("type",) if call.get("type") in ("function", "tool_call") else ())}
    if isinstance(call.get("index"), int):
        known.add("index")
    if function is call or isinstance(call.get("function"), str):
        known |= own
    else:
        notes.unused_of(function, own, "a tool call")
    notes.unused_of(call, known, "a tool call")
    text, as_text = _arguments(function.get(spelled), number, notes)
    return ToolCall(function["name"], text, optional_id(call, ("id",), f"turn {number}"), as_text)


def _arguments(arguments: Any, number: int, notes: Notes) -> tuple[str, bool]:
    """The JSON text of a call's arguments, and whether the record holds them as text."""
    if arguments is None:
        return "", False
    if isinstance(arguments, str):
        try:
            if arguments.strip():
                normalize_json(arguments)
        except ValueError:
            raise RecordError("not_json", f"a tool call's arguments are not JSON (turn {number})") from None
        return arguments, True
    return json_text(arguments, f"a tool call's arguments (turn {number})", notes), False


def json_text(value: Any, what: str, notes: Notes) -> str:
    """A value's JSON text; without the nulls with which Arrow fills the objects of a table.

    Raises:
        RecordError: the value is nothing that JSON has.
    """
    notes.has_json = True
    if notes.is_table:
        cleaned = _without_nulls(value)
        if cleaned != value:
            notes.change("arrow_nulls_removed")
        value = cleaned
    try:
        return write_json(value)
    except ValueError as error:
        kind = reprlib.repr(str(error))
        raise RecordError("wrong_type", f"{what} cannot be written as JSON: {kind}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, TextObject):
        return value
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def call_from_text(content: str, notes: Notes) -> tuple[tuple[ToolCall, ...], str]:
    """The calls that a turn's text is, as ShareGPT's `function_call` turns hold them, and the text that is left.

    Text that is no call in JSON stays text, which is told.
    """
    try:
        value = parse_text(content)
        calls = value if isinstance(value, list) else [value]
        found = read_calls({"tool_calls": calls}, "assistant", 0, notes)
    except (ValueError, RecordError):
        notes.change("call_that_is_not_json")
        return (), content
    return found, ""


def read_tools(value: object, name: str, notes: Notes) -> str | None:
    """The JSON text of the definitions of tools: a list, one object, or JSON text of these; None if there are none.

    Raises:
        RecordError: they are something else.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = parse_text(value)
        except ValueError:
            raise RecordError("not_json", f"{name!r} is text and not JSON") from None
    if isinstance(value, dict):
        value = [value]
    if not value:
        return None
    tools = _opened(value) if isinstance(value, list) else None
    if tools is None or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("wrong_type", f"{name!r} must be a list of objects, it is {type_name(value)}")
    respelled = [one for tool in tools for one in _as_openai_writes(tool)]
    if respelled != tools:
        notes.change("tools_respelled")
    return json_text(respelled, repr(name), notes)


_SCHEMAS = ("parameters", "input_schema", "inputSchema")


def _as_openai_writes(tool: Any) -> list[Any]:
    """Definitions as OpenAI's chat API has them, which is the only form that chat templates know.

    Anthropic and MCP write the schema as `input_schema` and `inputSchema`, Bedrock below `toolSpec`, Gemini several
    functions in one object, and OpenAI's Responses API without `function`. Anything else stays as it is.
    """
    declared = tool.get("functionDeclarations", tool.get("function_declarations"))
    if len(tool) == 1 and isinstance(declared, list) and all(isinstance(one, dict) for one in declared):
        return [_wrapped(one) for one in declared]
    specified = tool["toolSpec"] if len(tool) == 1 and isinstance(tool.get("toolSpec"), dict) else None
    is_flat = tool.get("type") == "function" and "function" not in tool
    if specified is None and not is_flat and not any(name in tool for name in _SCHEMAS[1:]):
        return [tool]
    function = specified or tool
    return [_wrapped(function)] if isinstance(function.get("name"), str) else [tool]


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    respelled = {}
    for name, value in function.items():
        if name in _SCHEMAS:
            in_json = isinstance(value, dict) and value.keys() == {"json"}
            respelled["parameters"] = value["json"] if in_json else value
        elif name != "type":
            respelled[name] = value
    return {"type": "function", "function": respelled}


def _opened(tools: Sequence[Any]) -> list[Any]:
    """The tools, those that are JSON text as values."""
    opened = []
    for tool in tools:
        try:
            opened.append(parse_text(tool) if isinstance(tool, str) else tool)
        except ValueError:
            opened.append(tool)
    return opened
