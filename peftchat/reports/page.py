"""HTML pages from the templates of this package: one file each, without scripts or external resources."""

import functools
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from peftchat import formatting
from peftchat.files import write_text
from peftchat.output_paths import InputPath, check_output_file

_MARK = b'<meta name="generator" content="peftchat">'
_START = 1024


def check_page(path: Path, inputs: Iterable[InputPath]) -> Path:
    """Check that a page may be written, and return the file to write to, links followed.

    Raises:
        UserError: it may not, or the file is there and no page of ours.
    """
    return check_output_file(path, inputs, f"--html {path}", is_ours=_is_own_page, kind="an HTML page")


def _is_own_page(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK in file.read(_START)


def write_page(path: Path, template: str, **values: object) -> Path:
    """Render a template to `path` atomically and return it; values are escaped unless they are `Markup`.

    A folder that is not there is made, as `check_page` allows it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = load_template(template).render(values)
    # Text from conversations may hold lone surrogates, which UTF-8 cannot encode.
    write_text(path, text, errors="backslashreplace")
    return path


def load_template(name: str) -> Template:
    """Return a template of this package, compiled once in a process."""
    return _environment().get_template(name)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("peftchat", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=formatting.format_count,
        short_count=formatting.format_short_count,
        size=formatting.format_bytes,
        share=formatting.format_percent,
        decimal=formatting.format_decimal,
        duration=formatting.format_duration,
        moment=formatting.format_time,
    )
    return environment
