"""Turns as Gradio's chatbot shows them: reasoning folded, tags as text, each message with its turn."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from peftchat.conversation import Message
from peftchat.web.answer_stream import AnswerStep

# Code of Markdown: fenced, also where the fence is still open, or between backticks.
_CODE = re.compile(
    r"(^(?:`{3,}|~{3,}).*?(?:^(?:`{3,}|~{3,})[ \t]*$|\Z)|(`+)(?!`).+?(?<!`)\2(?!`))", re.DOTALL | re.MULTILINE
)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=[A-Za-z0-9#]+;)")
_SHOWN_TAG = re.compile(r"&lt;(?=[A-Za-z/!?])")
_SHOWN_ENTITY = re.compile(r"&amp;(?=[A-Za-z0-9#]+;)")


def show_turns(turns: Sequence[Message], step: AnswerStep | None = None) -> list[dict[str, Any]]:
    """Return the messages of a chatbot.

    Args:
        turns: questions and answers.
        step: the answer that is being written, which is not among them.
    """
    shown: list[dict[str, Any]] = []
    for turn in turns:
        shown += _messages(turn)
    if step is not None and (step.reasoning is not None or step.content):
        shown += _messages(Message("assistant", step.content, reasoning=step.reasoning), pending=True)
    return shown


def turn_at(turns: Sequence[Message], index: int) -> tuple[int, bool]:
    """Return the turn that a message of the chatbot belongs to, and whether the message is its reasoning."""
    messages: list[tuple[int, bool]] = []
    for at, turn in enumerate(turns):
        parts = _messages(turn)
        messages += [(at, "metadata" in part) for part in parts]
    return messages[index] if 0 <= index < len(messages) else (-1, False)


def show_tags(text: str) -> str:
    """Return Markdown that shows the tags of a text instead of obeying them; code shows them by itself."""
    return _outside_code(text, lambda part: _TAG.sub("&lt;", _ENTITY.sub("&amp;", part)))


def read_tags(shown: str) -> str:
    """Return the text that `show_tags` made this of."""
    return _outside_code(shown, lambda part: _SHOWN_ENTITY.sub("&", _SHOWN_TAG.sub("<", part)))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    changed, done = [], 0
    for code in _CODE.finditer(text):
        changed += [change(text[done : code.start()]), code.group()]
        done = code.end()
    return "".join([*changed, change(text[done:])])


def text_of(value: Any) -> str:
    """Return the text of an edited message, which Gradio gives as text or as a list of parts."""
    if isinstance(value, str):
        return read_tags(value)
    if isinstance(value, list):
        return "".join(map(text_of, value))
    return str(value.get("text") or value.get("content") or "") if isinstance(value, dict) else ""


def _messages(turn: Message, *, pending: bool = False) -> list[dict[str, Any]]:
    content = {"role": turn.role, "content": show_tags(turn.content)}
    if turn.reasoning is None:
        return [content]
    status = "pending" if pending and not turn.content else "done"
    thought = {
        "role": "assistant",
        "content": show_tags(turn.reasoning),
        "metadata": {"title": "Reasoning", "status": status},
    }
    return [thought] if pending and not turn.content else [thought, content]
