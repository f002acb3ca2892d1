"""Laying one document over another: mappings are merged, everything else is replaced."""

from typing import Any

from peftchat.recipe.document import Document, Keys


def merge(base: Document, over: Document) -> Document:
    """`base` with the values and places of `over` on top. Lists are replaced, not joined."""
    merged = Document(dict(base.values), dict(base.places))
    _lay(merged, merged.values, over, over.values, ())
    merged.places[()] = over.places[()]
    return merged


def _lay(merged: Document, into: dict[str, Any], over: Document, values: dict[str, Any], keys: Keys) -> None:
    for key, value in values.items():
        here = (*keys, key)
        below = into.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            into[key] = dict(below)
            merged.places[here] = over.places[here]
            _lay(merged, into[key], over, value, here)
            continue
        merged.forget(here)
        into[key] = value
        merged.places |= {known: place for known, place in over.places.items() if known[: len(here)] == here}
