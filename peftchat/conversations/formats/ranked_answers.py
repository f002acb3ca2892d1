"""Several answers to one prompt with scores, ranks or a preference between two, as `prompt`, `chosen` and `rejected`.

Sources: UltraFeedback's `completions`, Nectar's `answers`, PKU-SafeRLHF, AlpacaFarm, Stanford's SHP, Nvidia's
HelpSteer, and the votes of Chatbot Arena. Answers that are all right, as SQuAD has them, are a pair with the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from peftchat.conversations.formats import names
from peftchat.conversations.formats.fields import Fields
from peftchat.conversations.formats.keys import LeftOut

_LISTS = ("completions", "answers", "responses", "outputs", "candidates")
_TEXTS = ("response", "answer", "text", "content", "completion", "output")
_SCORES = ("overall_score", "score", "rating", "reward")
_RANK = "rank"
_TURNS_BEFORE = "context"
"""HelpSteer's turns before two answers."""


@dataclass(frozen=True, slots=True)
class _Sides:
    """Two fields with an answer each, and the field that says which is better.

    Attributes:
        answers: the names of the two fields: the answers, or the conversations that end with them.
        better: the name of the field that chooses.
        first, second, neither: its values where the first is better, where the second is, and where both are alike.
    """

    answers: tuple[str, str]
    better: str
    first: frozenset[object]
    second: frozenset[object]
    neither: frozenset[object] = frozenset()

    def are_in(self, fields: Fields) -> bool:
        """Whether a record has the fields, with a known choice."""
        choice = fields.get(self.better)
        is_known = isinstance(choice, str | int | float) and choice in self.first | self.second | self.neither
        return is_known and {*self.answers, self.better} <= fields.keys()


def _one(first: object, second: object) -> tuple[frozenset[object], frozenset[object]]:
    return frozenset({first}), frozenset({second})


# Below 0, the first one is better, the more so the lower.
_STRENGTHS = (frozenset[object]({-3, -2, -1}), frozenset[object]({3, 2, 1}), frozenset[object]({0}))
_BOTH_BAD = frozenset[object]({"tie (bothbad)", "both_bad", "bothbad"})
_VOTES = (
    frozenset[object]({"model_a", "a", "A", "response_a"}),
    frozenset[object]({"model_b", "b", "B", "response_b"}),
    frozenset[object]({"tie"}) | _BOTH_BAD,
)
_SIDES = (
    _Sides(("response_0", "response_1"), "better_response_id", *_one(0, 1)),
    _Sides(("output_1", "output_2"), "preference", *_one(1, 2)),
    _Sides(("human_ref_A", "human_ref_B"), "labels", *_one(1, 0)),
    _Sides(("response_1", "response_2"), "preference_strength", *_STRENGTHS),
    _Sides(("response1", "response2"), "overall_preference", *_STRENGTHS),
    _Sides(("response_a", "response_b"), "winner", *_VOTES),
    _Sides(("conversation_a", "conversation_b"), "winner", *_VOTES),
)

RANKED_FIELDS = frozenset({*_LISTS, *(sides.better for sides in _SIDES)})
"""Fields of which a record with ranked answers has at least one."""


def of_ranked(fields: Fields, *, pairs: bool = False) -> Fields:
    """Return a record with several answers as one with the best and the worst, or the first; any other as it is.

    The list stays in the record, so that the answers between the two are told as not used.

    Args:
        fields: the record.
        pairs: whether a pair is wanted, which answers with one score do not make.

    Raises:
        LeftOut: a pair is wanted, and no answer is better than another.
    """
    if names.CHOSEN in fields:
        return fields
    asked = next((name for name in (*names.ASKED, names.HISTORY) if isinstance(fields.get(name), str)), None)
    for sides in _SIDES:
        if sides.are_in(fields):
            return _of_sides(sides, fields, asked, pairs=pairs)
    if asked is None:
        return fields
    if (texts := _right_answers(fields)) is not None:
        return {**fields, "answer": next(iter(texts), "")}
    name = next((name for name in _LISTS if name in fields), None)
    answers = _scored(fields[name]) if name else None
    if not answers:
        return fields
    best, worst = max(answers), min(answers)
    if pairs and best[0] == worst[0]:
        raise LeftOut("answers_tie")
    return _preference(fields, asked, best[2], worst[2])


def _right_answers(fields: Fields) -> list[str] | None:
    """The texts in SQuAD's `answers`, which has a list of places beside them; None for any other record."""
    answers = fields.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) and "answer" not in fields else None
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


def _of_sides(sides: _Sides, fields: Fields, asked: str | None, *, pairs: bool) -> Fields:
    """The record with the better of two answers; of two that are alike, the first, with its label if both are bad.

    Raises:
        LeftOut: a pair is wanted, and neither is better.
    """
    choice = fields[sides.better]
    if pairs and choice in sides.neither:
        raise LeftOut("answers_tie")
    rest = {name: value for name, value in fields.items() if name not in (*sides.answers, sides.better)}
    if choice in _BOTH_BAD:
        rest[names.LABEL] = False
    one, other = (fields[name] for name in sides.answers)
    best, worst = (other, one) if choice in sides.second else (one, other)
    if asked is None:
        turns = rest.pop(_TURNS_BEFORE) if isinstance(rest.get(_TURNS_BEFORE), list) else None
        start = {} if turns is None else {"prompt": turns}
        return {**rest, **start, names.CHOSEN: best, names.REJECTED: worst}
    return _preference(rest, asked, best, worst)


def _scored(answers: object) -> list[tuple[float, int, str]] | None:
    """Score, place (earlier is larger) and text of each answer with a score; None if it is no list of answers."""
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
        return None
    scored = []
    for place, one in enumerate(answers):
        text = next((one[name] for name in _TEXTS if isinstance(one.get(name), str)), None)
        if text is None:
            return None
        if (score := _score(one)) is not None:
            scored.append((score, -place, text))
    return scored


def _score(answer: Mapping[str, Any]) -> float | None:
    """How good an answer is; of ranks, the lowest is the best."""
    value = next((answer[name] for name in _SCORES if is_number(answer.get(name))), None)
    if value is not None:
        return float(value)
    return -float(answer[_RANK]) if is_number(answer.get(_RANK)) else None


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _preference(fields: Fields, asked: str, best: Any, worst: Any) -> Fields:
    """The record with the two answers; a prompt that is the text of several turns begins both."""
    record = {name: value for name, value in fields.items() if name != asked}
    prompt = fields[asked]
    if prompt.rstrip().endswith("\n\nAssistant:") and isinstance(best, str) and isinstance(worst, str):
        start = f"{prompt.rstrip()} "
        best, worst = start + best, start + worst
    else:
        record["prompt"] = prompt
    return {**record, names.CHOSEN: best, names.REJECTED: worst}
