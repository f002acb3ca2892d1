"""A record as it comes out of a file, before anyone knows what it means."""

import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from peftchat.conversation import RankPairs, Role
from peftchat.errors import UserError

MAX_RECORD_BYTES = 16 * 2**20
"""Default limit for one record: a conversation of 16 MiB is a broken file, not a conversation."""


class RawRecord(NamedTuple):
    """One JSON object or table record.

    Attributes:
        where: `file:line` or `file:element`, from 1.
        value: the fields.
        raw: the bytes it was read from, None for tables.
    """

    where: str
    value: dict[str, Any]
    raw: bytes | None

    def as_bytes(self) -> bytes:
        """What a quarantine file shows of the record: its bytes, or its fields as JSON where it came from a table."""
        if self.raw is not None:
            return self.raw
        return json.dumps(self.value, default=str).encode()


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Settings of one reading.

    Attributes:
        languages: keep only conversations in these languages (`en`, `pt-BR`; `pt` includes `pt-BR`); empty keeps all.
            The record's own `lang` field decides where there is one, else a detector.
        oasst_top_k: OASST only: of each turn's ranked replies, follow the best `oasst_top_k`; None follows all.
        oasst_pairs: OASST only: which ranked replies to one prompt are pairs; None is `best_worst`
            (`peftchat.conversations.formats.oasst_pairs`).
        consecutive: what becomes of two turns of one role: `error`, `merge` or `keep`.
        columns: our name of a field -> the file's.
        roles: the file's name of a role, in lower case -> ours.
        max_record_bytes: a longer record is a problem and is not read into memory.
        pairs: read the rejected answer too, and refuse records without one.
        labels: read the label of the answer, and refuse records without one. A pair is two labeled answers.
    """

    languages: tuple[str, ...] = ()
    oasst_top_k: int | None = None
    oasst_pairs: RankPairs | None = None
    consecutive: str = "error"
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    max_record_bytes: int = MAX_RECORD_BYTES
    pairs: bool = False
    labels: bool = False


Kind = Literal[
    "not_json",
    "not_utf8",
    "nul_character",
    "lone_surrogate",
    "nested_too_deep",
    "record_too_long",
    "broken_file",
    "other_columns",
    "not_an_object",
    "missing_field",
    "wrong_type",
    "other_format",
    "unknown_role",
    "repeated_role",
    "system_not_first",
    "no_answer",
    "empty_content",
    "unsupported_content",
    "broken_tree",
    "unknown_flag",
    "two_system_messages",
    "repeated_key",
    "identical_answers",
    "no_prompt",
]

KINDS: dict[Kind, str] = {
    "not_json": "the record is not JSON",
    "not_utf8": "the record is not UTF-8 text",
    "nul_character": "the text holds a NUL character",
    "lone_surrogate": "the text holds half of a surrogate pair",
    "nested_too_deep": "the JSON is nested too deep to be a conversation",
    "record_too_long": "the record is longer than the limit",
    "broken_file": "the rest of a file cannot be read",
    "other_columns": "the row has another number of columns than the header",
    "not_an_object": "the record is JSON but not an object",
    "missing_field": "a field of the format is missing",
    "wrong_type": "a field holds another type than its format says",
    "other_format": "the record lacks the fields of the format that the file is read as",
    "unknown_role": "a turn has a role that the format does not know",
    "repeated_role": "two turns of one role follow each other",
    "system_not_first": "a system message stands behind other turns",
    "no_answer": "the conversation has no assistant message",
    "empty_content": "a message is empty",
    "unsupported_content": "a turn holds something other than text",
    "broken_tree": "a message does not belong to any tree of its file",
    "unknown_flag": "a field that may say what is trained is not understood",
    "repeated_key": "a key is there twice in one object",
    "two_system_messages": "the system prompt beside the turns is not that of the turns",
    "identical_answers": "the chosen answer of a pair is the rejected one",
    "no_prompt": "the answers of a pair do not answer one prompt",
}

NOTES: dict[str, str] = {
    "trailing_user_trimmed": "an unanswered user turn at the end taken off",
    "turns_merged": "a turn joined with the one before it, of the same role",
    "arrow_nulls_removed": "nulls with which a table fills tool calls taken out",
    "constants_removed": "a field that is NaN or Infinity taken as absent",
    "call_that_is_not_json": "a tool call that is not JSON kept as text",
    "call_of_no_tool": "a call of a function that the record's tools do not define (kept)",
    "answer_beside_turns": "an answer in a field of its own put behind the turns",
    "template_marks_removed": "a prompt with the marks of a chat template read as turns",
    "tools_respelled": "definitions of tools written as OpenAI's chat API has them, which templates know",
}
"""Change of a record -> what it is, as tables say it."""

STRICT_SCAN_RECORDS = 10_000
"""How many more conversations a strict reader looks at, after the first problem, to say how many there are."""
STRICT_SCAN_PROBLEMS = 1_000
_EXAMPLES_PER_KIND = 3
_MOST_UNREAD = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """One record that cannot be used.

    Attributes:
        where: `file:line` (or `file:element` for JSON arrays and tables), from 1.
        kind: a key of `KINDS`.
        detail: what exactly, for this record.
    """

    where: str
    kind: Kind
    detail: str

    def __str__(self) -> str:
        """`where: detail`."""
        return f"{self.where}: {self.detail}"


@dataclass(slots=True)
class UnusedField:
    """A field that nothing is trained on.

    Attributes:
        records: how many records have it.
        first: the first of them, `file:line`.
    """

    records: int
    first: str


_MOST_UNUSED = 100
_OTHER_FIELDS = "other fields"


class RecordError(Exception):
    """A record cannot become a conversation; the reader that knows its place turns it into a `Problem`."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class ProblemLog:
    """Counts what happened to the records of one reading.

    Args:
        strict: end the reading with an `UserError` at the first problem instead of going on without the record.
        quarantine: called with each problem and the raw record (None where the record has no bytes of its own).

    Attributes:
        prepare_options: what `data prepare` needs to read the same records, such as ` --pairs`.
        records: records read from files, valid and invalid.
        problems: records that could not be used, by kind.
        skipped: records left out on purpose, by the name of the rule.
        notes: records that were kept but changed, or are worth knowing about, by name.
        unused: fields that are not used, by name.
        examples: the first few problems of each kind.
        formats: source file -> format it was read as.
        commits: hub data set -> the commit that was read.
        unread: files beside them that are not read -> why.
        remarks: what else a user should know about records, as the end of a sentence -> in how many.
        told: what else a user should know about the data, in sentences.
        most_unused: how many names of fields are kept.
    """

    def __init__(
        self, *, strict: bool = False, quarantine: Callable[[Problem, bytes | None], None] | None = None
    ) -> None:
        self.strict = strict
        self.prepare_options = ""
        self.records = 0
        self.problems: Counter[Kind] = Counter()
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.examples: defaultdict[Kind, list[Problem]] = defaultdict(list)
        self.unused: dict[str, UnusedField] = {}
        self.formats: dict[str, str] = {}
        self.commits: dict[str, str] = {}
        self.unread: dict[str, str] = {}
        self.remarks: Counter[str] = Counter()
        self.told: list[str] = []
        self.first: Problem | None = None
        self.most_unused = _MOST_UNUSED
        self._quarantine = quarantine

    @property
    def total(self) -> int:
        """The number of problems, of all kinds."""
        return self.problems.total()

    def sentences(self) -> list[str]:
        """What a user should know: commits, files that are not read, and all remarks."""
        found = [f"{name} was read at commit {commit}." for name, commit in self.commits.items()]
        found += [f"{file} is not read: {why}." for file, why in itertools.islice(self.unread.items(), _MOST_UNREAD)]
        if len(self.unread) > _MOST_UNREAD:
            found.append(f"{len(self.unread) - _MOST_UNREAD:,} more files are not read.")
        for remark, count in self.remarks.items():
            found.append(f"In {count:,} record{'s' if count > 1 else ''} {remark}.")
        return found + self.told

    def add(self, problem: Problem, raw: bytes | None = None) -> None:
        """Record a record that cannot be used.

        Raises:
            UserError: in strict mode, once there are more problems than are worth counting.
        """
        if self.first is None:
            self.first = problem
        self.problems[problem.kind] += 1
        examples = self.examples[problem.kind]
        if len(examples) < _EXAMPLES_PER_KIND:
            examples.append(problem)
        if self._quarantine is not None:
            self._quarantine(problem, raw)
        if self.strict and self.total >= STRICT_SCAN_PROBLEMS:
            raise self.failure()

    def add_unused(self, name: str, where: str, records: int = 1) -> None:
        """Count records with a field that is not used; the names of the first hundred fields are kept."""
        if name not in self.unused and len(self.unused) >= self.most_unused:
            name = _OTHER_FIELDS
        if name in self.unused:
            self.unused[name].records += records
        else:
            self.unused[name] = UnusedField(records, where)

    def take(self, part: "PartOfLog") -> None:
        """Count what happened to the next records, which another log has counted."""
        self.records += part.records
        for problem, raw in part.problems:
            self.add(problem, raw)
        for mine, its in (
            (self.skipped, part.skipped),
            (self.notes, part.notes),
            (self.remarks, part.remarks),
        ):
            mine.update(its)
        for name, field_of_part in part.unused.items():
            self.add_unused(name, field_of_part.first, field_of_part.records)

    def failure(self) -> UserError:
        """The error of a strict reading: the first problem, and how many more were seen behind it."""
        if self.first is None:
            raise ValueError("no problem was recorded")
        more = self.total - 1
        what = self.first.detail
        if more:
            what += f" ({more:,} more problem{'s' if more > 1 else ''} in the records behind it)"
        return UserError(
            what,
            where=self.first.where,
            hint=f"Repair the records, or let `peftchat data prepare{self.prepare_options}` write a clean file "
            "and put the bad records aside.",
        )


@dataclass(slots=True)
class PartOfLog:
    """What happened to the records of a part of a file: what a `ProblemLog` of a whole one needs to know of it."""

    records: int
    problems: list[tuple[Problem, bytes | None]]
    skipped: Counter[str]
    notes: Counter[str]
    remarks: Counter[str]
    unused: dict[str, UnusedField]


class PartLog(ProblemLog):
    """The log of a part of a file; every problem and every name of a field is kept."""

    def __init__(self) -> None:
        self._kept: list[tuple[Problem, bytes | None]] = []
        super().__init__(quarantine=lambda problem, raw: self._kept.append((problem, raw)))
        self.most_unused = sys.maxsize

    def part(self) -> PartOfLog:
        """All that was counted."""
        return PartOfLog(self.records, self._kept, self.skipped, self.notes, self.remarks, self.unused)
