"""Tools in a chat: definitions that a user gives, and the calls in an answer's text."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftchat.conversation import ToolCall
from peftchat.errors import UserError
from peftchat.json_text import normalize_json, parse_json, split_json_list
from peftchat.paths import expand_path

_HINT = 'Write [{"type": "function", "function": {"name": …, "parameters": …}}].'
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_OPENINGS = ("[TOOL_CALLS]", "<|python_tag|>")


def read_tools(text: str | None, where: str = "Tools") -> str | None:
    """Return definitions of tools as a user typed them in the spelling of `normalize_json`; None where there are none.

    Args:
        text: a JSON list.
        where: the place that errors name.

    Raises:
        UserError: the text is no JSON list of functions with names.
    """
    if text is None or not text.strip():
        return None
    try:
        tools = split_json_list(text)
        values = [parse_json(tool) for tool in tools]
    except ValueError as error:
        raise UserError(f"expected a JSON list: {error}", where=where, hint=_HINT) from error
    for number, value in enumerate(values, start=1):
        if tool_name(value) is None:
            raise UserError("the tool has no name", where=f"{where}, number {number}", hint="Give it a `name`.")
    return normalize_json(text) if tools else None


def read_tools_file(path: str, where: str) -> str:
    """Return the definitions of tools in a file.

    Args:
        path: a file with a JSON list.
        where: the flag or the command that names it.

    Raises:
        UserError: it cannot be read, defines no tools, or is not such a list.
    """
    file = Path(expand_path(path, where))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"the file cannot be read: {reason}", where=f"{where} {path}") from error
    tools = read_tools(text, f"{where} {path}")
    if tools is None:
        raise UserError("the file defines no tools", where=f"{where} {path}", hint=_HINT)
    return tools


def tool_name(definition: Any) -> str | None:
    """Return the name of the function that a definition describes, as OpenAI writes it or bare; None without one."""
    function = definition.get("function", definition) if isinstance(definition, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def split_calls(content: str, tools: str, numbers: Iterator[int] | None = None) -> tuple[str, tuple[ToolCall, ...]]:
    """Return the content of an answer without its calls, and the calls; all of it and none where there are none.

    Calls are objects with `name` and `arguments` (or `parameters`): between `<tool_call>` tags, as Hermes and Qwen
    write them; behind `[TOOL_CALLS]`, as Mistral does; or nothing else, as Llama 3.1 does. What names no tool is text.

    Args:
        content: of the answer, without reasoning.
        tools: their definitions, JSON text of a list.
        numbers: of the ids that the calls get.
    """
    names = {tool_name(definition) for definition in json.loads(tools)}
    tagged = list(_TAGGED.finditer(content))
    if tagged:
        before, texts = content[: tagged[0].start()], [match[1] for match in tagged]
    else:
        opening = next((mark for mark in _OPENINGS if mark in content), "")
        before, _, behind = content.partition(opening) if opening else ("", "", content)
        texts = [behind]
    found: list[Any] = []
    for text in texts:
        values = _json_values(text)
        if not values:
            return content, ()
        found += values
    calls = []
    for value, number in zip(found, numbers or itertools.count(1), strict=False):
        arguments = value.get("arguments", value.get("parameters", {})) if isinstance(value, dict) else None
        if not isinstance(arguments, dict) or value.get("name") not in names:
            return content, ()
        # Mistral's templates want ids of nine letters and digits.
        calls.append(ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False), f"call{number:05}"))
    return before.strip(), tuple(calls)


def _json_values(text: str) -> list[Any]:
    """Return the JSON values that a text consists of, one behind the other or as a list; none if it has other text."""
    decoder, found, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        found += value if isinstance(value, list) else [value]
        # Llama separates calls by semicolons.
        while at < len(text) and (text[at].isspace() or text[at] in ";,"):
            at += 1
    return found
