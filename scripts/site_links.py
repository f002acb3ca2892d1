"""Hook of mkdocs: links of the manual that leave docs/ become the file's path, because the site has no such page."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links to files of the repository are names of files."""
    return _OUTSIDE.sub(lambda link: _as_text(link[1], link[2]), markdown)


def _as_text(text: str, path: str) -> str:
    return f"`{path}`" if path.startswith(text) or text.endswith(path) else f"{text} (`{path}`)"
