"""All variants by name. A new one is a file of its own and a place in this list."""

from collections.abc import Mapping
from types import MappingProxyType

from peftchat.errors import UserError
from peftchat.variants import adalora, low_rank, prompts
from peftchat.variants import full as whole
from peftchat.variants import hadamard_kronecker as products
from peftchat.variants import initialized_lora as starts
from peftchat.variants import orthogonal as rotations
from peftchat.variants import random_projection as shared_bases
from peftchat.variants import selective as parts
from peftchat.variants.base import Variant

_MODULES = (low_rank, starts, adalora, products, parts, rotations, shared_bases, prompts, whole)

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {variant.name: variant for module in _MODULES for variant in module.VARIANTS}
)
"""Every variant, `full` included, in the order in which they are shown."""

ADAPTERS: tuple[str, ...] = tuple(name for name, variant in VARIANTS.items() if variant.options is not None)
"""The names that `adapter.variant` takes."""

_CALLED = {alias: name for name, variant in VARIANTS.items() for alias in (name, *variant.aliases)}


def canonical_name(name: str) -> str:
    """The registry's name for a name or an alias; what is neither comes back as it is."""
    return _CALLED.get(name.lower(), name)


def get_variant(name: str) -> Variant:
    """The variant of that name or alias.

    Raises:
        UserError: there is none.
    """
    found = VARIANTS.get(canonical_name(name))
    if found is None:
        raise UserError(f"there is no variant `{name}`", hint=f"There are: {', '.join(VARIANTS)}.")
    return found
