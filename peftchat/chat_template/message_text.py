r"""The text of a turn: reasoning, content and tool calls, and the text that defines the tools.

The templates of the registry have one way for each, that of the Hermes and Qwen models:

    <think>\n{reasoning}\n</think>\n\n
    <tool_call>\n{"name": "find", "arguments": {"a": 1}}\n</tool_call>
    # Tools … <tools>\n{definition}\n</tools> …                              at the end of the system message

`ANSWER_JINJA` and `TOOLS_JINJA` are the same in Jinja, for the saved template.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress

from peftchat.chat_template.loss_mask import TurnPart
from peftchat.conversation import Conversation, Message, ToolCall, as_tool_schema
from peftchat.json_text import normalize_json, write_json

_THINK_START, _THINK_END = "<think>\n", "\n</think>\n\n"
_TOOLS_START = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_END = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
_TOOLS_MARK = "<tools>"

TextParts = tuple[tuple[str, TurnPart], ...]
"""A text in pieces, each with the part of the turn that it is."""

_REASONING_BLOCK = re.compile(
    r"\s*(?:<(?P<tag>[\w:]*think\w*)>(?P<text>.*?)</(?P=tag)>|\[THINK\](?P<bracketed>.*?)\[/THINK\])\s*", re.DOTALL
)
_CALL_BLOCK = re.compile(r"\s*<tool_call>.*?</tool_call>", re.DOTALL)


def write_call(call: ToolCall) -> str:
    """Return a call as text, spelled as the templates of Hermes and Qwen spell it.

    Arguments that are not JSON are written as they are; readers refuse them.
    """
    arguments = call.arguments
    if call.as_text:
        with suppress(ValueError):
            arguments = normalize_json(arguments) if arguments.strip() else ""
    return f'<tool_call>\n{{"name": {write_json(call.name)}, "arguments": {arguments or "{}"}}}\n</tool_call>'


def message_text(message: Message) -> str:
    """Return what a template of the registry writes between the header and the end of a turn."""
    if not (message.tool_calls or message.reasoning):
        return message.content
    text = f"{_THINK_START}{message.reasoning}{_THINK_END}" if message.reasoning else ""
    text += message.content
    blocks = "\n".join(map(write_call, message.tool_calls))
    return f"{text}\n{blocks}" if message.content and blocks else text + blocks


def message_parts(message: Message) -> TextParts:
    """Return the text of an answer in pieces: its reasoning, its content and its calls.

    Joined, they are `message_text`. An answer that is nothing but content has at most one piece.
    """
    content = message.content
    if not (message.tool_calls or message.reasoning):
        return content_parts(content)
    text = message_text(message)
    start = len(f"{_THINK_START}{message.reasoning}{_THINK_END}") if message.reasoning else 0
    stop = start + len(content)
    parts = [(text[:start], TurnPart.REASONING), *content_parts(content), (text[stop:], TurnPart.TOOL_CALL)]
    return tuple((piece, part) for piece, part in parts if piece)


def content_parts(content: str) -> TextParts:
    """Return a content in pieces. Many records hold reasoning and calls in the content, in the marks of Hermes."""
    if "think" not in content and "[THINK]" not in content and "<tool_call>" not in content:
        return ((content, TurnPart.CONTENT),) if content else ()
    return tuple((piece, part) for piece, part in _content_parts(content) if piece)


def _content_parts(content: str) -> Iterator[tuple[str, TurnPart]]:
    at = 0
    block = _REASONING_BLOCK.match(content)
    if block is not None:
        empty = not (block["text"] or block["bracketed"] or "").strip()
        at = block.end()
        yield content[:at], TurnPart.EMPTY_REASONING if empty else TurnPart.REASONING
    for call in _CALL_BLOCK.finditer(content, at):
        yield content[at : call.start()], TurnPart.CONTENT
        at = call.end()
        yield call.group(), TurnPart.TOOL_CALL
    yield content[at:], TurnPart.CONTENT


def tools_text(conversation: Conversation) -> str:
    """Return the text that defines the conversation's tools; "" if it has none, or its system message lists them."""
    if conversation.tools is None:
        return ""
    messages = conversation.messages
    if messages and messages[0].role == "system" and _TOOLS_MARK in messages[0].content:
        return ""
    lines = "".join(f"\n{_definition(tool)}" for tool in conversation.tool_texts())
    return f"{_TOOLS_START}{lines}{_TOOLS_END}" if lines else ""


def _definition(tool: str) -> str:
    """Return a definition as `{"type": "function", "function": …}`, numbers as they were written."""
    value = json.loads(tool)
    return tool if as_tool_schema(value) is value else f'{{"type": "function", "function": {tool}}}'


def with_tools(system: str, tools: str) -> str:
    """Return a system message with the text that defines the tools behind it."""
    return f"{system}\n\n{tools}" if system and tools else system + tools


def _literal(text: str) -> str:
    """Return the text as a Jinja string literal. JSON's escapes are a subset of those that Jinja reads."""
    return json.dumps(text, ensure_ascii=False)


TOOLS_JINJA = (
    "{% set listed = namespace(text='') %}"
    f"{{% if tools and not (messages and messages[0]['role'] == 'system' and {_literal(_TOOLS_MARK)} in "
    "(messages[0]['content'] or '')) %}{% for tool in tools %}"
    "{% set definition = tool if tool.function is defined or tool.name is not defined "
    "else {'type': 'function', 'function': tool} %}"
    "{% set listed.text = listed.text + '\\n' + (definition | tojson) %}{% endfor %}"
    f"{{% set listed.text = {_literal(_TOOLS_START)} + listed.text + {_literal(_TOOLS_END)} %}}{{% endif %}}"
)
"""Jinja that sets `listed.text` to `tools_text`."""

CONTENT_JINJA = (
    "{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}{% set function = call.function or call %}"
    "{{ ('\\n' if message['content'] or not loop.first else '') + '<tool_call>\\n{\"name\": '"
    " + (function.name | tojson) + ', \"arguments\": ' + (function.arguments if function.arguments is string"
    " else (function.arguments or {}) | tojson) + '}\\n</tool_call>' }}{% endfor %}"
)
"""Jinja that writes content and calls of the message `message`."""

REASONING_JINJA = f"{_literal(_THINK_START)} + thought + {_literal(_THINK_END)}"
"""A Jinja expression: the reasoning `thought` as it stands in front of a content."""

ANSWER_JINJA = (
    "{% if message.reasoning_content %}"
    f"{{{{ {_literal(_THINK_START)} + message.reasoning_content + {_literal(_THINK_END)} }}}}{{% endif %}}"
    f"{CONTENT_JINJA}"
)
"""Jinja that writes `message_text` of the message `message`."""
