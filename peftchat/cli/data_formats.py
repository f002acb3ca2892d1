"""What `peftchat data formats` shows."""

import json
from collections.abc import Mapping
from typing import Any


def print_formats(formats: Mapping[str, Mapping[str, Any]], templates: Mapping[str, str]) -> None:
    """Print each format: its fields, two records, and how to map other names; then the chat templates.

    Args:
        formats: as `describe_formats` gives them.
        templates: name -> one line.
    """
    from peftchat.console import stdout
    from peftchat.conversations.formats import SHARED_FIELDS

    for name, described in formats.items():
        stdout.print(name, style="bold", end="")
        stdout.print(f": {described['summary']}", markup=False)
        _print_fields(described["fields"])
        for example in described["examples"]:
            # One record, one line: what is copied must be a line of a file.
            stdout.print(
                f"    {json.dumps(example, ensure_ascii=False)}", markup=False, soft_wrap=True, highlight=False
            )
        stdout.print()
    stdout.print("Fields that all formats with one conversation per record read:", style="bold")
    _print_fields(SHARED_FIELDS)
    stdout.print()
    stdout.print("Other names", style="bold", end="")
    stdout.print(": `columns` of a recipe's source and `--columns` give our name of a field the file's.")
    stdout.print("    data.train: [{path: FILE, columns: {prompt: ask, completion: reply}, roles: {agent: assistant}}]")
    stdout.print("    peftchat data prepare FILE -o FOLDER --columns prompt=ask,completion=reply")
    for name, described in formats.items():
        columns = ", ".join(described["columns"]) or "none, its names are fixed"
        stdout.print(f"  {name}: {columns}", markup=False)
    stdout.print("All other fields are kept beside the conversation. Those with text are told as not used.")
    if templates:
        stdout.print()
        stdout.print("Templates:", style="bold")
        width = max(map(len, templates))
        for name, summary in templates.items():
            stdout.print(f"  {name:{width}}  {summary}", markup=False)


def _print_fields(fields: Mapping[str, str]) -> None:
    from peftchat.console import stdout

    width = max(map(len, fields))
    for name, meaning in fields.items():
        stdout.print(f"  {name:{width}}  {meaning}", markup=False, highlight=False)
