"""A judging: every pair in both orders, each reply kept as it comes, nothing asked twice."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from peftchat.judging.judge_client import Judge, JudgeUnreachable, Reply
from peftchat.judging.judge_prompts import JudgePrompt
from peftchat.judging.judged_pairs import Pair
from peftchat.judging.replies import Preference, Scores
from peftchat.kept_lines import KeptLines

Order = Literal["AB", "BA"]
Winner = Literal["A", "B", "tie"]

REPLIES = "replies.jsonl"
_UNREACHABLE_LIMIT = 5
"""Requests in a row without a reply after which the judge is given up."""


@dataclass(frozen=True, slots=True)
class Judgment:
    """What a judge said of a pair in one order.

    Attributes:
        order: which answer was shown first.
        reply: the text.
        preference: which of the shown answers it prefers; None if the reply cannot be read.
        scores: of the answers in the order in which they were shown, if scores were asked for.
        prompt_tokens: tokens of the request.
        tokens: tokens of the reply.
        finish: why it ended, in the judge's words; `length` where it was cut.
    """

    order: Order
    reply: str
    preference: Preference | None
    scores: Scores | None
    prompt_tokens: int
    tokens: int
    finish: str = ""

    @property
    def winner(self) -> Winner | None:
        """The answer that it prefers, by file; None if the reply cannot be read."""
        if self.preference is None or self.preference == "tie":
            return self.preference
        return "A" if (self.preference == "first") == (self.order == "AB") else "B"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A pair with the judgments of both orders.

    Attributes:
        pair: the question and its answers.
        forward: with answer A first.
        backward: with answer B first.
    """

    pair: Pair
    forward: Judgment
    backward: Judgment

    @property
    def is_read(self) -> bool:
        """Whether both replies could be read."""
        return self.forward.winner is not None and self.backward.winner is not None

    @property
    def agrees(self) -> bool:
        """Whether both orders have the same winner."""
        return self.is_read and self.forward.winner == self.backward.winner

    @property
    def winner(self) -> Winner | None:
        """The winner in both orders; a tie where they disagree; None where a reply cannot be read."""
        if not self.is_read:
            return None
        return self.forward.winner if self.agrees else "tie"


def judge_pairs(
    judge: Judge,
    pairs: Sequence[Pair],
    prompt: JudgePrompt,
    folder: Path,
    on_reply: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Ask a judge about every pair in both orders.

    Replies are kept in `replies.jsonl` as they come, by what was asked of whom, and are not asked again.

    Args:
        judge: the judge.
        pairs: the questions with their answers.
        prompt: what it is asked.
        folder: where replies are kept.
        on_reply: called for every reply, kept ones too.

    Raises:
        JudgeUnreachable: the judge gave no reply; what it gave is kept.
        UserError: another process keeps replies there.
    """
    lines = KeptLines(folder / REPLIES)
    with lines.claimed(str(folder)):
        return _judge_pairs(judge, pairs, prompt, lines, on_reply)


def _judge_pairs(
    judge: Judge, pairs: Sequence[Pair], prompt: JudgePrompt, lines: KeptLines, on_reply: Callable[[], None]
) -> list[Outcome]:
    kept = {line["key"]: line for line in lines.read()}
    wanted: list[tuple[Pair, Order]] = [(pair, order) for pair in pairs for order in ("AB", "BA")]
    messages = {(pair.id, order): _messages(prompt, pair, order) for pair, order in wanted}
    keys = {place: _key(judge, asked) for place, asked in messages.items()}
    missing = [(pair, order) for pair, order in wanted if keys[pair.id, order] not in kept]
    for _ in range(len(wanted) - len(missing)):
        on_reply()

    def keep(pair: Pair, order: Order, reply: Reply) -> None:
        key = keys[pair.id, order]
        kept[key] = {"key": key, "judge": judge.name, "question_id": pair.id, "order": order, **asdict(reply)}
        lines.append([kept[key]])
        on_reply()

    _ask_all(judge, [(pair, order, messages[pair.id, order]) for pair, order in missing], keep)
    return [
        Outcome(pair, *(_judgment(kept[keys[pair.id, order]], order, prompt) for order in ("AB", "BA")))
        for pair in pairs
    ]


def _ask_all(
    judge: Judge,
    requests: Sequence[tuple[Pair, Order, list[dict[str, str]]]],
    keep: Callable[[Pair, Order, Reply], None],
) -> None:
    """Ask with as many requests at a time as the judge allows; replies are kept by this thread alone."""
    left = iter(requests)
    running: dict[Future[Reply], tuple[Pair, Order]] = {}
    failures: list[JudgeUnreachable] = []
    in_a_row = 0
    with ThreadPoolExecutor(judge.concurrency) as pool:
        try:
            while True:
                while len(running) < judge.concurrency and (request := next(left, None)) is not None:
                    pair, order, messages = request
                    running[pool.submit(judge.ask, messages)] = (pair, order)
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    place = running.pop(done)
                    try:
                        keep(*place, done.result())
                        in_a_row = 0
                    except JudgeUnreachable as error:
                        failures.append(error)
                        in_a_row += 1
                if in_a_row >= _UNREACHABLE_LIMIT:
                    break
        finally:
            for future in running:
                future.cancel()
    if failures:
        count = len(failures)
        raise JudgeUnreachable(
            f"{count} request{'s' if count > 1 else ''} got no reply, the last one because of {failures[-1]}. "
            "All replies are kept: the same command asks only for the others."
        )


def _messages(prompt: JudgePrompt, pair: Pair, order: Order) -> list[dict[str, str]]:
    answers = (pair.answer_a, pair.answer_b)
    return prompt.fill(pair.question, *(answers if order == "AB" else answers[::-1]))


def _key(judge: Judge, messages: Sequence[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps([judge.name, judge.settings, messages]).encode()).hexdigest()[:24]


def _judgment(line: dict[str, Any], order: Order, prompt: JudgePrompt) -> Judgment:
    preference, scores = prompt.read(line["text"])
    return Judgment(order, line["text"], preference, scores, line["prompt_tokens"], line["tokens"], line["finish"])
