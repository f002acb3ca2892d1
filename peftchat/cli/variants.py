"""`peftchat variants`: the ways to train, as a table or one by one."""

import json

import click


@click.command()
@click.argument("name", required=False)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object: all variants by name, or the one that is named."
)
def command(name: str | None, as_json: bool) -> None:
    """List the values of `adapter.variant`, or show one: what it does, takes, and works with.

    \b
    Examples:
        peftchat variants
        peftchat variants dora
    """
    from peftchat.console import stdout
    from peftchat.variants import VARIANTS, get_variant
    from peftchat.variants.describe import as_dict, details, overview

    if as_json:
        chosen = as_dict(get_variant(name)) if name else {key: as_dict(variant) for key, variant in VARIANTS.items()}
        click.echo(json.dumps(chosen))
    elif name:
        stdout.print(details(get_variant(name)))
    else:
        stdout.print(overview(VARIANTS.values()))
