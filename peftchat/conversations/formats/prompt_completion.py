"""Pairs: a question and its answer, under the names in use for the two."""

import re
from collections.abc import Sequence
from functools import lru_cache

from peftchat.conversation import Message, Role
from peftchat.conversations.formats import names
from peftchat.conversations.formats.base import (
    Description,
    Fields,
    Notes,
    optional_text,
    record_format,
    text_field,
    type_name,
)
from peftchat.conversations.formats.fields import is_switch
from peftchat.conversations.formats.parts import parse_parts, text_of_parts
from peftchat.conversations.formats.templated_text import marked_exchange
from peftchat.conversations.formats.turns import parse_turns, turn_list, turns_of_text
from peftchat.conversations.problems import RecordError

_ALPACA = ("instruction", "output")


def find_pair(fields: Fields) -> tuple[str, str] | None:
    """The names of the two sides, as the record spells them; None if there are none."""
    return _find_pair(tuple(fields))


@lru_cache(maxsize=1024)
def _find_pair(fields: tuple[str, ...]) -> tuple[str, str] | None:
    if _ALPACA[0] in fields and _ALPACA[1] in fields:
        return _ALPACA
    lower = {str(name).lower(): name for name in reversed(fields)}
    asked = next((name for name in names.ASKED if name in lower), None)
    answered = next((name for name in names.ANSWERED if name in lower), None)
    return None if asked is None or answered is None else (lower[asked], lower[answered])


def used_fields(fields: Fields) -> set[str]:
    """The names of the fields that a pair is read from."""
    pair = find_pair(fields) or ("prompt", "completion")
    return {*pair, *names.CONTEXT, names.HISTORY, *names.REASONING}


def parse_pair(fields: Fields, notes: Notes) -> list[Message]:
    """History, question with the text that it is about, and answer."""
    asked, answered = find_pair(fields) or ("prompt", "completion")
    _check_options(fields, answered)
    question = _side(fields, asked, "user", notes)
    if isinstance(fields[asked], str) and (turns := turns_of_text(fields[asked])) and turns[-1].role == "user":
        question = turns
    answer = _side(fields, answered, "assistant", notes)
    if marked := _marked(fields[asked], fields[answered], notes):
        *question, last = marked
        answer = [last]
    if len(fields) == 2:
        return question + answer
    about = [optional_text(fields, name) for name in names.CONTEXT if name != asked]
    if any(about):
        if len(question) > 1 or isinstance(fields[asked], list):
            raise RecordError("wrong_type", f"{asked!r} holds several turns, and there is a text that it is about")
        question = [Message("user", "\n\n".join(filter(None, (fields[asked], *about))))]
    return [*_history(fields, notes), *question, *_with_reasoning(fields, answer, notes)]


_NAMES_AN_OPTION = re.compile(r"\s*\(?(?:[A-Za-z]|\d{1,2})[).:]?\s*")


def _check_options(fields: Fields, answered: str) -> None:
    """Check that the answer is no mere name of an option that stands beside the question.

    Raises:
        RecordError: it is, so that the question alone would not tell what `B` means.
    """
    if len(fields) == 2:
        return
    options = next((name for name in names.OPTIONS if isinstance(fields.get(name), list | dict) and fields[name]), None)
    answer = fields[answered]
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    if options is not None and (is_number or (isinstance(answer, str) and _NAMES_AN_OPTION.fullmatch(answer))):
        detail = f"{answered!r} names one of {options!r}, which are no part of the question"
        raise RecordError("wrong_type", f"{detail}; write the options below the question, and the answer in words")


def _marked(question: object, answer: object, notes: Notes) -> list[Message] | None:
    """The turns of a pair whose question a chat template wrote, with its marks."""
    return marked_exchange(question, answer, notes) if isinstance(question, str) and isinstance(answer, str) else None


def _side(fields: Fields, name: str, role: Role, notes: Notes) -> list[Message]:
    """One side of the pair: text, or a list of messages as TRL writes conversational pairs."""
    value = fields.get(name)
    if isinstance(value, str):
        return [Message(role, value)]
    if isinstance(value, list) and all(isinstance(part, dict) and "role" not in part for part in value) and value:
        return [_from_parts(role, value, notes)]
    if isinstance(value, list):
        return parse_turns(turn_list(fields, name), notes)
    return [Message(role, text_field(fields, name))]


def _from_parts(role: Role, value: Sequence[object], notes: Notes) -> Message:
    if role != "assistant":
        return Message(role, text_of_parts(value, 1, notes))
    parts = parse_parts(value, 2, notes)
    if parts.results:
        raise RecordError("unsupported_content", "the answer holds the result of a call")
    return Message(role, parts.text, parts.calls, None, None, parts.reasoning)


def _with_reasoning(fields: Fields, answer: list[Message], notes: Notes) -> list[Message]:
    for name in names.REASONING:
        if is_switch(fields.get(name)):
            notes.unused(name)
            continue
        thought = optional_text(fields, name)
        if not thought:
            continue
        place = next((index for index, message in enumerate(answer) if message.role == "assistant"), None)
        if place is None or answer[place].reasoning not in (None, thought):
            raise RecordError("wrong_type", f"{name!r} belongs to no answer, or to one with other reasoning")
        answer = [*answer[:place], answer[place]._replace(reasoning=thought), *answer[place + 1 :]]
    return answer


def _history(fields: Fields, notes: Notes) -> list[Message]:
    """Earlier exchanges: a list of [question, answer] as LLaMA-Factory writes them, or of turns."""
    history = fields.get(names.HISTORY) or []
    if not isinstance(history, list):
        raise RecordError("wrong_type", f"'history' must be a list, it is {type_name(history)}")
    if all(isinstance(turn, dict) for turn in history):
        return parse_turns(history, notes)
    messages = []
    for exchange in history:
        if not isinstance(exchange, list) or [type(part) for part in exchange] != [str, str]:
            raise RecordError("wrong_type", f"'history' must hold [question, answer] pairs, not {type_name(exchange)}")
        messages += [Message("user", exchange[0]), Message("assistant", exchange[1])]
    return messages


_ALSO_ASKED = [name for name in names.ASKED if name != "prompt"]
PAIR_COLUMNS = ("prompt", "completion", "context", "history", "role", "content", "tool_calls", "reasoning_content")
FORMAT = record_format(
    "prompt_completion",
    Description(
        "two fields: prompt/completion, prompt/response, question/answer, query/response, input/output and the like; "
        "optional system, input, context, history",
        {
            "prompt": f"the user's message, or a list of messages; also {', '.join(_ALSO_ASKED)}",
            "completion": f"the answer, or a list of messages; also {', '.join(names.ANSWERED[1:])}",
            "context": "text that the prompt is about, below it; also `input`",
            "history": "earlier rounds: a list of [question, answer], or of turns",
            "reasoning_content": "the thoughts before the answer; also reasoning, thinking",
        },
        (
            {"prompt": "What is 2 + 2?", "completion": "It is 4."},
            {"system": "Be brief.", "question": "Who wrote it?", "context": "Ada wrote the notes.", "answer": "Ada."},
        ),
        PAIR_COLUMNS,
        has_roles=True,
    ),
    lambda fields: find_pair(fields) is not None,
    parse_pair,
    used_fields,
)
