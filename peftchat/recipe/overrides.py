"""`--set section.key=value`: one value laid over the recipe, parsed as YAML."""

from typing import Any

from peftchat.errors import UserError
from peftchat.recipe.document import Document, Keys, dotted, parse_yaml, plain


def apply_override(document: Document, flag: str) -> None:
    """Put the value of one `--set` flag into `document`.

    Args:
        document: changed in place.
        flag: `a.b.c=YAML`; a whole number steps into a list (`data.train.0.path=x`).

    Raises:
        InputError: the flag is not of that form, its value is not YAML, or its path leads nowhere.
    """
    path, equals, text = flag.partition("=")
    path = path.strip()
    where = f"--set {path}"
    steps = path.split(".")
    if not equals or not all(steps):
        raise UserError(
            "not of the form KEY=VALUE",
            where=f"--set {flag}",
            cure="Write for example `--set training.learning_rate=1e-4`.",
        )
    if steps[0] == "extends":
        raise UserError("`extends` can only stand in a file", where=where, cure="Pass that file instead.")
    keys, holder = _descend(document, steps, where)
    document.forget(keys)
    value, places = plain(parse_yaml(text, where), where, keys=keys, layer=1)
    holder[keys[-1]] = value
    document.places |= places


def _descend(document: Document, steps: list[str], where: str) -> tuple[Keys, Any]:
    """The keys that the steps stand for, and the mapping or list that holds the last of them."""
    keys: Keys = ()
    holder: Any = document.values
    for position, step in enumerate(steps):
        key: str | int = step
        if isinstance(holder, list):
            key = _index(step, holder, keys, where)
        elif not isinstance(holder, dict):
            raise UserError(f"`{dotted(keys)}` holds a single value, not keys", where=where)
        keys = (*keys, key)
        if position == len(steps) - 1:
            break
        if isinstance(holder, dict) and holder.get(step) is None:
            holder[step] = {}
        holder = holder[key]
    return keys, holder


def _index(step: str, holder: list[Any], keys: Keys, where: str) -> int:
    if step.isdecimal() and int(step) < len(holder):
        return int(step)
    raise UserError(
        f"`{dotted(keys)}` is a list of {len(holder)}, and `{step}` is none of its places",
        where=where,
        cure=f"Use a number from 0 to {len(holder) - 1}, or set the whole list.",
    )
