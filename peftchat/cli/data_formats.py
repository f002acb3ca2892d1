"""`peftchat data formats`: the input forms and the chat templates."""

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object: formats and templates by name.")
def command(as_json: bool) -> None:
    """List the input forms that `format` knows, with their fields, and the templates that `chat.template` knows.

    \b
    Example:
        peftchat data formats
    """
    from peftchat.chat_template.templates import template_summaries
    from peftchat.console import stdout
    from peftchat.conversations import list_formats

    lists = {"formats": dict(list_formats()), "templates": template_summaries()}
    if as_json:
        click.echo(json.dumps(lists))
        return
    for title, entries in lists.items():
        stdout.print(f"{title.capitalize()}:", style="bold")
        width = max(map(len, entries))
        for name, summary in entries.items():
            stdout.print(f"  {name:{width}}  {summary}", markup=False)
