"""The fenced blocks of the documentation, and the commands in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PAGES = (PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"(^|\s{2,})#\s.*$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file's name.
        line: number of the first line inside the fence, from 1.
        language: the word behind the fence.
        text: what stands inside.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        """Where the block is."""
        return f"{self.page}:{self.line}"


def blocks(language: str) -> Iterator[Block]:
    """Yield the blocks of a language, page by page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _FENCE.finditer(text):
            if found[1] == language:
                yield Block(page.name, text.count("\n", 0, found.start()) + 2, found[1], found[2])


def shell_lines() -> Iterator[Block]:
    """Yield each line of the `bash` blocks, without its comment."""
    for block in blocks("bash"):
        for number, line in enumerate(block.text.splitlines()):
            command = _COMMENT.sub("", line).strip()
            if command:
                yield Block(block.page, block.line + number, "bash", command)
