"""The rule for single conversations with a loss far above those of their length."""

import numpy as np
import pytest

from peftchat.training.outliers import OutlierDetector, StepConversations, in_step_order
from peftchat.training.source_losses import SourceLosses


def made(seed: int, steps: int = 300, per_step: int = 6, fall: float = 2.0) -> list[StepConversations]:
    """Steps of conversations whose loss falls with time and varies more where there are fewer tokens."""
    draw = np.random.default_rng(seed)
    found = []
    for step in range(1, steps + 1):
        counts = np.round(2 ** draw.uniform(1, 8, per_step))
        level = 2.0 + fall * np.exp(-step / 30)
        means = level * np.exp(draw.normal(0, 0.08, per_step) + draw.normal(0, 0.6, per_step) / np.sqrt(counts))
        found.append(StepConversations(step, np.arange(per_step) + per_step * step, counts, counts * means))
    return found


def raised(steps: list[StepConversations], step: int, place: int, factor: float) -> int:
    """Raise the loss of one conversation; return its index."""
    steps[step - 1].sums[place] *= factor
    return int(steps[step - 1].examples[place])


def judged(steps: list[StepConversations], part: int) -> list[int]:
    detector = OutlierDetector()
    parts = [steps[start : start + part] for start in range(0, len(steps), part)]
    return [one.example for some in parts for one in detector.judge(some)]


@pytest.mark.parametrize("part", [1, 10, 300])
def test_high_losses_are_found_among_others_in_their_step(part: int) -> None:
    steps = made(0)
    for one in steps[59::40]:
        one.counts[0], one.sums[0] = 64, 64 * one.sums[1] / one.counts[1]
    high = [raised(steps, number, 0, 2.5) for number in range(60, 301, 40)]
    found = judged(steps, part)
    assert set(high) <= set(found)
    assert len(found) <= len(high) + 4


def test_conversations_without_anything_unusual_raise_few_alarms() -> None:
    alarms = sum(len(judged(made(seed), 10)) for seed in range(1, 6))
    assert alarms <= 0.003 * 5 * 300 * 6


def test_few_tokens_vary_more_and_need_more() -> None:
    steps = made(3)
    steps[199].counts[:2], steps[199].sums[:2] = (2, 200), (2 * 3.2, 200 * 3.2)
    assert judged(steps, 10).count(int(steps[199].examples[0])) == 0
    assert judged(steps, 10).count(int(steps[199].examples[1])) == 1


def test_all_processes_come_to_the_same_result() -> None:
    steps = made(4)
    expected = judged(steps, 300)
    halves = [
        [StepConversations(one.step, one.examples[k::2], one.counts[k::2], one.sums[k::2]) for one in steps]
        for k in (0, 1)
    ]
    joined = in_step_order(halves)
    assert sorted(found_at_once(joined)) == sorted(found_at_once(in_step_order(halves)))
    assert len(set(expected) ^ set(found_at_once(joined))) <= 2  # The order within a step differs.


def found_at_once(steps: list[StepConversations]) -> list[int]:
    return [one.example for one in OutlierDetector().judge(steps)]


def test_losses_are_summed_by_example() -> None:
    step = StepConversations.of(3, [7, 8, 9], [2, 0, 3], np.arange(5.0))
    assert step.examples.tolist() == [7, 9]
    assert step.counts.tolist() == [2, 3]
    assert step.sums.tolist() == [1.0, 9.0]


def test_losses_by_file_begin_and_end() -> None:
    sums = SourceLosses()
    for number in range(1, 10):
        sums.add(["a.jsonl:1", "b.jsonl:4"], StepConversations.of(number, [0, 1], [1, 2], np.array([number, 1.0, 1.0])))
    means = sums.means()
    assert list(means) == ["a.jsonl", "b.jsonl"]
    assert (means["a.jsonl"].first, means["a.jsonl"].last, means["a.jsonl"].tokens) == (2.0, 8.0, 9)
    assert means["b.jsonl"].first == means["b.jsonl"].last == 1.0
