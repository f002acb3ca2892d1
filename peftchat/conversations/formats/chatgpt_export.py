"""The data export of ChatGPT (`conversations.json`): a `mapping` of message nodes, each naming its parent."""

import reprlib
from collections.abc import Iterator

from peftchat.conversation import Message, Role
from peftchat.conversations.formats.base import Description, Fields, Notes, record_format, type_name
from peftchat.conversations.formats.turns import parse_flag
from peftchat.conversations.problems import RecordError

_KNOWN = ("author", "content", "recipient", "weight")
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def _matches(fields: Fields) -> bool:
    return "mapping" in fields and "current_node" in fields


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    """Return the branch that ends at `current_node`: what the user sees of a conversation with edited messages."""
    messages = []
    for number, message in enumerate(_branch(fields, notes), start=1):
        notes.unused_of(message, _KNOWN, "a message")
        train = parse_flag({"weight": message.get("weight")}, f"message {number}")
        metadata = message.get("metadata")
        if isinstance(metadata, dict) and metadata.get("is_visually_hidden_from_conversation"):
            notes.unused("mapping: hidden messages")
            continue
        role, content = _role(message, number, notes), _text(message, number, notes)
        # The export begins with a system message that ChatGPT leaves empty.
        if role != "system" or content:
            messages.append(Message(role, content, train=False if train is False and role == "assistant" else None))
    return messages


def _branch(fields: Fields, notes: Notes) -> Iterator[Fields]:
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
            fault = "is in a circle" if isinstance(node, dict) else "is missing"
            raise RecordError("broken_tree", f"the node {reprlib.repr(key)} {fault}")
        path[key] = node
        notes.unused_of(node, ("message", "parent", "children"), "a node")
        key = node.get("parent")
    if any(isinstance(node, dict) and node.get("message") and key not in path for key, node in nodes.items()):
        notes.unused("mapping: messages of other branches")
    for node in reversed(path.values()):
        message = node.get("message")
        if isinstance(message, dict):
            yield message
        elif message is not None:
            raise RecordError("wrong_type", f"a message must be an object, it is {type_name(message)}")


def _role(message: Fields, number: int, notes: Notes) -> Role:
    author = message.get("author")
    if isinstance(author, dict):
        notes.unused_of(author, ("role",), "a message's author")
    name = author.get("role") if isinstance(author, dict) else None
    if name == "tool" or message.get("recipient") not in (None, "all"):
        raise RecordError("unsupported_content", f"the conversation uses a tool (message {number})")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise RecordError("unknown_role", f"unknown role {reprlib.repr(name)} (message {number}); known: {known}")
    return role


def _text(message: Fields, number: int, notes: Notes) -> str:
    content = message.get("content")
    kind = content.get("content_type") if isinstance(content, dict) else type_name(content)
    parts = content.get("parts") if isinstance(content, dict) and kind == "text" else None
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise RecordError("unsupported_content", f"content of type {reprlib.repr(kind)} is not text (message {number})")
    if isinstance(content, dict):
        notes.unused_of(content, ("content_type", "parts"), "a message's content")
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
