"""Late imports: what libraries load while they are imported, and that a command may never need."""

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "bitsandbytes"


def postpone_imports() -> None:
    """Let bitsandbytes load torch's compiler when it compiles, and read the installed packages once.

    PEFT imports bitsandbytes wherever it is installed, and its `torch.compile` of four functions imports Inductor: a
    fifth of the time until training can begin.
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/default/ops.py#L12
    transformers and TRL each ask for the packages of all distributions.
    """
    listing = importlib.metadata.packages_distributions
    if not hasattr(listing, "cache_info"):
        importlib.metadata.packages_distributions = functools.cache(listing)
    if _NAME not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds bitsandbytes, once, and imports it with a `torch.compile` that waits for the first call."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the package's own spec with another way to run it."""
        if name != _NAME:
            return None
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            import torch

            compile_now = torch.compile
            torch.compile = functools.partial(_compile_later, compile_now)
            try:
                execute(module)
            finally:
                torch.compile = compile_now

        loader.exec_module = exec_module
        return spec


def _compile_later(compile_now: Callable[..., Any], function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(compile_now(function, **options))
        return compiled[0](*args, **kwargs)

    return call
