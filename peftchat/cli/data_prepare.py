"""`peftchat data prepare`: a source becomes train and eval files, and a card that counts every row."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from peftchat.conversations.dataset_card import Card
    from peftchat.conversations.prepare import PrepareSettings


def _languages(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(code.strip() for code in value.split(",") if code.strip())


@click.command()
@click.argument("source")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--format", "form", default="auto", show_default=True, help="Input form (`peftchat data formats`).")
@click.option("--split", help="Split of a folder or hub data set.  [default: train, where files are named so]")
@click.option("--lang", default="", callback=_languages, help="Keep these languages: en,de.  [default: all]")
@click.option("--top-k", type=click.IntRange(min=1), help="OpenAssistant: only the best K replies of each turn.")
@click.option(
    "--eval-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share held out; conversations with the same first user message stay together.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the held-out choice.")
@click.option("--strict", is_flag=True, help="Stop at the first bad row instead of writing it to a quarantine file.")
@click.option("--max-rows", type=click.IntRange(min=1), help="Stop after this many conversations.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as one JSON object.")
def command(
    source: str,
    folder: Path,
    form: str,
    split: str | None,
    lang: tuple[str, ...],
    top_k: int | None,
    eval_fraction: float,
    seed: int,
    strict: bool,
    max_rows: int | None,
    as_json: bool,
) -> None:
    """Write train.jsonl, eval.jsonl and a card from SOURCE: a file, a folder of files, or a hub id.

    Bad rows go to quarantine.jsonl with their place and reason; nothing is left out without being counted.

    \b
    Example:
        peftchat data prepare oasst_trees.jsonl.gz -o data/oasst --lang en --eval-fraction 0.1
    """
    from peftchat.conversations.prepare import PrepareSettings

    settings = PrepareSettings(
        format=form,
        split=split,
        languages=lang,
        top_k=top_k,
        eval_fraction=eval_fraction,
        seed=seed,
        strict=strict,
        max_conversations=max_rows,
    )
    card = _with_progress(source, folder, settings)
    if as_json:
        click.echo(json.dumps(card.as_dict()))
    else:
        _show(card, folder)


def _with_progress(source: str, folder: Path, settings: "PrepareSettings") -> "Card":
    from peftchat.console import stderr
    from peftchat.conversations.prepare import prepare

    started = time.monotonic()
    with stderr.status("reading …") as status:

        def advance(conversations: int) -> None:
            if conversations % 1000 == 0:
                rate = conversations / (time.monotonic() - started)
                status.update(f"{conversations:,} conversations, {rate:,.0f} a second")

        return prepare(source, folder, settings, advance)


def _show(card: "Card", folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from peftchat.console import stderr, stdout
    from peftchat.conversations.dataset_card import funnel

    table = Table(box=None, pad_edge=False)
    table.add_column("what became of the rows")
    table.add_column("count", justify="right")
    for what, count in funnel(card):
        table.add_row(escape(what), f"{count:,}")
    stdout.print(table)
    for examples in card.examples.values():
        stderr.print(f"  {examples[0]}", markup=False, style="yellow")
    rate = card.rows / card.seconds if card.seconds else 0
    stderr.print(
        f"Wrote {folder} in {card.seconds:.1f} s ({rate:,.0f} rows/s). The counts are in card.md.", markup=False
    )
