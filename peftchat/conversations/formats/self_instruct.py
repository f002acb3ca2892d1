"""Self-Instruct's format: one `instruction` and a list of `instances`, each with `input` and `output`."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from peftchat.conversation import Conversation
from peftchat.conversations.formats import alpaca
from peftchat.conversations.formats.base import Description, Fields, Format, field_names, type_name
from peftchat.conversations.problems import Problem, ProblemLog, RawRecord, ReadOptions

_INSTANCES = "instances"


def _matches(fields: Fields) -> bool:
    return "instruction" in fields and _INSTANCES in fields and "output" not in fields


def _records_of(record: RawRecord) -> Iterator[RawRecord]:
    """Yield a record of Alpaca's format for each instance; what else the record has is kept with each."""
    shared = {name: value for name, value in record.value.items() if name != _INSTANCES}
    for instance in record.value[_INSTANCES]:
        fields: dict[str, Any] = {**shared, **instance}
        yield RawRecord(record.where, fields, None if record.raw is None else json.dumps(fields).encode())


def _problem(record: RawRecord) -> Problem | None:
    """What keeps a record from being read instance by instance."""
    if not _matches(record.value):
        detail = f"not in self_instruct format; fields: {field_names(record.value)}"
        return Problem(record.where, "other_format", detail)
    instances = record.value[_INSTANCES]
    if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
        detail = f"{_INSTANCES!r} must be a list of objects, it is {type_name(instances)}"
        return Problem(record.where, "wrong_type", detail)
    if not instances:
        return Problem(record.where, "no_answer", f"{_INSTANCES!r} is empty: there is no answer to the instruction")
    return None


def _read(records: Iterable[RawRecord], options: ReadOptions, problems: ProblemLog) -> Iterator[Conversation]:
    def instances() -> Iterator[RawRecord]:
        for record in records:
            problem = _problem(record)
            if problem is None:
                yield from _records_of(record)
            else:
                problems.add(problem, record.as_bytes())

    yield from alpaca.FORMAT.read(instances(), options, problems)


FORMAT = Format(
    "self_instruct",
    Description(
        "instruction, instances: a list of {input, output}; each instance is a conversation (Self-Instruct)",
        {
            "instruction": "the user's message, the same for all instances",
            "instances": "a list of {input, output}: the text that it is about, below the message, and the answer",
        },
        (
            {"instruction": "Translate to English.", "instances": [{"input": "Guten Tag", "output": "Good day"}]},
            {"instruction": "Name a color.", "instances": [{"input": "", "output": "Red"}, {"output": "Blue"}]},
        ),
    ),
    _matches,
    _read,
    fixed_fields=True,
    by_record=True,
)
