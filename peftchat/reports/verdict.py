"""A run in words: what it achieved, and what its numbers do not let anyone claim."""

import math
from dataclasses import dataclass
from typing import Literal

from peftchat.formatting import format_count, format_decimal, format_duration, format_percent
from peftchat.runs.run_summary import RunSummary

Outcome = Literal["better", "worse", "unknown", "failed"]

_FEW_ROWS = 1000
_MANY_EPOCHS = 5


@dataclass(frozen=True)
class Verdict:
    """One sentence on the result, one on what it took, and which way it went."""

    headline: str
    effort: str
    outcome: Outcome


def verdict(facts: RunSummary) -> Verdict:
    """The result of a run in words, judged by the held-out loss where there is one."""
    headline, outcome = _result(facts)
    return Verdict(headline, _effort(facts), outcome)


def _result(facts: RunSummary) -> tuple[str, Outcome]:
    before, after = facts.eval_loss_before, facts.eval_loss
    losses = [loss for loss in (after, facts.train_loss) if loss is not None]
    if any(not math.isfinite(loss) for loss in losses):
        return "The loss is not a number: training failed, and this model is of no use.", "failed"
    if after is None:
        return "No held-out conversations were given, so nothing here shows that the model got better.", "unknown"
    if before is None or before <= 0:
        text = f"Held-out loss is {format_decimal(after)}; it was not measured before training."
        return text, "unknown"
    if after == before:
        return f"Held-out loss stayed at {format_decimal(after)}.", "worse"
    change = (
        f"from {format_decimal(before)} to {format_decimal(after)}, by {format_percent(abs(after - before) / before)}"
    )
    if after < before:
        return f"Held-out loss fell {change}.", "better"
    return f"Held-out loss rose {change}: on conversations it did not see, the model got worse.", "worse"


def _effort(facts: RunSummary) -> str:
    parts = []
    if facts.steps is not None:
        parts.append(f"{format_count(facts.steps)} steps")
    if facts.seconds is not None:
        parts.append(f"in {format_duration(facts.seconds)}")
    if facts.tokens is not None:
        parts.append(f"over {format_count(facts.tokens)} tokens")
    if facts.tokens_per_second is not None:
        parts.append(f"at {format_count(facts.tokens_per_second)} tokens/s")
    if facts.world_size is not None and facts.world_size > 1:
        parts.append(f"on {facts.world_size} processes")
    text = " ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def cautions(facts: RunSummary) -> list[str]:
    """What a reader should know before relying on the model, each from a number of the run."""
    found = []
    if facts.train_examples is not None and facts.train_examples < _FEW_ROWS:
        found.append(f"It was trained on only {format_count(facts.train_examples)} conversations.")
    if facts.eval_loss is None:
        found.append("No held-out conversations were used: whether it got better is not known.")
    elif facts.eval_loss_before is not None and facts.eval_loss >= facts.eval_loss_before:
        found.append("Its loss on held-out conversations did not fall.")
    if facts.epochs is not None and facts.epochs > _MANY_EPOCHS:
        found.append(
            f"It saw each conversation about {format_decimal(facts.epochs)} times and may recite some of them."
        )
    if facts.dropped_examples:
        found.append(f"{format_count(facts.dropped_examples)} rows of the data were left out.")
    if facts.special_token_text:
        found.append(
            f"Text that looks like a special token occurred {format_count(facts.special_token_text)} times "
            "in the conversations and was trained as ordinary text."
        )
    for token in facts.new_tokens:
        if token.verdict in ("not in the data", "did not move"):
            found.append(f"The token {token.token} {_TOKEN_FAULTS[token.verdict]}.")
    unfinished = sum(answer.stopped is False for answer in facts.samples_after)
    if unfinished:
        found.append(f"{unfinished} of {len(facts.samples_after)} sample answers did not end by themselves.")
    return found


_TOKEN_FAULTS = {
    "not in the data": "does not occur in the training data: as an input it means nothing yet",
    "did not move": "occurs in the training data, yet one of its rows did not move",
}
