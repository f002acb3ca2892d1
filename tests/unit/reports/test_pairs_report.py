"""What a preference run says of itself: pairs with an interval, never more than the numbers hold."""

import json
from pathlib import Path

import pytest

from peftchat.reports.assessment import assess_run, run_warnings
from peftchat.reports.run_report import write_report
from peftchat.runs.eval_labels import AnswerResult, LabelSummary, write_eval_answers
from peftchat.runs.eval_lines import wilson_interval
from peftchat.runs.eval_pairs import PairResult, PairSummary, write_eval_pairs
from peftchat.runs.run_summary import RunSummary, SampleAnswer
from tests.support.reports import RUN_JSON, run_folder


def pair(number: int, margin: float, logp: float = -9.0) -> PairResult:
    return PairResult(number, f"pairs.jsonl:{number + 1}", 3, 4, logp, -11.0, margin, 0.0, 0.5)


def summary_of(margins: list[float], objective: str = "dpo") -> RunSummary:
    pairs = PairSummary.of([pair(number, margin) for number, margin in enumerate(margins)])
    return RunSummary(objective=objective, eval_loss=0.5, eval_loss_before=0.7, eval_pairs=pairs)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(60, 60, 0.9398, 1.0), (5, 10, 0.2366, 0.7634), (0, 20, 0.0, 0.1611)]
)
def test_intervals_are_those_of_wilson(right: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("margins", "objective", "outcome", "words"),
    [
        ([1.0] * 60, "dpo", "better", "in 100 % of 60 held-out pairs (95 % interval 94 % to 100 %)."),
        ([1.0, -1.0, 1.0], "dpo", "unknown", "which may be chance."),
        ([-1.0] * 60, "dpo", "worse", "the model learned the opposite."),
        ([-1.0] * 60, "simpo", "unknown", "rejected answers are still the likelier ones."),
        ([0.0] * 60, "dpo", "unknown", "in 50 % of 60 held-out pairs"),
    ],
)
def test_a_run_is_judged_by_its_pairs(margins: list[float], objective: str, outcome: str, words: str) -> None:
    found = assess_run(summary_of(margins, objective))
    assert found.outcome == outcome and words in found.headline


def test_where_both_answers_became_less_likely_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "eval_pairs.jsonl"
    write_eval_pairs(path, [pair(number, 0.0, -9.0) for number in range(4)], before=True)
    after = [PairResult(n, f"pairs.jsonl:{n + 1}", 3, 4, -10.0, -20.0, 1.0, 0.0, 0.1) for n in range(4)]
    told = PairSummary.of(write_eval_pairs(path, after, before=False))
    assert (told.chosen_logp_before, told.chosen_logp) == (-9.0, -10.0) and told.both_fell
    summary = RunSummary(objective="dpo", eval_loss=0.1, eval_pairs=told)
    assert any("fell from -9 to -10" in line for line in run_warnings(summary))
    # Results of other pairs are not compared with those before.
    others = [PairResult(n, f"other.jsonl:{n + 1}", 3, 4, -10.0, -20.0, 1.0, 0.0, 0.1) for n in range(4)]
    assert PairSummary.of(write_eval_pairs(path, others, before=False)).chosen_logp_before is None


def test_the_page_has_the_pairs(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    told = summary_of([1.0] * 60)
    assert told.eval_pairs is not None
    facts = {**RUN_JSON, "objective": "dpo", "eval_pairs": told.eval_pairs.model_dump()}
    (folder / "run.json").write_text(json.dumps(facts))
    html = write_report(folder).read_text(encoding="utf-8")
    assert "Held-out pairs right" in html and "Pairs trained on" in html and "100 % of 60 held-out pairs" in html


def answer(number: int, label: bool, reward: float, logp: float) -> AnswerResult:
    right = float((reward > 0) is label)
    return AnswerResult(number, f"labels.jsonl:{number + 1}", label, 3, logp, reward, right, 0.5, logp_before=-9.0)


@pytest.mark.parametrize(
    ("sign", "outcome", "words"),
    [
        (1.0, "better", "in 100 % of 40 held-out answers (95 % interval 91 % to 100 %)."),
        (-1.0, "worse", "the model learned the opposite."),
    ],
)
def test_a_run_is_judged_by_its_labeled_answers(sign: float, outcome: str, words: str, tmp_path: Path) -> None:
    answers = [answer(number, number % 2 == 0, sign * (1 - 2 * (number % 2)), -10.0) for number in range(40)]
    told = LabelSummary.of(write_eval_answers(tmp_path / "answers.jsonl", answers, before=False), kl=0.25)
    assert (told.good, told.bad, told.margin) == (20, 20, 2 * sign)
    # Without a line of before the first step, what is known of it stays.
    assert told.both_fell
    samples = {"samples_before": (SampleAnswer("Hi", "a b"),), "samples_after": (SampleAnswer("Hi", "a b c"),)}
    summary = RunSummary(objective="kto", eval_loss=0.5, eval_loss_before=0.5, eval_labels=told, **samples)
    found = assess_run(summary)
    assert found.outcome == outcome and words in found.headline and summary.answer_lengths == (2, 3)
    assert any("good answers became less likely too" in line for line in run_warnings(summary))
    folder = run_folder(tmp_path / "run")
    facts = {**RUN_JSON, "objective": "kto", "eval_labels": told.model_dump()}
    facts |= {
        name: [{"prompt": "Hi", "answer": "a b c"[:end]}] for name, end in (("samples_before", 3), ("samples_after", 5))
    }
    (folder / "run.json").write_text(json.dumps(facts))
    html = write_report(folder).read_text(encoding="utf-8")
    assert "On average 2.0 words before and 3.0 after." in html
    assert "Held-out answers right" in html and "KL term" in html and "Labeled answers trained on" in html
