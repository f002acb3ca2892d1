"""Regular expressions that are compiled when they are first used.

transformers makes those of all its architectures, more than a thousand, to look up the ones of the model that it loads.
"""

import re
from functools import cached_property
from types import ModuleType
from typing import Any

from peftchat.late_imports.stand_ins import LateModule

HAS_PATTERNS = "transformers.core_model_loading"
"""The module that makes them."""


class LatePattern:
    """What `re.compile` returns, compiled when an attribute of it is asked for."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self._arguments = pattern, flags

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(*self._arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __deepcopy__(self, _: dict[int, Any]) -> "LatePattern":
        """Return itself, as a compiled pattern does."""
        return self


def compile_late(module: ModuleType) -> None:
    """Give a module late patterns."""
    module.re = LateModule(of="re", compile=LatePattern)  # type: ignore[attr-defined]
