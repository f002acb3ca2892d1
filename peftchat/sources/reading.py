"""The way in: a path becomes a stream of dialogues."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from peftchat.conversation import Conversation
from peftchat.errors import UserError
from peftchat.sources.forms import FORMS, Form, find_form, matching_form
from peftchat.sources.forms.turns import field_names
from peftchat.sources.options import ReadOptions
from peftchat.sources.problems import STRICT_SCAN_ROWS, ProblemLog
from peftchat.sources.readers import find_files, reader_for
from peftchat.sources.readers.hub import read_hub
from peftchat.sources.row import Row

_DETECT_ROWS = 20


def read_conversations(
    path: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    problems: ProblemLog | None = None,
    options: ReadOptions | None = None,
) -> Iterator[Conversation]:
    """The dialogues of a file, a folder of files or a hub data set, one at a time.

    Memory does not grow with the number of rows; only OpenAssistant exports are remembered (to find duplicates), and
    those of single messages held until the file ends.

    Args:
        path: a `.jsonl`, `.jsonl.gz`, `.json`, `.parquet` or `.csv` file, a folder of them, or a hub id.
        format: one of `list_formats()`; `auto` decides by the first rows of each file.
        split: of a folder or hub data set; see `find_files`.
        problems: where bad rows are counted; by default a strict log, so that the first one ends the reading.
        options: languages, OASST rank limit, row limit.

    Raises:
        InputError: path, format or split do not exist, no form fits, `top_k` is set for a form without ranks, or, in
            strict mode, a row has a problem. Path and format are checked at once, before the first dialogue is asked
            for.
    """
    log = ProblemLog(strict=True) if problems is None else problems
    settings = options or ReadOptions()
    form = None if format == "auto" else find_form(format)
    if form is not None:
        _check_rank_limit(str(path), form, settings)
    files = find_files(str(path), split)
    if files is None:
        sources = [(str(path), read_hub(str(path), split, log))]
    else:
        sources = [(str(file), _rows(file, settings, log)) for file in files]
    stream = _all_sources(str(path), sources, form, settings, log)
    return _until_problem(stream, log) if log.strict else stream


def _rows(file: Path, options: ReadOptions, problems: ProblemLog) -> Iterator[Row]:
    reader = reader_for(file)
    if reader is None:
        raise ValueError(f"no reader for {file}")
    try:
        yield from reader(file, options.max_row_bytes, problems)
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror or error}", where=str(file)) from error


def _all_sources(
    path: str,
    sources: list[tuple[str, Iterator[Row]]],
    form: Form | None,
    options: ReadOptions,
    problems: ProblemLog,
) -> Iterator[Conversation]:
    before = problems.rows + problems.total
    for name, rows in sources:
        yield from _source(name, rows, form, options, problems)
    if problems.rows + problems.total == before:
        raise UserError("there are no rows", where=path, cure="Give a file with rows.")


def _source(
    name: str, rows: Iterator[Row], form: Form | None, options: ReadOptions, problems: ProblemLog
) -> Iterator[Conversation]:
    """The dialogues of one file, its form settled first."""
    first = list(itertools.islice(rows, _DETECT_ROWS))
    if form is None and first:
        form = _detect(name, first)
    if form is None:
        return
    _check_rank_limit(name, form, options)
    problems.forms[name] = form.name
    yield from form.read(_chain(first, rows), options, problems)


def _check_rank_limit(name: str, form: Form, options: ReadOptions) -> None:
    if options.top_k is not None and not form.ranked:
        raise UserError(
            f"`top_k` chooses answers by rank, and the form `{form.name}` has no ranks",
            where=name,
            cure="Leave `top_k` out; OpenAssistant exports have ranks.",
        )


def _chain(first: list[Row], rest: Iterator[Row]) -> Iterator[Row]:
    yield from first
    # The rows looked at for detection must not stay in memory for the length of the file.
    first.clear()
    yield from rest


def _detect(name: str, rows: Iterable[Row]) -> Form:
    """The form of the first row that has one."""
    shown = ""
    for row in rows:
        form = matching_form(row.value)
        if form is not None:
            return form
        shown = shown or field_names(row.value)
    raise UserError(
        f"no known form has the fields found here: {shown}",
        where=name,
        cure=f"Known forms: {', '.join(FORMS)} (`peftchat data formats` shows their fields).",
    )


def _until_problem(stream: Iterator[Conversation], problems: ProblemLog) -> Iterator[Conversation]:
    """The dialogues up to the first problem, which becomes the error; a little further on others are counted."""
    for conversation in stream:
        if problems.first is not None:
            break
        yield conversation
    if problems.first is not None:
        for _ in itertools.islice(stream, STRICT_SCAN_ROWS):
            pass
        raise problems.failure()
