"""A recipe that begins at a finished run (`model.adapter`): what it takes from that run, and must not change."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftchat.errors import UserError
from peftchat.recipe.document import Document, Keys, SourceLocation
from peftchat.recipe.error_messages import Problem
from peftchat.recipe.schema import Recipe
from peftchat.variants import get_adapter
from peftchat.variants.base import Adapter, Mark

KEY: Keys = ("model", "adapter")

_CHAT = (
    "template", "system", "template_kwargs", "template_date", "end_token", "reasoning_format", "reasoning_history",
    "unsupported_roles", "new_token_init",
)  # fmt: skip
"""What decides the chat template and the tokens that it adds. What is trained may be another in each stage."""

_DATA = ("max_length",)
"""What is taken where the recipe has none, and may differ: the length that the run's positions were trained for."""

_BASE = ("name", "revision", "dtype", "trust_remote_code")
_FREE = frozenset({"dropout"})
"""Keys of `adapter` that neither name nor shape its tensors. Without noise of its own a stage has its own default."""

_LOWEST = -(10**6)
"""The layer of what comes from the run: every key that is written wins over it, and is then compared."""

_MERGE = "Or merge the run with `peftchat merge`, and name the merged model in `model.name` for an adapter of its own."


def recipe_of_run(document: Document, *, needed: bool) -> Path | None:
    """Return the recipe of the run that a document begins at; None if it begins at a base.

    Args:
        document: the recipe.
        needed: whether the run must be there. A finished second stage has all keys in its own recipe.

    Raises:
        UserError: there is no such run.
    """
    folder = document.value(KEY)
    if not isinstance(folder, str) or not folder:
        return None
    is_complete = document.value(("model", "name")) is not None and document.value(("method",)) is not None
    if is_complete and not needed:
        return None
    file = Path(folder) / "recipe.yaml"
    if file.is_file():
        return file
    what, hint = "there is no such run folder", "Give the folder of a finished run of peftchat."
    if (Path(folder) / "adapter_config.json").is_file():
        what = "expected a run of peftchat, got an adapter without recipe.yaml, which does not name its chat template"
        hint = "Merge it with `peftchat merge`, and name the merged model in `model.name`."
    elif Path(folder).exists():
        what = "expected a run folder, and this one has no recipe.yaml" if Path(folder).is_dir() else "this is a file"
    raise UserError(what, where=_where(document, KEY), hint=hint)


def take_from_run(document: Document, run: Recipe, values: Mapping[str, Any], file: Path) -> None:
    """Fill in what a document leaves open and its run determines: base, method, adapter, template, longest example.

    Args:
        document: changed in place.
        run: the run's recipe.
        values: the same as plain values.
        file: where it stands.

    Raises:
        UserError: another method or variant than the run's.
    """
    method = document.value(("method",))
    if run.method == "full":
        what = "this run trained every weight, so its folder is a model and holds no adapter"
        hint = f"Write `model: {{name: {file.parent}}}` instead."
        raise UserError(what, where=_where(document, KEY), hint=hint)
    if method not in (None, "full", run.method) and method in ("lora", "qlora"):
        what = (
            f"the run that it begins at was trained with `method: {run.method}`, got `{method}`: its adapter belongs "
        )
        what += "to a quantized base" if run.method == "qlora" else "to a base that is not quantized"
        hint = f"Remove the key, or write `full`, which merges the adapter first. {_MERGE}"
        raise UserError(what, where=_where(document, ("method",)), hint=hint)
    _fill(document, values, "model", _keys_of_base(document), file)
    if method is None:
        _put(document, ("method",), run.method, file)
    if document.value(("method",)) != "full" and run.adapter is not None:
        _check_variant(document, run.adapter)
        _fill(document, values, "adapter", [key for key in values["adapter"] if key not in _FREE], file)
        _fill(document, values, "quantization", tuple(values.get("quantization", ())), file)
    _fill(document, values, "chat", _CHAT, file)
    _fill(document, values, "data", _DATA, file)


def changes_of_run(recipe: Recipe, run: Recipe) -> Iterator[Problem]:
    """Return what a recipe has otherwise than the run that it begins at, and must not."""
    for key in _CHAT:
        now, then = getattr(recipe.chat, key), getattr(run.chat, key)
        if now != then:
            what = f"the run that it begins at has `{_word(then)}`, got `{_word(now)}`: the chat template is the run's"
            yield Problem(("chat", key), what, "Remove the key.")
    if recipe.method == "full" or recipe.adapter is None or run.adapter is None:
        return
    for key in recipe.adapter.setting_names():
        if key in _FREE or recipe.adapter.has_mark(key, Mark.NOT_IN_CONFIG):
            continue
        now, then = getattr(recipe.adapter, key), getattr(run.adapter, key)
        if now != then:
            what = f"the run that it begins at has `{_word(then)}`, got `{_word(now)}`: its adapter goes on as it is"
            yield Problem(("adapter", key), what, f"Remove the key. {_MERGE}")
    if recipe.quantization != run.quantization:
        what = "the base that the run was trained on is quantized in another way"
        yield Problem(("quantization",), what, f"Remove the section. {_MERGE}")


def _keys_of_base(document: Document) -> tuple[str, ...]:
    # A base of another name has a revision and code of its own; its content is compared when it is opened.
    return _BASE if document.value(("model", "name")) is None else ("dtype",)


def _check_variant(document: Document, adapter: Adapter) -> None:
    given = document.value(("adapter", "variant"))
    variant = get_adapter(given) if isinstance(given, str) else None
    if variant is not None and variant.name != adapter.name:
        what = f"the run that it begins at has an adapter of the variant `{adapter.name}`, which cannot go on as "
        hint = f"Remove the key. {_MERGE}"
        raise UserError(f"{what}`{variant.name}`", where=_where(document, ("adapter", "variant")), hint=hint)


def _fill(document: Document, values: Mapping[str, Any], section: str, keys: Any, file: Path) -> None:
    """Put values of the run into a section, where it has none."""
    held = values.get(section, {})
    for key in keys:
        if key in held and document.value((section, key)) is None:
            _put(document, (section, key), held[key], file)


def _put(document: Document, keys: Keys, value: Any, file: Path) -> None:
    holder: Any = document.values
    for step in keys[:-1]:
        if holder.get(step) is None:
            holder[step] = {}
        holder = holder[step]
    if isinstance(holder, dict):
        holder[keys[-1]] = value
        document.places[keys] = SourceLocation(str(file), file=file, layer=_LOWEST)


def _where(document: Document, keys: Keys) -> str:
    return f"{document.place(keys).of(keys)}: {document.value(keys)}"


def _word(value: object) -> str:
    return "null" if value is None else str(value)
