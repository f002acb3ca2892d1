"""Writes the dialogues as training data: a split in which no object is asked about on both sides, and a card."""

import json
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from peftchat import __version__
from peftchat.errors import UserError
from peftchat.files import write_text
from peftchat.sources.from_code.dialogues import CodeDialogue, dialogues_about
from peftchat.sources.from_code.survey import survey


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_dialogues` left in its folder; `card` is the content of `card.json`."""

    folder: Path
    card: dict[str, Any]


def write_dialogues(
    roots: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    max_rows: int | None = None,
    eval_fraction: float = 0.1,
    private: bool = False,
) -> Written:
    """Make dialogues about some code and write `train.jsonl`, `eval.jsonl` and `card.json` into `folder`.

    Args:
        roots: package names, folders or files.
        folder: created where it is missing; files of an earlier call are replaced.
        seed: chooses phrasings, the split and, with `max_rows`, the rows.
        max_rows: at most this many rows in both files together, drawn evenly over the objects.
        eval_fraction: share of the rows held out, from 0 (no eval rows) to below 1.
        private: ask also about names that start with an underscore.

    Raises:
        InputError: a root cannot be read, nothing documented was found, or `folder` cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, not a folder", where=str(folder), cure="Name a folder with -o.")
    found = survey(roots, private=private)
    everything = list(dialogues_about(found, seed=seed))
    if not everything:
        raise UserError(
            f"no documented function, class or module in the {found.files} files read",
            where=", ".join(roots),
            cure="Dialogues are made from docstrings and signatures: add docstrings, or name another package.",
        )
    kept = _draw(everything, max_rows, seed)
    train, held_out = split(kept, eval_fraction, seed)
    card = {
        "made_by": f"peftchat {__version__} data from-code",
        "roots": list(roots),
        "seed": seed,
        "max_rows": max_rows,
        "eval_fraction": eval_fraction,
        "split_by": "object",
        "files_read": found.files,
        "objects": len(found.objects),
        "dialogues_made": len(everything),
        "left_out_by_max_rows": len(everything) - len(kept),
        "skipped": dict(sorted(found.skipped.items())),
        "unreadable": list(found.unreadable),
        "train": _facts(train),
        "eval": _facts(held_out),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "train.jsonl", _lines(train))
        write_text(folder / "eval.jsonl", _lines(held_out))
        write_text(folder / "card.json", json.dumps(card, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", where=str(folder), cure="Name another folder."
        ) from error
    return Written(folder, card)


def split(
    dialogues: Sequence[CodeDialogue], eval_fraction: float, seed: int
) -> tuple[list[CodeDialogue], list[CodeDialogue]]:
    """(train, eval), shuffled; a class, its methods and its properties are on one side together."""
    rng = random.Random(f"{seed}:split")
    groups = sorted({dialogue.group for dialogue in dialogues})
    rng.shuffle(groups)
    sizes = Counter(dialogue.group for dialogue in dialogues)
    wanted = round(len(dialogues) * eval_fraction)
    held_out: set[str] = set()
    rows = 0
    for group in groups:
        # A group that would overshoot by more than it helps is passed over: one big class must not fill the eval set.
        if rows < wanted and (rows + sizes[group] <= 1.5 * wanted or sizes[group] == 1):
            held_out.add(group)
            rows += sizes[group]
    train = [dialogue for dialogue in dialogues if dialogue.group not in held_out]
    test = [dialogue for dialogue in dialogues if dialogue.group in held_out]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _draw(dialogues: Sequence[CodeDialogue], limit: int | None, seed: int) -> list[CodeDialogue]:
    """At most `limit` dialogues: one of each object before a second of any."""
    if limit is None or len(dialogues) <= limit:
        return list(dialogues)
    rng = random.Random(f"{seed}:draw")
    shuffled = rng.sample(range(len(dialogues)), len(dialogues))
    seen: Counter[str] = Counter()
    rounds = []
    for index in shuffled:
        rounds.append((seen[dialogues[index].object], index))
        seen[dialogues[index].object] += 1
    rounds.sort(key=itemgetter(0))  # stable: the shuffled order stays within a round
    return [dialogues[index] for index in sorted(index for _, index in rounds[:limit])]


def _facts(dialogues: Sequence[CodeDialogue]) -> dict[str, Any]:
    answers = [
        len(message.content)
        for dialogue in dialogues
        for message in dialogue.conversation.messages
        if message.role == "assistant"
    ]
    return {
        "rows": len(dialogues),
        "objects": len({dialogue.object for dialogue in dialogues}),
        "turns": sum(len(dialogue.conversation.messages) for dialogue in dialogues),
        "kinds": dict(sorted(Counter(dialogue.kind for dialogue in dialogues).items())),
        "mean_answer_characters": round(statistics.fmean(answers), 1) if answers else 0,
    }


def _lines(dialogues: Sequence[CodeDialogue]) -> str:
    rows = ({"messages": item.conversation.as_dicts(), "object": item.object} for item in dialogues)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
