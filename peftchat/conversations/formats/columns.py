"""A source's own names of its fields: `columns` of the recipe, applied to records before a format reads them."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from peftchat.conversations.formats import names
from peftchat.conversations.formats.fields import field_names, parse_text
from peftchat.conversations.problems import ProblemLog, RawRecord
from peftchat.errors import UserError

IN_TURNS = ("role", "content", "tool_calls", "reasoning_content", "train")
"""Our names that fields of a turn can have."""
IN_RECORDS = ("system", "tools", "train", "chosen", "rejected", "lang")
"""Our names that every format reads beside its own."""
_HOLD_TURNS = frozenset({*names.TURNS, *names.ASKED, *names.ANSWERED, names.CHOSEN, names.REJECTED, names.HISTORY})
_TURNS_AS_TEXT = re.compile(r"\s*\[\s*\{")


class Columns:
    """The mapping of one source, and which of its names were found.

    Args:
        columns: our name of a field -> the file's.
        source: the path or hub id, for messages.

    Raises:
        UserError: one field of the file stands for two of ours.
    """

    def __init__(self, columns: Mapping[str, str], source: str) -> None:
        self._given = {theirs: ours for ours, theirs in columns.items()}
        self._columns = columns
        self._source = source
        self._missing = set(self._given)
        self._found: dict[str, None] = {}
        for theirs in self._given:
            twice = [name for name, field in columns.items() if field == theirs]
            if len(twice) > 1:
                fields = " and ".join(f"`{name}`" for name in twice)
                raise UserError(
                    f"`columns` takes {fields} from one field, {theirs!r}",
                    where=source,
                    hint="Give each of them a field of its own, or leave one out.",
                )

    def apply(self, records: Iterable[RawRecord], problems: ProblemLog) -> Iterator[RawRecord]:
        """The records under our names; a field that gives way to a mapped one is counted as not used."""
        for record in records:
            given_way: dict[str, None] = {}
            value = self.rename(record.value, given_way)
            for name in given_way:
                problems.add_unused(name, record.where)
            yield record._replace(value=value)

    def rename(self, fields: dict[str, Any], given_way: dict[str, None] | None = None) -> dict[str, Any]:
        """A record with its fields, and those of its turns, under our names.

        Args:
            fields: the record.
            given_way: takes the names of fields whose place a mapped one has taken.
        """
        lost = {} if given_way is None else given_way
        renamed = self._names(fields, lost, "")
        for name in _HOLD_TURNS & renamed.keys():
            value = renamed[name]
            if isinstance(value, str) and self._in_turns:
                value = _turns_of_text(value)
            if isinstance(value, list):
                renamed[name] = [
                    self._names(turn, lost, " in a turn") if isinstance(turn, dict) else turn for turn in value
                ]
        return renamed

    @property
    def _in_turns(self) -> bool:
        return any(ours in IN_TURNS for ours in self._columns)

    def _names(self, fields: Mapping[str, Any], given_way: dict[str, None], level: str) -> dict[str, Any]:
        """Rename one object; a field of the same name as a mapped one gives way, unless the mapped one is absent."""
        present = self._given.keys() & fields.keys()
        self._missing -= present
        if len(self._found) < _MOST_NAMES:
            self._found.update(dict.fromkeys(fields))
        taken = {self._given[name] for name in present}
        renamed = {}
        for name, value in fields.items():
            if name in present:
                renamed[self._given[name]] = value
            elif name in taken:
                if value is not None:
                    given_way[f"{name}{level}"] = None
            else:
                renamed[name] = value
        return renamed

    def check_found(self) -> None:
        """Check that every name was found in a record.

        Raises:
            UserError: one was not.
        """
        for theirs in self._given:
            if theirs in self._missing:
                raise UserError(
                    f"no record has the field {theirs!r}, which `columns` gives for `{self._given[theirs]}`; "
                    f"found: {field_names(self._found)}",
                    where=self._source,
                    hint="Write the name as the file has it.",
                )

    def check_format(self, name: str, known: Collection[str]) -> None:
        """Check that the format reads every field that the mapping gives.

        Args:
            name: of the format.
            known: our names of fields that it reads.

        Raises:
            UserError: it does not, or no record has such a field.
        """
        unknown = [ours for ours in self._columns if ours not in known]
        if unknown:
            self.check_found()
            what = f"can give: {', '.join(known)}" if known else "cannot give any: they always have the same names"
            raise UserError(
                f"the records are read as `{name}`, which has no field `{unknown[0]}`; `columns` {what}",
                where=self._source,
                hint="Change `columns`, or name the `format` (`peftchat data formats` shows their fields).",
            )


_MOST_NAMES = 50


def _turns_of_text(text: str) -> list[Any] | None:
    """The turns that a field holds as JSON text; None where it is text of another kind."""
    if not _TURNS_AS_TEXT.match(text):
        return None
    try:
        value = parse_text(text)
    except ValueError:
        return None
    return value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else None
