"""Blind votes: which of two models is asked on which side, what a user prefers, and what the votes say so far.

The file has a JSON object per line, with the names of FastChat's Chatbot Arena, whose analyses then read it
(https://huggingface.co/datasets/lmsys/chatbot_arena_conversations).
"""

import random
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from time import time
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from peftchat.conversation import Message
from peftchat.errors import UserError
from peftchat.kept_lines import KeptLines
from peftchat.runs.eval_lines import wilson_interval

Winner = Literal["model_a", "model_b", "tie", "tie (bothbad)"]
WINNERS: tuple[Winner, ...] = get_args(Winner)


class Vote(BaseModel):
    """One vote. `model_a` was shown on the left.

    Attributes:
        question_id: of this vote; no two are alike.
        model_a: the left model, as the user named it on the command line.
        model_b: the right one.
        winner: which was preferred; `tie (bothbad)` if neither was any good.
        judge: the user's name at the password prompt, else `human`.
        conversation_a: the messages with the left model, system message first where there was one.
        conversation_b: those with the right one; the questions are the same.
        turn: the number of questions.
        anony: whether the names were hidden; always so here.
        tstamp: seconds since 1970.
        sampling: the settings that differed from the models' own.
        tools: definitions of tools, JSON text of a list.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    question_id: str
    model_a: str
    model_b: str
    winner: Winner
    judge: str
    conversation_a: list[dict[str, Any]]
    conversation_b: list[dict[str, Any]]
    turn: int
    anony: bool
    tstamp: float
    sampling: dict[str, Any] = {}
    tools: str | None = None

    @property
    def preferred(self) -> str | None:
        """The preferred model; None for a tie."""
        return {"model_a": self.model_a, "model_b": self.model_b}.get(self.winner)


class VoteFile:
    """The votes of a file, and those that are added.

    Args:
        path: the file; it is made with the first vote.

    Raises:
        UserError: it holds something else than votes.
    """

    def __init__(self, path: Path) -> None:
        self._lines = KeptLines(path)
        self.votes = [self._read(number, line) for number, line in enumerate(self._lines.read(), start=1)]

    @property
    def path(self) -> Path:
        """The file."""
        return self._lines.path

    def add(self, vote: Vote) -> None:
        """Write a vote to the disk.

        Raises:
            OSError: it cannot be written; the vote does not count then.
        """
        self._lines.append([vote.model_dump(exclude_none=True)])
        self.votes.append(vote)

    def _read(self, number: int, line: dict[str, Any]) -> Vote:
        try:
            return Vote.model_validate(line)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            what = f"the line is no vote: `{key}`: {first['msg']}"
            raise UserError(
                what, where=f"{self.path}:{number}", hint="Name a file of votes of `peftchat web`."
            ) from error


@dataclass(slots=True)
class BlindRound:
    """One conversation with two models whose names the user does not see.

    Attributes:
        model_a: the left model.
        model_b: the right one.
        turns_a: the questions and the left model's answers.
        turns_b: those of the right one.
        vote: what the user preferred; the names are shown then.
    """

    model_a: str
    model_b: str
    turns_a: list[Message] = field(default_factory=list)
    turns_b: list[Message] = field(default_factory=list)
    vote: Vote | None = None

    def sides(self) -> tuple[tuple[str, list[Message]], tuple[str, list[Message]]]:
        """Return each model with its conversation, the left one first."""
        return (self.model_a, self.turns_a), (self.model_b, self.turns_b)

    @property
    def can_vote(self) -> bool:
        """Whether both have answered and nobody has voted."""
        both = self.turns_a[-1:] + self.turns_b[-1:]
        return self.vote is None and [turn.role for turn in both] == ["assistant", "assistant"]

    @property
    def questions(self) -> int:
        """The number of questions."""
        return sum(turn.role == "user" for turn in self.turns_a)

    def decide(
        self,
        winner: Winner,
        *,
        judge: str = "human",
        system: str | None = None,
        sampling: dict[str, Any] | None = None,
        tools: str | None = None,
    ) -> Vote:
        """Return the vote of this round, and show the names from now on.

        Raises:
            UserError: not both have answered, or somebody has voted.
        """
        if not self.can_vote:
            what = "this pair has its vote" if self.vote else "not both have answered"
            raise UserError(what, hint="Ask the next question." if self.vote else "Wait for both answers.")
        first = [] if system is None else [Message("system", system).as_dict()]
        self.vote = Vote(
            question_id=uuid.uuid4().hex,
            model_a=self.model_a,
            model_b=self.model_b,
            winner=winner,
            judge=judge,
            conversation_a=[*first, *(turn.as_dict() for turn in self.turns_a)],
            conversation_b=[*first, *(turn.as_dict() for turn in self.turns_b)],
            turn=self.questions,
            anony=True,
            tstamp=round(time(), 3),
            sampling=sampling or {},
            tools=tools,
        )
        return self.vote


def new_round(models: Sequence[str], votes: Iterable[Vote], chance: random.Random | None = None) -> BlindRound:
    """Return a round of two models: the pair with the fewest votes, each on a random side.

    Args:
        models: the names, at least two.
        votes: those so far.
        chance: for tests; None for the system's own.
    """
    chance = chance or random.SystemRandom()
    counts = Counter(frozenset((vote.model_a, vote.model_b)) for vote in votes)
    pairs = list(combinations(models, 2))
    fewest = min(counts[frozenset(pair)] for pair in pairs)
    left, right = chance.choice([pair for pair in pairs if counts[frozenset(pair)] == fewest])
    return BlindRound(*((left, right) if chance.random() < 0.5 else (right, left)))


@dataclass(frozen=True, slots=True)
class PairTally:
    """What the votes say of two models.

    Attributes:
        first: a model.
        second: the other.
        wins: votes for the first.
        losses: votes for the second.
        ties: votes for neither, both bad among them.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int

    @property
    def count(self) -> int:
        """All votes."""
        return self.wins + self.losses + self.ties

    @property
    def share(self) -> float:
        """What the first got of the votes, half of each tie."""
        return (self.wins + self.ties / 2) / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of that share."""
        return wilson_interval(self.share, self.count)


def tally(votes: Iterable[Vote]) -> list[PairTally]:
    """Count the votes of each pair of models, in the order of the models' names."""
    counts: dict[tuple[str, str], Counter[str | None]] = {}
    for vote in votes:
        first, second = sorted((vote.model_a, vote.model_b))
        counts.setdefault((first, second), Counter())[vote.preferred] += 1
    return [
        PairTally(first, second, count[first], count[second], count[None])
        for (first, second), count in sorted(counts.items())
    ]
