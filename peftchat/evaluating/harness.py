"""One model on tasks of the harness: its scores, and the result of every question."""

import contextlib
import io
import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.evaluating.evaluated_model import EvaluatedModel
from peftchat.evaluating.kept_answers import KeptAnswers
from peftchat.evaluating.task_catalog import ChosenTask


@dataclass(frozen=True, slots=True)
class MetricScore:
    """A metric of a task, or its mean over a group of tasks.

    Attributes:
        value: as the harness aggregates it.
        stderr: as the harness estimates it; None where it does not.
        higher_is_better: None where the task does not say.
        by_question: the value of each question; None where the metric is not a mean of them.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None
    by_question: tuple[float, ...] | None


@dataclass(frozen=True)
class TaskScores:
    """The scores of one model on one task or group.

    Attributes:
        task: its name.
        asked: the name that was asked for: its own, or of the group or tag that it is a part of.
        shots: examples before each question; None for a group whose tasks differ.
        version: the version of the task.
        questions: how many were asked.
        available: how many the task has.
        metrics: by the harness's key, `NAME,FILTER`.
        ids: a digest of each question, in order.
        clusters: the group of related questions that each belongs to; None where each stands alone.
        samples: what is kept of each question, as JSON values.
        members: the tasks of a group; empty for a task.
        dataset: the hub id of its data; None for local files.
        weighted: for a group, the metrics (`NAME`, or `NAME,FILTER`) in which each question counts the same; in others
            each task does.
    """

    task: str
    asked: str
    shots: int | None
    version: str | None
    questions: int
    available: int
    metrics: Mapping[str, MetricScore]
    ids: tuple[str, ...] = ()
    clusters: tuple[Hashable, ...] | None = None
    samples: tuple[dict[str, Any], ...] = ()
    members: tuple[str, ...] = ()
    dataset: str | None = None
    weighted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model.

    Attributes:
        scores: by task and group.
        through_template: whether it was asked through its chat template.
        device: where it ran.
        dtype: what it computed in.
        context: tokens of its context.
        batch_sizes: the batches that were found or given.
        cut: requests whose beginning did not fit into its context.
        requests: all requests.
    """

    scores: Mapping[str, TaskScores]
    through_template: bool
    device: str
    dtype: str
    context: int
    batch_sizes: tuple[int, ...]
    cut: int
    requests: int


OtherTask = tuple[str, Callable[[Any, bool], TaskScores]]


@dataclass(frozen=True, slots=True)
class AskOptions:
    """How a model is asked.

    Attributes:
        chat_template: ask through the model's chat template, if it has one.
        system: a system prompt.
        batch_size: sequences of a batch, or "auto".
        limit: the most questions of a task.
    """

    chat_template: bool = False
    system: str | None = None
    batch_size: str = "auto"
    limit: int | None = None


def score_model(
    model: EvaluatedModel,
    tasks: Sequence[ChosenTask],
    options: AskOptions,
    answers: Path,
    on_task: Callable[[str], None] = lambda task: None,
    on_answer: Callable[[int], None] = lambda count: None,
    on_finished: Callable[[TaskScores], None] = lambda scores: None,
    others: Sequence[OtherTask] = (),
) -> ModelScores:
    """Load a model, ask it the questions of all tasks, and free it.

    Args:
        model: what to load.
        tasks: from `load_tasks`.
        options: how to ask.
        answers: the file in which answers are kept; those that are there are not asked again.
        on_task: called with the name of each task before it.
        on_answer: called with the number of new answers.
        on_finished: called with the scores of each task and group.
        others: tasks that the harness does not have, by name; each is given the harness's model, and whether to ask
            through the chat template.

    Raises:
        UserError: the model cannot be loaded, or a question does not fit into its context.
        VerificationError: the model computes no numbers.
    """
    from peftchat.evaluating.harness_model import HarnessModel

    tokenizer = model.tokenizer()
    through_template = options.chat_template and bool(tokenizer.chat_template)
    loaded = model.load()
    # PEFT keeps the base's settings, and only the run's name the token that ends an answer.
    loaded.generation_config = model.source.generation_config()
    scores: dict[str, TaskScores] = {}
    requests = 0

    def count(number: int) -> None:
        nonlocal requests
        requests += number
        on_answer(number)

    # The harness prints how it looks for a batch size; standard output is for results.
    with contextlib.redirect_stdout(io.StringIO()), KeptAnswers(answers) as kept:
        harness = HarnessModel(loaded, tokenizer, batch_size=options.batch_size, answers=kept, on_answer=count)
        for task in tasks:
            on_task(task.name)
            for found in _score(harness, task, options, through_template):
                scores[found.task] = found
                on_finished(found)
        for name, score in others:
            on_task(name)
            scores[name] = score(harness, through_template)
            on_finished(scores[name])
    sizes = tuple(sorted({int(size) for size in harness.batch_sizes.values()} or _fixed(options.batch_size)))
    dtype = str(loaded.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return ModelScores(
        scores, through_template, str(harness.device), dtype, int(harness.max_length), sizes, harness.cut, requests
    )


def _fixed(batch_size: str) -> set[int]:
    return {int(batch_size)} if batch_size.isdigit() else set()


def _score(harness: Any, chosen: ChosenTask, options: AskOptions, through_template: bool) -> list[TaskScores]:
    """Run what was asked for by one name."""
    from lm_eval.evaluator import evaluate

    _seed(chosen)
    found = evaluate(
        lm=harness,
        task_dict={"tasks": dict(chosen.tasks), "groups": dict(chosen.groups), "group_map": {}},
        limit=options.limit,
        system_instruction=options.system,
        apply_chat_template=through_template,
        fewshot_as_multiturn=True,
    )
    scores = [_task_scores(name, chosen, found) for name in chosen.tasks]
    return scores + [_group_scores(group, chosen, found, scores) for group in chosen.groups.values()]


def _seed(chosen: ChosenTask) -> None:
    """Seed as the harness's own command line does, so that the same examples are shown to every model."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    for task in chosen.tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _task_scores(name: str, chosen: ChosenTask, found: Mapping[str, Any]) -> TaskScores:
    samples = found["samples"][name]
    # A task with several filters has each question once per filter.
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    by_filter = {one: sorted(_of(samples, one), key=lambda sample: sample["doc_id"]) for one in filters}
    questions = by_filter[filters[0]]
    field = chosen.clusters.get(name)
    task = chosen.tasks[name]
    means = {metric for metric, aggregation in task.aggregation().items() if _is_mean(aggregation)}
    metrics = {
        key: MetricScore(
            float(value), error, better, _by_question(by_filter[key.partition(",")[2]], key.partition(",")[0], means)
        )
        for key, value, error, better in _metrics(name, found)
    }
    return TaskScores(
        name,
        chosen.name,
        found["n-shot"].get(name),
        None if found["versions"].get(name) is None else str(found["versions"][name]),
        len(questions),
        found["n-samples"][name]["original"],
        metrics,
        tuple(str(question["doc_hash"]) for question in questions),
        None if field is None else tuple(str(question["doc"].get(field)) for question in questions),
        tuple(_kept(name, sample) for one in filters for sample in by_filter[one]),
        dataset=_hub_id(task.get_config("dataset_path")),
    )


def _hub_id(dataset: Any) -> str | None:
    """Return the hub id of a task's data; None for files, whose paths belong to this machine."""
    is_id = isinstance(dataset, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) and not Path(dataset).exists()
    return dataset if is_id else None


def _group_scores(group: Any, chosen: ChosenTask, found: Mapping[str, Any], scores: Sequence[TaskScores]) -> TaskScores:
    members = {task.task_name for task in group.get_all_tasks()}
    parts = [one for one in scores if one.task in members]
    aggregated = group.aggregate_metric_list or []
    weighted = frozenset(
        f"{one.metric},{name}" if name else one.metric
        for one in aggregated
        if one.weight_by_size
        for name in (one.filter_list or [""])
    )
    metrics = {
        key: MetricScore(float(value), error, better, None) for key, value, error, better in _metrics(group.name, found)
    }
    shots, datasets = {part.shots for part in parts}, {part.dataset for part in parts}
    return TaskScores(
        group.name,
        chosen.name,
        shots.pop() if len(shots) == 1 else None,
        None if found["versions"].get(group.name) is None else str(found["versions"][group.name]),
        sum(part.questions for part in parts),
        sum(part.available for part in parts),
        metrics,
        members=tuple(part.task for part in parts),
        dataset=datasets.pop() if len(datasets) == 1 else None,
        weighted=weighted,
    )


def _of(samples: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["filter"] == name]


def _metrics(name: str, found: Mapping[str, Any]) -> list[tuple[str, float, float | None, bool | None]]:
    """Return key, value, standard error and direction of each metric that is a number."""
    results = found["results"].get(name, {})
    better = found["higher_is_better"].get(name) or {}
    rows = []
    for key, value in results.items():
        metric, comma, of_filter = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{of_filter}")
        rows.append((key, value, float(error) if isinstance(error, int | float) else None, better.get(metric)))
    return rows


def _is_mean(aggregation: Any) -> bool:
    from lm_eval.api.metrics import mean

    return aggregation is mean


def _by_question(questions: Sequence[dict[str, Any]], metric: str, means: set[str]) -> tuple[float, ...] | None:
    values = [question.get(metric) for question in questions]
    if metric not in means or not all(isinstance(value, int | float) for value in values):
        return None
    return tuple(float(value) for value in values if value is not None)


def _kept(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a question: the results, and what they were made from."""
    return {
        "task": task,
        "question": sample["doc_id"],
        "digest": sample["doc_hash"],
        "filter": sample["filter"],
        "target": sample["target"],
        "answers": sample["filtered_resps"],
        **{metric: sample[metric] for metric in sample["metrics"]},
    }
