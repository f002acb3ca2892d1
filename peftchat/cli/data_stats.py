"""`peftchat data stats`: what is in a set of conversations, what repeats, what leaks."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftchat.conversations.stats import DataStats, StatsPart
    from peftchat.conversations.stats.parts import FileTokenCounter

_RECIPE_ENDINGS = (".yaml", ".yml")


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="FILE|FOLDER|RECIPE...")
@click.option("--tokenizer", metavar="FOLDER", help="Count tokens too, with this model's tokenizer.")
@click.option("--against", "benchmarks", multiple=True, metavar="FILE", help="Look for this benchmark's questions.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write a page to this file.")
def command(
    sources: tuple[str, ...], tokenizer: str | None, benchmarks: tuple[str, ...], as_json: bool, page: Path | None
) -> None:
    """Describe conversations: lengths, roles, languages, code, duplicates, bad rows; overlap between files.

    Several files, a folder with splits or a recipe with held-out data are compared with each other: what train and
    eval have in common is a leak.

    \b
    peftchat data stats conversations.jsonl --tokenizer models/base
    peftchat data stats data/train.jsonl data/eval.jsonl --html stats.html
    peftchat data stats recipes/demo_cpu.yaml --against humaneval.jsonl.gz --against arc.jsonl
    """
    parts, counter = _resolve(sources, tokenizer)
    stats = _gather(parts, benchmarks, counter)
    if page is not None:
        from peftchat.console import stderr
        from peftchat.reports.stats_report import write_stats_page

        write_stats_page(page, stats)
        stderr.print(f"Wrote {page}.", markup=False)
    if as_json:
        click.echo(json.dumps(stats.as_dict()))
    elif page is None:
        from peftchat.console import stdout
        from peftchat.reports.stats_report import print_stats

        print_stats(stats, stdout)


def _resolve(sources: "Sequence[str]", tokenizer: str | None) -> "tuple[list[StatsPart], FileTokenCounter | None]":
    """The parts, and what counts their tokens: the tokenizer asked for, else that of a recipe, if it is on disk."""
    from peftchat.conversations.stats import parts_of_path, parts_of_recipe
    from peftchat.conversations.stats.parts import FileTokenCounter, has_tokenizer

    parts: list[StatsPart] = []
    for source in sources:
        if not source.endswith(_RECIPE_ENDINGS):
            parts += parts_of_path(source)
            continue
        from peftchat.recipe import load_recipe

        recipe = load_recipe(Path(source), to_train=False).recipe
        parts += parts_of_recipe(recipe)
        if tokenizer is None and has_tokenizer(recipe.model.name):
            tokenizer = recipe.model.name
    return parts, None if tokenizer is None else FileTokenCounter(tokenizer)


def _gather(
    parts: "Sequence[StatsPart]", benchmarks: "Sequence[str]", counter: "FileTokenCounter | None"
) -> "DataStats":
    from peftchat.console import stderr
    from peftchat.conversations.stats import gather

    started = time.monotonic()
    with stderr.status("reading …") as status:

        def advance(conversations: int) -> None:
            rate = conversations / (time.monotonic() - started)
            status.update(f"{conversations:,} conversations, {rate:,.0f} a second")

        return gather(parts, benchmarks, count_tokens=counter, progress=advance)
