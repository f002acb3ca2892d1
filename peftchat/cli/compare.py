"""`peftchat compare`: train variants of one recipe and compare them."""

from pathlib import Path

import click

from peftchat.cli.common import Command, PathType, RecipeType, echo_json, json_option, note, output_option
from peftchat.cli.variants import complete_variants


@click.command(
    "compare",
    cls=Command,
    renamed={
        "--out": "--output",
        "--ask": "--prompt",
        "--plain-text": "--forgetting-text",
        "--fixed-learning-rate": "--no-lr-search",
    },
)
@click.argument("recipe", type=RecipeType())
@click.option(
    "--variants",
    required=True,
    multiple=True,
    metavar="A,B,...",
    shell_complete=complete_variants,
    help="lora, dora, qlora, full, qlora+dora, ...",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=A[,B...]",
    help="Set a key; several values make a grid.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs per candidate at its best settings."
)
@click.option("--budget", metavar="steps|tokens|minutes=N", help="Length of a run.  [default: the recipe's]")
@click.option("--learning-rates", metavar="A,B,...", help="Rates to try.  [default: seven around the variant's]")
@click.option("--no-lr-search", is_flag=True, help="Try each variant at its default learning rate only.")
@click.option("--halving/--no-halving", default=True, help="Select among rates by short runs.  [default: on]")
@click.option("--trials", type=click.IntRange(1), help="Let optuna try this many settings per candidate.")
@click.option("--search", multiple=True, metavar="KEY=LOW..HIGH[:log]", help="A range for --trials. Repeatable.")
@click.option("--forgetting-text", type=PathType(), help="Text to measure forgetting on.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt that all models answer. Repeatable.")
@click.option(
    "--samples", type=click.IntRange(0), default=3, show_default=True, help="Held-out prompts, without --prompt."
)
@click.option("--merge/--no-merge", default=True, help="Merge each variant and verify the merge.  [default: on]")
@click.option(
    "--tasks", multiple=True, metavar="NAME|FILE[@SHOTS],...", help="Tasks of the harness that every run is asked."
)
@click.option("--task-limit", type=click.IntRange(1), help="Most questions of each task.")
@click.option(
    "--equal-within",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.005,
    show_default=True,
    help="Part of the loss up to which differences are ties.",
)
@output_option("Folder of the comparison.  [default: runs/compare-RECIPE]")
@json_option("Print the results as one JSON object.")
def command(
    recipe: Path,
    variants: tuple[str, ...],
    settings: tuple[str, ...],
    seeds: int,
    budget: str | None,
    learning_rates: str | None,
    no_lr_search: bool,
    halving: bool,
    trials: int | None,
    search: tuple[str, ...],
    forgetting_text: Path | None,
    prompts: tuple[str, ...],
    samples: int,
    merge: bool,
    tasks: tuple[str, ...],
    task_limit: int | None,
    equal_within: float,
    output: Path | None,
    as_json: bool,
) -> None:
    """Train variants of a recipe on your data and recommend one.

    All candidates train on the same examples, each run in a process and a folder of its own. Started again, the command
    keeps finished runs and continues.

    \b
    peftchat compare recipes/demo_cpu.yaml --variants lora,dora,qlora,full --budget steps=50
    peftchat compare my.yaml --variants lora --set adapter.r=8,16,64 --learning-rates 1e-4,3e-4
    peftchat compare my.yaml --variants lora,dora --trials 12 --search training.learning_rate=1e-5..1e-3:log
    peftchat compare my.yaml --variants lora,dora,full --tasks arc_easy@5,tasks/own.yaml --task-limit 200
    """
    from peftchat import api
    from peftchat.comparing.candidates import split_names
    from peftchat.errors import UserError, VerificationError

    if learning_rates is not None and no_lr_search:
        raise UserError("--learning-rates and --no-lr-search exclude each other", hint="Remove one of them.")
    if bool(trials) != bool(search):
        raise UserError("--trials and --search belong together", hint="Give a number of trials and a range or more.")
    if trials and learning_rates is not None:
        hint = "Use --search training.learning_rate=LOW..HIGH:log."
        raise UserError("--learning-rates is a grid, and --trials searches ranges", hint=hint)
    if task_limit is not None and not tasks:
        hint = "Name tasks with --tasks, or leave it out."
        raise UserError("there is no task to limit", where=f"--task-limit {task_limit}", hint=hint)
    result = api.compare(
        recipe,
        split_names(variants),
        output=output,
        settings=settings,
        seeds=seeds,
        budget=budget,
        learning_rates=_rates(learning_rates) if learning_rates is not None else None,
        search_lr=not no_lr_search,
        trials=trials or 0,
        ranges=search,
        forgetting_text=forgetting_text,
        prompts=prompts,
        num_samples=samples,
        merge=merge,
        equal_within=equal_within,
        halving=halving,
        tasks=tasks,
        task_limit=task_limit,
    )
    from peftchat.comparing.compare_report import print_comparison
    from peftchat.comparing.comparison_folder import ComparisonFolder
    from peftchat.comparing.results import ComparisonSummary
    from peftchat.console import stdout

    folder = ComparisonFolder(api.comparison_folder(recipe, output))
    if as_json:
        echo_json(ComparisonSummary.of(result, folder).model_dump())
    else:
        print_comparison(result, stdout)
    note(f"Report: {folder.report}")
    if result.recommendation is None:
        raise VerificationError(f"no run succeeded; their logs are in {folder.path / 'logs'}")
    note(f"To run it: peftchat train {folder.recommended}")


def _rates(text: str) -> list[float]:
    from peftchat.errors import UserError

    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = []
    if not rates or rates[0] <= 0:
        raise UserError("not a list of rates", where=f"--learning-rates {text}", hint="Write for example 1e-4,3e-4.")
    return rates
