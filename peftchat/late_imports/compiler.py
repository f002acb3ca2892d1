"""torch's compiler, imported when a function is compiled and not where one is marked for it."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from peftchat.late_imports.stand_ins import LateModule
from peftchat.late_imports.table import COMPILER

_Function = Callable[..., Any]


class LateCompiler:
    """Keeps what modules ask of torch's compiler until it is imported."""

    def __init__(self) -> None:
        self._kept: list[Callable[[], Any]] = []

    def imported(self, _: ModuleType) -> None:
        """Do what was asked: the compiler has been imported."""
        kept, self._kept = self._kept, []
        for ask in kept:
            ask()

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Let the compiler's decorators wait while a module is executed."""
        import torch

        if COMPILER in sys.modules:
            yield
            return
        compiler = torch.compiler
        saved = compiler.disable, compiler.allow_in_graph, torch.compile
        late = LateModule(
            of=COMPILER, allow_in_graph=self._allow_in_graph, assume_constant_result=_assume_constant_result
        )
        compiler.disable, compiler.allow_in_graph = _disable, self._allow_in_graph
        torch.compile = functools.partial(_compile_later, torch.compile)
        torch_names = vars(torch)
        # Modules with decorators import one another.
        outer = torch_names.get("_dynamo")
        torch_names["_dynamo"] = late
        try:
            yield
        finally:
            compiler.disable, compiler.allow_in_graph, torch.compile = saved
            if torch_names["_dynamo"] is not late:
                # The compiler was imported meanwhile.
                pass
            elif outer is None:
                del torch_names["_dynamo"]
            else:
                torch_names["_dynamo"] = outer

    def disable_later(self, function: Any, *_: Any, **__: Any) -> Any:
        """Return a function that must not be compiled as it is: until the compiler is imported, none is."""
        # torch keeps what it gets in this attribute, and asks again where there is none:
        # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_compile.py
        self._kept.append(functools.partial(vars(function).pop, "__dynamo_disable", None))
        return function

    def _allow_in_graph(self, function: Any) -> Any:
        def ask() -> None:
            import torch._dynamo

            torch._dynamo.allow_in_graph(function)

        self._kept.append(ask)
        return function


def _disable(function: _Function | None = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """Mark a function as one not to be compiled, as torch marks its own: at the first call."""
    import torch

    return torch._disable_dynamo(function, recursive)


def _assume_constant_result(function: Any) -> Any:
    function._dynamo_marked_constant = True
    return function


def _compile_later(compile_now: _Function, function: _Function | None = None, **options: Any) -> _Function:
    if function is None:
        return functools.partial(_compile_later, compile_now, **options)
    compiled: list[_Function] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(compile_now(function, **options))
        return compiled[0](*args, **kwargs)

    return call
