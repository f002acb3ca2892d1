"""What adapters must have in common to be combined: base, added tokens, chat template."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from peftchat.errors import UserError, first_line
from peftchat.merging.adapter_source import AdapterSource
from peftchat.models.base_content import base_content, check_run
from peftchat.models.source import ModelKind, ModelSource, read_json

_TEMPLATE = "chat_template.jinja"
_TOKENIZER = "tokenizer.json"


def open_inputs(folders: Sequence[Path], base: str | None = None) -> list[AdapterSource]:
    """Open the adapters to combine, and check that they fit together.

    Args:
        folders: run folders, or folders with a PEFT adapter.
        base: folder or hub id of their base; None for the one that each was trained on.

    Raises:
        UserError: there are fewer than two, one is named twice or cannot be used, or they do not fit together. One
            message names every difference.
    """
    if len(folders) < 2:
        raise UserError("one adapter, expected two or more to combine", where="--combine", hint="Name another run.")
    seen: dict[str, Path] = {}
    for folder in folders:
        real = os.path.realpath(folder)
        if real in seen:
            hint = "Name each once, and say with --weights how much it counts."
            raise UserError("the adapter is named twice", where=str(folder), hint=hint)
        seen[real] = folder
    sources = [AdapterSource.open(folder, base) for folder in folders]
    first = sources[0]
    differences = []
    for other in sources[1:]:
        found = [
            *(_base_difference(first.base, other.base) if base is None else []),
            *_token_difference(first, other),
            *_template_difference(first.model.path, other.model.path),
        ]
        if found:
            differences.append(f"{other.model.name} has {' and '.join(found)}")
    if differences:
        raise UserError(
            f"the adapters do not fit together: compared with {first.model.name}, {'; '.join(differences)}",
            where="--combine",
            hint="Combine adapters of one base, with the same added tokens and chat template.",
        )
    return sources


def overlaps(folders: Sequence[Path]) -> list[str]:
    """Return a sentence for each run that begins at another one of the runs: it holds the update of both."""
    begins = {folder: _first_stage(folder) for folder in folders}
    return [
        f"{folder} begins at {other} (model.adapter), so the update of {other} counts in both."
        for folder, start in begins.items()
        for other in folders
        if start is not None and start == os.path.realpath(other)
    ]


def _first_stage(folder: Path) -> str | None:
    """Return the real path of the run that a run begins at; None where it begins at its base."""
    loaded = ModelSource.open(str(folder), local=True).recipe()
    start = None if loaded is None else loaded.recipe.model.adapter
    return None if start is None else os.path.realpath(start)


def check_weights_given(weights: Sequence[float] | None, count: int) -> None:
    """Check the user's weights.

    Raises:
        UserError: there are more or fewer than adapters, or one is not a finite number, or all are 0.
    """
    if weights is None:
        return
    if len(weights) != count:
        what = f"{len(weights)} weight{'' if len(weights) == 1 else 's'} for {count} adapters"
        raise UserError(what, where="--weights", hint="Give one for each, in their order, as 0.7,0.3.")
    bad = next((weight for weight in weights if not math.isfinite(weight)), None)
    if bad is not None:
        raise UserError(f"{bad} is not a finite number", where="--weights")
    if not any(weights):
        raise UserError("all weights are 0, so nothing of the adapters is left", where="--weights")


def check_content(sources: Sequence[AdapterSource], *, allow_changed: bool) -> tuple[str, ...]:
    """Check that every run but the first was trained on the base of the first, as it is now.

    Returns:
        What changed, and was allowed.

    Raises:
        UserError: something changed.
    """
    changes: list[str] = []
    for other in sources[1:]:
        found = check_run(other.model, sources[0].base, allow_changed=allow_changed, exact=True)
        changes += [f"{other.model.name}: {change}" for change in found]
    return tuple(changes)


def _base_difference(one: ModelSource, other: ModelSource) -> list[str]:
    if (one.name, one.revision) == (other.name, other.revision):
        return []
    if ModelKind.HUB not in (one.kind, other.kind) and os.path.realpath(one.path) == os.path.realpath(other.path):
        return []
    contents = [base_content(base, exact=True) for base in (one, other)]
    if contents[0].base and contents[0].base == contents[1].base:
        return []
    revisions = [f" at {base.revision}" if base.revision else "" for base in (one, other)]
    return [f"another base ({other.name}{revisions[1]}, not {one.name}{revisions[0]})"]


def _token_difference(one: AdapterSource, other: AdapterSource) -> list[str]:
    tokens = [_added_tokens(source) for source in (one, other)]
    if None in tokens or tokens[0] == tokens[1]:
        return []
    first, second = (found or {} for found in tokens)
    differing = sorted(index for index in {*first, *second} if first.get(index) != second.get(index))
    shown = f"{second.get(differing[0], 'no token')!r}, not {first.get(differing[0], 'no token')!r}"
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return [f"other added tokens (id {differing[0]} is {shown}{more})"]


def _added_tokens(source: AdapterSource) -> dict[int, str] | None:
    """Return the added tokens of an adapter, by id; None if they are not known.

    An adapter without a tokenizer was trained with the base's.
    """
    folders = [source.model.path, *([source.base.path] if source.base.kind is not ModelKind.HUB else [])]
    file = next((file for folder in folders if (file := folder / _TOKENIZER).is_file()), None)
    if file is None:
        return None
    tokens = read_json(file).get("added_tokens") or []
    return {int(token["id"]): str(token["content"]) for token in tokens}


def _template_difference(one: Path, other: Path) -> list[str]:
    templates = [_template(folder) for folder in (one, other)]
    return [] if None in templates or templates[0] == templates[1] else ["another chat template"]


def _template(folder: Path) -> str | None:
    file = folder / _TEMPLATE
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"the file cannot be read: {first_line(error)}", where=str(file)) from error
    settings = folder / "tokenizer_config.json"
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    return found.strip() if isinstance(found, str) else None
