"""`peftchat variants`: list the variants, or describe one."""

import click
from click.shell_completion import CompletionItem

from peftchat.cli.common import beginning_with, echo_json, json_option


def complete_variants(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer variants for the beginning of a name, or of the last name of a list with commas."""
    from peftchat.variants import VARIANTS

    before, comma, _ = incomplete.rpartition(",")
    return beginning_with(incomplete, (f"{before}{comma}{name}" for name in VARIANTS))


@click.command("variants")
@click.argument("name", required=False, shell_complete=complete_variants)
@json_option("Print one JSON object: all variants by name, or the named one.")
def command(name: str | None, as_json: bool) -> None:
    """List the ways to train: LoRA, other adapters, full.

    With NAME, describe one variant: what it does, its options and what it is compatible with.

    \b
    peftchat variants
    peftchat variants dora
    """
    from peftchat.console import stdout
    from peftchat.variants import VARIANTS, get_variant
    from peftchat.variants.describe import as_dict, details, overview

    if as_json:
        chosen = as_dict(get_variant(name)) if name else {key: as_dict(variant) for key, variant in VARIANTS.items()}
        echo_json(chosen)
    elif name:
        stdout.print(details(get_variant(name)))
    else:
        stdout.print(overview(VARIANTS.values()))
