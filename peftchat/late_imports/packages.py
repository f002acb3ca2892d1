"""The installed packages, looked for one by one: a list of all takes half a second, and TRL asks for two versions."""

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache

LISTS_PACKAGES = "trl.import_utils"
"""The module that lists them while it is imported."""

Listing = Mapping[str, list[str]]


class Packages(Listing):
    """Import name -> distributions, as `importlib.metadata.packages_distributions` returns it.

    Args:
        list_all: that function.
    """

    def __init__(self, list_all: Callable[[], Listing]) -> None:
        self._list_all = cache(list_all)

    def __getitem__(self, name: str) -> list[str]:
        with suppress(importlib.metadata.PackageNotFoundError, ValueError):
            distribution = importlib.metadata.distribution(name)
            if (distribution.read_text("top_level.txt") or "").split() == [name]:
                return [distribution.metadata["Name"]]
        return self._list_all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._list_all())

    def __len__(self) -> int:
        return len(self._list_all())


@contextmanager
def looked_for_one_by_one() -> Iterator[None]:
    """Let a module that lists the installed packages while it is executed look for those that it asks for."""
    list_all = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: Packages(list_all)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = list_all
