"""`peftchat data formats`: the input forms."""

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object: name -> fields.")
def command(as_json: bool) -> None:
    """List the input forms that `format` and `--format` know, and the fields of each.

    \b
    Example:
        peftchat data formats
    """
    from peftchat.console import output
    from peftchat.sources import list_formats

    formats = dict(list_formats())
    if as_json:
        click.echo(json.dumps(formats))
        return
    width = max(map(len, formats))
    for name, summary in formats.items():
        output.print(f"{name:{width}}  {summary}", markup=False)
