"""What pydantic found, told by file, line and key, in words that say what to write instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from peftchat.errors import UserError
from peftchat.recipe.adapter import options_of
from peftchat.recipe.document import Document, Keys, dotted
from peftchat.recipe.foreign import REFUSED, RENAMED
from peftchat.recipe.schema import Recipe
from peftchat.strict_model import StrictModel
from peftchat.variants import VARIANTS


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe: at which key, what, and the cure."""

    keys: Keys
    what: str
    cure: str | None = None

    def error(self, document: Document) -> UserError:
        """The problem as an error that shows its place."""
        return UserError(self.what, where=document.place(self.keys).of(self.keys), cure=self.cure)


def refuse(problems: Sequence[Problem], document: Document, name: str) -> None:
    """Raise one InputError that tells all problems, in the order of their lines; do nothing for none."""
    in_order = sorted(problems, key=lambda problem: document.place(problem.keys).line or 0)
    errors = [problem.error(document) for problem in in_order]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = "\n".join(f"  {error}" for error in errors)
        raise UserError(f"{len(errors)} problems\n{lines}", where=name)


def schema_problems(errors: Sequence[ErrorDetails], document: Document) -> list[Problem]:
    """One problem for each of the errors that pydantic found in a recipe."""
    adapter = options_of(document.value(("adapter", "variant")) or "lora")
    return [_problem(error, adapter) for error in errors]


def _problem(error: ErrorDetails, adapter: type[StrictModel] | None) -> Problem:
    keys, kind, given = tuple(error["loc"]), error["type"], error["input"]
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(keys, given, adapter)
    if kind == "missing":
        return _missing(keys)
    if kind == "literal_error":
        return _not_allowed(keys, given, context["expected"])
    if kind in ("model_type", "dict_type"):
        return Problem(keys, f"expected keys with values, got {_shown(given)}", _mapping_cure(keys, given))
    if kind in _EXPECTED:
        return Problem(keys, f"expected {_EXPECTED[kind]}, got {_shown(given)}", _type_cure(keys, kind, given))
    if kind in _BOUNDS:
        limit = next(iter(context.values()))
        return Problem(keys, f"must be {_BOUNDS[kind]} {limit:g}, got {_shown(given)}")
    if kind in ("string_too_short", "too_short"):
        return Problem(keys, "is empty", _example(keys))
    if kind == "string_pattern_mismatch":
        return Problem(keys, f"is not of the right form, got {_shown(given)}", _example(keys))
    return Problem(keys, f"{error['msg']}, got {_shown(given)}")


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
}

_BOUNDS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def _shown(value: object) -> str:
    """A value and its kind, as its writer sees them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text `{value if len(value) <= 60 else value[:57] + '...'}`"
    if isinstance(value, Mapping):
        return "keys with values" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "null" if value is None else f"the number {value}"


def _type_cure(keys: Keys, kind: str, given: object) -> str | None:
    if isinstance(given, str) and kind == "bool_type":
        word = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
        return f"Write `{word[given.lower()]}`, without quotes." if given.lower() in word else None
    if isinstance(given, str) and kind in ("int_type", "float_type"):
        try:
            float(given)
        except ValueError:
            return None
        return "Remove the quotes."
    if isinstance(given, bool | int | float) and kind == "string_type":
        return "Put it in quotes."
    if isinstance(given, str) and keys in (("data", "train"), ("data", "eval")):
        return f"Write `{keys[-1]}: [{{path: {given}}}]`."
    if kind == "tuple_type":
        return "Write it as a list: `[...]`, or one line a value that begins with `- `."
    return None


def _mapping_cure(keys: Keys, given: object) -> str | None:
    if isinstance(given, str) and keys[-2:-1] in (("train",), ("eval",)):
        return f"Write `{{path: {given}}}`."
    if not keys:
        return "A recipe begins with keys such as `model:` and `method:`."
    return None


def _not_allowed(keys: Keys, given: object, expected: str) -> Problem:
    allowed = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
    near = get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    choices = ", ".join(f"`{word}`" for word in allowed)
    what = f"expected one of {choices}, got {_shown(given)}"
    return Problem(keys, what, f"Did you mean `{near[0]}`?" if near else None)


def _missing(keys: Keys) -> Problem:
    return Problem(keys, "missing", _example(keys))


def _example(keys: Keys) -> str | None:
    info = _field(keys)
    if info is None:
        return None
    if info.examples:
        return f"Add for example `{keys[-1]}: {info.examples[0]}`."
    return f"Add `{keys[-1]}:`. {info.description}"


def _field(keys: Keys) -> FieldInfo | None:
    """The field a path of keys leads to; list indices are stepped over."""
    model: type[StrictModel] | None = Recipe
    found: FieldInfo | None = None
    for key in keys:
        if isinstance(key, int):
            continue
        if model is None or key not in model.model_fields:
            return None
        found = model.model_fields[key]
        model = section_of(found.annotation)
    return found


def section_of(annotation: Any) -> type[StrictModel] | None:
    """The Section class within an annotation such as `AdapterSection | None` or `tuple[DataEntry, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return annotation
    for part in get_args(annotation):
        if (found := section_of(part)) is not None:
            return found
    return None


def all_keys() -> dict[str, list[str]]:
    """Every key's last name -> the sections it stands in (`""` for the top level)."""
    homes: dict[str, list[str]] = {}
    for name, info in Recipe.model_fields.items():
        homes.setdefault(name, []).append("")
        section = section_of(info.annotation)
        for key in section.model_fields if section else ():
            homes.setdefault(key, []).append(name)
    for key in _settings_of_variants():
        homes.setdefault(key, []).append("adapter")
    return homes


def _settings_of_variants() -> list[str]:
    """What the `adapter` section takes beside `variant`, of any variant."""
    return list(dict.fromkeys(key for variant in VARIANTS.values() for key in variant.keys))


def _unknown(keys: Keys, given: object, adapter: type[StrictModel] | None) -> Problem:
    name, section = str(keys[-1]), dotted(keys[:-1])
    if section == "adapter" and adapter is not None and name in _settings_of_variants():
        return _of_another_variant(keys, adapter)
    inside = _field(keys[:-1])
    known = section_of(inside.annotation) if inside else Recipe
    if section == "adapter":
        known = adapter
    valid = list(known.model_fields) if known else []
    homes = [home for home in all_keys().get(name, []) if home != section]
    if name in REFUSED:
        what = f"`{name}` is a known setting that peftchat does not pass on"
        return Problem(keys, what, REFUSED[name])
    if name in RENAMED:
        return Problem(keys, f"`{name}` is called `{RENAMED[name]}` here")
    if homes:
        return Problem(keys, "unknown key", _belongs(name, homes[0], keys))
    near = get_close_matches(name, valid, n=1)
    if near:
        return Problem(keys, "unknown key", f"Did you mean `{near[0]}`?")
    elsewhere = get_close_matches(name, list(all_keys()), n=1)
    if elsewhere:
        home = all_keys()[elsewhere[0]][0]
        return Problem(keys, "unknown key", f"Did you mean `{f'{home}.' if home else ''}{elsewhere[0]}`?")
    listed = ", ".join(f"`{key}`" for key in valid)
    return Problem(keys, "unknown key", f"Here can stand: {listed}.")


def _of_another_variant(keys: Keys, adapter: type[StrictModel]) -> Problem:
    variant = adapter.model_fields["variant"].default
    taken = ", ".join(f"`{key}`" for key in adapter.model_fields if key != "variant")
    others = [entry.name for entry in VARIANTS.values() if keys[-1] in entry.keys]
    shown = ", ".join(others[:4]) + (", …" if len(others) > 4 else "")
    what = f"`{variant}` has no such setting; it belongs to {shown}"
    return Problem(keys, what, f"`{variant}` takes {taken}." if taken else f"`{variant}` takes no settings.")


def _belongs(name: str, home: str, keys: Keys) -> str:
    if not home:
        return f"`{name}` belongs at the top level, not in `{dotted(keys[:-1])}`."
    return f"`{name}` belongs in the section `{home}`."
