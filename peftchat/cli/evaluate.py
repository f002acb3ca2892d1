"""`peftchat evaluate`: benchmark tasks, base and tuned side by side."""

from pathlib import Path

import click

from peftchat.cli.common import NameType, PathType, allow_changed_option, base_option, json_option, output_option


class _BatchSize(click.ParamType):
    """A number of sequences, or `auto`."""

    name = "auto|n"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value != "auto" and not (value.isdigit() and int(value) > 0):
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)
        return value


@click.command("evaluate")
@click.argument("model", type=NameType())
@click.option(
    "--against",
    type=NameType(),
    multiple=True,
    metavar="MODEL",
    help="A run or model to compare with. Repeatable.  [default: the base of a run]",
)
@click.option("--alone", is_flag=True, help="Do not compare a run with its base.")
@base_option()
@allow_changed_option()
@click.option(
    "--tasks",
    metavar="NAME[@SHOTS],…",
    help="Tasks, groups or tags of the harness, with their shots.  [default: arc_challenge@25, hellaswag@10, mmlu@5, "
    "truthfulqa_mc1 and truthfulqa_mc2]",
)
@click.option("--include", type=PathType(), multiple=True, help="Folder with task files of your own. Repeatable.")
@click.option("--limit", type=click.IntRange(min=1), help="Ask only the first N questions of each task.")
@click.option(
    "--chat-template/--no-chat-template",
    default=False,
    help="Ask through the model's chat template, if it has one.  [default: no]",
)
@click.option("--system", metavar="TEXT", help="System prompt, with --chat-template.")
@click.option(
    "--batch-size", type=_BatchSize(), default="auto", show_default=True, help="Sequences of a batch; auto finds it."
)
@click.option("--cluster", metavar="FIELD", help="Field by which questions are related, such as a common text.")
@output_option("Folder of the results.  [default: RUN/evaluations/…, or evaluations/… for other models]")
@json_option()
def command(
    model: str,
    against: tuple[str, ...],
    alone: bool,
    base: str | None,
    allow_changed: bool,
    tasks: str | None,
    include: tuple[Path, ...],
    limit: int | None,
    chat_template: bool,
    system: str | None,
    batch_size: str,
    cluster: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Score a run or a model on benchmark tasks, beside its base.

    MODEL is a run folder, a merged model, or any model. Tasks are those of EleutherAI's harness, or files of your own.
    An adapter is not merged, and its base is quantized as in training. Each difference has a paired 95 % interval.
    Answers are kept as they come: start the command again after an interruption.

    \b
    peftchat evaluate runs/assistant
    peftchat evaluate runs/assistant --tasks arc_challenge@25,hellaswag@10 --limit 200
    peftchat evaluate runs/assistant --against runs/other --include tasks --tasks my_task
    """
    from peftchat.logging_setup import quiet_libraries

    quiet_libraries()
    from peftchat.evaluating.task_catalog import DEFAULT_TASKS, parse_tasks, require_harness

    tasks = DEFAULT_TASKS if tasks is None else tasks
    parse_tasks(tasks)
    require_harness()
    from transformers.utils.logging import disable_progress_bar

    from peftchat import api
    from peftchat.cli.common import echo_json, note
    from peftchat.console import stdout
    from peftchat.evaluating.evaluation_progress import EvaluationProgress
    from peftchat.evaluating.evaluation_report import evaluation_table, notes
    from peftchat.evaluating.harness import AskOptions
    from peftchat.evaluating.run_evaluation import EvaluateOptions

    disable_progress_bar()
    options = EvaluateOptions(
        against=against,
        alone=alone,
        tasks=tasks,
        include=include,
        ask=AskOptions(chat_template, system, batch_size, limit),
        cluster=cluster,
        base=base,
        allow_changed=allow_changed,
        output=output,
    )
    with EvaluationProgress() as progress:
        evaluation, folder = api.evaluate(model, options, progress.watch)
    if as_json:
        echo_json({"folder": str(folder), **evaluation.as_dict()})
        return
    stdout.print(evaluation_table(evaluation), soft_wrap=False)
    for text in notes(evaluation):
        note(text)
    stdout.print(f"Results: {folder}", markup=False, soft_wrap=True)
