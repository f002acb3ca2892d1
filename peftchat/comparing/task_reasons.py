"""What the recommendation says of tasks: who is set aside by them, what they cannot tell, and the base beside them."""

from collections.abc import Mapping, Sequence

from peftchat.comparing.task_evidence import (
    NEGLIGIBLE_SCORE,
    ONE_SEED_SCORE,
    TaskComparison,
    TaskEvidence,
    TaskGap,
)
from peftchat.formatting import format_count


def format_score(value: float) -> str:
    """Format a score with three decimals; further digits are noise."""
    return f"{value:.3f}"


def format_task_gap(gap: TaskGap) -> str:
    """Format how much worse a score is, with the interval that holds for all pairs and tasks at once."""
    return format_score(gap.mean) + ("" if gap.margin is None else f" ± {format_score(gap.margin)}")


def split_by_tasks(
    names: Sequence[str], evidence: TaskEvidence
) -> tuple[list[str], dict[str, tuple[TaskComparison, str]]]:
    """Return who stays of candidates that tie, and who is set aside by which task and beside whom.

    Where each of them is certainly worse on some task, tasks set nobody aside: they contradict each other.
    """
    aside = evidence.set_aside(names)
    staying = [name for name in names if name not in aside]
    return (staying, aside) if staying else (list(names), {})


def task_reasons(
    recommended: str, tied: Sequence[str], aside: Mapping[str, tuple[TaskComparison, str]], evidence: TaskEvidence
) -> list[str]:
    """Return what tasks say of candidates that tie, a sentence each."""
    reasons = []
    for name, (task, better) in aside.items():
        gap = task.gap(better, name)
        assert gap is not None
        reasons.append(f"{name} is set aside: on {task.title} it is worse by {format_task_gap(gap)} than {better}.")
    contradicting = {} if aside else evidence.set_aside(tied)
    if contradicting:
        told = "; ".join(f"{name} than {better} on {task.title}" for name, (task, better) in contradicting.items())
        reasons.append(f"Tasks contradict each other and set nobody aside. Certainly worse is: {told}.")
    for task in evidence.tasks:
        names = [name for name in task.names if name in tied]
        if len(names) > 1 and not any(task.is_worse(one, other) for one in names for other in names):
            reasons.append(f"{task.title} does not tell the tied candidates apart: {_scores(task, names)}.")
    reasons += _better_elsewhere(recommended, tied, evidence)
    if evidence.tasks:
        reasons.append(_basis(evidence))
    return reasons


def _scores(task: TaskComparison, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {format_score(task.means[task.names.index(name)])}" for name in names)


def _better_elsewhere(recommended: str, tied: Sequence[str], evidence: TaskEvidence) -> list[str]:
    """Name candidates with a higher loss that are certainly better on a task."""
    found = []
    for task in evidence.tasks:
        for name in task.names:
            if name not in tied and task.is_worse(name, recommended):
                gap = task.gap(name, recommended)
                assert gap is not None
                told = format_task_gap(gap)
                found.append(f"Trade-off: {name} is better on {task.title} by {told}, but its held-out loss is higher.")
    return found


def _basis(evidence: TaskEvidence) -> str:
    first = evidence.tasks[0]
    questions = ", ".join(
        f"{format_count(task.questions)} questions of {task.task}"
        + ("" if task.clusters == task.questions else f" in {format_count(task.clusters)} groups")
        for task in evidence.tasks
    )
    start = f"Task intervals (95 %, for all pairs and tasks at once) are over {questions}"
    if first.seeds == 1:
        return (
            f"{start}. One seed does not show the noise of runs: a candidate is set aside only if it is worse by "
            f"{ONE_SEED_SCORE} more than that."
        )
    return f"{start}, and {first.seeds} seeds. Differences up to {NEGLIGIBLE_SCORE} count as equal."


def task_warnings(recommended: str, evidence: TaskEvidence) -> list[str]:
    """Return what tasks say against relying on the recommended candidate, a sentence each."""
    warnings = []
    for task in evidence.against_base.get(recommended, ()):
        gap = task.gap("base", recommended)
        if gap is None or gap.margin is None:
            continue
        if task.is_worse("base", recommended):
            warnings.append(f"On {task.title} it is worse than the untouched base, by {format_task_gap(gap)}.")
    for name, failure in evidence.failures.items():
        warnings.append(f"{name} could not be asked the tasks, which therefore say nothing of it: {failure}")
    return warnings
