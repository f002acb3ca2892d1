"""What a template can write, learned from small conversations: roles, calls, reasoning, and what ends an answer."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftchat.chat_template.answer_rendering import MARK, AnswerRenderer, shared_length
from peftchat.chat_template.template_renderer import (
    PROBE_TOOL,
    TemplateMessage,
    TemplateRenderer,
    probe_turn,
    with_reasoning_parts,
)
from peftchat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftchat.conversation import Role

_QUESTION: TemplateMessage = {"role": "user", "content": "question"}
_ANSWER: TemplateMessage = {"role": "assistant", "content": "answer"}
_ARGUMENT = "peftchat argument"
_CALL: dict[str, Any] = {
    "id": "abcde1234",
    "type": "function",
    "function": {"name": "find", "arguments": {"text": _ARGUMENT}},
}
_REASONING = "peftchat reasoning"


def missing_roles(renderer: TemplateRenderer) -> frozenset["Role"]:
    """Return the roles beside user and assistant that a template refuses, or leaves out without a word.

    A template that writes the results of tools and not the calls before them cannot write `tool`.
    """
    question, system = probe_turn("user"), {"role": "system", "content": MARK}
    result = {"role": "tool", "content": MARK, "name": "find", "tool_call_id": _CALL["id"]}
    calling = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    tried: dict[Role, tuple[list[str], Sequence[Sequence[TemplateMessage]]]] = {
        "system": ([MARK], [[system, question]]),
        "tool": ([MARK, _ARGUMENT], [[question, one, result] for one in (calling, with_text_arguments(calling))]),
    }
    return frozenset(
        role
        for role, (texts, conversations) in tried.items()
        if not any(renderer.writes(texts, messages) for messages in conversations)
    )


def wants_text_arguments(renderer: TemplateRenderer) -> bool:
    """Return whether the template takes the arguments of a call as JSON text only."""
    calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    found = []
    for messages in ([_QUESTION, calling], [_QUESTION, with_text_arguments(calling)]):
        try:
            renderer.render(messages, [PROBE_TOOL], generation_prompt=False)
        except UserError:
            found.append(False)
        else:
            found.append(True)
    return found == [False, True]


def wants_reasoning_parts(renderer: TemplateRenderer) -> bool:
    """Return whether the template reads reasoning from a part of the content only, as Mistral's newer ones do."""
    return _writes_reasoning(renderer) == [False, True]


def has_place_for_reasoning(renderer: TemplateRenderer) -> bool:
    """Return whether the template writes the reasoning of an answer, as a field or as a part of the content."""
    return any(_writes_reasoning(renderer))


def _writes_reasoning(renderer: TemplateRenderer) -> list[bool]:
    """Return whether the template writes reasoning that is a field, and reasoning that is a part of the content."""
    answer = {**_ANSWER, "reasoning_content": _REASONING}
    found = []
    for message in (answer, with_reasoning_parts(answer)):
        try:
            text = renderer.render([_QUESTION, message], None, generation_prompt=False)
        except UserError:
            text = ""
        # A template that knows no parts writes them as Python does.
        found.append(_REASONING in text and not re.search(r"""["'](?:type|thinking)["']""", text))
    return found


def turn_headers(renderer: TemplateRenderer, end_tokens: Sequence[str]) -> dict[str, str]:
    """Return what the template writes in front of the content of a user and of an answer, as far as that is sure.

    It is what precedes a content that begins a conversation and also one behind other turns.
    """
    marked = {"content": MARK}
    user, answer = {"role": "user", **marked}, {"role": "assistant", **marked}
    tried = {"user": (user, [_QUESTION, _ANSWER]), "assistant": (answer, [_QUESTION])}
    found = {}
    for role, (message, history) in tried.items():
        try:
            first, behind = (
                renderer.render(messages, None, generation_prompt=False).rpartition(MARK)[0]
                for messages in ([message], [*history, message])
            )
        except UserError:
            continue
        header = first[len(first) - shared_length(first[::-1], behind[::-1]) :]
        for end in end_tokens:
            # The end of the turn before; where the next role's token ends a turn, it belongs to the header.
            *_, last = header.split(end)
            if last != header and renderer.special.search(last):
                header = last
        # Different tokens in front may end in the same characters.
        start = renderer.special.search(header)
        found[role] = header[start.start() :] if start else ""
    return found


def find_end_tokens(
    renderer: TemplateRenderer, tokenizer: "PreTrainedTokenizerBase", given: str | None
) -> tuple[str, ...]:
    """Return the tokens that end an answer, and an answer that calls a tool, where the template writes one.

    Raises:
        UserError: nothing ends an answer.
    """
    calling = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    found: list[str] = []
    refusal: UserError | None = None
    for answer, tools in ((_ANSWER, None), (_ANSWER, [PROBE_TOOL]), (calling, [PROBE_TOOL])):
        if found and answer is _ANSWER:
            continue
        try:
            text = AnswerRenderer(renderer, [_QUESTION, answer], tools, given).answer(1).text
        except UserError as error:
            refusal = refusal or error
            continue
        token = renderer.special.split(text)[-2]
        if token not in found:
            found.append(token)
    if found:
        return tuple(found)
    if refusal is not None and refusal.where is not None:
        raise refusal
    # A template that refuses these conversations may still take those of the data.
    usual = given or tokenizer.eos_token
    if usual is None:
        raise UserError(
            "nothing ends an answer: the tokenizer has no end token, and the chat template writes none",
            where="chat.template: model",
            hint="Set `chat.end_token`, or choose another template.",
        )
    return (str(usual),)


def with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose calls have their arguments as JSON text."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
