"""The reasoning at the start of an answer is told apart, however the text comes in."""

import random

import pytest

from peftchat.serving.reasoning import ReasoningStream, opens_reasoning, split_reasoning


@pytest.mark.parametrize(
    ("answer", "opened", "reasoning", "content"),
    [
        ("<think>\nOne.\n</think>\n\n2.", False, "One.", "2."),
        ("\n[THINK]One.[/THINK]2.", False, "One.", "2."),
        ("One.\n</think>\n\n2.", True, "One.", "2."),
        ("<think>\nstill at it", False, "still at it", ""),
        ("still at it", True, "still at it", ""),
        ("2. A <think> in HTML; </think> too.", False, None, "2. A <think> in HTML; </think> too."),
        ("<thin", False, None, "<thin"),
        ("", False, None, ""),
        ("<think>a</think><think>b</think>", False, "a", "<think>b</think>"),
    ],
)  # fmt: skip
def test_a_streamed_answer_is_split_like_the_whole(
    answer: str, opened: bool, reasoning: str | None, content: str
) -> None:
    assert split_reasoning(answer, opened=opened) == (reasoning, content)
    draw = random.Random(0)
    for _ in range(60):
        stream = ReasoningStream(opened)
        pieces: list[tuple[str, bool]] = []
        at = 0
        while at < len(answer):
            step = draw.randint(1, 8)
            pieces += stream.feed(answer[at : at + step])
            at += step
        pieces += stream.end()
        assert "".join(text for text, _ in pieces) == answer
        thought = "".join(text for text, inside in pieces if inside)
        assert answer.startswith(thought) or answer.lstrip().startswith(thought.lstrip())
        assert thought.strip().removeprefix("<think>").removeprefix("[THINK]").removesuffix("</think>").removesuffix(
            "[/THINK]"
        ).strip() == (reasoning or "")


def test_a_prompt_that_opens_a_reasoning_is_known() -> None:
    assert opens_reasoning("<|assistant|><think>\n") and opens_reasoning("[/INST][THINK]")
    assert not opens_reasoning("<think>\n\n</think>\n\n") and not opens_reasoning("<|assistant|>\n")
