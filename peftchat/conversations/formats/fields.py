"""Fields of a record: reading one with its type checked, and noting what was not used."""

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftchat.conversation import Role
from peftchat.conversations.formats import names
from peftchat.conversations.formats.names import CALL_ROLES, ROLES
from peftchat.conversations.problems import ProblemLog, RecordError
from peftchat.json_text import parse_json

Fields = Mapping[str, Any]


@dataclass(slots=True)
class Notes:
    """What reading one record after the other has to tell, besides conversations.

    Attributes:
        log: the log of the reading.
        roles: the recipe's own names of roles.
        where: the place of the record.
        is_table: whether the record comes from an Arrow table, which fills structs with nulls.
        speakers: name of a role -> role, the recipe's names and the usual ones except those of calls.
        has_json: whether the record has arguments of calls or definitions of tools as values.
    """

    log: ProblemLog
    roles: Mapping[str, Role] = field(default_factory=dict)
    where: str = ""
    is_table: bool = False
    has_json: bool = False
    speakers: Mapping[str, Role] = field(init=False)
    _unused: dict[str, None] = field(default_factory=dict)
    _changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Put the recipe's names of roles before the usual ones."""
        usual = {name: role for name, role in ROLES.items() if name not in CALL_ROLES}
        self.speakers = {**usual, **self.roles}

    def start(self, where: str, is_table: bool) -> None:
        """Begin a record."""
        self.where, self.is_table, self.has_json = where, is_table, False
        if self._unused or self._changes:
            self._unused, self._changes = {}, []

    def unused(self, name: str) -> None:
        """Note a field that is not used."""
        self._unused[name] = None

    def used(self, name: str) -> None:
        """Take back that a field is not used."""
        self._unused.pop(name, None)

    def unused_of(self, fields: Fields, known: Collection[str], what: str) -> None:
        """Note the fields of a part of the record that are not used.

        Args:
            fields: a turn, a call, a content part.
            known: the names of those that are.
            what: the part, with its article.

        Raises:
            RecordError: one of them may say what is trained.
        """
        for name, value in fields.items():
            if name in known or value in (None, "", [], {}):
                continue
            if names.LOOKS_LIKE_FLAG.search(name) and not isinstance(value, str):
                known_flags = ", ".join((*names.TRAIN_FLAGS, *names.TRAIN_WEIGHTS))
                detail = f"{name!r} in {what} may say what is trained, and is not understood; known in a turn"
                raise RecordError("unknown_flag", f"{detail}: {known_flags}")
            self.unused(f"{name} in {what}")

    def change(self, name: str) -> None:
        """Note that the record was changed; see `NOTES`."""
        self._changes.append(name)

    def finish(self) -> None:
        """Count what was noted about a record that became a conversation."""
        for name in self._unused:
            self.log.add_unused(name, self.where)
        for name in self._changes:
            self.log.notes[name] += 1


def parse_text(text: str) -> Any:
    """The value of JSON text in a field, numbers as they are written.

    Raises:
        ValueError: it is not JSON.
    """
    return parse_json(text)


def text_field(fields: Fields, name: str) -> str:
    """A field that must be text.

    Raises:
        RecordError: it is absent or something else.
    """
    if name not in fields:
        raise RecordError("missing_field", f"no field {name!r}; fields: {field_names(fields)}")
    value = fields[name]
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{name!r} must be text, it is {type_name(value)}")
    return value


def optional_text(fields: Fields, name: str) -> str:
    """A field that may be absent, null or text; "" if it is empty."""
    return "" if fields.get(name) is None else text_field(fields, name)


def optional_id(fields: Fields, known: Sequence[str], what: str) -> str | None:
    """The first of several fields that hold an id, which is text or a number.

    Raises:
        RecordError: it is something else.
    """
    value = next((fields[name] for name in known if fields.get(name) is not None), None)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RecordError("wrong_type", f"an id must be text, it is {type_name(value)} ({what})")


_SWITCHES = frozenset({"on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high"})


def is_switch(value: object) -> bool:
    """Whether a value says how to think, such as `on` or `low`, and is no thought itself."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCHES)


def field_names(fields: Fields) -> str:
    """The names of a record's fields, for messages; at most ten of them."""
    shown = [name if name.isprintable() else reprlib.repr(name) for name in map(str, list(fields)[:10])]
    more = ", …" if len(fields) > len(shown) else ""
    return (", ".join(shown) or "none") + more


def type_name(value: object) -> str:
    """The type of a JSON value in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return "a number"
    if isinstance(value, dict):
        return "an object"
    words = {bool: "true or false", int: "a number", str: "text", list: "a list"}
    return words.get(type(value), type(value).__name__)
