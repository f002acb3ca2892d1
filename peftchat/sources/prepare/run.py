"""One pass over a source: clean, free of duplicates, split, counted."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import orjson

from peftchat import __version__
from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from peftchat.sources.fingerprint import fingerprint
from peftchat.sources.options import ReadOptions
from peftchat.sources.prepare.card import SKIPPED, Card, SideCount, card_text
from peftchat.sources.prepare.folder import DialogueFile, Quarantine, appearing_folder
from peftchat.sources.prepare.seen import SeenDialogues
from peftchat.sources.problems import KINDS, ProblemLog
from peftchat.sources.reading import read_conversations
from peftchat.sources.row import MAX_ROW_BYTES
from peftchat.sources.splitting import EvalSplit, SplitCensus

_TRAIN, _EVAL, _WHOLE = "train.jsonl", "eval.jsonl", ".whole.jsonl"


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """What to make of a source.

    Attributes:
        format: input form, or `auto`.
        split: of a folder or hub data set.
        languages: keep only these; empty keeps all.
        top_k: OpenAssistant only: follow the best `top_k` replies of each turn.
        eval_fraction: share of first user messages whose dialogues are held out.
        seed: of that choice.
        strict: end at the first problem.
        max_dialogues: stop after this many.
        max_row_bytes: a longer row is a problem.
    """

    format: str = "auto"
    split: str | None = None
    languages: tuple[str, ...] = ()
    top_k: int | None = None
    eval_fraction: float = 0.1
    seed: int = 0
    strict: bool = False
    max_dialogues: int | None = None
    max_row_bytes: int = MAX_ROW_BYTES


def _no_progress(dialogues: int) -> None:
    """Say nothing."""


def prepare(
    source: str, folder: Path, settings: PrepareSettings, progress: Callable[[int], None] = _no_progress
) -> Card:
    """Write `train.jsonl`, `eval.jsonl`, `card.md`, `card.json` and, if any row is bad, `quarantine.jsonl`.

    Exact duplicates are left out. Memory does not grow with the source. Everything is written beside `folder` first
    and renamed at the end.

    Args:
        source: a file, a folder or a hub id.
        folder: absent or empty.
        settings: what to make of the source.
        progress: called with the number of dialogues seen so far.

    Raises:
        InputError: as `read_conversations`; or `folder` is not empty or cannot be written, or no dialogue is left.
    """
    started = time.monotonic()
    card = Card(source, asdict(settings), __version__)
    with appearing_folder(folder) as draft:
        with Quarantine(draft / "quarantine.jsonl") as quarantine:
            log = ProblemLog(strict=settings.strict, quarantine=quarantine.write)
            dialogues = _dialogues(source, settings, log, card)
            split = _write_sides(_new_only(dialogues, draft, log, progress), draft, settings, card)
        card.take(log)
        if not card.train.dialogues + card.eval.dialogues:
            raise UserError("no dialogue is left", where=source, cure=_why_nothing(card))
        if split is not None:
            _split_again(draft, split, card)
        card.seconds = round(time.monotonic() - started, 3)
        (draft / "card.md").write_text(card_text(card), encoding="utf-8")
        (draft / "card.json").write_bytes(orjson.dumps(card.as_dict(), option=orjson.OPT_INDENT_2))
    return card


def _dialogues(source: str, settings: PrepareSettings, log: ProblemLog, card: Card) -> Iterator[Conversation]:
    options = ReadOptions(settings.languages, settings.top_k, settings.max_row_bytes)
    stream = read_conversations(source, format=settings.format, split=settings.split, problems=log, options=options)
    yield from islice(stream, settings.max_dialogues)
    card.stopped_early = next(stream, None) is not None


def _new_only(
    stream: Iterator[Conversation], draft: Path, log: ProblemLog, progress: Callable[[int], None]
) -> Iterator[Conversation]:
    with SeenDialogues(draft / ".seen") as seen:
        for number, conversation in enumerate(stream, start=1):
            progress(number)
            if seen.add(fingerprint(conversation.messages)):
                yield conversation
            else:
                log.skipped["duplicate"] += 1


def _write_sides(
    stream: Iterator[Conversation], draft: Path, settings: PrepareSettings, card: Card
) -> EvalSplit | None:
    """Write both files by the split that large sets end with; return another if the set turns out to need it."""
    census = SplitCensus(settings.eval_fraction, settings.seed)
    split = census.tentative
    with DialogueFile(draft / _TRAIN, card.train) as train, DialogueFile(draft / _EVAL, card.eval) as held_out:
        for conversation in stream:
            number = split.number(conversation)
            census.see(number)
            (held_out if number < split.threshold else train).write(conversation)
    settled = census.settle()
    return None if settled == split else settled


def _split_again(draft: Path, split: EvalSplit, card: Card) -> None:
    """Divide a small set anew, of which all fell on one side."""
    for name in (_TRAIN, _EVAL):
        if (draft / name).stat().st_size:
            (draft / name).rename(draft / _WHOLE)
    card.train, card.eval = SideCount(), SideCount()
    with DialogueFile(draft / _TRAIN, card.train) as train, DialogueFile(draft / _EVAL, card.eval) as held_out:
        for conversation in _reread(draft / _WHOLE):
            (held_out if split.is_eval(conversation) else train).write(conversation)
    (draft / _WHOLE).unlink()


def _reread(path: Path) -> Iterator[Conversation]:
    with path.open("rb") as lines:
        for line in lines:
            row = orjson.loads(line)
            messages = tuple(Message(**message) for message in row["messages"])
            yield Conversation(messages, row["source"])


def _why_nothing(card: Card) -> str:
    reasons = [f"in {count:,} {KINDS[kind]}" for kind, count in card.problems.items()]
    reasons += [f"{count:,} {SKIPPED[rule]}" for rule, count in card.skipped.items()]
    return f"What became of the {card.rows:,} rows: {'; '.join(reasons) or 'nothing'}."
