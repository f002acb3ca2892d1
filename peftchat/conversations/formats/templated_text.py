"""Conversations that a chat template already wrote: one `text` with the template's marks between the turns."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftchat.conversation import Message, Role
from peftchat.conversations.formats.base import Description, Fields, Notes, record_format, text_field
from peftchat.conversations.formats.names import ROLES, normalize_role
from peftchat.conversations.problems import RecordError


@dataclass(frozen=True, slots=True)
class _Style:
    """How one family of templates marks its turns.

    Attributes:
        turn: one turn, with the groups `role` and `content`.
        strip: whether the template takes blanks off a content.
    """

    turn: re.Pattern[str]
    strip: bool = False


_END_OF_TEXT = r"(?:</s>|<\|endoftext\|>|<eos>)"
_STYLES = {
    "<|im_start|>": _Style(
        re.compile(
            r"<\|im_start\|>[ ]?(?P<role>\w+)\n(?P<content>.*?)(?:<\|im_end\|>|\Z|(?=<\|im_start\|>))", re.DOTALL
        )
    ),
    "<|start_header_id|>": _Style(
        re.compile(
            r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n\n(?P<content>.*?)"
            r"(?:<\|eot_id\|>|<\|eom_id\|>|\Z|(?=<\|start_header_id\|>))",
            re.DOTALL,
        ),
        strip=True,
    ),
    "<start_of_turn>": _Style(
        re.compile(
            r"<start_of_turn>(?P<role>\w+)\n(?P<content>.*?)(?:<end_of_turn>|\Z|(?=<start_of_turn>))", re.DOTALL
        ),
        strip=True,
    ),
    "<|user|>": _Style(
        re.compile(
            r"<\|(?P<role>system|user|assistant)\|>\n?(?P<content>.*?)"
            rf"(?:<\|end\|>|{_END_OF_TEXT}|\Z|(?=<\|(?:system|user|assistant)\|>))",
            re.DOTALL,
        ),
        strip=True,
    ),
}
_AROUND = re.compile(rf"(?:\s|<s>|<bos>|<\|begin_of_text\|>|{_END_OF_TEXT})*")
"""What templates write around turns, and nobody says."""

_LLAMA_2 = re.compile(rf"\[INST\](?P<asked>.*?)\[/INST\](?P<answer>.*?)(?={_END_OF_TEXT}|<s>|\[INST\]|\Z)", re.DOTALL)
_LLAMA_2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)

_ALPACA = re.compile(r"^### (?P<role>Instruction|Input|Response):[ ]*\n?", re.MULTILINE)

_MARKS = (*_STYLES, "[INST]", "### Instruction:")


def _mark_of(text: str) -> str | None:
    """The mark that the text has, of the family that begins first."""
    places = {mark: text.find(mark) for mark in _MARKS}
    return min((mark for mark in places if places[mark] >= 0), key=lambda mark: places[mark], default=None)


def _matches(fields: Fields) -> bool:
    text = fields.get("text")
    return isinstance(text, str) and _mark_of(text) is not None


def _parse(fields: Fields, notes: Notes) -> list[Message]:
    messages = _turns_of(text_field(fields, "text"))
    return messages[:-1] if _is_open(messages) else messages


def _is_open(messages: Sequence[Message]) -> bool:
    """Whether the text ends with the prompt for an answer."""
    return bool(messages) and not messages[-1].content and messages[-1].role == "assistant"


def marked_exchange(prompt: str, answer: str, notes: Notes) -> list[Message] | None:
    """Return the turns of a prompt that a chat template wrote, with its answer; None for a prompt in plain words.

    Such a prompt is nothing but marked turns, the last of them open for the answer.
    """
    if _mark_of(prompt) is None:
        return None
    try:
        if not _is_open(_turns_of(prompt)):
            return None
    except RecordError:
        return None
    notes.change("template_marks_removed")
    return _turns_of(prompt + answer)


def _turns_of(text: str) -> list[Message]:
    mark = _mark_of(text)
    if mark is None:
        raise RecordError("missing_field", f"'text' has no mark of a turn; known: {', '.join(_MARKS)}")
    if mark == "### Instruction:":
        return _alpaca_turns(text)
    if mark == "[INST]":
        return list(_llama_2_turns(text))
    return list(_marked_turns(text, _STYLES[mark]))


def _found_turns(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, re.Match[str]]]:
    """Yield what a pattern finds, with its number; refuse words between, so that nothing is lost."""
    end = 0
    for number, turn in enumerate(pattern.finditer(text), start=1):
        _check_between(text[end : turn.start()], f"before turn {number}")
        end = turn.end()
        yield number, turn
    _check_between(text[end:], "behind the last turn")


def _marked_turns(text: str, style: _Style) -> Iterator[Message]:
    for number, turn in _found_turns(text, style.turn):
        content = turn["content"]
        yield Message(_role_of(turn["role"], number), content.strip() if style.strip else content)


def _llama_2_turns(text: str) -> Iterator[Message]:
    """Turns of Llama 2 and Mistral, whose first question holds the system message."""
    for number, turn in _found_turns(text, _LLAMA_2):
        asked = turn["asked"]
        if number == 1 and (system := _LLAMA_2_SYSTEM.match(asked)):
            yield Message("system", system[1].strip())
            asked = asked[system.end() :]
        yield Message("user", asked.strip())
        yield Message("assistant", turn["answer"].strip())


def _alpaca_turns(text: str) -> list[Message]:
    """Turns of Alpaca's prompt; the text above the first mark is a system message, as in `guanaco`."""
    before, *pieces = _ALPACA.split(text)
    messages = [Message("system", before.strip())] if before.strip() else []
    for name, piece in zip(pieces[::2], pieces[1::2], strict=True):
        content = re.sub(rf"{_END_OF_TEXT}\s*\Z", "", piece).strip()
        if name == "Response":
            messages.append(Message("assistant", content))
        elif name == "Instruction":
            messages.append(Message("user", content))
        elif messages and messages[-1].role == "user":
            messages[-1] = Message("user", "\n\n".join(filter(None, (messages[-1].content, content))))
        else:
            raise RecordError("wrong_type", "'### Input:' stands behind no '### Instruction:'")
    return messages


def _role_of(name: str, number: int) -> Role:
    role = ROLES.get(normalize_role(name))
    if role is None:
        raise RecordError("unknown_role", f"unknown role {name!r} (turn {number}); known: {', '.join(ROLES)}")
    return role


def _check_between(text: str, where: str) -> None:
    if _AROUND.fullmatch(text) is None:
        raise RecordError("wrong_type", f"'text' has words that belong to no turn ({where})")


FORMAT = record_format(
    "templated_text",
    Description(
        "text with the marks of a chat template: ChatML, Llama 2 and 3, Mistral, Gemma, Zephyr, Phi, Alpaca",
        {"text": f"the turns, between marks such as {', '.join(_MARKS)}; they are taken out again"},
        (
            {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"},
            {"text": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s>"},
        ),
    ),
    _matches,
    _parse,
    lambda fields: ("text",),
)
