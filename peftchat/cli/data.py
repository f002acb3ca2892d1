"""`peftchat data`: turn raw conversations into training data and inspect it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftchat.cli.common import (
    Command,
    NameType,
    OrderedGroup,
    PathType,
    conversation_progress,
    echo_json,
    json_option,
    note,
    output_option,
)
from peftchat.cli.reading_options import HubKeys, check_pairs_are_read, oasst_pairs_option, reading_options
from peftchat.output_paths import InputPath

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftchat.conversation import RankPairs, Role
    from peftchat.conversations import ReadOptions
    from peftchat.conversations.dataset_card import Card
    from peftchat.conversations.stats import StatsPart
    from peftchat.conversations.stats.parts import FileTokenCounter

_RECIPE_SUFFIXES = (".yaml", ".yml")


@click.group("data", cls=OrderedGroup)
def command() -> None:
    """Make, clean and inspect conversations."""


def _split_languages(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(code.strip() for code in value.split(",") if code.strip())


@command.command(cls=Command, renamed={"--lang": "--languages", "--max-rows": "--max-samples"})
@click.argument("source", type=NameType())
@output_option("A new folder.", required=True)
@click.option("--format", "format_name", default="auto", show_default=True, help="Format (`peftchat data formats`).")
@click.option("--split", help="Split of a folder or hub dataset.  [default: train, where files are named by split]")
@reading_options
@click.option("--languages", default="", callback=_split_languages, help="Keep these: en,de.  [default: all]")
@click.option("--top-k", type=click.IntRange(min=1), help="OpenAssistant: keep only the best K replies per turn.")
@click.option(
    "--eval-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Fraction held out; conversations with the same first user message stay together.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the eval split.")
@click.option("--strict", is_flag=True, help="Stop at the first invalid record instead of writing it to a file.")
@click.option("--keep-going", is_flag=True, help="Keep what was read of a file whose rest cannot be read.")
@click.option("--pairs", is_flag=True, help="Keep chosen and rejected answers, for objectives with pairs.")
@click.option("--labels", is_flag=True, help="Keep each answer with its label, good or bad, for `objective: kto`.")
@oasst_pairs_option
@click.option("--max-samples", type=click.IntRange(min=1), help="Stop after this many conversations.")
@json_option("Print the dataset card as one JSON object.")
def prepare(
    source: str,
    output: Path,
    format_name: str,
    split: str | None,
    subset: str | None,
    revision: str | None,
    columns: dict[str, str],
    roles: "dict[str, Role]",
    consecutive: str,
    languages: tuple[str, ...],
    top_k: int | None,
    eval_fraction: float,
    seed: int,
    strict: bool,
    keep_going: bool,
    pairs: bool,
    labels: bool,
    oasst_pairs: "RankPairs | None",
    max_samples: int | None,
    as_json: bool,
) -> None:
    """Clean, split and count conversations from any known format.

    SOURCE is a file, a folder of files or a hub id. Writes train.jsonl, eval.jsonl and a dataset card. Invalid records
    go to quarantine.jsonl with their location and the reason. Everything left out is counted. A file that is cut or
    damaged ends the command with status 1, and nothing is written.

    \b
    peftchat data prepare oasst_trees.jsonl.gz -o data/oasst --languages en --eval-fraction 0.1
    """
    from peftchat.conversations.prepare import PrepareOptions
    from peftchat.conversations.prepare import prepare as prepare_dataset

    check_pairs_are_read(pairs, oasst_pairs, labels=labels)
    options = PrepareOptions(
        format=format_name,
        split=split,
        subset=subset,
        revision=revision,
        columns=columns,
        roles=roles,
        consecutive=consecutive,
        languages=languages,
        oasst_top_k=top_k,
        eval_fraction=eval_fraction,
        seed=seed,
        strict=strict,
        keep_going=keep_going,
        pairs=pairs,
        labels=labels,
        oasst_pairs=oasst_pairs,
        max_samples=max_samples,
    )
    with conversation_progress("reading") as advance:
        card = prepare_dataset(source, output, options, advance)
    if as_json:
        echo_json(card.as_dict())
    else:
        _print_card(card, output)


def _print_card(card: "Card", folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from peftchat.console import stdout
    from peftchat.conversations.dataset_card import funnel

    table = Table(box=None, pad_edge=False)
    table.add_column("step")
    table.add_column("count", justify="right")
    for step, count in funnel(card):
        table.add_row(escape(step), f"{count:,}")
    stdout.print(table)
    for examples in card.examples.values():
        note(f"  {examples[0]}", style="yellow")
    for remark in card.remarks:
        note(remark, style="yellow")
    rate = card.records / card.seconds if card.seconds else 0
    note(f"Wrote {folder} in {card.seconds:.1f} s ({rate:,.0f} records per second). card.md has the counts.")


@command.command(cls=Command, renamed={"--against": "--benchmark"})
@click.argument("sources", nargs=-1, required=True, type=NameType(), metavar="FILE|FOLDER|RECIPE...")
@click.option("--tokenizer", type=NameType(), metavar="FOLDER", help="Also count tokens, with this model's tokenizer.")
@click.option(
    "--benchmark",
    "benchmarks",
    type=NameType(),
    multiple=True,
    metavar="FILE",
    help="Look for this benchmark's questions. Repeatable.",
)
@reading_options
@click.option("--pairs", is_flag=True, help="Read chosen and rejected answers, and describe them as pairs.")
@click.option("--labels", is_flag=True, help="Read each answer with its label, good or bad, and count both.")
@oasst_pairs_option
@json_option()
@click.option("--html", "page", type=PathType("file"), help="Write an HTML page.")
def stats(
    sources: tuple[str, ...],
    tokenizer: str | None,
    benchmarks: tuple[str, ...],
    subset: str | None,
    revision: str | None,
    columns: dict[str, str],
    roles: "dict[str, Role]",
    consecutive: str,
    pairs: bool,
    labels: bool,
    oasst_pairs: "RankPairs | None",
    as_json: bool,
    page: Path | None,
) -> None:
    """Describe conversations: lengths, duplicates, leaks.

    Also counts roles, languages, code and invalid records. Several files, a folder with splits or a recipe with
    held-out data are compared with each other: what train and eval have in common is a leak.

    \b
    peftchat data stats conversations.jsonl --tokenizer models/base
    peftchat data stats data/train.jsonl data/eval.jsonl --html stats.html
    peftchat data stats recipes/demo_cpu.yaml --benchmark humaneval.jsonl.gz --benchmark arc.jsonl
    """
    from peftchat.conversations import ReadOptions
    from peftchat.conversations.stats import gather

    check_pairs_are_read(pairs, oasst_pairs, labels=labels)
    options = ReadOptions(
        consecutive=consecutive, columns=columns, roles=roles, pairs=pairs, labels=labels, oasst_pairs=oasst_pairs
    )
    parts, inputs, count_tokens = _open_parts(sources, tokenizer, options, HubKeys(subset, revision))
    if page is not None:
        from peftchat.reports.page import check_page

        page = check_page(page, [*inputs, *(InputPath(Path(name), "a benchmark") for name in benchmarks)])
    with conversation_progress("reading") as advance:
        gathered = gather(parts, benchmarks, count_tokens=count_tokens, progress=advance)
    if page is not None:
        from peftchat.reports.stats_report import write_stats_page

        write_stats_page(page, gathered)
        note(f"Wrote {page}.")
    if as_json:
        echo_json(gathered.as_dict())
    elif page is None:
        from peftchat.console import stdout
        from peftchat.reports.stats_report import print_stats

        print_stats(gathered, stdout)


def _open_parts(
    sources: "Sequence[str]", tokenizer: str | None, options: "ReadOptions", hub: HubKeys
) -> "tuple[list[StatsPart], list[InputPath], FileTokenCounter | None]":
    """Return the parts, what they are read from, and their token counter.

    It counts by the tokenizer asked for, else by a recipe's, if it is on disk.
    """
    from peftchat.conversations.stats import parts_of_path, parts_of_recipe
    from peftchat.conversations.stats.parts import FileTokenCounter, has_tokenizer

    parts: list[StatsPart] = []
    inputs: list[InputPath] = []
    for source in sources:
        if not source.endswith(_RECIPE_SUFFIXES):
            parts += parts_of_path(source, options, subset=hub.subset, revision=hub.revision)
            inputs.append(InputPath(Path(source), "the data"))
            continue
        from peftchat.recipe import load_recipe

        _check_recipe_decides(source, options, hub)
        loaded = load_recipe(Path(source), to_train=False)
        inputs += loaded.inputs()
        recipe = loaded.recipe
        parts += parts_of_recipe(recipe)
        if tokenizer is None and has_tokenizer(recipe.model.name):
            tokenizer = recipe.model.name
    return parts, inputs, None if tokenizer is None else FileTokenCounter(tokenizer)


def _check_recipe_decides(recipe: str, options: "ReadOptions", hub: HubKeys) -> None:
    """Check that no option speaks of data that a recipe describes.

    Raises:
        UserError: one does.
    """
    from peftchat.errors import UserError

    given = {
        "columns": bool(options.columns),
        "roles": bool(options.roles),
        "consecutive": options.consecutive != "error",
        "pairs": options.pairs,
        "labels": options.labels,
        "oasst-pairs": options.oasst_pairs is not None,
        "subset": hub.subset is not None,
        "revision": hub.revision is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise UserError(
                f"`--{name}` speaks of files, and this is a recipe",
                where=recipe,
                hint="Leave the option out: the recipe's `objective` says whether pairs or labels are read."
                if name in ("pairs", "labels")
                else f"Write `{name.replace('-', '_')}` in the recipe's `data` section, or leave the option out.",
            )


@command.command("from-code", cls=Command, renamed={"--max-rows": "--max-samples"})
@click.argument("roots", nargs=-1, type=NameType(), metavar="[PACKAGE|FOLDER]...")
@output_option("Folder for the files.", required=True)
@click.option("--stdlib", is_flag=True, help="Read the well-documented modules of Python's standard library.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of phrasings, split and selection.")
@click.option(
    "--max-samples", type=click.IntRange(min=2), help="At most this many conversations, drawn evenly over the objects."
)
@click.option(
    "--eval-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Fraction held out; train and eval ask about different objects.",
)
@click.option("--private", is_flag=True, help="Also ask about names that start with an underscore.")
@json_option("Print the dataset card as one JSON object.")
def from_code(
    roots: tuple[str, ...],
    output: Path,
    stdlib: bool,
    seed: int,
    max_samples: int | None,
    eval_fraction: float,
    private: bool,
    as_json: bool,
) -> None:
    """Make conversations about your own Python code.

    They explain what the code does, how to call it and how it is written. They come from syntax trees, signatures and
    docstrings; the code is read, never imported. Tests, vendored and generated code, private names and anything that
    looks like a secret are left out and counted in card.json. Several packages or folders may be given, also as a
    comma list.

    \b
    peftchat data from-code mypackage -o data/mypackage
    peftchat data from-code src/ -o data/mine --max-samples 2000
    peftchat data from-code --stdlib -o data/stdlib --max-samples 400
    """
    from peftchat.console import stdout
    from peftchat.errors import UserError
    from peftchat.from_code.survey import available_stdlib
    from peftchat.from_code.writer import write_conversations

    names = [name.strip() for root in roots for name in root.split(",") if name.strip()]
    names += available_stdlib() if stdlib else []
    if not names:
        raise UserError("nothing to read", where="from-code", hint="Name a package or a folder, or pass --stdlib.")
    written = write_conversations(
        names, output, seed=seed, max_samples=max_samples, eval_fraction=eval_fraction, private=private
    )
    card = written.card
    for line in card["unreadable"]:
        note(f"Left out, not valid Python: {line}", style="yellow")
    for reason, count in card["skipped"].items():
        note(f"Left out: {count} {reason}")
    if as_json:
        echo_json(card)
        return
    counts = f"{card['train']['conversations']} train and {card['eval']['conversations']} eval conversations"
    stdout.print(f"{output}: {counts} about {card['objects']} objects in {card['files_read']} files", markup=False)


@command.command()
@click.argument("name", required=False)
@json_option("Print one JSON object: formats and templates by name.")
def formats(name: str | None, as_json: bool) -> None:
    """List the data formats, or show the one called NAME.

    Each comes with the fields that it reads, two records as an example, and the names that `columns` can give. The
    formats are those that `data.train[].format` and `--format` accept. The chat templates that `chat.template` accepts
    are listed below them.

    \b
    peftchat data formats sharegpt
    """
    from peftchat.chat_template.templates import template_summaries
    from peftchat.cli.data_formats import print_formats
    from peftchat.conversations.formats import describe_formats

    described = describe_formats(name)
    templates = template_summaries() if name is None else {}
    if as_json:
        echo_json({"formats": described, **({"templates": templates} if name is None else {})})
    else:
        print_formats(described, templates)
