"""Stand-ins: what a library's module gets for names of a module that is imported when one of them is used."""

import sys
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any


class StandIn(type):
    """Stands for a class or a function, in the one module that imported it.

    It is itself a class, so that it serves in annotations and in `isinstance`. Nothing can be an instance of a class
    whose module was never imported, so such a question imports nothing.
    """

    _of: tuple[str, str]
    _importer: "Importer"

    def __new__(cls, name: str, bases: tuple[type, ...] = (), namespace: dict[str, Any] | None = None) -> Any:
        """Return a stand-in; where it is made the base of a class, that class with the real base."""
        if not bases:
            return super().__new__(cls, name, (), namespace or {})
        real = tuple(base.real() if isinstance(base, StandIn) else base for base in bases)
        return type(real[0])(name, real, namespace or {})

    def __init__(cls, name: str, bases: tuple[type, ...] = (), namespace: dict[str, Any] | None = None) -> None:
        super().__init__(name, (), namespace or {})

    def real(cls) -> Any:
        """Import the module, and return what this stands for."""
        module, name = cls._of
        return getattr(import_module(module), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Call what this stands for, or make a late value for a module that is still executed."""
        if cls._importer.is_executing and not cls._is_imported():
            return LateValue(cls, args, kwargs)
        return cls.real()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.real(), name)

    def __instancecheck__(cls, instance: Any) -> bool:
        return cls._is_imported() and isinstance(instance, cls.real())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return cls._is_imported() and issubclass(subclass, cls.real())

    def _is_imported(cls) -> bool:
        return cls._of[0] in sys.modules


def stand_in(importer: "Importer", module: str, name: str) -> StandIn:
    """Return a stand-in for a name of a module."""
    made: StandIn = StandIn(name, (), {"_of": (module, name), "_importer": importer})
    return made


@dataclass
class Importer:
    """The module that has stand-ins: while it is executed, what it makes of them is stood in for too.

    Attributes:
        is_executing: whether it is being executed.
        late_modules: what it got for `import module`, for functions that import whenever they run.
    """

    is_executing: bool = True
    late_modules: dict[str, "LateModule"] = field(default_factory=dict)


@dataclass(frozen=True)
class LateValue:
    """What a module made by a stand-in while it was executed, to be made when the real class is there."""

    made_by: StandIn
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def real_value(value: Any) -> Any:
    """Return a value with what stands in for others replaced by them."""
    if isinstance(value, LateValue):
        return value.made_by.real()(*value.args, **value.kwargs)
    return type(value)(map(real_value, value)) if type(value) in (list, tuple) else value


class LateModule(SimpleNamespace):
    """What `import module` gives where some names are stood in for; any other name imports the module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.of), name)
