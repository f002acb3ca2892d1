"""An evaluation from names to results: everything is checked first, then one model after the other is asked."""

import gc
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftchat.console import stderr
from peftchat.errors import UserError
from peftchat.evaluating.card_results import write_results
from peftchat.evaluating.data_losses import DataLosses, data_losses
from peftchat.evaluating.evaluated_model import EvaluatedModel
from peftchat.evaluating.evaluation_report import difference_plot, markdown
from peftchat.evaluating.harness import AskOptions, ModelScores, TaskScores, score_model
from peftchat.evaluating.sandbox import require_sandbox
from peftchat.evaluating.score_programs import ProgramTask, load_program_task, score_programs
from peftchat.evaluating.side_by_side import Evaluation, ModelRow, side_by_side
from peftchat.evaluating.task_catalog import DEFAULT_TASKS, ChosenTask, TaskSpec, load_tasks, parse_tasks
from peftchat.files import write_text
from peftchat.output_paths import InputPath, check_output
from peftchat.reports.model_card import read_card
from peftchat.runs.run_folder import RunFolder

RESULTS = "results.json"
_SEED = 1234


@dataclass(frozen=True, slots=True)
class CodeOptions:
    """Problems that are solved by a program.

    Attributes:
        files: HumanEval's or MBPP's, or of their form.
        run: run what a model wrote; without it, files are refused.
        open_sandbox: go on where the sandbox does not hold programs.
        samples: programs of each problem.
        temperature: of several samples.
    """

    files: Sequence[Path] = ()
    run: bool = False
    open_sandbox: bool = False
    samples: int = 1
    temperature: float = 0.2

    def load(self, limit: int | None) -> list[ProgramTask]:
        """Read the files and try the sandbox.

        Raises:
            UserError: programs are not to be run, or are not held, or a file cannot be used.
        """
        if self.files and not self.run:
            raise UserError(
                "these problems are solved by programs: what the model writes is run on this machine",
                where="--code",
                hint="Add `--run-code` if you want that. Each program gets a process without network and files.",
            )
        if not self.files:
            if self.run:
                raise UserError("there is no code to run", where="--run-code", hint="Name problems with `--code FILE`.")
            return []
        tasks = [
            load_program_task(file, limit=limit, samples=self.samples, temperature=self.temperature)
            for file in self.files
        ]
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise UserError(f"two files have one name: {', '.join(names)}", where="--code", hint="Rename one of them.")
        doors = require_sandbox(allow_open=self.open_sandbox)
        if doors:
            what = ", ".join(doors)
            stderr.print(f"Warning: a program of the model can {what} on this machine.", style="yellow", markup=False)
        return tasks


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate and how.

    Attributes:
        against: other models; empty for the base of a run.
        alone: do not compare a run with its base.
        tasks: `NAME[@SHOTS],…`; None for the default ones, or for none beside `code`.
        code: problems that are solved by a program.
        include: folders with task files.
        ask: how a model is asked.
        cluster: the field by which questions are related; None for what the tasks say.
        base: folder or hub id of an adapter's base that has moved.
        allow_changed: load a run although base, tokenizer or template changed.
        output: the folder of the results; None for one below the run folder, or below `evaluations`.
    """

    against: Sequence[str] = ()
    alone: bool = False
    tasks: str | None = None
    code: CodeOptions = field(default_factory=CodeOptions)
    include: Sequence[Path] = ()
    ask: AskOptions = field(default_factory=AskOptions)
    cluster: str | None = None
    base: str | None = None
    allow_changed: bool = False
    output: Path | None = None


@dataclass(frozen=True)
class Watch:
    """Who is told about the progress of an evaluation; each function is called as it says.

    Attributes:
        on_model: with a model before it is loaded.
        on_task: with the name of each task before it.
        on_answer: with the number of new answers.
        on_finished: with the scores of each task and group.
    """

    on_model: Callable[[EvaluatedModel], None] = lambda model: None
    on_task: Callable[[str], None] = lambda task: None
    on_answer: Callable[[int], None] = lambda count: None
    on_finished: Callable[[TaskScores], None] = lambda scores: None


_NOBODY = Watch()


def evaluate_models(
    name: str, options: EvaluateOptions | None = None, watch: Watch = _NOBODY
) -> tuple[Evaluation, Path]:
    """Evaluate a run or a model, and write the results.

    Args:
        name: a run folder, a model folder or a hub id.
        options: what else to evaluate, and how.
        watch: who is told about the progress.

    Returns:
        The result, and the folder with `results.json`, `results.md`, `results.svg` and the result of each question.

    Raises:
        UserError: an input cannot be used; mostly raised before a model is loaded.
        VerificationError: a model computes no numbers.
    """
    options = options or EvaluateOptions()
    specs = _specs(options)
    programs = options.code.load(options.ask.limit)
    models = _models(name, options)
    folder, answers = _folders(models, specs, programs, options)
    _check_templates(models, options)
    card = _card(models[0])
    if card is not None:
        read_card(card.read_text(encoding="utf-8", errors="replace"), str(card))
    tasks = load_tasks(specs, options.include, cluster=options.cluster) if specs else []
    clash = {name for task in tasks for name in task.tasks} & {task.name for task in programs}
    if clash:
        raise UserError(f"{min(clash)} is a task and a file of problems", where="--code", hint="Rename the file.")
    others = [(task.name, _scorer(task, options.ask.system)) for task in programs]
    rows, scores = [], []
    for model in models:
        watch.on_model(model)
        key = model.key()
        found = score_model(
            model,
            tasks,
            options.ask,
            answers / f"{key}.jsonl",
            watch.on_task,
            watch.on_answer,
            watch.on_finished,
            others,
        )
        gc.collect()
        scores.append(found)
        rows.append(_model_row(model, found, key))
    evaluation = Evaluation(tuple(rows), side_by_side(scores), _settings([*tasks, *programs], options))
    _write(evaluation, scores, folder)
    if card is not None:
        write_results(card, evaluation)
    return evaluation, folder


def evaluate_data(
    name: str, data: Path, options: EvaluateOptions | None = None, watch: Watch = _NOBODY
) -> tuple[DataLosses, Path]:
    """Compute the held-out loss of a run on a file of conversations, beside its base or other runs.

    Args:
        name: a run folder.
        data: the file.
        options: what else to evaluate; tasks and code are left out.
        watch: who is told about the progress.

    Returns:
        The losses, and the folder with `losses.json` and the losses of each conversation.

    Raises:
        UserError: an input cannot be used; raised before a model is loaded.
    """
    options = options or EvaluateOptions()
    models = _models(name, options)
    if options.output is not None:
        inputs = [InputPath(data, "the data"), InputPath(Path(name), f"the model {name}")]
        check_output(options.output, inputs, f"-o {options.output}")
        _check_own(options.output)
    watch.on_task(data.name)
    found = data_losses(models, data, limit=options.ask.limit, on_model=watch.on_model, on_answer=watch.on_answer)
    digest = hashlib.sha256(json.dumps([str(data.absolute()), found.models, options.ask.limit]).encode()).hexdigest()
    folder = options.output or models[0].source.path / "evaluations" / f"losses-{data.stem[:40]}-{digest[:6]}"
    found.write(folder)
    return found, folder


def _card(model: EvaluatedModel) -> Path | None:
    """Return the model card of a finished run."""
    run = RunFolder(model.source.path)
    return run.model_card if model.recipe is not None and run.is_finished and run.model_card.is_file() else None


def _specs(options: EvaluateOptions) -> list[TaskSpec]:
    if options.tasks is None:
        return [] if options.code.files or options.code.run else parse_tasks(DEFAULT_TASKS)
    return parse_tasks(options.tasks)


def _scorer(task: ProgramTask, system: str | None) -> Callable[[Any, bool], TaskScores]:
    return lambda harness, through_template: score_programs(
        harness, task, through_template=through_template, system=system
    )


def _models(name: str, options: EvaluateOptions) -> list[EvaluatedModel]:
    first = EvaluatedModel.open(name, base=options.base, allow_changed=options.allow_changed)
    if options.alone and options.against:
        raise UserError("a comparison is asked for, and none", where="--alone", hint="Leave out one of the options.")
    others = [EvaluatedModel.open(other, allow_changed=options.allow_changed) for other in options.against]
    base = None if options.against or options.alone else first.base()
    models = [first, *others] if base is None else [first, base]
    places = [model.source.name if model.is_base else str(_place(model.name)) for model in models]
    for model, place in zip(models, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{model.name} is named twice", where="--against", hint="Name each model once.")
    return models


def _place(name: str) -> Path | str:
    """Return the folder that a name stands for, or the hub id."""
    return Path(name).resolve() if Path(name).exists() else name


def _check_templates(models: Sequence[EvaluatedModel], options: EvaluateOptions) -> None:
    """Load all tokenizers, and check that a chat template that is asked for is there."""
    templates = {model.name: bool(model.tokenizer().chat_template) for model in models}
    if options.ask.chat_template and not any(templates.values()):
        raise UserError(
            "no model has a chat template", where="--chat-template", hint="Ask without it: `--no-chat-template`."
        )
    if options.ask.system is not None and not options.ask.chat_template:
        raise UserError(
            "a system prompt needs a chat template", where="--system", hint="Add `--chat-template`, or leave it out."
        )


def _folders(
    models: Sequence[EvaluatedModel],
    specs: Sequence[TaskSpec],
    programs: Sequence[ProgramTask],
    options: EvaluateOptions,
) -> tuple[Path, Path]:
    """Return the folder of the results, and that of the kept answers."""
    first = models[0]
    inputs = [InputPath(Path(model.name), f"the model {model.name}") for model in models if Path(model.name).exists()]
    inputs += [InputPath(folder, f"the folder of task files {folder}") for folder in options.include]
    if options.output is not None:
        check_output(options.output, inputs, f"-o {options.output}")
        _check_own(options.output)
        return options.output, options.output / "answers"
    root = Path("evaluations")
    if first.recipe is not None and RunFolder(first.source.path).is_run:
        root = RunFolder(first.source.path).path / "evaluations"
    asked = [spec.name if spec.shots is None else f"{spec.name}@{spec.shots}" for spec in specs]
    names = "+".join([*asked, *(f"{task.name}@{task.samples}" for task in programs)])
    settings = [[model.name for model in models], names, options.ask.limit, options.ask.chat_template,
                options.ask.system, options.cluster]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]
    return root / f"{re.sub(r'[^A-Za-z0-9_.@+-]', '_', names)[:60]}-{digest}", root / "answers"


def _check_own(folder: Path) -> None:
    """Refuse a folder with other contents than those of an evaluation."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError("the output is a file, expected a folder", where=f"-o {folder}", hint="Name another one.")
    own = {RESULTS, "results.md", "results.svg", "answers"}
    foreign = [
        path.name
        for path in folder.iterdir()
        if path.name not in own and not path.name.startswith(("samples-", "losses"))
    ]
    if foreign:
        what = f"the folder holds something else than an evaluation: {sorted(foreign)[0]}"
        raise UserError(what, where=f"-o {folder}", hint="Name another folder.")


def _model_row(model: EvaluatedModel, scores: ModelScores, key: str) -> ModelRow:
    from peftchat.models.source import ModelKind

    base = model.source.base().name if model.source.kind is ModelKind.ADAPTER else None
    return ModelRow(
        model.name,
        model.source.name,
        base,
        model.precision,
        scores.through_template,
        scores.device,
        scores.dtype,
        scores.context,
        scores.batch_sizes,
        scores.cut,
        scores.requests,
        key,
    )


def _settings(tasks: Sequence[ChosenTask | ProgramTask], options: EvaluateOptions) -> dict[str, Any]:
    return {
        "tasks": [task.name for task in tasks],
        "include": [str(folder) for folder in options.include],
        "code_samples": options.code.samples if options.code.files else None,
        "limit": options.ask.limit,
        "chat_template": options.ask.chat_template,
        "system": options.ask.system,
        "batch_size": options.ask.batch_size,
        "seed": _SEED,
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch", "peft")},
    }


def _write(evaluation: Evaluation, scores: Sequence[ModelScores], folder: Path) -> None:
    """Write all results; `results.json` last."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(scores):
        lines = [json.dumps(sample, default=str) for task in one.scores.values() for sample in task.samples]
        write_text(folder / f"samples-{number + 1}.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "results.md", markdown(evaluation))
    write_text(folder / "results.svg", difference_plot(evaluation))
    evaluation.write(folder / RESULTS)
