"""All variants by name. Every module of this package is searched: a new variant is a class in a file of its own."""

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import MappingProxyType

from peftchat.errors import UserError
from peftchat.variants.base import Adapter, Variant

_FIRST = ("low_rank", "initialized_lora", "adalora")
_LAST = ("prompts", "full")
"""The modules whose variants are shown first and last; those of the others stand between, by name of the module."""

_WITHOUT_VARIANTS = frozenset({"base", "describe", "model_shape", "registry"})


def find_variants(folders: Iterable[str]) -> Iterator[type[Variant]]:
    """Yield the variants of all modules in the package's folders, in the order in which they are shown."""
    names = [module.name for module in iter_modules(folders) if module.name not in _WITHOUT_VARIANTS]
    between = [name for name in names if name not in (*_FIRST, *_LAST)]
    for name in (*_FIRST, *sorted(between), *_LAST):
        module = import_module(f"peftchat.variants.{name}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__ and _is_concrete(value):
                yield value


def _is_concrete(value: type) -> bool:
    """Return whether a class is a variant, and not a base class of several."""
    if issubclass(value, Adapter):
        return value.is_concrete()
    return issubclass(value, Variant)


VARIANTS: Mapping[str, type[Variant]] = MappingProxyType(
    {variant.name: variant for variant in find_variants([str(Path(__file__).parent)])}
)
"""Every variant, `full` included, in the order in which they are shown."""

ADAPTERS: Mapping[str, type[Adapter]] = MappingProxyType(
    {name: variant for name, variant in VARIANTS.items() if issubclass(variant, Adapter)}
)
"""The variants that `adapter.variant` can name."""

_NAMES = {alias: name for name, variant in VARIANTS.items() for alias in (name, *variant.aliases)}


def canonical_name(name: str) -> str:
    """Return the registry's name for a name or an alias; any other word unchanged."""
    return _NAMES.get(name.lower(), name)


def get_variant(name: str) -> type[Variant]:
    """Return the variant of that name or alias.

    Raises:
        UserError: there is none.
    """
    variant = VARIANTS.get(canonical_name(name))
    if variant is None:
        raise UserError(f"there is no variant `{name}`", hint=f"Choose one of: {', '.join(VARIANTS)}.")
    return variant


def get_adapter(name: object) -> type[Adapter] | None:
    """Return the adapter of that name or alias; None for anything else."""
    return ADAPTERS.get(canonical_name(name)) if isinstance(name, str) else None
