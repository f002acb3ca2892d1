"""Lists of turns: OpenAI's `messages`, ShareGPT's `conversations`, and the other names of both."""

from peftchat.conversation import Message
from peftchat.conversations.formats import names
from peftchat.conversations.formats.base import Description, Fields, Notes, record_format
from peftchat.conversations.formats.turns import parse_turns, turn_list


def _list_name(fields: Fields, known: tuple[str, ...]) -> str | None:
    return next((name for name in known if isinstance(fields.get(name), list | str)), None) or next(
        (name for name in known if name in fields), None
    )


def _parse_sharegpt(fields: Fields, notes: Notes) -> list[Message]:
    if (texts := _texts_of(fields)) is not None:
        return [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    return parse_turns(turn_list(fields, _list_name(fields, _SHAREGPT) or "conversations"), notes)


def _plain_turns(fields: Fields) -> list[dict[str, str]] | None:
    if len(fields) != 1:
        return None
    turns: list[dict[str, str]] | None = fields.get("messages")
    if type(turns) is not list or not turns:
        return None
    before = None
    for turn in turns:
        if type(turn) is not dict or tuple(turn) != ("role", "content"):
            return None
        role, content = turn.values()
        if role == before or not (role in ("user", "assistant") or (role == "system" and before is None)):
            return None
        if type(content) is not str or not content or content.isspace() or "\x00" in content:
            return None
        before = role
    return turns if before == "assistant" else None


_SHAREGPT = (*names.TURNS[1:], names.TURNS[0])
_COLUMNS = ("messages", "role", "content", "tool_calls", "reasoning_content")

FORMAT = record_format(
    "messages",
    Description(
        "messages: a list of {role, content}, with tool_calls, reasoning_content, weight; tools beside it",
        {
            "messages": "the turns, also as JSON text; each has a role and a content: text or a list of text parts",
            "tool_calls": "of a turn: name and arguments of functions, as OpenAI writes them; also function_call",
            "tool_call_id": "of a tool's turn: the call that it answers",
            "reasoning_content": "of an answer: the thoughts before it; also reasoning, thinking",
            "train": "of a turn: false makes it context; also loss, trainable, weight, loss_weight with 0 or 1",
        },
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Go away.", "train": False},
                    {"role": "user", "content": "Please?"},
                    {"role": "assistant", "content": "Hello!"},
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": "Where is my hat?"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"what": "hat"}}}
                        ],
                    },
                    {"role": "tool", "content": "under the bed", "tool_call_id": "c1"},
                    {"role": "assistant", "content": "Under the bed."},
                ],
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "find", "parameters": {"properties": {"what": {"type": "string"}}}},
                    }
                ],
            },
        ),
        _COLUMNS,
        has_roles=True,
    ),
    lambda fields: "messages" in fields,
    lambda fields, notes: parse_turns(turn_list(fields, "messages"), notes),
    lambda fields: ("messages",),
    plain_turns=_plain_turns,
)


def _texts_name(fields: Fields) -> str | None:
    """The list of bare texts in which user and assistant take turns, as LIMA and UltraChat have it.

    `turns` holds the questions of MT-bench instead.
    """
    known = (*(name for name in _SHAREGPT if name != "turns"), "data")
    return next((name for name in known if _are_texts(fields.get(name))), None)


def _are_texts(value: object) -> bool:
    """Whether a value is a list of at least two texts, none of which is a turn as JSON."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(isinstance(text, str) and not text.lstrip().startswith("{") for text in value)


def _texts_of(fields: Fields) -> list[str] | None:
    name = _texts_name(fields)
    return None if name is None else fields[name]


def _is_sharegpt(fields: Fields) -> bool:
    if "conversations" in fields or "messages" in fields:
        return True
    if _texts_name(fields) is not None:
        return True
    # The other names are words that tables use for other things as well.
    name = _list_name(fields, _SHAREGPT)
    value = fields[name] if name else None
    return (isinstance(value, list) and bool(value) and isinstance(value[0], dict)) or (
        isinstance(value, str) and value.lstrip().startswith("[{")
    )


SHAREGPT = record_format(
    "sharegpt",
    Description(
        "conversations, conversation, dialog …: a list of {from, value}, from human, gpt, system, tool, function_call",
        {
            "conversations": f"the turns, also as JSON text; also {', '.join(names.TURNS[2:])}",
            "from": f"of a turn: {', '.join(names.ROLES)} in any case; the field may be {', '.join(names.ROLE)}",
            "data": "texts alone, the user's and the assistant's in turn; also under the names above",
            "value": f"of a turn: text, or a list of text parts; the field may be {', '.join(names.CONTENT)}",
        },
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
            {
                "system": "Be kind.",
                "conversation": [
                    {"from": "human", "value": "Where is my hat?"},
                    {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "hat"}}'},
                    {"from": "observation", "value": "under the bed"},
                    {"from": "gpt", "value": "Under the bed."},
                ],
            },
        ),
        _COLUMNS,
        has_roles=True,
    ),
    _is_sharegpt,
    _parse_sharegpt,
    lambda fields: (_texts_name(fields) or _list_name(fields, _SHAREGPT) or "",),
)
