"""Assessment of a run: its result in one sentence, and the warnings that follow from its numbers."""

import math
from dataclasses import dataclass
from typing import Literal

from peftchat.conversations.dataset_card import SKIPPED
from peftchat.formatting import format_count, format_decimal, format_duration, format_percent
from peftchat.runs.eval_labels import LabelSummary
from peftchat.runs.eval_pairs import PairSummary
from peftchat.runs.run_summary import RunSummary

Outcome = Literal["better", "worse", "unknown", "failed"]

_FEW_EXAMPLES = 1000
_MANY_EPOCHS = 5


@dataclass(frozen=True)
class RunAssessment:
    """The result of a run.

    Attributes:
        headline: one sentence on the result.
        effort: steps, time, tokens, and the step that was kept, in sentences; may be empty.
        outcome: whether the held-out loss got better, or most held-out pairs or labeled answers are right.
    """

    headline: str
    effort: str
    outcome: Outcome


def assess_run(summary: RunSummary) -> RunAssessment:
    """Assess a run by its held-out loss, if it has one."""
    headline, outcome = _result(summary)
    return RunAssessment(headline, _effort(summary), outcome)


def _result(summary: RunSummary) -> tuple[str, Outcome]:
    before, after = summary.eval_loss_before, summary.eval_loss
    losses = [loss for loss in (after, summary.train_loss) if loss is not None]
    if any(not math.isfinite(loss) for loss in losses):
        return "The loss is not a finite number: training failed, and the model is unusable.", "failed"
    if after is None:
        return f"There were no held-out {summary.unit}, so it is unknown whether the model improved.", "unknown"
    if summary.eval_pairs is not None:
        return _pairs_result(summary.eval_pairs, summary.objective)
    if summary.eval_labels is not None:
        return _labels_result(summary.eval_labels)
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
    return f"Held-out loss rose {change}: the model got worse on conversations it was not trained on.", "worse"


def _pairs_result(pairs: PairSummary, objective: str) -> tuple[str, Outcome]:
    """Return the result of a preference run: better where more than half of the pairs are right, beyond chance."""
    text = f"The chosen answer has the higher reward in {pairs.right_text}"
    if pairs.right_low > 0.5:
        return f"{text}.", "better"
    if pairs.right_high < 0.5 and objective == "dpo":
        return f"{text}: the model learned the opposite.", "worse"
    if pairs.right_high < 0.5:
        # Without a reference, a reward is the likelihood itself, which had a side before the first step.
        return f"{text}: rejected answers are still the likelier ones.", "unknown"
    return f"{text}, which may be chance.", "unknown"


def _labels_result(answers: LabelSummary) -> tuple[str, Outcome]:
    """Return the result of a run on labeled answers: better where more than half of them are right, beyond chance."""
    text = f"The reward is on the side of its label in {answers.right_text}"
    if answers.right_low > 0.5:
        return f"{text}.", "better"
    if answers.right_high < 0.5:
        return f"{text}: the model learned the opposite.", "worse"
    return f"{text}, which may be chance.", "unknown"


def _effort(summary: RunSummary) -> str:
    parts = []
    if summary.steps is not None:
        parts.append(f"{format_count(summary.steps)} steps")
    if summary.seconds is not None:
        parts.append(f"in {format_duration(summary.seconds)}")
    if summary.tokens is not None:
        parts.append(f"over {format_count(summary.tokens)} tokens")
    if summary.tokens_per_second is not None:
        parts.append(f"at {format_count(summary.tokens_per_second)} tokens/s")
    if summary.world_size is not None and summary.world_size > 1:
        parts.append(f"on {summary.world_size} processes")
    text = " ".join(parts)
    sentences = [f"{text[:1].upper()}{text[1:]}."] if text else []
    return " ".join([*sentences, *([str(summary.kept)] if summary.kept else [])])


def run_warnings(summary: RunSummary) -> list[str]:
    """Return what to know before using the model, one sentence each."""
    warnings = []
    if summary.train_examples is not None:
        # A template that rewrites earlier turns makes several examples of a conversation.
        conversations = summary.train_examples - (summary.expanded_examples or 0) + (summary.expanded or 0)
        if conversations < _FEW_EXAMPLES:
            warnings.append(f"It was trained on only {format_count(conversations)} {summary.unit}.")
    if summary.eval_loss is None:
        warnings.append(f"No held-out {summary.unit} were used; it is unknown whether it improved.")
    elif summary.eval_pairs is not None:
        warnings += _pair_warnings(summary.eval_pairs, summary.objective)
    elif summary.eval_labels is not None:
        warnings += _label_warnings(summary.eval_labels)
    elif summary.eval_loss_before is not None and summary.eval_loss >= summary.eval_loss_before:
        warnings.append("Its loss on held-out conversations did not fall.")
    times = _times_seen(summary)
    if times is not None and times > _MANY_EPOCHS:
        what = f"each of the {summary.unit}" if summary.objective != "sft" else "each conversation"
        warnings.append(f"It saw {what} about {format_decimal(times)} times and may reproduce some of them.")
    if summary.dropped_examples:
        verb = "was" if summary.dropped_examples == 1 else "were"
        reasons = ", ".join(
            f"{format_count(number)} {SKIPPED.get(reason, reason.replace('_', ' '))}"
            for reason, number in (summary.dropped or {}).items()
        )
        # Runs of older versions have no reasons.
        told = f"dropped: {reasons}" if reasons else "dropped"
        warnings.append(f"{format_count(summary.dropped_examples)} of the {summary.unit} {verb} {told}.")
    if summary.special_token_text:
        warnings.append(
            f"Text that looks like a special token occurred {format_count(summary.special_token_text)} times "
            "in the conversations and was encoded as ordinary text."
        )
    if summary.outliers:
        highest = max(
            summary.outliers, key=lambda source: summary.outliers[source].loss - summary.outliers[source].limit
        )
        warnings.append(
            f"The training loss of {format_count(len(summary.outliers))} conversations was far above that of others of "
            f"their length; look at {highest} first (`outliers` in run.json)."
        )
    warnings += summary.warnings
    for token in summary.new_tokens:
        if token.verdict in ("not in the data", "did not move"):
            warnings.append(f"The token {token.token} {_TOKEN_FAULTS[token.verdict]}.")
    unstopped = sum(answer.stopped is False for answer in summary.samples_after)
    if unstopped:
        warnings.append(f"{unstopped} of {len(summary.samples_after)} sample answers reached the length limit.")
    return warnings


def _pair_warnings(pairs: PairSummary, objective: str) -> list[str]:
    """Return what held-out pairs say against a run."""
    if not pairs.both_fell:
        return []
    fell = f"{format_decimal(pairs.chosen_logp_before)} to {format_decimal(pairs.chosen_logp)}"
    cure = "a lower learning rate" + (", a higher `dpo.beta` or `dpo.rpo_alpha`" if objective == "dpo" else "")
    return [
        f"The chosen answers became less likely too: their mean log-probability fell from {fell}. Try {cure}, if they "
        "are answers that the model should give."
    ]


def _label_warnings(answers: LabelSummary) -> list[str]:
    """Return what held-out labeled answers say against a run."""
    found = []
    if not answers.good or not answers.bad:
        found.append(f"All held-out answers are {'good' if answers.good else 'bad'} ones, so rewards tell little.")
    if answers.both_fell:
        fell = f"{format_decimal(answers.good_logp_before)} to {format_decimal(answers.good_logp)}"
        found.append(
            f"The good answers became less likely too: their mean log-probability fell from {fell}. Try a lower "
            "learning rate, a higher `kto.beta` or a higher `kto.desirable_weight`."
        )
    return found


def _times_seen(summary: RunSummary) -> float | None:
    """Return how often each conversation was trained on, in the mean."""
    if summary.epochs is None or not summary.train_examples or summary.examples_per_epoch is None:
        return summary.epochs
    return summary.epochs * summary.examples_per_epoch / summary.train_examples


_TOKEN_FAULTS = {
    "not in the data": "does not occur in the training data, so the model learned neither to read nor to write it",
    "did not move": "occurs in the training data, but one of its embeddings did not move",
}
