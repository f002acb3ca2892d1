"""Replies of a judge: two scores or a verdict, read only where they are unmistakable."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Preference = Literal["first", "second", "tie"]

_NUMBER = r"(\d{1,3}(?:\.\d+)?)"
_OUT_OF = r"(?:\s*(?:/|out of)\s*\d{1,3})?"
_PAIR = re.compile(rf"\W*{_NUMBER}{_OUT_OF}(?:\s*,\s*|\s*;\s*|\s*\|\s*|\s+and\s+|\s+){_NUMBER}{_OUT_OF}\W*")
_LABEL = r"(?:assistant|answer|response|model)\s*'?s?\s*"
_COMMENT = r"(?:\s*\([^()\n]*\))?"
_LABELED = re.compile(
    rf"\W*{_LABEL}(?:1|a)(?:'s)?\s*(?:score)?\W*[:=]\W*{_NUMBER}{_OUT_OF}{_COMMENT}"
    rf"\W+{_LABEL}(?:2|b)(?:'s)?\s*(?:score)?\W*[:=]\W*{_NUMBER}{_OUT_OF}{_COMMENT}\W*",
    re.IGNORECASE,
)
_STATED = re.compile(
    rf"\bscores are \(?{_NUMBER}(?:, | and ){_NUMBER}\)? for {_LABEL}(?:1|a) and (?:{_LABEL})?(?:2|b)\b", re.IGNORECASE
)
_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of the answer that was shown first and of the second one."""

    first: float
    second: float

    @property
    def preference(self) -> Preference:
        """Which answer has the higher score."""
        if self.first == self.second:
            return "tie"
        return "first" if self.first > self.second else "second"


def read_scores(reply: str, low: float, high: float) -> Scores | None:
    """Return the two scores of a reply; None where a reader would not be sure of them.

    They stand on the first line or, if it has none, on the only line that is a pair of numbers; or each behind its
    label, or in a sentence that names both. A number outside the scale is no score.

    Args:
        reply: the judge's text.
        low: the lowest score.
        high: the highest score.
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    pairs = [found for line in lines if (found := _PAIR.fullmatch(line.strip()))]
    first = _PAIR.fullmatch(lines[0].strip()) if lines else None
    if first is not None:
        return _in_scale(first, low, high)
    if len(pairs) == 1:
        return _in_scale(pairs[0], low, high)
    blocks = [*lines, *map("\n".join, pairwise(lines))]
    labeled = [found for block in blocks if (found := _LABELED.fullmatch(block.strip()))]
    named = [*labeled, *_STATED.finditer(reply)]
    return _in_scale(named[0], low, high) if len(named) == 1 and not pairs else None


def _in_scale(found: re.Match[str], low: float, high: float) -> Scores | None:
    scores = Scores(float(found[1]), float(found[2]))
    return scores if low <= min(scores.first, scores.second) and max(scores.first, scores.second) <= high else None


def read_verdict(reply: str) -> Preference | None:
    """Return the verdict of a reply, `[[A]]`, `[[B]]` or `[[C]]`; None where there is none, or several."""
    found = {match.upper() for match in _VERDICT.findall(reply)}
    if len(found) != 1:
        return None
    verdicts: dict[str, Preference] = {"A": "first", "B": "second", "C": "tie", "TIE": "tie"}
    return verdicts[found.pop()]
