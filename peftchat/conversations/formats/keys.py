"""The fields of a record against those that its format understands: used, kept, told, or refused."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeGuard, cast

from peftchat.conversation import Conversation, Message
from peftchat.conversations.formats import names
from peftchat.conversations.formats.calls import read_tools
from peftchat.conversations.formats.fields import Fields, Notes, is_switch, type_name
from peftchat.conversations.formats.parts import text_of_parts
from peftchat.conversations.formats.turns import parse_flag, parse_turns, turn_list, turns_of_text
from peftchat.conversations.problems import RecordError

_COMMON = frozenset(
    {
        *names.SYSTEM,
        *names.TOOLS,
        *names.TURN_MASKS,
        *names.TRAIN_FLAGS,
        *names.TRAIN_WEIGHTS,
        *(names.CHOSEN, names.REJECTED, names.LABEL),
        *names.MEDIA,
    }
)
CHOICES = "choices"
"""The answers in a response of OpenAI's chat API: a list of {message, finish_reason}."""


@dataclass(frozen=True, slots=True)
class RecordShape:
    """What the names of a record's fields mean to its format.

    Attributes:
        special: fields that mean the same in every format: system prompt, tools, flags, preferences, media.
        columns: fields that are kept beside the conversation.
        told: those of `columns` that a reader of the file might expect to be trained on.
    """

    special: frozenset[str]
    columns: tuple[str, ...]
    told: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the format's own fields are all that there is."""
        return not (self.special or self.columns)


def shape_of(fields: Collection[str], used: Collection[str], *, all_described: bool = False) -> RecordShape:
    """Sort the names of a record's fields.

    Args:
        fields: all names.
        used: those that the format reads by itself.
        all_described: the format comes with many fields of its own, none of which could be trained on.
    """
    others = [name for name in fields if name not in used]
    special = frozenset(others) & _COMMON
    columns = tuple(name for name in others if name not in special)
    told = () if all_described else tuple(name for name in columns if not describes(name))
    return RecordShape(special, columns, told)


def describes(name: str) -> bool:
    """Whether a field describes its record and is nothing that could be trained on, judged by its name."""
    lower = name.lower()
    return lower in names.METADATA or lower.endswith(("_id", "_at", "_url"))


class LeftOut(Exception):
    """A record that its own flag leaves out.

    Args:
        rule: why, a key of the card's rules.
    """

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


def complete(fields: Fields, shape: RecordShape, messages: Sequence[Message], notes: Notes) -> Conversation:
    """Return the conversation of a record: the turns that its format found, and what all formats have in common.

    Raises:
        RecordError: a field would change what is trained, and is not understood.
        LeftOut: the record says that it must not be trained.
    """
    if shape.is_plain:
        return Conversation(tuple(messages), notes.where)
    turns, tools, columns = list(messages), None, list(shape.columns)
    for name in shape.columns:
        if names.LOOKS_LIKE_MASK.search(name) and isinstance(fields[name], bool | list | int):
            known = ", ".join((*names.TURN_MASKS, *names.TRAIN_FLAGS))
            detail = f"{name!r} may say what is trained, and is not understood; known: {known}"
            raise RecordError("unknown_flag", detail)
    used: set[str] = set()
    beside = _answer_beside(fields, shape, turns)
    if beside is not None:
        turns = with_chosen(turns, _first_choice(fields[beside], notes) if beside == CHOICES else fields[beside], notes)
        notes.change("answer_beside_turns")
        columns.remove(beside)
        thought = _thought_beside(fields, shape)
        if thought is not None and turns[-1].role == "assistant" and turns[-1].reasoning is None:
            turns[-1] = turns[-1]._replace(reasoning=fields[thought])
            columns.remove(thought)
            used.add(thought)
        used.add(beside)
    if shape.special:
        columns += _refuse_or_keep(fields, shape.special, notes)
        turns = _with_preference(fields, shape.special, turns, notes)
        turns = _with_flags(fields, shape.special, turns)
        turns = _with_system(fields, shape.special, turns, notes)
        for name in names.TOOLS:
            if name in shape.special and (found := read_tools(fields[name], name, notes)) is not None:
                if tools is not None and found != tools:
                    raise RecordError("wrong_type", f"{name!r} and another list of tools differ")
                tools = found
        if tools is not None:
            _note_unknown_calls(tools, turns, notes)
    for name in shape.told:
        if name not in used and fields[name] not in ("", []):
            notes.unused(name)
    if "split" in shape.columns and str(fields["split"]).lower().replace("-", "_") in names.HELD_OUT_SPLITS:
        notes.unused(f"split: {fields['split']}")
    return Conversation(tuple(turns), notes.where, tools, {name: fields[name] for name in columns})


def _answer_beside(fields: Fields, shape: RecordShape, turns: Sequence[Message]) -> str | None:
    """The field with the answer to turns that end with a question; None where they do not, or there is none."""
    if not turns or turns[-1].role == "assistant" or names.CHOSEN in shape.special:
        return None
    return next((name for name in (CHOICES, *names.ANSWERED) if name in shape.columns and fields[name]), None)


def _thought_beside(fields: Fields, shape: RecordShape) -> str | None:
    """The field with the thoughts before an answer that stands beside the turns."""
    texts = (name for name in names.REASONING if name in shape.columns and isinstance(fields[name], str))
    return next((name for name in texts if fields[name] and not is_switch(fields[name])), None)


def _first_choice(choices: object, notes: Notes) -> object:
    """The message of the first of `choices`.

    Raises:
        RecordError: it has none.
        LeftOut: the answer was cut off, so that its end is not the end of an answer.
    """
    first = choices[0] if isinstance(choices, list) else None
    if not isinstance(first, dict) or not isinstance(first.get("message"), dict):
        raise RecordError("wrong_type", f"{CHOICES!r} must be a list of objects with a message")
    if first.get("finish_reason") in ("length", "content_filter"):
        raise LeftOut("answer_cut_off")
    notes.unused_of(first, ("message", "finish_reason", "index"), CHOICES)
    if len(cast("list[object]", choices)) > 1:
        notes.unused(f"{CHOICES} behind the first")
    message = first["message"]
    return message if "role" in message else {"role": "assistant", **message}


def _note_unknown_calls(tools: str, turns: Sequence[Message], notes: Notes) -> None:
    """Note a record in which a function is called that its tools do not define: the model was not shown it."""
    called = {call.name for message in turns for call in message.tool_calls}
    if called and not called <= _functions_defined(tools):
        notes.change("call_of_no_tool")


@lru_cache(maxsize=64)
def _functions_defined(tools: str) -> frozenset[str]:
    """The names in a list of tools; the records of a file often share one."""
    functions = [tool.get("function", tool) for tool in json.loads(tools)]
    named = [one.get("name", one.get("type")) for one in functions if isinstance(one, dict)]
    return frozenset(name for name in named if isinstance(name, str))


_FLAGS = frozenset({*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS, names.LABEL})
_FLAG_TEXTS: dict[str, Any] = {"true": True, "false": False, "1": 1, "0": 0, "1.0": 1, "0.0": 0, "": None}


def flag_of_text(value: object) -> object:
    """The flag that a text stands for: all cells of a CSV are text. Anything else as it is."""
    return _FLAG_TEXTS.get(value.strip().lower(), value) if isinstance(value, str) else value


def _refuse_or_keep(fields: Fields, special: frozenset[str], notes: Notes) -> list[str]:
    """The special fields that mean nothing here and are kept as columns.

    Raises:
        RecordError: the record has images, sounds or the like.
        LeftOut: the record's flag says that it must not be trained.
    """
    kept = []
    for name in sorted(special & names.MEDIA):
        if fields[name]:
            raise RecordError("unsupported_content", f"the record has {name}, which are not text")
    fields = {**fields, **{name: flag_of_text(fields[name]) for name in special & _FLAGS if name in fields}}
    label = fields.get(names.LABEL) if names.LABEL in special else None
    if label is False:
        raise LeftOut("label_is_false")
    if names.LABEL in special and label not in (True, None):
        kept.append(names.LABEL)
        notes.unused(names.LABEL)
    elif label is True:
        kept.append(names.LABEL)
    # A `loss` of 0 or 1 in a record is a measured loss; in a turn it is a flag.
    flags = {
        name: fields[name]
        for name in names.TRAIN_FLAGS
        if isinstance(fields.get(name), bool) or (name != "loss" and fields.get(name) in (0, 1))
    }
    weights = {name: fields[name] for name in names.TRAIN_WEIGHTS if fields.get(name) in (0, 1)}
    if parse_flag({**flags, **weights}, "the record") is False:
        raise LeftOut("flagged_not_to_train")
    for name in (*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS):
        if name in special:
            kept.append(name)
            is_used = name in flags or name in weights or _are_flags(fields[name])
            if fields[name] is not None and not is_used:
                notes.unused(name)
    return kept


def _with_preference(fields: Fields, special: frozenset[str], turns: list[Message], notes: Notes) -> list[Message]:
    """The turns with the chosen answer at their end; the rejected one is told as not used."""
    if names.CHOSEN in special:
        turns = with_chosen(turns, fields[names.CHOSEN], notes)
    elif names.REJECTED in special and (not turns or turns[-1].role != "assistant"):
        raise RecordError("no_answer", "the record has a 'rejected' answer and no 'chosen' one")
    if names.REJECTED in special:
        notes.unused(names.REJECTED)
    return turns


def with_chosen(turns: Sequence[Message], chosen: object, notes: Notes) -> list[Message]:
    """Turns with the preferred answer, which is text, a turn, a list of turns, or the whole conversation.

    Raises:
        RecordError: it is something else.
    """
    if isinstance(chosen, str) and not chosen.lstrip().startswith("[{"):
        answer = turns_of_text(chosen) or [Message("assistant", chosen)]
        if len(answer) == 1 and not turns:
            raise RecordError("missing_field", "'chosen' is an answer without a question: there is no 'prompt'")
    else:
        listed = [chosen] if isinstance(chosen, dict) else chosen
        answer = parse_turns(turn_list({names.CHOSEN: listed}, names.CHOSEN), notes)
    start = list(turns)
    # The whole conversation, perhaps with the system message that the turns before it lack.
    system = 1 if answer[:1] and answer[0].role == "system" and start[:1] and start[0].role != "system" else 0
    if len(answer) - system >= len(start) and answer[system : system + len(start)] == start:
        return answer
    if start and start[-1].role == "assistant":
        raise RecordError(
            "repeated_role", "'chosen' stands behind an answer; the turns before it must end with the user's"
        )
    return start + answer


def _are_flags(value: object) -> TypeGuard[list[Any]]:
    """Whether a value is a list of flags, each 0 or 1."""
    return isinstance(value, list) and all(isinstance(one, bool | int | float) and one in (0, 1) for one in value)


def _with_flags(fields: Fields, special: frozenset[str], turns: list[Message]) -> list[Message]:
    """The turns with the flags of the record's list of flags."""
    for name in (*names.TURN_MASKS, *names.TRAIN_FLAGS):
        flags = fields.get(name) if name in special else None
        valid = _are_flags(flags)
        if flags is None or (name in names.TRAIN_FLAGS and not valid):
            continue
        answers = [index for index, message in enumerate(turns) if message.role == "assistant"]
        if not valid or len(flags) not in (len(turns), len(answers)):
            what = f"{len(flags)} entries" if valid else type_name(flags)
            detail = f"{name!r} must be a list of 0 or 1 for each of {len(turns)} turns, it is {what}"
            raise RecordError("unknown_flag", detail)
        places = range(len(turns)) if len(flags) == len(turns) else answers
        for index, flag in zip(places, flags, strict=True):
            if turns[index].train is not None and turns[index].train != bool(flag):
                raise RecordError("unknown_flag", f"{name!r} and the flag of turn {index + 1} contradict each other")
            turns[index] = turns[index]._replace(train=bool(flag))
    return turns


def _with_system(fields: Fields, special: frozenset[str], turns: list[Message], notes: Notes) -> list[Message]:
    """The turns with the system prompt that stands beside them.

    Raises:
        RecordError: it is not text, or the turns have another one.
    """
    for name in names.SYSTEM:
        value = fields.get(name) if name in special else None
        if isinstance(value, dict) and (inner := next((key for key in ("parts", "content") if key in value), None)):
            notes.unused_of(value, (inner, "role"), name)
            value = value[inner]
        if isinstance(value, list):
            value = text_of_parts(value, 0, notes)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise RecordError("wrong_type", f"{name!r} must be text, it is {type_name(value)}")
        if turns and turns[0].role == "system":
            if turns[0].content != value:
                raise RecordError("two_system_messages", f"{name!r} and the system message of the turns differ")
        else:
            turns = [Message("system", value), *turns]
    return turns
