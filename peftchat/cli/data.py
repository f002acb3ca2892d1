"""`peftchat data`: from what people have to files worth training on."""

import click

from peftchat.cli.lazy import LazyVerbs, Verb

VERBS = {
    "prepare": Verb("peftchat.cli.data_prepare", "Clean, split and count conversations from any known form."),
    "stats": Verb("peftchat.cli.data_stats", "Describe conversations: lengths, duplicates, leaks."),
    "from-code": Verb("peftchat.cli.data_from_code", "Make conversations about your own Python code."),
    "formats": Verb("peftchat.cli.data_formats", "List the input forms."),
}


@click.group(cls=LazyVerbs, verbs=VERBS)
def command() -> None:
    """From what you have to conversations worth training on."""
