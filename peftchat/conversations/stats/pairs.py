"""Statistics of preference pairs: how long their answers are, and how much of them is the same."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from peftchat.conversation import Conversation, Message
from peftchat.conversations.formats.ranked_answers import is_number
from peftchat.conversations.stats.lengths import EXAMPLES, LengthSketch

_NEARLY = 0.9
"""The share of words in common above which two answers are nearly the same: Jaccard's index of their sets of words."""

_WORD = re.compile(r"\w+")
_SCORE = re.compile(r"score|rating|reward")


@dataclass(slots=True)
class PairStats:
    """The pairs of one part. An answer is what stands behind the turns that both conversations have in common.

    Attributes:
        pairs: their number.
        chosen: characters of the chosen answers.
        rejected: characters of the rejected ones.
        chosen_longer: pairs whose chosen answer is the longer one.
        same_length: pairs whose answers have one length.
        prompt_characters: of what both conversations begin with, over all pairs.
        shared_characters: of the beginnings that both answers have in common.
        same_but_for_space: pairs whose answers differ in white space and case alone.
        nearly_the_same: other pairs whose answers have nine tenths of their words in common.
        scored: pairs whose record has a score of either answer.
        tied: those with one score for both.
        scored_lower: those whose rejected answer has the higher score.
        examples: places of the first pairs whose answers are nearly the same, or differ in white space and case alone.
    """

    pairs: int = 0
    chosen: LengthSketch = field(default_factory=LengthSketch)
    rejected: LengthSketch = field(default_factory=LengthSketch)
    chosen_longer: int = 0
    same_length: int = 0
    prompt_characters: int = 0
    shared_characters: int = 0
    same_but_for_space: int = 0
    nearly_the_same: int = 0
    scored: int = 0
    tied: int = 0
    scored_lower: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, pair: Conversation) -> None:
        """Count one pair."""
        shared = pair.shared_turns
        chosen, rejected = _text(pair.messages[shared:]), _text((pair.rejected or ())[shared:])
        self.pairs += 1
        self.chosen.add(len(chosen))
        self.rejected.add(len(rejected))
        self.chosen_longer += len(chosen) > len(rejected)
        self.same_length += len(chosen) == len(rejected)
        self.prompt_characters += len(_text(pair.messages[:shared]))
        scores = scores_of(pair.columns)
        if scores is not None:
            self.scored += 1
            self.tied += scores[0] == scores[1]
            self.scored_lower += scores[0] < scores[1]
        same = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        self.shared_characters += sum(1 for _ in same)
        if chosen.casefold().split() == rejected.casefold().split():
            self.same_but_for_space += 1
        elif _is_nearly(chosen, rejected):
            self.nearly_the_same += 1
        else:
            return
        if len(self.examples) < EXAMPLES:
            self.examples.append(pair.source)

    @property
    def prompt_share(self) -> float:
        """The share of the characters of both conversations that belongs to the prompt."""
        prompts = 2 * self.prompt_characters
        whole = prompts + self.chosen.total + self.rejected.total
        return prompts / whole if whole else 0.0

    @property
    def shared_share(self) -> float:
        """The share of the answers' characters that belongs to a beginning which both have."""
        answers = self.chosen.total + self.rejected.total
        return 2 * self.shared_characters / answers if answers else 0.0

    @property
    def longer_share(self) -> float:
        """The share of pairs with the longer answer chosen, among those whose answers differ in length."""
        differing = self.pairs - self.same_length
        return self.chosen_longer / differing if differing else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with quantiles in place of the sketches."""
        return {
            "pairs": self.pairs,
            "chosen": self.chosen.as_dict(),
            "rejected": self.rejected.as_dict(),
            "chosen_longer": self.chosen_longer,
            "same_length": self.same_length,
            "prompt_share": round(self.prompt_share, 4),
            "shared_share": round(self.shared_share, 4),
            "same_but_for_space": self.same_but_for_space,
            "nearly_the_same": self.nearly_the_same,
            "scored": self.scored,
            "tied": self.tied,
            "scored_lower": self.scored_lower,
            "examples": self.examples,
        }


def scores_of(columns: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the scores of the chosen and the rejected answer in a record's other fields; None without both.

    They are a number each, under names such as `score_chosen` and `score_rejected`, or `chosen_avg_rating`.
    """
    for name, value in columns.items():
        if "chosen" in name and _SCORE.search(name):
            other = columns.get(name.replace("chosen", "rejected"))
            if is_number(value) and is_number(other):
                return value, other
    return None


def _text(messages: tuple[Message, ...]) -> str:
    return "\n".join(message.content for message in messages)


def _is_nearly(one: str, other: str) -> bool:
    words, others = set(_WORD.findall(one.casefold())), set(_WORD.findall(other.casefold()))
    return len(words & others) >= _NEARLY * len(words | others) > 0
