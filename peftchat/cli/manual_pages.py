"""The page of the manual that an error names: that of the recipe's section or the command that it is about."""

import re
from collections.abc import Iterable

from peftchat.errors import UserError

SECTION_PAGES = {
    "model": "training",
    "method": "variants",
    "adapter": "variants",
    "quantization": "variants",
    "objective": "preferences",
    "dpo": "preferences",
    "orpo": "preferences",
    "simpo": "preferences",
    "cpo": "preferences",
    "kto": "preferences",
    "chat": "templates",
    "data": "data",
    "training": "training",
    "evaluation": "evaluate",
    "distributed": "clusters",
    "output_dir": "training",
}
"""For each section of the recipe, the page that explains it."""

COMMAND_PAGES = {
    "doctor": "guide-one-gpu",
    "recipes": "recipe",
    "init": "index",
    "recipe": "import",
    "data": "data",
    "mask": "data",
    "template": "templates",
    "variants": "variants",
    "plan": "plan",
    "launch": "clusters",
    "train": "training",
    "report": "report",
    "compare": "compare",
    "evaluate": "evaluate",
    "merge": "merge",
    "chat": "serving",
    "web": "web",
    "generate": "evaluate",
    "judge": "evaluate",
    "export": "serving",
    "serve": "serving",
    "push": "serving",
}
"""For each command, the page that explains it."""

_FILE = r"\.(?:jsonl?|ya?ml|csv|tsv|txt|parquet|arrow|gz|zip)\b"
_SECTION = re.compile(rf"(?:^|(?<=[\s`(:]))({'|'.join(SECTION_PAGES)})(?!{_FILE})(?=[.:\s`,]|$)")


def command_page(arguments: Iterable[str]) -> str | None:
    """Return the page of the manual for the first command among some words; None if there is none."""
    page = next((COMMAND_PAGES[name] for name in arguments if name in COMMAND_PAGES), None)
    return None if page is None else f"docs/{page}.md"


def manual_page(error: UserError, arguments: Iterable[str]) -> str | None:
    """Return the page of the manual for an error, such as `docs/data.md`; None if no command was named.

    Args:
        error: what will be shown.
        arguments: those of the command line.
    """
    # A place in a recipe names its section; a message may name one, followed by a key.
    of_place = _SECTION.search(error.where or "")
    of_message = re.search(rf"`?\b({'|'.join(SECTION_PAGES)})\.[a-z_]+", f"{error.message} {error.hint or ''}")
    section = of_place or of_message
    if section:
        return f"docs/{SECTION_PAGES[section[1]]}.md"
    advised = re.findall(r"`peftchat ([a-z]+)", f"{error.message} {error.hint or ''}")
    return command_page((*advised, *arguments))
