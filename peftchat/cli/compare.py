"""`peftchat compare`: variants of one recipe side by side."""

import json
import signal
from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--variants", required=True, multiple=True, metavar="A,B,...", help="lora, dora, qlora, full, qlora+dora, ..."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=A[,B...]", help="Set a key; several values make a grid.")
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each at its best settings."
)
@click.option("--budget", metavar="steps|tokens|minutes=N", help="Length of a run.  [default: the recipe's own]")
@click.option("--learning-rates", metavar="A,B,...", help="Rates to try.  [default: three around each variant's own]")
@click.option("--fixed-learning-rate", is_flag=True, help="Try each variant at its customary rate only.")
@click.option("--trials", type=click.IntRange(1), help="Let optuna try this many settings of each instead.")
@click.option("--search", multiple=True, metavar="KEY=LOW..HIGH[:log]", help="A range for --trials. Repeatable.")
@click.option("--plain-text", type=click.Path(path_type=Path), help="Text that forgetting is measured on.")
@click.option("--ask", "questions", multiple=True, metavar="TEXT", help="A prompt that all answer. Repeatable.")
@click.option(
    "--samples", type=click.IntRange(0), default=3, show_default=True, help="Held-out prompts, without --ask."
)
@click.option("--merge/--no-merge", default=True, help="Merge each variant and prove it.  [default: on]")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder.  [default: runs/compare-RECIPE]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
def command(
    recipe: Path,
    variants: tuple[str, ...],
    settings: tuple[str, ...],
    seeds: int,
    budget: str | None,
    learning_rates: str | None,
    fixed_learning_rate: bool,
    trials: int | None,
    search: tuple[str, ...],
    plain_text: Path | None,
    questions: tuple[str, ...],
    samples: int,
    merge: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Train variants of RECIPE on the same rows and say which to take.

    Each run has a process and a folder of its own. Started again, the command keeps what is finished and goes on.

    \b
    peftchat compare recipes/demo_cpu.yaml --variants lora,dora,qlora,full --budget steps=50
    peftchat compare my.yaml --variants lora --set adapter.r=8,16,64 --learning-rates 1e-4,3e-4
    peftchat compare my.yaml --variants lora,dora --trials 12 --search training.learning_rate=1e-5..1e-3:log
    """
    from peftchat.comparing.candidates import parse_axis, split_names
    from peftchat.comparing.compare_plan import CompareOptions, parse_budget, plan_comparison
    from peftchat.comparing.hyperparameter_search import parse_range
    from peftchat.errors import UserError, VerificationError

    if learning_rates is not None and fixed_learning_rate:
        raise UserError("--learning-rates and --fixed-learning-rate exclude each other", hint="Give one of them.")
    if bool(trials) != bool(search):
        raise UserError("--trials and --search belong together", hint="Give a number of trials and a range or more.")
    if trials and learning_rates is not None:
        hint = "Use --search training.learning_rate=LOW..HIGH:log."
        raise UserError("--learning-rates is a grid, and --trials searches ranges", hint=hint)
    options = CompareOptions(
        recipe,
        split_names(variants),
        [parse_axis(flag) for flag in settings],
        seeds,
        parse_budget(budget) if budget is not None else None,
        _rates(learning_rates) if learning_rates is not None else None,
        not fixed_learning_rate,
        trials or 0,
        [parse_range(flag) for flag in search],
    )
    plan = plan_comparison(options)
    from peftchat.comparing.compare import EvalOptions, compare
    from peftchat.comparing.compare_report import print_comparison
    from peftchat.comparing.results import ComparisonSummary
    from peftchat.console import stderr, stdout

    # A scheduler that ends the job lets the run that is on end too, so that it can go on from its checkpoint.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = out or Path("runs") / f"compare-{recipe.stem}"
    stderr.print(f"{len(plan.candidates)} candidates, {plan.num_runs} runs, in {folder}", markup=False)
    result, comparison = compare(plan, folder, EvalOptions(plain_text, questions or None, samples, merge))
    if as_json:
        click.echo(json.dumps(ComparisonSummary.of(result, comparison).model_dump()))
    else:
        print_comparison(result, stdout)
    stderr.print(f"Report: {comparison.report}", markup=False)
    if result.recommendation is None:
        raise VerificationError(f"no run ended well; what they said is in {comparison.path / 'logs'}.")
    stderr.print(f"To run it: peftchat train {comparison.recommended}", markup=False)


def _rates(text: str) -> list[float]:
    from peftchat.errors import UserError

    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = []
    if not rates or rates[0] <= 0:
        raise UserError("not a list of rates", where=f"--learning-rates {text}", hint="Write for example 1e-4,3e-4.")
    return rates
