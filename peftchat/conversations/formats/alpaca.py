"""Alpaca's format: `instruction`, `input`, `output`, with optional `system` and `history`."""

from peftchat.conversation import Message
from peftchat.conversations.formats.base import Fields, optional_text, record_format, text_field, type_name
from peftchat.conversations.problems import RecordError


def _parse(fields: Fields) -> list[Message]:
    messages = []
    if system := optional_text(fields, "system"):
        messages.append(Message("system", system))
    for question, answer in _history(fields):
        messages += [Message("user", question), Message("assistant", answer)]
    question = text_field(fields, "instruction")
    if context := optional_text(fields, "input"):
        question = f"{question}\n\n{context}" if question else context
    return [*messages, Message("user", question), Message("assistant", text_field(fields, "output"))]


def _history(fields: Fields) -> list[tuple[str, str]]:
    """Earlier exchanges, as LLaMA-Factory writes them: a list of [question, answer]."""
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise RecordError("wrong_type", f"'history' must be a list, it is {type_name(history)}")
    exchanges = []
    for exchange in history:
        if not isinstance(exchange, list) or [type(part) for part in exchange] != [str, str]:
            raise RecordError("wrong_type", f"'history' must hold [question, answer] pairs, not {type_name(exchange)}")
        exchanges.append((exchange[0], exchange[1]))
    return exchanges


FORMAT = record_format(
    "alpaca",
    "instruction, output, optional input (appended to the instruction), system, history",
    lambda fields: "instruction" in fields and "output" in fields,
    _parse,
)
