"""torch's symbolic sizes, which take SymPy: no number is symbolic before they are imported.

torch computes the sizes of tensors on the `meta` device, where transformers makes a model before it loads the weights,
in Python. It asks there of plain numbers whether they are symbolic.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

CHECKS_SIZES = "torch"
SYMBOLIC = "torch.fx.experimental.symbolic_shapes"


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_int, value))


_PLAIN: Mapping[str, tuple[Callable[[Any], bool], Callable[..., Any]]] = MappingProxyType(
    {
        "guard_or_false": (_is_bool, lambda value: value),
        "guard_or_true": (_is_bool, lambda value: value),
        "guard_size_oblivious": (_is_bool, lambda value: value),
        "guarding_hint_or_throw": (_is_int, lambda value: value),
        "has_guarding_hint": (_is_int, lambda _: True),
        "is_nested_int": (_is_int, lambda _: False),
        "statically_known_true": (_is_bool, lambda value: value),
        "sym_and": (_is_bool, lambda *values: all(values)),
        "sym_eq": (_is_shape, lambda one, other: list(one) == list(other)),
        "sym_or": (_is_bool, lambda *values: any(values)),
    }
)
"""A function of that module -> what values are plain for it, and what it returns for those."""

ASKED = frozenset(_PLAIN)
"""The functions that answer for plain values without that module."""


def for_plain_values(name: str) -> Callable[..., Any]:
    """Return a function of that module, which is imported where a value is not a plain one."""
    is_plain, answer = _PLAIN[name]

    def ask(*values: Any) -> Any:
        return answer(*values) if all(map(is_plain, values)) else getattr(import_module(SYMBOLIC), name)(*values)

    return ask


def check_plain_conditions(module: ModuleType) -> None:
    """Let torch's checks that hold return at once, in place of asking whether the condition is symbolic."""
    check = module._check_with

    def check_with(error_type: type[Exception], cond: Any, message: Callable[[], str]) -> None:
        if cond is not True:
            check(error_type, cond, message)

    module._check_with = check_with  # type: ignore[attr-defined]
