"""The public Python API. The command line is a thin layer over these functions.

`import peftchat` imports no torch: each function imports the libraries that it needs.
"""

import contextlib
import dataclasses
import gc
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftchat.before_training import (
    check_inputs,
    check_rate_file,
    choose_settings,
    prepare_training,
    resolve_processes,
)
from peftchat.conversation import Message
from peftchat.errors import UserError, VerificationError
from peftchat.recipe import LoadedRecipe, load_recipe

if TYPE_CHECKING:
    from peftchat.comparing.results import ComparisonResult
    from peftchat.evaluating.data_losses import DataLosses
    from peftchat.evaluating.run_evaluation import EvaluateOptions, Watch
    from peftchat.evaluating.side_by_side import Evaluation
    from peftchat.export.combine import CombinationReport, CombineOptions
    from peftchat.launching.job import JobOptions
    from peftchat.launching.targets import JobPlaces, Target
    from peftchat.merging import MergeOptions, MergeResult
    from peftchat.planning.plan import TrainingPlan
    from peftchat.reports.run_report import ReportExtras
    from peftchat.runs.run_summary import RunSummary
    from peftchat.serving.chat_model import ChatModel
    from peftchat.serving.generate import ChatAnswer
    from peftchat.training.context import TrainOptions
    from peftchat.training.distributed import DistributedSetup
    from peftchat.training.rate_trials import RateSearch

RecipeSource = LoadedRecipe | Path | str
"""A loaded recipe, or the path of its file."""


class WorkerError(VerificationError):
    """A process that `train` started ended with an error, which it has printed.

    Attributes:
        status: the exit status of that process.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"a training process ended with status {status}; its message is above")
        self.status = status


def train(
    recipe: RecipeSource,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    allow_changed: bool = False,
    prompts: Sequence[str] = (),
) -> "RunSummary":
    """Fine-tune a model as a recipe says, and leave a run folder.

    A recipe with several processes starts them and waits for them. Inside a launcher (torchrun, accelerate, Slurm),
    every process calls this function.

    Args:
        recipe: the path of a recipe, or a loaded one.
        overrides: `section.key=value` texts, as for `--set`; for a path only.
        resume: continue from the last complete checkpoint, if there is one.
        allow_changed: resume although base, tokenizer, template, data, settings or layout changed, and record it.
        prompts: prompts to answer before and after training.

    Returns:
        The summary that is also in `run.json`.

    Raises:
        UserError: an input cannot be used; the run folder is then untouched.
        VerificationError: training or saving went wrong.

    Example:
        >>> import peftchat
        >>> summary = peftchat.train("my.yaml", overrides=["training.max_steps=2"])
        >>> summary.steps
        2
    """
    from peftchat.library_setup import prepare_libraries

    # First: the modules below import bitsandbytes, which logs while it is imported.
    prepare_libraries()
    resolve_processes()
    loaded = _load(recipe, overrides)
    distributed = prepare_training(loaded, resume=resume, allow_changed=allow_changed, download=True)
    from peftchat.training.context import TrainOptions, check_content

    if distributed.world_size == 1:
        # Data that is refused is refused before anything heavy is imported, planned or loaded.
        started = _with_rate_of_run(loaded) if resume else loaded
        check_content(started, TrainOptions(resume, allow_changed), distributed)
    from peftchat.evaluating.recipe_tasks import evaluate_recipe_tasks
    from peftchat.reports.run_report import try_model_card, write_summaries
    from peftchat.runs.run_folder import RunFolder
    from peftchat.runs.run_summary import RunSummary
    from peftchat.training.machines import this_route
    from peftchat.training.several_processes import is_main_process
    from peftchat.training.train import claimed_by_run
    from peftchat.training.train import train as train_in_process

    run_folder = RunFolder(Path(loaded.recipe.output_dir))
    arguments = _train_arguments(loaded, resume=resume, allow_changed=allow_changed, prompts=prompts)
    if distributed.launcher == "torchrun":
        # With several machines there is a launcher on each, so the first of all processes claims the folder.
        with claimed_by_run(run_folder) if distributed.nodes == 1 else contextlib.nullcontext():
            _launch(loaded, distributed, arguments, TrainOptions(resume, allow_changed))
        # There is a launcher on each machine, and one run folder.
        if distributed.nodes == 1 or this_route().is_first:
            evaluate_recipe_tasks(loaded)
        return RunSummary.read(run_folder)
    with claimed_by_run(run_folder):
        loaded, auto_settings = choose_settings(loaded, distributed, resume=resume)
        if is_main_process():
            try_model_card(loaded.recipe)
        options = TrainOptions(
            resume, allow_changed, tuple(prompts), shlex.join(["peftchat", *arguments]), auto_settings
        )
        # Standard output is for data; DeepSpeed prints to it while it compiles.
        with contextlib.redirect_stdout(sys.stderr), _advising_on_memory(loaded, distributed):
            summary = train_in_process(loaded, options, distributed)
        if is_main_process():
            write_summaries(run_folder.path)
    if distributed.world_size == 1:
        evaluate_recipe_tasks(loaded)
    return summary


@contextlib.contextmanager
def _advising_on_memory(loaded: LoadedRecipe, distributed: "DistributedSetup") -> Iterator[None]:
    """Add to the message of a run that ran out of memory what the plan advises.

    Raises:
        OutOfMemory: with the advice.
    """
    from peftchat.planning.memory_advice import memory_advice
    from peftchat.runs.run_folder import RunFolder
    from peftchat.training.out_of_memory import OutOfMemory

    try:
        yield
        return
    except OutOfMemory as error:
        position, message = error.position, str(error)
    # Behind the `except`: the error holds the run's tensors. Planning needs memory too.
    gc.collect()
    advice = ""
    with contextlib.suppress(Exception):
        advice = memory_advice(loaded.recipe, distributed, position)
    last = RunFolder(Path(loaded.recipe.output_dir)).latest_checkpoint()
    if last is not None:
        advice += f" `--resume` goes on from {last.path}."
    raise OutOfMemory(f"{message}.{advice}", position)


def find_learning_rate(
    recipe: RecipeSource, *, overrides: Sequence[str] = (), steps: int | None = None
) -> "tuple[RateSearch, Path]":
    """Search the learning rate of a recipe with short runs, and write the result to `find_lr.json` in its folder.

    Args:
        recipe: the path of a recipe, or a loaded one.
        overrides: `section.key=value` texts, as for `--set`; for a path only.
        steps: optimizer steps of each short run; None for 40, at most those of the run.

    Returns:
        The rates with their losses and the advised rate, and the file.

    Raises:
        UserError: an input cannot be used, or the recipe needs several processes.
        VerificationError: no rate gave a finite loss.

    Example:
        >>> import peftchat
        >>> search, file = peftchat.api.find_learning_rate("my.yaml", steps=5)
        >>> search.setting.startswith("training.learning_rate: ")
        True
    """
    from peftchat.console import stderr
    from peftchat.library_setup import prepare_libraries

    prepare_libraries()
    from peftchat.runs.run_folder import RunFolder
    from peftchat.training.rate_search import cases_of, find_rate, refuse_processes

    resolve_processes()
    loaded = _load(recipe, overrides)
    file = RunFolder(Path(loaded.recipe.output_dir)).rate_search
    refuse_processes(loaded)
    # The rule is where the search begins, whatever the recipe says.
    training = loaded.recipe.training.model_copy(update={"learning_rate": "auto"})
    loaded = dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"training": training}))
    distributed = check_inputs(loaded, download=True)
    loaded, _ = choose_settings(loaded, distributed)

    def tell(line: str) -> None:
        stderr.print(line, markup=False, highlight=False)

    if not loaded.recipe.data.has_eval:
        cases = cases_of(loaded.recipe)
        tell(f"The recipe holds out no {cases}, so the search holds out a tenth of those to train on.")
    check_rate_file(loaded, file)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            search = find_rate(loaded, distributed, steps=steps, tell=tell)
        search.write(file)
    finally:
        RunFolder(file.parent).release()
    return search, file


def plan(
    recipe: RecipeSource,
    *,
    overrides: Sequence[str] = (),
    gpu: str | None = None,
    gpus: int | None = None,
    price: float | None = None,
    alternatives: bool = False,
) -> "TrainingPlan":
    """Predict memory, time and cost of a run from its model's config.

    Args:
        recipe: the path of a recipe, or a loaded one.
        overrides: `section.key=value` texts; for a path only.
        gpu: a GPU such as `a100-80gb`, or `cpu`; None for this machine's.
        gpus: their number; None for that of the recipe.
        price: price of one GPU per hour.
        alternatives: whether to plan other methods and strategies too.

    Raises:
        UserError: the GPU is unknown, or the recipe or the config cannot be used.

    Example:
        >>> import peftchat
        >>> peftchat.plan("my.yaml", gpu="a100-80gb").fits
        True
    """
    from peftchat.models.base_check import check_base
    from peftchat.planning.hardware import find_hardware
    from peftchat.planning.plan import plan_training

    loaded = _load(recipe, overrides, to_train=False)
    check_base(loaded, for_plan=True)
    distributed = loaded.recipe.distributed
    count = gpus or (distributed.processes * distributed.nodes if distributed.processes else None)
    return plan_training(loaded.recipe, find_hardware(gpu, count), price=price, with_grid=alternatives)


def write_job(
    recipe: RecipeSource,
    target: "Target",
    options: "JobOptions",
    places: "JobPlaces",
    *,
    overrides: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> str:
    """Return the file of a cluster's job that trains a recipe; nothing is sent to the cluster.

    Args:
        recipe: the path of a recipe, or a loaded one.
        target: the scheduler.
        options: devices, name and time limit.
        places: where it runs: partition, image, volume and so on.
        overrides: `section.key=value` texts; for a path only.
        tell: prints what the cluster's limits changed.

    Raises:
        UserError: the plan refuses the recipe, the run does not fit, or the cluster takes a name or a number not.
    """
    from peftchat.launching.job import make_job, nodes_and_processes
    from peftchat.launching.targets import job_text
    from peftchat.planning.hardware import find_hardware

    loaded = _load(recipe, overrides, to_train=False)
    nodes, processes = nodes_and_processes(loaded, options)
    if options.gpu is None and find_hardware(None, 1).device == "cpu":
        raise UserError(
            "this machine has no GPU, so those of the cluster have to be named",
            where="--gpu",
            hint="Such as `--gpu a100-80gb`, or `--gpu cpu`; `peftchat plan --list` shows all.",
        )
    planned = plan(loaded, gpu=options.gpu, gpus=nodes * processes)
    return job_text(target, make_job(loaded, planned, options), loaded, places, tell)


def compare(
    recipe: Path | str,
    variants: Sequence[str],
    *,
    output: Path | str | None = None,
    settings: Sequence[str] = (),
    seeds: int = 3,
    budget: str | None = None,
    learning_rates: Sequence[float] | None = None,
    search_lr: bool = True,
    trials: int = 0,
    ranges: Sequence[str] = (),
    forgetting_text: Path | None = None,
    prompts: Sequence[str] = (),
    num_samples: int = 3,
    merge: bool = True,
    equal_within: float = 0.005,
    halving: bool = True,
    fork: bool = True,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
) -> "ComparisonResult":
    """Train variants of a recipe on the same data, measure them, and recommend one.

    Repeat the call to resume an interrupted comparison: finished runs are kept.

    Args:
        recipe: the file that all candidates share.
        variants: names such as `lora`, `qlora+dora` or `full`.
        output: the comparison's folder; None for `runs/compare-RECIPE`.
        settings: `key=A,B` texts; several values span a grid.
        seeds: runs of each candidate at its best settings.
        budget: `steps=N`, `tokens=N` or `minutes=N` per run; None for the recipe's own length.
        learning_rates: rates to try; None for a grid around the default of each variant.
        search_lr: whether to try rates other than the default.
        trials: settings that optuna tries per candidate, within `ranges`; 0 for the grid of rates.
        ranges: `key=LOW..HIGH[:log]` texts.
        forgetting_text: the file that forgetting is measured on; None for the built-in text.
        prompts: prompts that all candidates answer; by default the first `num_samples` held-out ones.
        num_samples: number of held-out prompts.
        merge: whether to merge each run and verify the result.
        halving: whether short runs select among more than three learning rates; otherwise all get full runs.
        fork: whether runs may be forks of one process that has imported the libraries.
        equal_within: fraction of the lowest held-out loss up to which differences count as ties.
        tasks: `NAME[@SHOTS]` or `FILE.yaml[@SHOTS]` of EleutherAI's harness, which every finished run is asked.
        task_limit: the most questions of each task.

    Raises:
        UserError: a candidate cannot be trained; raised before the first run.

    Example:
        >>> import peftchat
        >>> result = peftchat.compare("my.yaml", ["lora", "ia3"], seeds=1, budget="steps=50")  # doctest: +SKIP
        >>> result.recommendation.headline  # doctest: +SKIP
    """
    from peftchat.comparing.candidates import parse_axis
    from peftchat.comparing.compare_plan import CompareOptions, parse_budget, plan_comparison
    from peftchat.comparing.hyperparameter_search import parse_range

    comparison = plan_comparison(
        CompareOptions(
            Path(recipe),
            variants,
            [parse_axis(text) for text in settings],
            seeds,
            parse_budget(budget) if budget is not None else None,
            learning_rates,
            search_lr,
            halving,
            trials,
            [parse_range(text) for text in ranges],
            equal_within,
        )
    )
    from peftchat.library_setup import prepare_libraries

    # Only now, because it imports torch: a wrong option is reported at once.
    prepare_libraries()
    from peftchat.comparing.compare import EvalOptions
    from peftchat.comparing.compare import compare as compare_candidates
    from peftchat.comparing.task_scores import check_tasks

    choice = check_tasks(tasks, task_limit) if tasks else None
    evaluation = EvalOptions(forgetting_text, prompts or None, num_samples, merge, fork, choice)
    result, _ = compare_candidates(comparison, comparison_folder(recipe, output), evaluation)
    return result


def evaluate(
    model: Path | str, options: "EvaluateOptions | None" = None, watch: "Watch | None" = None
) -> "tuple[Evaluation, Path]":
    """Score a run or a model on tasks of EleutherAI's harness, beside the base of the run or beside other models.

    Repeat the call to resume an interrupted evaluation: answers are kept.

    Args:
        model: a run folder, a model folder or a hub id.
        options: the tasks, the other models and how they are asked; None for the four default tasks.
        watch: who is told about the progress.

    Returns:
        The result, and the folder that it is in.

    Raises:
        UserError: a model or a task cannot be used; mostly raised before a model is loaded.
        VerificationError: a model computes no numbers.

    Example:
        >>> import peftchat
        >>> from peftchat.evaluating.run_evaluation import EvaluateOptions
        >>> peftchat.evaluate("runs/assistant", EvaluateOptions(tasks="arc_easy"))  # doctest: +SKIP
    """
    from peftchat.evaluating.run_evaluation import Watch, evaluate_models

    return evaluate_models(str(model), options, watch or Watch())


def evaluate_data(
    run: Path | str, data: Path | str, options: "EvaluateOptions | None" = None, watch: "Watch | None" = None
) -> "tuple[DataLosses, Path]":
    """Compute the held-out loss of a run on a file of conversations, beside its base or other runs.

    Args:
        run: a run folder.
        data: the file of conversations, in any format that `train` reads.
        options: the other runs; tasks and code are left out.
        watch: who is told about the progress.

    Returns:
        The losses by role, kind of text, turn and length, and the folder that they are in.

    Raises:
        UserError: an input cannot be used; raised before a model is loaded.
    """
    from peftchat.evaluating.run_evaluation import Watch, evaluate_data

    return evaluate_data(str(run), Path(data), options, watch or Watch())


def merge(run: Path | str, options: "MergeOptions | None" = None) -> "MergeResult":
    """Merge the adapter of a run into the weights of its base, and verify the result.

    Args:
        run: a run folder, or a folder with a PEFT adapter.
        options: where to write, on which base, and more.

    Raises:
        UserError: the adapter or its base cannot be used, or the variant cannot be merged.
        VerificationError: the merged model differs from base and adapter.

    Example:
        >>> import peftchat
        >>> merged = peftchat.merge("runs/assistant")
        >>> (merged.folder / "config.json").exists()
        True
    """
    from peftchat.merging import MergeOptions, merge_run

    return merge_run(Path(run), options or MergeOptions())


def combine(runs: Sequence[Path | str], options: "CombineOptions") -> "CombinationReport":
    """Combine two or more adapters of one base into one plain LoRA, and prove it.

    `peftchat.export.combine.combine_into_model` writes merged weights instead.

    Args:
        runs: run folders, or folders with a PEFT adapter.
        options: where to write, the rule, the weights and more.

    Raises:
        UserError: an adapter or an option cannot be used, or the adapters do not fit together.
        VerificationError: no LoRA is as close to the exact combination as asked.

    Example:
        >>> import peftchat
        >>> from pathlib import Path
        >>> options = peftchat.CombineOptions(Path("runs/both"), weights=[0.5, 0.5])
        >>> peftchat.combine(["runs/assistant", "runs/style"], options)  # doctest: +SKIP
    """
    from peftchat.export.combine import combine_into_adapter

    return combine_into_adapter([Path(run) for run in runs], options)


def report(runs: Sequence[Path | str], *, output: Path | str | None = None, rows: int = 3) -> Path:
    """Write the page of a run again, with its plan and masks; or one page over several runs.

    Args:
        runs: run folders. One has to be finished; of several, some may still go on.
        output: the page; None for `report.html` in the folder of the one run, or in the working folder for several.
        rows: how many examples of one run to show with their masks.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder is no run's, or its run has no losses.

    Example:
        >>> import peftchat
        >>> peftchat.api.report(["runs/assistant"]).name
        'report.html'
    """
    from peftchat.output_paths import InputPath
    from peftchat.reports.overlay import check_run, read_runs, write_overlay
    from peftchat.reports.page import check_page
    from peftchat.reports.run_report import write_report
    from peftchat.runs.run_folder import RunFolder
    from peftchat.runs.run_summary import RunSummary

    paths = [Path(run) for run in runs]
    page = None if output is None else Path(output)
    if len(paths) == 1:
        check_run(paths[0])
        RunSummary.read(RunFolder(paths[0]))
        page = None if page is None else check_page(page, [InputPath(RunFolder(paths[0]).summary, "the run's summary")])
        return write_report(paths[0], path=page, extras=_report_extras(paths[0], rows))
    found = read_runs(paths)
    page = check_page(
        page or Path("report.html"), [InputPath(run.folder.summary, f"a file of {run.name}") for run in found]
    )
    return write_overlay(page, found)


def _report_extras(run: Path, rows: int) -> "ReportExtras":
    """Plan a run, and read examples of its data; what is not here any more is told on the page."""
    from peftchat.library_setup import prepare_libraries

    prepare_libraries()
    from peftchat.planning.planned_run import planned_values
    from peftchat.reports.mask import inspect_mask
    from peftchat.reports.run_report import ReportExtras
    from peftchat.runs.run_folder import RunFolder

    planned, examples, missing = [], [], []
    try:
        planned = planned_values(run)
    except UserError as error:
        missing.append(f"No plan beside the measurements: {error}")
    try:
        if rows:
            recipe = load_recipe(RunFolder(run).recipe, to_train=False, upgrade=True).recipe
            examples = list(inspect_mask(recipe, "train", lambda _: None).shown(rows))[:rows]
    except (UserError, VerificationError) as error:
        missing.append(f"No examples with their masks: {error}")
    return ReportExtras(planned, examples, missing)


def load_chat_model(name: Path | str, *, base: Path | str | None = None, allow_changed: bool = False) -> "ChatModel":
    """Load a run folder, a merged model, or any model with a chat template, ready to answer.

    Args:
        name: the folder or hub id.
        base: folder or hub id of an adapter's base that has moved; None for the one that it was trained on.
        allow_changed: load although base, tokenizer or template are not those of the run.

    Raises:
        UserError: it cannot be loaded, or has no chat template.

    Example:
        >>> import peftchat
        >>> model = peftchat.load_chat_model("runs/assistant")
        >>> answer = peftchat.chat(model, "Hello", max_new_tokens=4)
    """
    from peftchat.serving.chat_model import load_for_chat

    return load_for_chat(str(name), base=None if base is None else str(base), allow_changed=allow_changed)


def chat(
    model: "ChatModel",
    messages: str | Sequence[Message],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    greedy: bool = False,
) -> "ChatAnswer":
    """Generate the answer to a question or to a conversation that ends with the user.

    Text of a message that looks like a special token is encoded as ordinary text.

    Args:
        model: from `load_chat_model`.
        messages: a question, or the conversation so far.
        max_new_tokens: the most tokens of the answer; None for the model's own setting.
        temperature: sampling temperature; None for the model's own setting.
        greedy: take the most likely token at each step.

    Raises:
        UserError: the conversation does not fit into the model's context.
    """
    from peftchat.serving.generate import generate_answer
    from peftchat.serving.sampling import Sampling, apply_sampling

    history = [Message("user", messages)] if isinstance(messages, str) else list(messages)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, greedy=greedy)
    return generate_answer(model, history, apply_sampling(model.generation_config, sampling))


def comparison_folder(recipe: Path | str, output: Path | str | None) -> Path:
    """Return the folder of a comparison."""
    return Path(output) if output is not None else Path("runs") / f"compare-{Path(recipe).stem}"


def _load(recipe: RecipeSource, overrides: Sequence[str], *, to_train: bool = True) -> LoadedRecipe:
    if not isinstance(recipe, LoadedRecipe):
        return load_recipe(Path(recipe), overrides, to_train=to_train)
    if overrides:
        raise UserError(
            "a loaded recipe takes no overrides", where="overrides", hint="Pass them to `load_recipe`, or pass a path."
        )
    return recipe


def _with_rate_of_run(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return a recipe that is resumed with the learning rate that its run was started with, in place of `auto`."""
    from peftchat.planning.auto_settings import choose_rate

    return dataclasses.replace(loaded, recipe=choose_rate(loaded.recipe, resume=True)[0])


def _train_arguments(loaded: LoadedRecipe, *, resume: bool, allow_changed: bool, prompts: Sequence[str]) -> list[str]:
    """Return the command line of `train`, without the program's name."""
    arguments = ["train", *loaded.arguments()]
    for prompt in prompts:
        arguments += ["--prompt", prompt]
    arguments += ["--resume"] if resume else []
    return [*arguments, "--allow-changed"] if allow_changed else arguments


def _launch(
    loaded: LoadedRecipe, distributed: "DistributedSetup", arguments: Sequence[str], options: "TrainOptions"
) -> None:
    """Check and encode everything once, so that an error is printed once; then start the processes."""
    from peftchat.training.context import check_content
    from peftchat.training.launch import launch

    # Every process chooses the rate again, by the same rule.
    started = _with_rate_of_run(loaded) if options.resume else loaded
    check_content(started, options, distributed)
    status = launch(distributed, arguments)
    if status:
        raise WorkerError(status)
