"""The pages about the Python API name what `import peftchat` offers, no more and no less."""

import re

import peftchat
from tests.docs.fences import PROJECT

NAMES = set(peftchat.__all__) - {"__version__"}


def page(name: str) -> str:
    return (PROJECT / "docs" / name).read_text(encoding="utf-8")


def test_the_generated_reference_has_every_public_name() -> None:
    assert set(re.findall(r"^### `(\w+)`$", page("api-reference.md"), re.MULTILINE)) == NAMES


def test_the_page_by_hand_mentions_every_public_name() -> None:
    table = page("api.md").partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)[`(]", table)) >= NAMES
