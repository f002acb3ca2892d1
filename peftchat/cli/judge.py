"""`peftchat judge`: which of two models answers better, by a judge that sees each pair in both orders."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import NameType, PathType, echo_json, json_option, note, output_option

if TYPE_CHECKING:
    from peftchat.judging.judge_client import Judge
    from peftchat.judging.judge_prompts import JudgePrompt
    from peftchat.judging.judged_pairs import Pair


class _Scale(click.ParamType):
    name = "low-high"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float] | object:
        """Return the two ends."""
        if not isinstance(value, str):
            return value
        low, dash, high = value.partition("-")
        if not (dash and low.isdecimal() and high.isdecimal() and int(low) < int(high)):
            self.fail(f"expected two whole numbers such as 1-8, got {value!r}", param, ctx)
        return float(low), float(high)


@click.command("judge")
@click.argument("answers_a", type=PathType())
@click.argument("answers_b", type=PathType(), required=False)
@click.option(
    "--judge", "judges", multiple=True, type=NameType(), metavar="URL[#MODEL]|MODEL",
    help="An OpenAI-compatible endpoint (http…/v1), or a run or chat model on this machine. Repeatable.",
)  # fmt: skip
@click.option("--questions", type=PathType(), help="The file of questions, for answer files that do not have them.")
@click.option("--prompt", default="general", show_default=True, help="general, code, verdict, or FILE[#NAME].")
@click.option("--scale", type=_Scale(), metavar="LOW-HIGH", help="Lowest and highest score.  [default: the prompt's]")
@click.option("--exam", type=PathType(), help="Pairs with a known better answer (prompt, good, bad), judged first.")
@click.option("--max-samples", type=click.IntRange(1), help="Judge only this many questions, the first ones.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Most tokens of a reply.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="Of an endpoint.")
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True, help="Requests at a time.")
@click.option(
    "--key-variable", default="OPENAI_API_KEY", show_default=True, help="Environment variable with the endpoint's key."
)
@click.option(
    "--prices", type=click.FloatRange(0), nargs=2, metavar="IN OUT", help="Price of a million tokens read and written."
)
@output_option("Folder of the result; replies that are there are not asked again.")
@json_option()
@click.pass_context
def command(
    context: click.Context,
    answers_a: Path,
    answers_b: Path | None,
    judges: tuple[str, ...],
    questions: Path | None,
    prompt: str,
    scale: tuple[float, float] | None,
    exam: Path | None,
    max_samples: int | None,
    max_tokens: int,
    temperature: float,
    concurrency: int,
    key_variable: str,
    prices: tuple[float, float] | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Judge which of two models answers better.

    The answer files are those of `peftchat generate`, or FastChat's. Every pair is judged in both orders, and a winner
    that changes with the order is a tie. The win rate has a 95 % interval over questions, and stands beside the rate at
    equal length. Replies are kept as they come: the same command asks only for what is missing.

    A single file is one of blind votes, as `peftchat web` keeps them: each pair's share is shown with its interval.

    \b
    peftchat judge answers/base.jsonl answers/tuned.jsonl --judge http://127.0.0.1:8000/v1 -o judged
    peftchat judge a.jsonl b.jsonl --judge https://api.openai.com/v1#gpt-4.1 --prompt code --scale 1-8 -o judged
    peftchat judge chats/votes.jsonl
    """
    if answers_b is None:
        from peftchat.cli.votes_output import report_votes

        report_votes(answers_a, context, as_json=as_json)
        return
    if not judges or output is None:
        missing = "--judge" if not judges else "--output"
        raise click.UsageError(f"Missing option '{missing}': two files of answers need it.", context)
    from peftchat.errors import VerificationError
    from peftchat.judging.judged_pairs import read_exam, read_pairs
    from peftchat.output_paths import InputPath, check_output

    chosen = _prompt(prompt, scale)
    pairs = read_pairs(answers_a, answers_b, questions)[:max_samples]
    known = read_exam(exam) if exam is not None else []
    inputs = [InputPath(path, "an input") for path in (answers_a, answers_b, questions, exam) if path is not None]
    check_output(output, inputs, f"--output {output}")
    _check_own(output)
    opened = _open(judges, temperature, max_tokens, concurrency, key_variable)
    output.mkdir(parents=True, exist_ok=True)

    from peftchat.console import print_table
    from peftchat.judging.judge_report import Judging, judging_table
    from peftchat.judging.verdicts import exam_result, kappa, verdict_of

    outcomes, exams = {}, []
    for judge in opened:
        if known:
            exams.append(exam_result(judge.name, _judge(judge, known, chosen, output, "exam")))
        outcomes[judge.name] = _judge(judge, pairs, chosen, output, "pairs")
    verdicts = [verdict_of(name, found) for name, found in outcomes.items()]
    both = list(outcomes.values())[:2]
    cost = None
    if prices is not None:
        read, written = (sum(getattr(verdict, name) for verdict in verdicts) for name in ("prompt_tokens", "tokens"))
        cost = (read * prices[0] + written * prices[1]) / 1e6
    settings = {"prompt": chosen.name, "form": chosen.form, "scale": [chosen.low, chosen.high], "pairs": len(pairs)}
    names = _names(answers_a, answers_b)
    judging = Judging(*names, outcomes, verdicts, exams, kappa(*both) if len(both) == 2 else None, cost, settings)
    judging.write(output)
    if as_json:
        echo_json({"folder": str(output), **judging.as_dict()})
    else:
        print_table(judging_table(judging))
        for line in judging.notes():
            note(line)
        note(f"Every question: {output / 'report.html'}")
    for verdict in verdicts:
        if not verdict.read:
            what = f"{verdict.judge}: no pair has two replies that can be read; they are in {output / 'replies.jsonl'}"
            raise VerificationError(what)


def _prompt(text: str, scale: tuple[float, float] | None) -> "JudgePrompt":
    from peftchat.judging.judge_prompts import own_prompt, read_prompt_file

    file, _, name = text.partition("#")
    if Path(file).suffix == ".jsonl":
        return read_prompt_file(Path(file), name or None, scale)
    return own_prompt(text, scale)


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Return short names: those of the files or, where these are alike, with their folders."""
    return (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))


def _check_own(folder: Path) -> None:
    from peftchat.errors import UserError

    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError("expected a folder, got a file", where=f"--output {folder}", hint="Name a folder.")
    own = {"replies.jsonl", "results.json", "report.html"}
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if foreign:
        what = f"the folder holds something else than a judging: {foreign[0]}"
        raise UserError(what, where=f"--output {folder}", hint="Name another folder.")


def _open(
    names: Sequence[str], temperature: float, max_tokens: int, concurrency: int, key_variable: str
) -> "list[Judge]":
    """Reach all endpoints, then load the models of this machine.

    Raises:
        UserError: a judge is named twice, cannot be reached or cannot be loaded.
    """
    from peftchat.errors import UserError
    from peftchat.judging.judge_client import EndpointJudge, LocalJudge

    if not math.isfinite(temperature):
        what = f"the temperature is {temperature}, expected a finite number"
        raise UserError(what, where="--temperature", hint="Write for example 0.")
    other = next((name for name in names if "://" in name and not name.startswith(("http://", "https://"))), None)
    if other is not None:
        hint = "Write http://… or https://…, or name a model on this machine."
        raise UserError(
            "the address of an endpoint begins with http:// or https://", where=f"--judge {other}", hint=hint
        )
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError("the judge is named twice", where=f"--judge {repeated}", hint="Name it once.")
    opened: dict[str, Judge] = {}
    for name in names:
        if name.startswith(("http://", "https://")):
            url, _, model = name.partition("#")
            opened[name] = EndpointJudge(
                url, model or None, temperature=temperature, max_tokens=max_tokens, concurrency=concurrency,
                key_variable=key_variable,
            )  # fmt: skip
    for name in names:
        if name not in opened:
            from peftchat import api

            opened[name] = LocalJudge(api.load_chat_model(name), max_tokens)
    return [opened[name] for name in names]


def _judge(judge: "Judge", pairs: "Sequence[Pair]", prompt: "JudgePrompt", folder: Path, what: str) -> list:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from peftchat.console import stderr
    from peftchat.judging.judge_run import judge_pairs

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(f"{judge.name}: {what}", total=2 * len(pairs))
        return judge_pairs(judge, pairs, prompt, folder, lambda: progress.advance(task))
