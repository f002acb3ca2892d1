"""`peftchat serve`: serve runs and models by an inference engine that is installed."""

import shlex
import sys

import click

from peftchat.cli.common import NameType, base_option, echo_json, json_option


@click.command("serve")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=NameType())
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "transformers", "llama.cpp"]),
    default="auto",
    show_default=True,
    help="auto: the first of the others that is installed and can serve MODEL.",
)
@base_option()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on; others need a key.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port.")
@click.option("--api-key", envvar="PEFTCHAT_API_KEY", help="What clients have to send; better set PEFTCHAT_API_KEY.")
@click.option(
    "--engine-options", default="", metavar="TEXT", help='Further options of the engine: "--max-model-len 4096".'
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Seconds that the engine may take until it answers.",
)
@click.option("--check", is_flag=True, help="End when every model has answered.")
@click.option("--dry-run", is_flag=True, help="Print the engine's command and start nothing.")
@json_option("Print one JSON object: the command, the models, and when they have answered, the address and answers.")
def command(
    models: tuple[str, ...],
    engine: str,
    base: str | None,
    host: str,
    port: int,
    api_key: str | None,
    engine_options: str,
    timeout: float,
    check: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Serve runs and models to clients of OpenAI's interface.

    MODEL is a run folder, a merged model, a hub id, or a GGUF file. vLLM serves several adapters of one base at once.
    The engine is started, each model is asked a question over http, and Ctrl-C ends all of it.

    \b
    peftchat serve runs/assistant
    peftchat serve runs/assistant runs/other --dry-run
    peftchat serve runs/assistant/assistant-q8_0.gguf --check
    """
    from typing import get_args

    from peftchat.engines.commands import EngineName, check_place, engine_command
    from peftchat.engines.served import open_served
    from peftchat.errors import UserError, VerificationError

    try:
        extra = shlex.split(engine_options)
    except ValueError as error:
        raise UserError(f"the options cannot be read: {error}", where="--engine-options") from error
    place = check_place(host, port, api_key, needs_port=not dry_run)
    chosen = next((name for name in get_args(EngineName) if name == engine), None)
    started = engine_command(open_served(models, base=base), place, engine=chosen, extra=extra, dry_run=dry_run)
    from peftchat.console import stderr

    for note in started.notes:
        stderr.print(note, markup=False, style="dim")
    told = {"engine": started.engine, "command": started.arguments, "models": started.models}
    if dry_run:
        if as_json:
            echo_json(told)
        else:
            click.echo(shlex.join(started.arguments))
        return
    from peftchat.engines.process import ended, running

    stderr.print(shlex.join(started.arguments), markup=False, style="dim", soft_wrap=True)
    with running(started, place) as served:
        answers = served.wait_until_it_answers(timeout)
        for name, answer in answers.items():
            first = next(iter(answer.strip().splitlines()), "")
            stderr.print(f"{name} answers: {first[:70] or '(nothing)'}", markup=False)
        if as_json:
            echo_json({**told, "url": served.url, "answers": answers})
            sys.stdout.flush()
        if check:
            return
        stderr.print(f"Serving {', '.join(answers)} on {served.url} (Ctrl-C ends it)", markup=False)
        status = served.wait()
    raise VerificationError(ended(started.engine, status))
