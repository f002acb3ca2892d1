"""Two answers side by side: what both begin with, and each from where they part."""

from peftchat.chat_template.loss_mask import TurnPart
from peftchat.reports.mask import ShownExample, ShownToken
from peftchat.reports.mask_pairs import pairs_of


def example(text: str) -> ShownExample:
    tokens = [ShownToken(letter, (ord(letter),), "user", TurnPart.CONTENT, False, False) for letter in text]
    return ShownExample("a.jsonl:1", tuple(tokens), (), len(tokens))


def test_a_pair_is_shown_from_where_its_answers_part() -> None:
    (one, other) = pairs_of(
        ("chosen", "rejected"), [example(text) for text in ("abcd", "abxyz", "same", "same and more")]
    )
    assert ["".join(token.text for token, _ in part) for part in (one.prompt, other.prompt)] == ["ab", "same"]
    sides = [
        [(name, "".join(token.text for token, _ in tokens)) for name, _, tokens in pair.sides] for pair in (one, other)
    ]
    assert sides == [[("chosen", "cd"), ("rejected", "xyz")], [("chosen", ""), ("rejected", " and more")]]
