"""Preference pairs: `chosen` and `rejected`. As a conversation, the chosen answer is read, the other told as not used.

Where pairs are wanted, the record is read once for each answer (`peftchat.conversations.formats.pairs`).
"""

import re

from peftchat.conversation import Message
from peftchat.conversations.formats import names
from peftchat.conversations.formats.base import Description, Fields, Notes, optional_text, record_format
from peftchat.conversations.formats.keys import with_chosen
from peftchat.conversations.formats.templated_text import marked_exchange
from peftchat.conversations.formats.turns import parse_turns, turn_list, turns_of_text


def _asked(fields: Fields) -> str | None:
    """Return the field with the prompt: `input` where no other field asks."""
    found = [name for name in names.ASKED if name in fields and name not in names.CONTEXT]
    if found:
        return found[0]
    is_text = isinstance(fields.get("input"), str) and isinstance(fields[names.CHOSEN], str)
    return "input" if is_text and not _SPOKEN.match(fields[names.CHOSEN]) else None


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    asked = _asked(fields)
    notes.unused(names.REJECTED)
    chosen = fields[names.CHOSEN]
    if asked is not None and isinstance(fields[asked], str) and isinstance(chosen, str):
        marked = marked_exchange(fields[asked], chosen, notes)
        if marked is not None:
            notes.unused_of({name: fields.get(name) for name in names.CONTEXT}, (asked,), "a preference pair")
            return marked
    if asked is None or isinstance(fields[asked], list):
        notes.unused_of({name: fields.get(name) for name in names.CONTEXT}, (), "a preference pair")
        start = [] if asked is None else parse_turns(turn_list(fields, asked), notes)
    elif turns := turns_of_text(optional_text(fields, asked)):
        notes.unused_of({name: fields.get(name) for name in names.CONTEXT}, (), "a preference pair")
        start = turns
    else:
        about = [optional_text(fields, name) for name in names.CONTEXT if name != asked]
        start = [Message("user", "\n\n".join(filter(None, (optional_text(fields, asked), *about))))]
    if asked is None and isinstance(chosen, str) and _SPOKEN.match(chosen):
        return _turns_of_text(chosen)
    return with_chosen(start, chosen, notes)


# Anthropic's HH-RLHF: the whole conversation as one text.
_SPOKEN = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def _turns_of_text(text: str) -> list[Message]:
    pieces = _SPEAKER.split(text)[1:]
    said = zip(pieces[::2], pieces[1::2], strict=True)
    return [Message("user" if name == "Human" else "assistant", content.strip()) for name, content in said]


FORMAT = record_format(
    "preference",
    Description(
        "chosen, rejected, optional prompt: the chosen answer is read; objectives with pairs read both",
        {
            "prompt": "what is asked (`input` if no other field asks): text, or turns; absent if `chosen` has them all",
            "chosen": "the answer: text, a turn, a list of turns, or all turns (also `Human: … Assistant: …`)",
            "rejected": "the other answer, in the same form; used by objectives with pairs alone",
            "preferred_output": "the chosen answer in OpenAI's files, beside non_preferred_output and input",
            "chosen_response": "the chosen answer in Argilla's first UltraFeedback, beside rejected_response",
            "response_j": "the better answer in pairs of Stack Exchange, beside response_k",
        },
        (
            {"prompt": "A joke?", "chosen": "A horse walks into a bar.", "rejected": "No."},
            {
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}],
            },
        ),
        ("prompt", "context", "role", "content", "tool_calls", "reasoning_content"),
        has_roles=True,
    ),
    lambda fields: (
        {names.CHOSEN, names.REJECTED} <= fields.keys()
        or any({better, worse} <= fields.keys() for better, worse in names.PREFERRED.items())
    ),
    _parse,
    lambda fields: {names.CHOSEN, names.REJECTED, _asked(fields) or "", *names.CONTEXT},
)
