"""Preference pairs of a record: the conversation with the chosen answer, and with the rejected one."""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peftchat.conversation import Conversation, Message
from peftchat.conversations.formats import names
from peftchat.conversations.formats.fields import Fields, Notes, field_names
from peftchat.conversations.formats.keys import flag_of_text
from peftchat.conversations.problems import RecordError


def pair_of(fields: Fields, notes: Notes, conversation_of: Callable[[Fields], Conversation]) -> Conversation:
    """Return a record's conversation with the chosen answer, and with the rejected one as `rejected`.

    Both are read in the same way, so that prompts, system messages and tools are those of every format.

    Args:
        fields: the record.
        notes: its notes.
        conversation_of: reads a record whose `chosen` is the answer.

    Raises:
        RecordError: an answer is missing, or one of them cannot be read.
    """
    for name, other in ((names.CHOSEN, names.REJECTED), (names.REJECTED, names.CHOSEN)):
        if name not in fields:
            detail = f"no field {name!r}: a preference pair has {name!r} and {other!r}; fields: {field_names(fields)}"
            raise RecordError("missing_field", detail)
    fields = without_turns(fields)
    chosen = conversation_of(fields)
    with of_rejected():
        rejected = conversation_of({**fields, names.CHOSEN: fields[names.REJECTED], names.REJECTED: ""})
    notes.used(names.REJECTED)
    return replace(chosen, rejected=rejected.messages)


def labeled_of(fields: Fields, notes: Notes, conversation_of: Callable[[Fields], Conversation]) -> Conversation:
    """Return a record's conversation with its label; a pair where it has a chosen and a rejected answer instead.

    Raises:
        RecordError: it has neither, or the label is something other than true, false, 1 or 0.
    """
    label = flag_of_text(fields.get(names.LABEL))
    if label is None and names.CHOSEN in fields and names.REJECTED in fields:
        return pair_of(fields, notes, conversation_of)
    if label is None:
        detail = f"no field {names.LABEL!r} that says whether the answer is good; fields: {field_names(fields)}"
        raise RecordError("missing_field", detail)
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise RecordError("wrong_type", f"{names.LABEL!r} must be true or false, it is {reprlib.repr(label)}")
    conversation = conversation_of({name: value for name, value in fields.items() if name != names.LABEL})
    return replace(conversation, label=bool(label))


def unpaired(pair: Conversation) -> Iterator[Conversation]:
    """Yield the answers of a pair as labeled ones."""
    yield replace(pair, rejected=None, label=True)
    yield replace(pair, messages=pair.rejected or (), rejected=None, label=False)


@contextmanager
def of_rejected() -> Iterator[None]:
    """Say of a problem that it is in the rejected conversation."""
    try:
        yield
    except RecordError as error:
        # The reader takes it for the chosen answer of the record.
        detail = error.detail.replace(f"'{names.CHOSEN}'", f"'{names.REJECTED}'")
        raise RecordError(error.kind, f"in the rejected conversation: {detail}") from None


def without_turns(fields: Fields) -> Fields:
    """Return a record without the list of turns that repeats the chosen conversation, as UltraFeedback's files have."""
    if names.CHOSEN not in fields or names.REJECTED not in fields:
        return fields
    repeated = [name for name in names.TURNS if name in fields and fields[name] == fields[names.CHOSEN]]
    return {name: value for name, value in fields.items() if name not in repeated} if repeated else fields


def beside_turns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of turns that has a rejected answer beside them as a pair; any other as it is."""
    rejected = next((name for name in names.REJECTED_BESIDE_TURNS if fields.get(name) is not None), None)
    turns = next((name for name in names.TURNS if isinstance(fields.get(name), list) and fields[name]), None)
    if rejected is None or turns is None or names.CHOSEN in fields:
        return dict(fields)
    rest = {name: value for name, value in fields.items() if name not in (turns, rejected)}
    *start, answer = fields[turns]
    if rejected == names.REJECTED_BESIDE_TURNS[0]:
        return {**rest, names.CHOSEN: fields[turns], names.REJECTED: fields[rejected]}
    return {**rest, "prompt": start, names.CHOSEN: [answer], names.REJECTED: fields[rejected]}


def renamed_preference(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with other names of the two answers under those of `preference`; any other as it is.

    In OpenAI's files, `input` holds the turns of the prompt as `messages`, and the tools.
    """
    better = next((name for name, worse in names.PREFERRED.items() if name in fields and worse in fields), None)
    if better is None or names.CHOSEN in fields:
        return dict(fields)
    renamed = {better: names.CHOSEN, names.PREFERRED[better]: names.REJECTED}
    record = {renamed.get(name, name): value for name, value in fields.items() if name != "input"}
    asked = fields.get("input")
    if "instruction" in fields:
        return record if asked is None else {**record, "input": asked}
    if not isinstance(asked, Mapping):
        return record if asked is None else {"prompt": asked, **record}
    return {**{"prompt" if name == "messages" else name: value for name, value in asked.items()}, **record}


def check_pair(messages: tuple[Message, ...], rejected: tuple[Message, ...]) -> None:
    """Check that two conversations differ in the answers to one prompt.

    Raises:
        RecordError: they are the same, have no prompt in common, or one ends where the other goes on.
    """
    if messages == rejected:
        raise RecordError("identical_answers", "the chosen answer and the rejected one are the same")
    shared = Conversation(messages, rejected=rejected).shared_turns
    parting = [turns[shared].role if shared < len(turns) else None for turns in (messages, rejected)]
    if not any(message.role == "user" for message in messages[:shared]):
        what = "the chosen answer and the rejected one have no question in common"
        is_system = any(turns[:1] and turns[0].role == "system" for turns in (messages, rejected))
        raise RecordError("no_prompt", f"{what}: their system messages differ" if is_system and not shared else what)
    if parting != ["assistant", "assistant"]:
        ended = "rejected" if parting[1] is None else "chosen" if parting[0] is None else None
        what = f"the {ended} conversation ends there" if ended else "they part at a turn that is no answer"
        raise RecordError(
            "no_prompt", f"chosen and rejected are no two answers to one prompt: {what} (turn {shared + 1})"
        )
