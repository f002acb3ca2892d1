"""One model on problems that are solved by a program: it writes, the sandbox runs, pass@k counts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftchat.evaluating.harness import MetricScore, TaskScores
from peftchat.evaluating.paired import standard_error
from peftchat.evaluating.programs import STOPS, Problem, pass_at, read_problems
from peftchat.evaluating.sandbox import run_programs

_MOST_NEW_TOKENS = 512


@dataclass(frozen=True)
class ProgramTask:
    """A file of problems.

    Attributes:
        name: of the file, without its endings.
        problems: those that are asked.
        available: how many the file has.
        samples: programs of each problem; one is greedy, several are sampled.
        temperature: of the sampling.
    """

    name: str
    problems: tuple[Problem, ...]
    available: int
    samples: int
    temperature: float


def load_program_task(path: Path, *, limit: int | None, samples: int, temperature: float) -> ProgramTask:
    """Read a file of problems.

    Raises:
        UserError: it cannot be used.
    """
    problems = read_problems(path)
    return ProgramTask(path.name.split(".")[0], tuple(problems[:limit]), len(problems), samples, temperature)


def score_programs(harness: Any, task: ProgramTask, *, through_template: bool, system: str | None) -> TaskScores:
    """Let a model write the programs of a task, run them, and count.

    Args:
        harness: the model, from `peftchat.evaluating.harness_model`.
        task: the problems.
        through_template: whether to ask through the chat template.
        system: a system prompt.
    """
    from lm_eval.api.instance import Instance

    settings: dict[str, Any] = {
        "until": ["```\n\n"] if through_template else list(STOPS),
        "max_gen_toks": min(_MOST_NEW_TOKENS, harness.max_length // 2),
    }
    if task.samples > 1:
        settings |= {"do_sample": True, "temperature": task.temperature, "top_p": 0.95}
    prompts = [_prompt(harness, problem, through_template, system) for problem in task.problems]
    requests = [
        Instance("generate_until", doc={}, arguments=(prompt, dict(settings)), idx=0, metadata=(task.name, place, 1))
        for place, prompt in enumerate(prompts)
        for _ in range(task.samples)
    ]
    answers = harness.generate_until(requests)
    owners = [problem for problem in task.problems for _ in range(task.samples)]
    ends = run_programs(
        [owner.program(answer, from_chat=through_template) for owner, answer in zip(owners, answers, strict=True)]
    )
    groups = [range(start, start + task.samples) for start in range(0, len(answers), task.samples)]
    passed = [sum(ends[place].passed for place in group) for group in groups]
    metrics = {
        f"pass@{k},none": _metric([pass_at(k, task.samples, count) for count in passed])
        for k in (1, 10, 100)
        if k <= task.samples
    }
    samples = [
        {
            "task": task.name,
            "question": problem.name,
            "passed": count,
            "answers": [answers[place] for place in group],
            "errors": [ends[place].error for place in group],
        }
        for problem, count, group in zip(task.problems, passed, groups, strict=True)
    ]
    ids = tuple(hashlib.sha256(f"{one.prompt}{one.tests}".encode()).hexdigest() for one in task.problems)
    return TaskScores(
        task.name, task.name, 0, None, len(task.problems), task.available, metrics, ids, None, tuple(samples)
    )


def _metric(values: Sequence[float]) -> MetricScore:
    return MetricScore(sum(values) / len(values), standard_error(values), True, tuple(values))


def _prompt(harness: Any, problem: Problem, through_template: bool, system: str | None) -> str:
    if not through_template:
        return problem.prompt
    messages = [{"role": "user", "content": problem.question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return str(harness.apply_chat_template(messages))
