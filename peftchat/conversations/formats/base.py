"""What an input format is: how to recognize its records, and how to turn them into conversations."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftchat.conversation import NOTHING_ELSE, Conversation, Message, Role
from peftchat.conversations.formats import names
from peftchat.conversations.formats.api_records import API_FIELDS, of_api
from peftchat.conversations.formats.columns import IN_RECORDS, Columns
from peftchat.conversations.formats.fields import Fields, Notes, field_names, optional_text, text_field, type_name
from peftchat.conversations.formats.keys import LeftOut, RecordShape, complete, shape_of
from peftchat.conversations.formats.pairs import (
    beside_turns,
    check_pair,
    labeled_of,
    of_rejected,
    pair_of,
    renamed_preference,
    unpaired,
)
from peftchat.conversations.formats.ranked_answers import RANKED_FIELDS, of_ranked
from peftchat.conversations.formats.turns import turn_list
from peftchat.conversations.languages import is_in_languages
from peftchat.conversations.problems import Problem, ProblemLog, RawRecord, ReadOptions, RecordError
from peftchat.json_text import holds_floats, parse_json

__all__ = [
    "Description",
    "Fields",
    "Format",
    "Notes",
    "field_names",
    "optional_text",
    "text_field",
    "turn_list",
    "type_name",
]

Parse = Callable[[Fields, Notes], list[Message]]


@dataclass(frozen=True, slots=True)
class Description:
    """What `peftchat data formats` shows of a format.

    Attributes:
        summary: one line: its fields.
        fields: name of a field -> what it holds.
        examples: two records.
        columns: our names of fields that `columns` can give, besides those of every format.
        has_roles: whether its turns have names of roles, so that `roles` means something.
    """

    summary: str
    fields: Mapping[str, str]
    examples: tuple[Fields, Fields]
    columns: tuple[str, ...] = ()
    has_roles: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """One input format.

    Attributes:
        name: as written in a recipe's `format`.
        description: what users see of it.
        matches: whether a record has this format, judged by its fields alone.
        read: the conversations in a stream of records; bad records go to the log.
        ranked: whether its answers come with ranks, so that `ReadOptions.oasst_top_k` means something.
        fixed_fields: whether its fields always have the same names, so that `columns` means nothing.
        by_record: whether each record is read for itself, so that several processes can read parts of one file.
        plain_turns: the turns of a record in which there is nothing to check, to change or to keep besides, written as
            our own files are; None for any other record. It is asked in a hurry, and `read` makes the same of both.
    """

    name: str
    description: Description
    matches: Callable[[Fields], bool]
    read: Callable[[Iterable[RawRecord], ReadOptions, ProblemLog], Iterator[Conversation]]
    ranked: bool = False
    fixed_fields: bool = False
    by_record: bool = False
    plain_turns: Callable[[Fields], list[dict[str, str]] | None] | None = None

    @property
    def summary(self) -> str:
        """One line: its fields."""
        return self.description.summary

    @property
    def columns(self) -> tuple[str, ...]:
        """Our names of fields that `columns` can give."""
        return () if self.fixed_fields else tuple(dict.fromkeys([*self.description.columns, *IN_RECORDS]))


_MAY_BE_EMPTY = ("system", "tool")
_MAY_REPEAT = ("tool",)


def record_format(
    name: str,
    description: Description,
    matches: Callable[[Fields], bool],
    parse: Parse,
    used: Callable[[Fields], Collection[str]],
    *,
    all_described: bool = False,
    fixed_fields: bool = False,
    plain_turns: Callable[[Fields], list[dict[str, str]] | None] | None = None,
) -> Format:
    """A format in which each record is one conversation.

    Args:
        name: as written in a recipe's `format`.
        description: what users see of it.
        matches: whether a record has this format.
        parse: the turns of a record; raises `RecordError` for a record that it cannot read.
        used: the names of the fields that `parse` reads. All others are looked at in `keys`.
        all_described: the format comes with many fields of its own, none of which could be trained on.
        fixed_fields: its fields always have the same names.
        plain_turns: as in `Format`.
    """

    def read(records: Iterable[RawRecord], options: ReadOptions, problems: ProblemLog) -> Iterator[Conversation]:
        notes = Notes(problems, options.roles)
        shapes: dict[tuple[str, ...], RecordShape] = {}
        wants_pairs = options.pairs or options.labels

        def conversation_of(fields: Fields) -> Conversation:
            if not matches(fields):
                raise RecordError("other_format", f"not in {name} format; fields: {field_names(fields)}")
            messages = parse(fields, notes)
            shape = shapes.get(tuple(fields))
            if shape is None:
                shape = shape_of(fields, used(fields), all_described=all_described)
                shapes[tuple(fields)] = shape
                if len(shapes) > _MOST_SHAPES:
                    shapes.clear()
            return complete(fields, shape, messages, notes)

        def read_one(fields: Fields) -> Conversation:
            if options.labels:
                return labeled_of(fields, notes, conversation_of)
            return pair_of(fields, notes, conversation_of) if options.pairs else conversation_of(fields)

        for record in records:
            notes.start(record.where, record.raw is None)
            try:
                fields = known_shape(record.value, pairs=wants_pairs)
                conversation = read_one(fields)
                if record.raw is not None and _has_other_values(conversation, notes) and _may_be_respelled(record):
                    # Read once more with each number as it is written; the fast parser rounds them.
                    notes.start(record.where, is_table=False)
                    conversation = read_one(known_shape(_exactly(record, options), pairs=wants_pairs))
                kept = validate_messages(conversation.messages, problems, options.consecutive)
                if conversation.rejected is not None:
                    with of_rejected():
                        rejected = validate_messages(conversation.rejected, problems, options.consecutive)
                    check_pair(kept, rejected)
                    conversation = replace(conversation, rejected=rejected)
            except LeftOut as left_out:
                problems.skipped[left_out.rule] += 1
                continue
            except RecordError as error:
                problems.add(Problem(record.where, error.kind, error.detail), record.as_bytes())
                continue
            if options.languages and not is_in_languages(record.value, kept, options.languages, problems):
                problems.skipped["other_language"] += 1
                continue
            notes.finish()
            if kept is not conversation.messages:
                conversation = replace(conversation, messages=kept)
            if options.labels and conversation.rejected is not None:
                yield from unpaired(conversation)
            else:
                yield conversation

    return Format(name, description, matches, read, fixed_fields=fixed_fields, by_record=True, plain_turns=plain_turns)


_MOST_SHAPES = 10_000


_OTHER_SHAPES = API_FIELDS | RANKED_FIELDS


def known_shape(value: dict[str, Any], *, pairs: bool = False) -> dict[str, Any]:
    """Return the record without the fields that are null, and in the shape that a format reads.

    Pairs with other names, records of chat APIs and ranked answers have the fields of our formats in other places.

    Raises:
        LeftOut: a pair is wanted, and the answers do not differ in rank.
    """
    if None in value.values():
        value = {name: item for name, item in value.items() if item is not None}
    if names.VERDICT_MARK in value and value.get(names.VERDICT) in names.VERDICTS:
        value = _without_verdict(value)
    if not names.PREFERRED.keys().isdisjoint(value):
        return renamed_preference(value)
    if any(name in value for name in names.REJECTED_BESIDE_TURNS):
        return beside_turns(value)
    return value if _OTHER_SHAPES.isdisjoint(value) else dict(of_ranked(of_api(value), pairs=pairs))


def _without_verdict(value: dict[str, Any]) -> dict[str, Any]:
    """Return a record of Prodigy with a flag in place of its annotator's verdict, unless that is `accept`."""
    rest = {name: item for name, item in value.items() if name != names.VERDICT}
    return rest if value[names.VERDICT] == "accept" else {**rest, names.TRAIN_FLAGS[0]: False}


def _has_other_values(conversation: Conversation, notes: Notes) -> bool:
    """Whether there is JSON in the conversation besides text."""
    return notes.has_json or bool(conversation.columns)


# The fast parser gives 0 for -0, which is an integer.
_NEGATIVE_ZERO = re.compile(rb"[\[:,\s]-0[\],}\s]")


def _may_be_respelled(record: RawRecord) -> bool:
    return holds_floats(record.value) or _NEGATIVE_ZERO.search(record.raw or b"") is not None


def _exactly(record: RawRecord, options: ReadOptions) -> dict[str, Any]:
    """The record with each number as it is written."""
    try:
        value = parse_json((record.raw or b"").decode("utf-8-sig"))
    except ValueError:
        return record.value
    if not isinstance(value, dict):  # a list of turns
        value = dict.fromkeys(record.value, value)
    return Columns(options.columns, record.where).rename(value) if options.columns else value


_AS_UTF8 = "; save the file as UTF-8 (from Excel: iconv -f WINDOWS-1252 -t UTF-8)"


def validate_messages(
    messages: Sequence[Message], problems: ProblemLog, consecutive: str = "error"
) -> tuple[Message, ...]:
    """The conversation's messages, a trailing user turn taken off and counted.

    Args:
        messages: the turns.
        problems: where changes are counted.
        consecutive: `data.consecutive`: what becomes of two turns of one role, and of a later system message.

    Raises:
        RecordError: no answer, nothing said, a role twice, a system message in the middle, or text that no tokenizer
            should see (NUL, half a surrogate pair).
    """
    if consecutive == "merge":
        messages = _merged(messages, problems)
    before: Role | None = None
    strict = consecutive == "error"
    for number, message in enumerate(messages, start=1):
        role, content = message.role, message.content
        if strict:
            if role == before and role not in _MAY_REPEAT:
                detail = f"two {role} turns in a record (turns {number - 1} and {number})"
                raise RecordError("repeated_role", f"{detail}; data.consecutive: merge or keep reads such records")
            if role == "system" and before is not None:
                detail = f"a system message behind other turns (turn {number})"
                raise RecordError("system_not_first", f"{detail}; data.consecutive: keep reads such records")
        if message[2:] != NOTHING_ELSE:
            _check_extras(message, number)
        elif not content.isascii() or not content or content.isspace() or "\x00" in content:
            _check_content(content, role, number)
        before = role
    end = len(messages)
    while end and messages[end - 1].role != "assistant":
        end -= 1
    if not end:
        raise RecordError("no_answer", "the conversation has no assistant message")
    if end == len(messages):
        return messages if isinstance(messages, tuple) else tuple(messages)
    problems.notes["trailing_user_trimmed"] += 1
    return tuple(messages[:end])


def _merged(messages: Sequence[Message], problems: ProblemLog) -> list[Message]:
    """The turns, neighbors of one role joined with a line break and counted."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is None or last.role != message.role or message.role in _MAY_REPEAT or last.train is not message.train:
            merged.append(message)
            continue
        problems.notes["turns_merged"] += 1
        merged[-1] = last._replace(
            content="\n".join(filter(None, (last.content, message.content))),
            tool_calls=last.tool_calls + message.tool_calls,
            reasoning="\n".join(filter(None, (last.reasoning, message.reasoning))) or None,
        )
    return merged


def _check_extras(message: Message, number: int) -> None:
    """Check a turn with calls, reasoning or a name."""
    if message.content or not (message.tool_calls or message.reasoning):
        _check_content(message.content, message.role, number)
    others = [message.reasoning or "", message.name or "", message.tool_call_id or ""]
    for call in message.tool_calls:
        others += [call.name, call.arguments, call.id or ""]
    _check_content("".join(others) or "-", message.role, number)


def _check_content(content: str, role: Role, number: int) -> None:
    if (not content or content.isspace()) and role not in _MAY_BE_EMPTY:
        raise RecordError("empty_content", f"the {role} message is empty (turn {number})")
    if "\x00" in content:
        raise RecordError("nul_character", f"the {role} turn holds a NUL character (turn {number})")
    if content.isascii():
        return
    try:
        content.encode()
    except UnicodeEncodeError as error:
        # The readers of text files mark bytes that are not UTF-8 by surrogates from U+DC80 on.
        if "\udc80" <= content[error.start] <= "\udcff":
            raise RecordError("not_utf8", f"the {role} turn is not UTF-8 (turn {number}){_AS_UTF8}") from None
        raise RecordError("lone_surrogate", f"the {role} turn holds half a surrogate pair (turn {number})") from None
