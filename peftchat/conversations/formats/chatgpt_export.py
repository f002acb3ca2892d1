"""The data export of ChatGPT (`conversations.json`): a `mapping` of message nodes, each naming its parent."""

import reprlib
from collections.abc import Iterator

from peftchat.conversation import Message, Role
from peftchat.conversations.formats.base import Description, Fields, Notes, record_format, type_name
from peftchat.conversations.formats.turns import parse_flag
from peftchat.conversations.problems import RecordError

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def _matches(fields: Fields) -> bool:
    return "mapping" in fields and "current_node" in fields


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    """Return the branch that ends at `current_node`: what the user sees of a conversation with edited messages."""
    messages, number = [], 0
    for number, message in enumerate(_branch(fields), start=1):
        _note_unused(message, notes)
        metadata = message.get("metadata")
        if isinstance(metadata, dict) and metadata.get("is_visually_hidden_from_conversation"):
            notes.change("hidden_turn_left_out")
            continue
        role, content = _role(message, number), _text(message, number)
        train = parse_flag({"weight": message.get("weight")}, f"message {number}")
        # The export begins with a system message that ChatGPT leaves empty.
        if role != "system" or content:
            messages.append(Message(role, content, train=False if train is False and role == "assistant" else None))
    others = sum(isinstance(node, dict) and node.get("message") is not None for node in fields["mapping"].values())
    for _ in range(others - number):
        notes.change("turn_of_another_branch")
    return messages


_READ = frozenset({"author", "content", "recipient", "weight"})


def _note_unused(message: Fields, notes: Notes) -> None:
    """Note all that a message holds besides its role and its text."""
    holders = (
        (message, _READ),
        (message.get("content"), ("content_type", "parts")),
        (message.get("author"), ("role",)),
    )
    for holder, read in holders:
        for name, value in holder.items() if isinstance(holder, dict) else ():
            if name not in read and value not in (None, "", [], {}):
                notes.unused(f"{name} in a turn")


def _branch(fields: Fields) -> Iterator[Fields]:
    """Yield the messages from the root to `current_node`; nodes without a message are skipped.

    Raises:
        RecordError: a node is missing or malformed, or its ancestors form a circle.
    """
    nodes = fields["mapping"]
    if not isinstance(nodes, dict):
        raise RecordError("wrong_type", f"'mapping' must be an object, it is {type_name(nodes)}")
    path: dict[str, Fields] = {}
    key = fields["current_node"]
    while key is not None:
        node = nodes.get(key) if isinstance(key, str) else None
        if not isinstance(node, dict) or key in path:
            fault = "is in a circle" if key in path else "is missing"
            raise RecordError("broken_tree", f"the node {reprlib.repr(key)} {fault}")
        path[key] = node
        key = node.get("parent")
    for node in reversed(path.values()):
        if isinstance(message := node.get("message"), dict):
            yield message


def _role(message: Fields, number: int) -> Role:
    author = message.get("author")
    name = author.get("role") if isinstance(author, dict) else None
    if name == "tool" or message.get("recipient") not in (None, "all"):
        raise RecordError("unsupported_content", f"the conversation uses a tool (message {number})")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise RecordError("unknown_role", f"unknown role {reprlib.repr(name)} (message {number}); known: {known}")
    return role


def _text(message: Fields, number: int) -> str:
    content = message.get("content")
    kind = content.get("content_type") if isinstance(content, dict) else type_name(content)
    parts = content.get("parts") if isinstance(content, dict) and kind == "text" else None
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise RecordError("unsupported_content", f"content of type {reprlib.repr(kind)} is not text (message {number})")
    return "".join(parts)


def _example(*turns: tuple[str, str]) -> Fields:
    mapping = {
        f"m{number}": {
            "parent": f"m{number - 1}" if number else None,
            "message": {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}},
        }
        for number, (role, text) in enumerate(turns)
    }
    return {"mapping": mapping, "current_node": f"m{len(turns) - 1}"}


FORMAT = record_format(
    "chatgpt_export",
    Description(
        "mapping, current_node: ChatGPT's data export (conversations.json); the branch that was shown last",
        {
            "mapping": "the messages by id, each with its parent",
            "current_node": "the last message of the branch that is read",
        },
        (
            _example(("user", "Hi"), ("assistant", "Hello!")),
            _example(("system", "Be kind."), ("user", "A hat?"), ("assistant", "A red one.")),
        ),
    ),
    _matches,
    _parse,
    lambda fields: ("mapping", "current_node"),
    all_described=True,
    fixed_fields=True,
)
