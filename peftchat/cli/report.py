"""`peftchat report`: the page of a run, or one over several runs."""

from pathlib import Path

import click

from peftchat.cli.common import PathType, echo_json, json_option, note


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PathType("folder"))
@click.option(
    "-o",
    "--output",
    type=PathType("file"),
    metavar="FILE",
    help="The page.  [default: report.html in the run folder; for several runs in the working folder]",
)
@click.option(
    "--rows",
    type=click.IntRange(0, 100),
    default=3,
    show_default=True,
    help="How many examples of one run to show with their masks.",
)
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the browser.")
@json_option()
def command(runs: tuple[Path, ...], output: Path | None, rows: int, open_browser: bool, as_json: bool) -> None:
    """Write the page of a run, or one page over several.

    Of one finished run: its result, curves, losses by source, role and turn, answers, warnings and environment, as
    `train` wrote it; and the plan beside what was measured, and examples with their masks. Of several runs, finished
    or not: their losses over each other against steps, tokens and time, what differs in their recipes, and what each
    source taught. A page is one file without scripts, and asks no other machine for anything.

    \b
    peftchat report runs/assistant
    peftchat report runs/lora runs/dora runs/full -o comparison.html
    """
    from peftchat import api

    page = api.report(runs, output=output, rows=rows)
    if as_json:
        echo_json({"page": str(page), "runs": [str(run) for run in runs]})
    note(f"Wrote {page}.")
    if open_browser:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
