"""`peftchat web`: chat with runs and models in the browser, and compare them blindly."""

import sys
from pathlib import Path

import click

from peftchat.cli.common import NameType, PathType, allow_changed_option, base_option, echo_json, json_option


@click.command("web")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=NameType())
@base_option()
@allow_changed_option()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on; others need a password.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port.  [default: the first that is free from 7860 on]")
@click.option(
    "--password",
    envvar="PEFTCHAT_WEB_PASSWORD",
    help="What a visitor has to type. Other users of this machine see it in the list of processes: better set the "
    "environment variable PEFTCHAT_WEB_PASSWORD.",
)
@click.option(
    "-o",
    "--output",
    type=PathType("folder"),
    default="chats",
    show_default=True,
    help="Folder for what you keep: examples.jsonl, pairs.jsonl, votes.jsonl.",
)
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the browser.")
@json_option("Print one JSON object when the page is there: its address and the models.")
def command(
    models: tuple[str, ...],
    base: str | None,
    allow_changed: bool,
    host: str,
    port: int | None,
    password: str | None,
    output: Path,
    open_browser: bool,
    as_json: bool,
) -> None:
    """Chat with runs and models in the browser.

    MODEL is a run folder, a merged model, or any model with a chat template. Of two or more, each pair can be compared
    without their names. A base and its adapters share their weights. Bad answers become data: edit them, and keep the
    conversation as a training example. The page asks no other machine for anything. Needs the extra `web`.

    \b
    peftchat web runs/assistant
    peftchat web runs/assistant runs/other meta-llama/Llama-3.1-8B-Instruct
    PEFTCHAT_WEB_PASSWORD=... peftchat web runs/assistant --host 0.0.0.0
    """
    from peftchat.web.access import check_access
    from peftchat.web.page import check_gradio

    check_gradio()
    access = check_access(host, port, password)
    from peftchat.web.kept_files import KeptFiles

    kept = KeptFiles(output, list(models))
    from transformers.utils.logging import disable_progress_bar

    from peftchat.console import stderr
    from peftchat.web.loaded_models import load_models, open_models
    from peftchat.web.page import serve_page

    disable_progress_bar()
    named = open_models(models, base=base)
    with stderr.status("loading …"):
        page = serve_page(load_models(named, allow_changed=allow_changed), kept, access)
    stderr.print(f"Serving on {page.url} (Ctrl-C ends it)", markup=False, highlight=False)
    if as_json:
        echo_json({"url": page.url, "models": list(models)})
        sys.stdout.flush()
    if open_browser:
        import webbrowser

        webbrowser.open(page.url)
    page.wait()
