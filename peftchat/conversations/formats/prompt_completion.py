"""Pairs: `prompt` and `completion`, and the other names in use for the two."""

from peftchat.conversation import Message, Role
from peftchat.conversations.formats.base import Fields, optional_text, record_format, text_field, turn_list
from peftchat.conversations.formats.messages import parse_turns

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "answer"),
)


def _pair(fields: Fields) -> tuple[str, str] | None:
    for pair in PAIRS:
        if pair[0] in fields and pair[1] in fields:
            return pair
    return None


def _parse(fields: Fields) -> list[Message]:
    asked, answered = _pair(fields) or PAIRS[0]
    question = _side(fields, asked, "user")
    # Dolly and question-answer sets keep the text that a question is about in a field of its own.
    if isinstance(fields[asked], str) and (context := optional_text(fields, "context")):
        question = [Message("user", f"{fields[asked]}\n\n{context}")]
    system = optional_text(fields, "system")
    start = [Message("system", system)] if system else []
    return [*start, *question, *_side(fields, answered, "assistant")]


def _side(fields: Fields, name: str, role: Role) -> list[Message]:
    """One side of the pair: text, or a list of messages as TRL writes conversational pairs."""
    if isinstance(fields[name], list):
        return parse_turns(turn_list(fields, name))
    return [Message(role, text_field(fields, name))]


FORMAT = record_format(
    "prompt_completion",
    "two fields: " + ", ".join(f"{asked}/{answered}" for asked, answered in PAIRS) + "; optional system",
    lambda fields: _pair(fields) is not None,
    _parse,
)
