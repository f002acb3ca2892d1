"""`peftchat data from-code`: conversations about your own Python code."""

from pathlib import Path

import click


@click.command("from-code")
@click.argument("roots", nargs=-1, metavar="[PACKAGE|FOLDER]...")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@click.option("--stdlib", is_flag=True, help="Read the well-documented modules of Python's standard library.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses phrasings, split and rows.")
@click.option("--max-rows", type=click.IntRange(min=2), help="At most this many rows, drawn evenly over the objects.")
@click.option(
    "--eval-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the rows held out; no object is asked about on both sides.",
)
@click.option("--private", is_flag=True, help="Ask also about names that start with an underscore.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as one JSON object.")
def command(
    roots: tuple[str, ...],
    folder: Path,
    stdlib: bool,
    seed: int,
    max_rows: int | None,
    eval_fraction: float,
    private: bool,
    as_json: bool,
) -> None:
    """Make conversations about your own Python code: what it does, how to call it, how it is written.

    They come from syntax trees, signatures and docstrings; the code is read, never imported. Tests, vendored and
    generated code, private names and anything that looks like a secret are left out and counted in card.json.
    Several packages or folders may be given, also as a comma list.

    \b
    Examples:
      peftchat data from-code mypackage -o data/mypackage
      peftchat data from-code src/ -o data/mine --max-rows 2000
      peftchat data from-code --stdlib -o data/stdlib --max-rows 400
    """
    from peftchat.console import stderr, stdout
    from peftchat.errors import UserError
    from peftchat.from_code.survey import available_stdlib
    from peftchat.from_code.writer import write_conversations

    names = [name.strip() for root in roots for name in root.split(",") if name.strip()]
    names += available_stdlib() if stdlib else []
    if not names:
        raise UserError("nothing to read", where="from-code", hint="Name a package or a folder, or pass --stdlib.")
    written = write_conversations(
        names, folder, seed=seed, max_rows=max_rows, eval_fraction=eval_fraction, private=private
    )
    card = written.card
    for line in card["unreadable"]:
        stderr.print(f"Not valid Python, left out: {line}", style="yellow", markup=False)
    for reason, count in card["skipped"].items():
        stderr.print(f"Left out: {count} {reason}", markup=False)
    if as_json:
        stdout.print_json(data=card)
        return
    rows = f"{card['train']['rows']} train and {card['eval']['rows']} eval rows"
    stdout.print(f"{folder}: {rows} about {card['objects']} objects in {card['files_read']} files", markup=False)
