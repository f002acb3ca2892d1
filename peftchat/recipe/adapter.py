"""The `adapter` section: each variant takes settings of its own."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, create_model

from peftchat.recipe.document import Document
from peftchat.variants import ADAPTERS, VARIANTS, AdapterSection, proper_name
from peftchat.variants.options import NOT_INHERITED

_AnyName: Any = Literal[ADAPTERS]
_Named: type[BaseModel] = create_model("_Named", variant=(_AnyName, ...))


def options_of(variant: object) -> type[AdapterSection] | None:
    """The section of a variant that a recipe names; None for a name that is no adapter's."""
    known = VARIANTS.get(proper_name(variant)) if isinstance(variant, str) else None
    return None if known is None else known.options


def section_of_variant(given: Any) -> Any:
    """Check an `adapter` section by the settings of the variant that it names."""
    if not isinstance(given, Mapping):
        return given
    name = "lora" if given.get("variant") is None else given["variant"]
    options = options_of(name)
    if options is None:
        _Named.model_validate({"variant": name})  # raises, and lists the names there are
    assert options is not None
    return options.model_validate({**given, "variant": proper_name(name)})


def drop_settings_of_other_variants(document: Document) -> None:
    """Let a variant that was laid on top of a recipe win over the settings below it that it does not take.

    A number that every variant counts in its own way, such as the rank of a shared random matrix, is not taken over
    either.
    """
    options = options_of(document.value(("adapter", "variant")))
    layer = document.layer(("adapter", "variant"))
    section = document.value(("adapter",))
    if options is None or layer is None or not isinstance(section, dict):
        return
    for key in [key for key in section if key != "variant"]:
        own = document.layer(("adapter", key))
        if own is not None and own < layer and not _taken_over(options, key):
            document.remove(("adapter", key))


def _taken_over(options: type[AdapterSection], key: str) -> bool:
    info = options.model_fields.get(key)
    if info is None:
        # A key that no variant knows is a mistake, and stays to be told.
        return not any(variant.options and key in variant.options.model_fields for variant in VARIANTS.values())
    extra = info.json_schema_extra
    return not (isinstance(extra, dict) and extra.get(NOT_INHERITED))
