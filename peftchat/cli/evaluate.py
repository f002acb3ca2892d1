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
@click.option(
    "--code", type=PathType(), multiple=True, help="Problems of HumanEval's or MBPP's form (JSON lines). Repeatable."
)
@click.option("--run-code", is_flag=True, help="Run what the model writes for --code, in a sandbox on this machine.")
@click.option("--open-sandbox", is_flag=True, help="Run it even where the sandbox does not hold programs.")
@click.option(
    "--code-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Programs of each problem."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    default=0.2,
    show_default=True,
    help="Of several programs; a single one is greedy.",
)
@click.option("--data", type=PathType(), help="Conversations: the loss by role, kind of text, turn and length.")
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
    code: tuple[Path, ...],
    run_code: bool,
    open_sandbox: bool,
    code_samples: int,
    temperature: float,
    data: Path | None,
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
    peftchat evaluate runs/assistant --code HumanEval.jsonl.gz --run-code
    peftchat evaluate runs/assistant --data data/eval.jsonl
    """

    from peftchat.errors import UserError
    from peftchat.evaluating.task_catalog import parse_tasks, require_harness

    if tasks is not None:
        parse_tasks(tasks)
    if data is None:
        require_harness()
    elif tasks is not None or code or chat_template or cluster is not None:
        hint = "Evaluate tasks and code in a command of their own."
        raise UserError("the loss on conversations has none of the settings of tasks", where="--data", hint=hint)
    from transformers.utils.logging import disable_progress_bar

    from peftchat import api
    from peftchat.cli.common import echo_json, note
    from peftchat.console import print_table, stdout
    from peftchat.evaluating.data_losses import loss_table
    from peftchat.evaluating.evaluation_progress import EvaluationProgress
    from peftchat.evaluating.evaluation_report import evaluation_table, notes
    from peftchat.evaluating.harness import AskOptions
    from peftchat.evaluating.run_evaluation import CodeOptions, EvaluateOptions

    disable_progress_bar()
    options = EvaluateOptions(
        against=against,
        alone=alone,
        tasks=tasks,
        code=CodeOptions(code, run_code, open_sandbox, code_samples, temperature),
        include=include,
        ask=AskOptions(chat_template, system, batch_size, limit),
        cluster=cluster,
        base=base,
        allow_changed=allow_changed,
        output=output,
    )
    if data is not None:
        with EvaluationProgress() as progress:
            losses, folder = api.evaluate_data(model, data, options, progress.watch)
        if as_json:
            echo_json({"folder": str(folder), **losses.as_dict()})
            return
        print_table(loss_table(losses))
        note("Losses in nats per target. Intervals of 95 % are paired by conversation.")
        stdout.print(f"Results: {folder}", markup=False, soft_wrap=True)
        return
    with EvaluationProgress() as progress:
        evaluation, folder = api.evaluate(model, options, progress.watch)
    if as_json:
        echo_json({"folder": str(folder), **evaluation.as_dict()})
        return
    print_table(evaluation_table(evaluation))
    for text in notes(evaluation):
        note(text)
    stdout.print(f"Results: {folder}", markup=False, soft_wrap=True)
