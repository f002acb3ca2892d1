"""Held-out losses by conversation: `eval_losses.jsonl`, and their means by source, role, kind, turn and length."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from peftchat.files import write_text
from peftchat.runs.eval_lines import read_lines

_LENGTHS = (64, 256, 1024, 4096, 16384)
"""Upper bounds of the buckets of lengths, in tokens."""

_TURNS_SHOWN = 5
"""Turns from this one on share a bucket."""

_SOURCES_SHOWN = 20
"""Files with a line of their own; the others share one."""


class GroupLoss(BaseModel):
    """The held-out loss on a group of targets, in nats per token.

    Attributes:
        conversations: those with a target in the group; None where an older version did not count them.
        tokens: the held-out targets of the group.
        before: the loss before the first step; None where it was not measured.
        after: the loss of the weights that are kept.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    conversations: int | None = None
    tokens: int
    before: float | None = None
    after: float


@dataclass(frozen=True, slots=True)
class PartLoss:
    """The targets of one kind in one turn of a conversation.

    Attributes:
        role: of the turn; None for text of the template outside the turns.
        turn: its number among the turns of its role, from 1 on.
        kind: of text: `content`, `reasoning`, `tool_calls` or `other`.
        tokens: targets.
        loss: sum of their negative log-likelihoods in nats.
        loss_before: the same before the first step; None where it was not measured.
    """

    role: str | None
    turn: int
    kind: str
    tokens: int
    loss: float
    loss_before: float | None = None


@dataclass(frozen=True, slots=True)
class ConversationLoss:
    """The held-out loss of one conversation.

    Attributes:
        source: where it came from, `file:line`.
        length: tokens, of the longest of its examples.
        parts: its targets by turn and kind.
    """

    source: str
    length: int
    parts: tuple[PartLoss, ...]

    @property
    def tokens(self) -> int:
        """The number of its targets."""
        return sum(part.tokens for part in self.parts)

    @property
    def loss(self) -> float:
        """The sum of its targets' negative log-likelihoods in nats."""
        return sum(part.loss for part in self.parts)

    @property
    def loss_before(self) -> float | None:
        """The same before the first step; None where it was not measured."""
        known = [part.loss_before for part in self.parts if part.loss_before is not None]
        return sum(known) if len(known) == len(self.parts) else None

    def as_before(self) -> Self:
        """Return the losses of an evaluation before the first step as such."""
        return replace(self, parts=tuple(replace(part, loss_before=part.loss) for part in self.parts))

    def with_before(self, noted: "ConversationLoss") -> Self:
        """Return these losses with those before the first step that were noted, if both have the same targets."""
        earlier = {(one.role, one.turn, one.kind, one.tokens): one.loss_before for one in noted.parts}
        keys = [(one.role, one.turn, one.kind, one.tokens) for one in self.parts]
        if noted.source != self.source or set(keys) != set(earlier):
            return self
        parts = [replace(one, loss_before=earlier[key]) for one, key in zip(self.parts, keys, strict=True)]
        return replace(self, parts=tuple(parts))

    def as_line(self) -> dict[str, Any]:
        """Return the line of the file."""
        before = self.loss_before
        return {
            "source": self.source,
            "length": self.length,
            "tokens": self.tokens,
            "loss": self.loss,
            "mean": self.loss / self.tokens,
            "loss_before": before,
            "mean_before": None if before is None else before / self.tokens,
            "parts": [asdict(part) for part in self.parts],
        }


def write_eval_losses(path: Path, conversations: Iterable[ConversationLoss]) -> None:
    """Write one line per conversation."""
    write_text(path, "".join(json.dumps(one.as_line(), ensure_ascii=False) + "\n" for one in conversations))


def read_eval_losses(path: Path) -> list[ConversationLoss]:
    """Read what `write_eval_losses` wrote; nothing where the file is missing or is another program's."""
    return read_lines(
        path,
        lambda line: ConversationLoss(
            line["source"], line["length"], tuple(PartLoss(**part) for part in line["parts"])
        ),
    )


def add_before(after: Sequence[ConversationLoss], noted: Sequence[ConversationLoss]) -> list[ConversationLoss]:
    """Return the losses with those before the first step, where both are of the same conversations in order."""
    if len(after) != len(noted):
        return list(after)
    return [one.with_before(other) for one, other in zip(after, noted, strict=True)]


def group_losses(conversations: Sequence[ConversationLoss]) -> dict[str, dict[str, GroupLoss]]:
    """Return the loss of each `source` (file), `role`, `kind` of text, `turn` and `length`.

    Turns are counted within their role, and lengths are those of the conversations, in tokens.
    """
    return {
        name: {group: _mean(parts) for group, parts in groups.items()}
        for name, groups in grouped_parts(conversations).items()
    }


def grouped_parts(conversations: Sequence[ConversationLoss]) -> dict[str, dict[str, list[tuple[int, PartLoss]]]]:
    """Return the targets of each group of `group_losses`, each with the number of its conversation."""
    files = _file_names(conversations)
    keys: dict[str, Callable[[ConversationLoss, PartLoss], tuple[int, str]]] = {
        "source": lambda one, part: files[_file(one)],
        "role": lambda one, part: (0, part.role or "outside the turns"),
        "kind": lambda one, part: (0, part.kind),
        "turn": lambda one, part: _turn_bucket(part.turn),
        "length": lambda one, part: _length_bucket(one.length),
    }
    return {name: _grouped(conversations, key) for name, key in keys.items()}


def _grouped(
    conversations: Sequence[ConversationLoss], key: Callable[[ConversationLoss, PartLoss], tuple[int, str]]
) -> dict[str, list[tuple[int, PartLoss]]]:
    groups: dict[tuple[int, str], list[tuple[int, PartLoss]]] = {}
    for number, one in enumerate(conversations):
        for part in one.parts:
            groups.setdefault(key(one, part), []).append((number, part))
    # Stable: groups of the same rank stay in the order in which they come.
    return {name: groups[rank, name] for rank, name in sorted(groups, key=lambda group: group[0])}


def _mean(parts: Sequence[tuple[int, PartLoss]]) -> GroupLoss:
    tokens = sum(part.tokens for _, part in parts)
    before = [part.loss_before for _, part in parts if part.loss_before is not None]
    return GroupLoss(
        conversations=len({number for number, _ in parts}),
        tokens=tokens,
        before=sum(before) / tokens if len(before) == len(parts) else None,
        after=sum(part.loss for _, part in parts) / tokens,
    )


def _file(one: ConversationLoss) -> str:
    return one.source.rpartition(":")[0] or one.source


def _file_names(conversations: Sequence[ConversationLoss]) -> dict[str, tuple[int, str]]:
    """Return the group of each file, as rank and name below their common folder; small ones of many share a group."""
    tokens: dict[str, int] = {}
    for one in conversations:
        tokens[_file(one)] = tokens.get(_file(one), 0) + one.tokens
    largest = set(sorted(tokens, key=tokens.__getitem__, reverse=True)[:_SOURCES_SHOWN])
    common = len(os.path.commonpath([str(Path(file).parent) for file in tokens])) if tokens else 0
    others = f"{len(tokens) - len(largest)} other files"
    return {file: (0, file[common:].lstrip("/\\")) if file in largest else (1, others) for file in tokens}


def _turn_bucket(turn: int) -> tuple[int, str]:
    return (turn, str(turn)) if turn < _TURNS_SHOWN else (_TURNS_SHOWN, f"{_TURNS_SHOWN} and later")


def _length_bucket(length: int) -> tuple[int, str]:
    lower = 1
    for upper in _LENGTHS:
        if length <= upper:
            return upper, f"{lower} to {upper}"
        lower = upper + 1
    return lower, f"{lower} and more"
