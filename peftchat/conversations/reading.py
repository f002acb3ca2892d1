"""Several sources as one stream."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peftchat.conversation import Conversation
from peftchat.conversations.formats import FORMATS, Fields, Format, find_format, matching_format, names
from peftchat.conversations.formats.base import field_names
from peftchat.conversations.formats.columns import Columns
from peftchat.conversations.formats.names import normalize_role
from peftchat.conversations.languages import check_languages
from peftchat.conversations.parts_of_file import Work, is_read_in_parts, parts_of, read_rest, records_of
from peftchat.conversations.problems import STRICT_SCAN_RECORDS, ProblemLog, RawRecord, ReadOptions
from peftchat.conversations.readers import check_no_hub_keys, find_data, reader_for
from peftchat.conversations.readers.hub import read_hub
from peftchat.conversations.splitting import seeded_fraction
from peftchat.errors import UserError

if TYPE_CHECKING:
    from peftchat.recipe import DataEntry

T = TypeVar("T")


def read_sources(
    entries: "Sequence[DataEntry]",
    seed: int = 0,
    *,
    problems: ProblemLog | None = None,
    consecutive: str = "error",
) -> Iterator[Conversation]:
    """The conversations of several sources, one source after the other, each conversation as often as its source's
    weight says.

    Weight 1 uses every conversation once, 2 twice, 0.5 a half, 1.5 every conversation once and a half of them twice.
    Which half depends on `seed` and the conversation's place alone. Shuffling is left to whoever draws batches.

    Raises:
        UserError: as `read_conversations`; paths and formats of all entries are checked before the first conversation.
    """
    numbered = read_numbered(entries, seed, problems=problems, consecutive=consecutive)
    return (conversation for _, conversation in numbered)


def read_numbered(
    entries: "Sequence[DataEntry]",
    seed: int = 0,
    *,
    problems: ProblemLog | None = None,
    consecutive: str = "error",
    weighted: bool = True,
    pairs: bool = False,
    labels: bool = False,
) -> Iterator[tuple[int, Conversation]]:
    """What `read_sources` yields, each conversation with the number of its source.

    Args:
        entries: the sources.
        seed: chooses what a weight leaves out.
        problems: as in `read_conversations`.
        consecutive: what becomes of two turns of one role.
        weighted: whether the weights count; without them each conversation comes once.
        pairs: read preference pairs, and refuse records that are none.
        labels: read labeled answers, and refuse records without a label.
    """
    log = ProblemLog(strict=True) if problems is None else problems
    streams = [
        _weighted(
            read_conversations(
                entry.path,
                format=entry.format,
                split=entry.split,
                subset=entry.subset,
                revision=entry.revision,
                problems=log,
                options=ReadOptions(
                    languages=entry.languages,
                    oasst_top_k=entry.oasst_top_k,
                    oasst_pairs=entry.oasst_pairs,
                    consecutive=consecutive,
                    columns={str(ours): theirs for ours, theirs in entry.columns.items()},
                    roles={normalize_role(theirs): ours for theirs, ours in entry.roles.items()},
                    pairs=pairs,
                    labels=labels,
                ),
            ),
            entry.weight if weighted else 1.0,
            f"{seed} {place}",
            log,
        )
        for place, entry in enumerate(entries)
    ]
    return chain.from_iterable(zip(itertools.repeat(place), stream) for place, stream in enumerate(streams))


def _weighted(
    conversations: Iterator[Conversation], weight: float, seed: str, problems: ProblemLog
) -> Iterator[Conversation]:
    if weight == 1:
        yield from conversations
        return
    whole, share = divmod(weight, 1)
    for number, conversation in enumerate(conversations):
        copies = int(whole) + (seeded_fraction(seed, str(number)) < share)
        if not copies:
            problems.skipped["left_out_by_weight"] += 1
        elif copies > 1:
            problems.notes["repeated_by_weight"] += copies - 1
        for _ in range(copies):
            yield conversation


_DETECT_RECORDS = 20


def read_conversations(
    path: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    problems: ProblemLog | None = None,
    options: ReadOptions | None = None,
) -> Iterator[Conversation]:
    """Yield the conversations of a file, a folder of files or a hub data set, one at a time.

    Memory does not grow with the number of records; only OpenAssistant exports are remembered (to find duplicates), and
    those of single messages held until the file ends.

    Args:
        path: a file, a folder or a pattern of files (`peftchat.conversations.readers.finding`), or a hub id.
        format: one of `list_formats()`; `auto` decides by the first records of each file.
        split: of a folder or hub data set; see `find_files`.
        subset: of a hub data set that has several.
        revision: branch, tag or commit of a hub data set.
        problems: where bad records are counted; by default a strict log, so that the first one ends the reading.
        options: languages, OASST rank limit, record limit.

    Raises:
        UserError: path, format or split do not exist, no format fits, `oasst_top_k` is set for a format without
            ranks, or, in strict mode, a record is invalid. Path and format are checked at once, before the first
            conversation is asked for.
    """
    return read_and_make(
        path,
        iter,
        format=format,
        split=split,
        subset=subset,
        revision=revision,
        problems=problems,
        options=options,
        in_parts=False,
    )


def read_and_make(
    path: str | Path,
    make: Callable[[Iterable[Any]], Iterator[T]],
    *,
    format: str = "auto",
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    problems: ProblemLog | None = None,
    options: ReadOptions | None = None,
    in_parts: bool = True,
    takes_plain: bool = False,
) -> Iterator[T]:
    """What `make` makes of the conversations, in order; the other arguments are those of `read_conversations`.

    Args:
        make: what becomes of the conversations of a file, or of a part of one; it must depend on nothing else.
        in_parts: several processes may read a large file, and call `make`. The log then runs ahead of what is
            returned by a part of the file, and all of a file is read, unless the reader stops.
        takes_plain: where a file is read in parts, `make` takes a `PlainRecord` in place of a conversation.
    """
    log = ProblemLog(strict=True) if problems is None else problems
    settings = options or ReadOptions()
    log.prepare_options = " --pairs" if settings.pairs else " --labels" if settings.labels else ""
    check_languages(settings.languages)
    data_format = None if format == "auto" else find_format(format)
    columns = Columns(settings.columns, str(path)) if settings.columns else None
    if data_format is not None:
        _check_ranks(str(path), data_format, settings)
    found = find_data(str(path), split)
    log.unread.update(found.unread)
    if found.files is None:
        sources = [_Records(str(path), read_hub(str(path), split, log, subset=subset, revision=revision))]
    else:
        check_no_hub_keys(str(path), subset, revision)
        split_up = in_parts and not log.strict and columns is None
        sources = [_records_of_file(file, settings, log, split_up) for file in found.files]
    if log.strict:
        read = _all_sources(str(path), sources, data_format, columns, settings, log, iter)
        return make(_until_problem(read, log))
    return _all_sources(str(path), sources, data_format, columns, settings, log, make, takes_plain)


@dataclasses.dataclass(slots=True)
class _Records:
    """The records of a file or a hub data set.

    Attributes:
        name: the file or the data set.
        now: all records; of a file that is read in parts, those of the first.
        later: the records of its other parts.
        file: the file that is read in parts.
    """

    name: str
    now: Iterator[RawRecord]
    later: Iterator[RawRecord] = dataclasses.field(default_factory=lambda: iter(()))
    file: Path | None = None

    def as_one(self) -> None:
        """Read all of the file here."""
        self.now, self.later, self.file = chain(self.now, self.later), iter(()), None


def _records_of_file(file: Path, options: ReadOptions, problems: ProblemLog, in_parts: bool) -> _Records:
    if not in_parts or not is_read_in_parts(file):
        return _Records(str(file), _records(file, options, problems))
    parts = (_until_error(file, records_of(file, part, options, problems)) for part in parts_of(file))
    # Nothing is read before the first record is asked for.
    now = chain.from_iterable(itertools.islice(parts, 1))
    return _Records(str(file), now, chain.from_iterable(parts), file)


def _records(file: Path, options: ReadOptions, problems: ProblemLog) -> Iterator[RawRecord]:
    reader = reader_for(file)
    if reader is None:
        raise ValueError(f"no reader for {file}")
    yield from _until_error(file, reader(file, options.max_record_bytes, problems))


def _until_error(file: Path, records: Iterator[RawRecord]) -> Iterator[RawRecord]:
    """The records; an error of the system becomes one of the user's file."""
    try:
        yield from records
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror or error}", where=str(file)) from error


def _all_sources(
    path: str,
    sources: list[_Records],
    data_format: Format | None,
    columns: Columns | None,
    options: ReadOptions,
    problems: ProblemLog,
    make: Callable[[Iterable[Any]], Iterator[T]],
    takes_plain: bool = False,
) -> Iterator[T]:
    before = problems.records + problems.total
    for source in sources:
        yield from _source(source, data_format, columns, options, problems, make, takes_plain)
    if problems.records + problems.total == before:
        raise UserError("there are no records", where=path, hint="Give a file with records.")
    if columns is not None:
        columns.check_found()


def _source(
    source: _Records,
    data_format: Format | None,
    columns: Columns | None,
    options: ReadOptions,
    problems: ProblemLog,
    make: Callable[[Iterable[Any]], Iterator[T]],
    takes_plain: bool = False,
) -> Iterator[T]:
    """The conversations of one file, its format found first."""
    name = source.name
    if columns is not None:
        source.now = columns.apply(source.now, problems)
    first = list(itertools.islice(source.now, _DETECT_RECORDS))
    if len(first) < _DETECT_RECORDS:
        source.as_one()
        first += itertools.islice(source.now, _DETECT_RECORDS - len(first))
    if data_format is None and first:
        data_format = _detect(name, first, columns, pairs=options.pairs or options.labels)
    if data_format is None:
        return
    _check_ranks(name, data_format, options)
    if columns is not None:
        columns.check_format(data_format.name, data_format.columns)
    if options.roles and not data_format.description.has_roles:
        raise UserError(
            f"`roles` renames the roles of turns, and the format `{data_format.name}` has fixed roles",
            where=name,
            hint="Leave `roles` out.",
        )
    problems.formats[name] = data_format.name
    if not data_format.by_record:
        source.as_one()
    yield from make(data_format.read(_chain(first, source.now), options, problems))
    if source.file is not None:
        yield from read_rest(Work(source.file, data_format, options, make, takes_plain), problems)


def _check_ranks(name: str, data_format: Format, options: ReadOptions) -> None:
    """Check that a format has ranks, where an option speaks of them."""
    for key in ("oasst_top_k", "oasst_pairs"):
        if getattr(options, key) is not None and not data_format.ranked:
            raise UserError(
                f"`{key}` chooses answers by rank, and the format `{data_format.name}` has no ranks",
                where=name,
                hint=f"Leave `{key}` out; OpenAssistant exports have ranks.",
            )


def _chain(first: list[RawRecord], rest: Iterator[RawRecord]) -> Iterator[RawRecord]:
    yield from first
    # The records looked at for detection must not stay in memory for the length of the file.
    first.clear()
    yield from rest


def _detect(name: str, records: Iterable[RawRecord], columns: Columns | None, *, pairs: bool) -> Format:
    """The format of the first record that has one."""
    shown = ""
    first: Fields = {}
    for record in records:
        first = first or record.value
        data_format = matching_format(
            {field: item for field, item in record.value.items() if item is not None}, pairs=pairs
        )
        if data_format is not None:
            return data_format
        shown = shown or field_names(record.value)
    if columns is not None:
        columns.check_found()
    if _are_turns(first):
        raise UserError(
            f"the records are turns, not conversations; fields: {shown}",
            where=name,
            hint="Write one conversation per record. If the file is one conversation: "
            "jq -cs '{messages: (if (.[0] | type) == \"array\" then .[0] else . end)}' FILE > FILE.jsonl",
        )
    raise UserError(
        f"no known format has the fields found here: {shown}",
        where=name,
        hint=f"{_found_below(first)}Known formats: {', '.join(FORMATS)} (`peftchat data formats` shows their fields).",
    )


def _in_yaml(name: str) -> str:
    """A field's name as YAML takes it between braces."""
    return name if re.fullmatch(r"\w[\w.-]*", name) else json.dumps(name)


def _found_below(fields: Fields) -> str:
    """What could be read of a record without a known format, as the beginning of a hint."""
    said = [name for name, value in fields.items() if isinstance(value, str | list | dict)]
    partners = {name: name.lower().replace(names.CHOSEN, names.REJECTED) for name in said}
    pairs = [(name, other) for name, other in partners.items() if other != name.lower() and other in said]
    if pairs:
        # A pair has other fields of both answers, such as their models; the texts are longest.
        better, worse = max(pairs, key=lambda pair: len(str(fields[pair[0]])))
        columns = f"{names.CHOSEN}: {_in_yaml(better)}, {names.REJECTED}: {_in_yaml(worse)}"
        return f"They look like preference pairs: `columns: {{{columns}}}` reads the chosen answers. "
    if "custom_id" in fields:
        join = "jq -cs 'group_by(.custom_id)[] | add' REQUESTS RESPONSES > FILE.jsonl"
        return f"The Batch API writes requests and responses into two files; join them: {join}. "
    for field, value in fields.items():
        if isinstance(value, dict) and matching_format(value) is not None:
            record = '(if type == "array" then .[] else . end)'
            return f"They are below the field {field!r}: jq -c '{record}[{json.dumps(field)}]' FILE > FILE.jsonl. "
    turns = [name for name, value in fields.items() if isinstance(value, list) and value and _are_turns(value[0])]
    if len(turns) == 1:
        return f"The field {turns[0]!r} holds turns: `columns: {{messages: {_in_yaml(turns[0])}}}` reads it. "
    if len(turns) > 1:
        return (
            f"Several fields hold turns: {', '.join(map(repr, turns))}. Write the one to train on as `messages`; "
            "of a pair, the better one as `chosen` and the other as `rejected`. "
        )
    if fields.keys() == {"text"}:
        return "A text without marks such as `### Human:` or `<|im_start|>` has no turns that could be told apart. "
    return "Give the file's names with `columns`, such as `{prompt: ask, completion: reply}`. "


def _are_turns(fields: Any) -> bool:
    """Whether a record is a turn: a role and a content."""
    return (
        isinstance(fields, dict)
        and any(name in fields for name in names.ROLE)
        and any(name in fields for name in names.CONTENT)
    )


def _until_problem(stream: Iterator[Conversation], problems: ProblemLog) -> Iterator[Conversation]:
    """The conversations up to the first problem, which becomes the error; a little further on others are counted."""
    for conversation in stream:
        if problems.first is not None:
            break
        yield conversation
    if problems.first is not None:
        for _ in itertools.islice(stream, STRICT_SCAN_RECORDS):
            pass
        raise problems.failure()
