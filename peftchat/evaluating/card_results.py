"""Results of an evaluation in the model card of a run: its metadata (`model-index`) and a section with the table.

The rest of the card stays as it is: a user may have changed it. Of models and files only the names are written.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peftchat.errors import UserError, first_line
from peftchat.evaluating.side_by_side import Evaluation, TaskRow
from peftchat.files import write_text
from peftchat.reports.model_card import read_card

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"
_SECTION = re.compile(rf"\n*{_BEGIN}.*?{_END}\n*", re.DOTALL)
_LIMITS = "## Limits"


def write_results(card: Path, evaluation: Evaluation) -> None:
    """Write the results of the first model into its card; earlier ones of the same tasks and settings are replaced.

    Args:
        card: `README.md` of a run.
        evaluation: the result.

    Raises:
        UserError: the card's metadata cannot be read.
    """
    from huggingface_hub.repocard_data import model_index_to_eval_results

    try:
        found = read_card(card.read_text(encoding="utf-8"), str(card))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the model card cannot be read: {first_line(error)}", where=str(card)) from error
    data = cast("ModelCardData", found.data)
    new = eval_results(evaluation)
    names = {(one.dataset_name, one.metric_name) for one in new}
    kept = [one for one in data.eval_results or [] if (one.dataset_name, one.metric_name) not in names]
    data.model_name = data.model_name or card.resolve().parent.name
    data.eval_results = [*kept, *new]
    # What the hub will read must be what is meant.
    index = data.to_dict()["model-index"]
    assert len(model_index_to_eval_results(index)[1]) == len(kept) + len(new)
    text = _SECTION.sub("\n\n", found.text)
    block = f"{_BEGIN}\n{_section(evaluation)}{_END}"
    before, limits, after = text.partition(_LIMITS)
    text = f"{before.rstrip()}\n\n{block}\n\n{limits}{after}" if limits else f"{text.rstrip()}\n\n{block}\n"
    found.text = text
    write_text(card, str(found))


def eval_results(evaluation: Evaluation) -> "list[EvalResult]":
    """Return the results of the first model as the hub's metadata has them."""
    from huggingface_hub import EvalResult

    results = []
    for task in evaluation.shown:
        for metric in task.metrics:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task.dataset or task.task,
                    dataset_name=f"{task.task} ({_settings(evaluation, task)})",
                    dataset_args=None if task.shots is None else {"num_few_shot": task.shots},
                    metric_type=metric.metric,
                    metric_name=metric.metric,
                    metric_value=round(metric.values[0], 6),
                    metric_args=None if metric.stderrs[0] is None else {"stderr": round(metric.stderrs[0], 6)},
                )
            )
    return results


def _settings(evaluation: Evaluation, task: TaskRow) -> str:
    parts = [] if task.shots is None else [f"{task.shots} shots"]
    if task.questions < task.available:
        parts.append(f"first {task.questions} of {task.available} questions")
    parts.append("through the chat template" if evaluation.models[0].through_template else "no chat template")
    return ", ".join(parts)


def _section(evaluation: Evaluation) -> str:
    _, *others = evaluation.models
    names = [one.name if one.name == "base" else Path(one.name).name for one in others]
    header = ["task", "metric", "questions", "this model"]
    for name in names:
        header += [name, "difference"]
    lines = ["## Evaluation", "", _line(header), _line(["---"] * len(header))]
    for task in evaluation.shown:
        for metric in task.metrics:
            cells = [f"{task.task} ({_settings(evaluation, task)})", metric.metric, f"{task.questions:,}"]
            cells.append(_number(metric.values[0], metric.stderrs[0]))
            for place, difference in enumerate(metric.differences):
                cells.append(_number(metric.values[place + 1], metric.stderrs[place + 1]))
                if difference is None or difference.low is None or difference.high is None:
                    cells.append("not measured")
                else:
                    interval = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
                    cells.append(f"{interval} {metric.verdict(place)}")
            lines.append(_line(cells))
    versions = evaluation.settings["versions"]
    lines += ["", f"Scores with standard errors, from lm-evaluation-harness {versions['lm_eval']} through peftchat."]
    if others:
        lines.append("Differences are paired by question, with their 95 % intervals.")
    return "\n".join(lines) + "\n"


def _number(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
