"""HTML pages from the templates of this package: one file each, without scripts or external resources."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from peftchat import formatting
from peftchat.files import write_text


def write_page(path: Path, template: str, **values: object) -> Path:
    """Render a template to `path` atomically and return it; values are escaped unless they are `Markup`."""
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
    text = environment.get_template(template).render(values)
    # Text from conversations may hold lone surrogates, which UTF-8 cannot encode.
    write_text(path, text, errors="backslashreplace")
    return path
