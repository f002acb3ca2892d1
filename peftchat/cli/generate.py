"""`peftchat generate`: answers of several models to the questions of a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peftchat.cli.common import (
    NameType,
    PathType,
    VariadicCommand,
    allow_changed_option,
    base_option,
    echo_json,
    json_option,
    note,
    output_option,
)

if TYPE_CHECKING:
    from peftchat.answering.prompting import PromptingKind

KINDS = ("template", "dialogue")


@click.command("generate", cls=VariadicCommand, variadic=("--models",))
@click.argument("questions", type=PathType())
@click.option(
    "--models", required=True, multiple=True, type=NameType(), metavar="MODEL...", help="Run folders and models."
)
@output_option("Folder of the answers: one file per model, continued if it is there.", required=True)
@click.option(
    "--prompting",
    "promptings",
    multiple=True,
    metavar="[MODEL=]template|dialogue",
    help="Ask by the chat template, or by a dialogue that the model continues.  [default: template]",
)
@click.option("--dialogue-file", type=PathType(), help="Text that begins a dialogue.  [default: our own]")
@click.option("--system", metavar="TEXT", help="System prompt of questions that have none of their own.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Questions in one batch.")
@click.option("--max-samples", type=click.IntRange(1), help="Ask only this many questions, the first ones.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Most tokens in an answer.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sampling temperature; 0 is greedy.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the top tokens with this probability mass."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K most likely tokens.")
@click.option("--greedy", is_flag=True, help="Always take the most likely token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--dtype", type=click.Choice(["float32"]), help="Compute in it.  [default: that of the model]")
@base_option()
@allow_changed_option()
@json_option("Print one JSON object per model and nothing else.")
def command(
    questions: Path,
    models: tuple[str, ...],
    output: Path,
    promptings: tuple[str, ...],
    dialogue_file: Path | None,
    system: str | None,
    batch_size: int,
    max_samples: int | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    greedy: bool,
    seed: int,
    dtype: str | None,
    base: str | None,
    allow_changed: bool,
    as_json: bool,
) -> None:
    """Answer the questions of a file with several models.

    QUESTIONS has one record per line: `prompt`, `messages`, or `question_id` and `turns`, as in the files of Vicuna and
    MT-bench. Each answer is kept as it comes; the same command continues what was interrupted. An answer depends on
    its question, its model and the seed, not on the others of its batch.

    \b
    peftchat generate questions.jsonl --models runs/assistant models/base -o answers
    peftchat generate questions.jsonl --models models/base -o answers --prompting dialogue
    """
    from peftchat.errors import UserError
    from peftchat.output_paths import InputPath, check_output
    from peftchat.serving.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, greedy, seed)
    kinds = parse_promptings(promptings, models)
    if dialogue_file is not None and "dialogue" not in kinds:
        raise UserError("no model is asked by a dialogue", where="--dialogue-file", hint="Add `--prompting dialogue`.")
    inputs = [InputPath(questions, "the file of questions")]
    inputs += [InputPath(Path(model), "a model", is_read_recursively=True) for model in models]
    check_output(output, inputs, f"--output {output}")
    if output.exists() and not output.is_dir():
        raise UserError("expected a folder, got a file", where=f"--output {output}", hint="Name a folder.")
    from peftchat.answering.questions import read_questions

    asked = [question.with_system(system) for question in read_questions(questions)[:max_samples]]
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    from peftchat.answering.answer_run import AnswerOptions, answer_questions
    from peftchat.console import print_table

    options = AnswerOptions(sampling, batch_size, dialogue_file, dtype, base, allow_changed)
    answered = answer_questions(asked, list(zip(models, kinds, strict=True)), output, options, source=str(questions))
    if as_json:
        for entry in answered:
            echo_json(entry.as_dict())
        return
    from peftchat.answering.answer_table import answer_notes, answer_table

    print_table(answer_table(answered))
    for line in answer_notes(answered):
        note(line)


def parse_promptings(texts: Sequence[str], models: Sequence[str]) -> "list[PromptingKind]":
    """Return how each model is asked.

    Args:
        texts: `KIND` for all models, `MODEL=KIND` for one.

    Raises:
        UserError: there is no such kind or no such model.
    """
    from peftchat.errors import UserError

    kinds: dict[str, Any] = dict.fromkeys(models, "template")
    for text in sorted(texts, key=lambda text: "=" in text):
        model, equals, kind = text.rpartition("=")
        where = f"--prompting {text}"
        if kind not in KINDS:
            raise UserError(f"expected {' or '.join(KINDS)}, got {kind!r}", where=where)
        if equals and model not in kinds:
            hint = f"Name one of --models: {', '.join(models)}."
            raise UserError(f"there is no model {model!r} here", where=where, hint=hint)
        kinds |= {model: kind} if equals else dict.fromkeys(models, kind)
    return [kinds[model] for model in models]
