"""The models of the page: a base and its adapters share one set of weights and are switched between answers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from peftchat.console import stderr
from peftchat.errors import UserError, first_line
from peftchat.models.loading import compute_in_float32_if_faster
from peftchat.models.source import LOAD_ERRORS, MISFIT_ERRORS, ModelKind, ModelSource
from peftchat.serving.chat_model import ChatModel, check_vocabulary, load_with_adapter, open_for_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BASE = None
"""The adapter of a base: none."""


@dataclass(frozen=True)
class _Named:
    """A model that passed the checks that need no weights."""

    name: str
    source: ModelSource
    tokenizer: "PreTrainedTokenizerBase"


@dataclass(frozen=True)
class PageModel:
    """One model of the page.

    Attributes:
        name: as the user gave it.
        chat: the model; its weights may be shared, so use it through `LoadedModels.using`.
        shares: whether the weights are shared with another model of the page.
        adapter: of shared weights, PEFT's name of the adapter; None for the base.
    """

    name: str
    chat: ChatModel
    shares: bool = False
    adapter: str | None = _BASE


@dataclass(frozen=True)
class LoadedModels:
    """All models of the page, in the order in which the user named them."""

    models: dict[str, PageModel]
    _lock: Lock = field(default_factory=Lock)

    @property
    def names(self) -> list[str]:
        """What the user named."""
        return list(self.models)

    @contextmanager
    def using(self, name: str) -> Iterator[ChatModel]:
        """Have one model for this thread alone, its adapter switched on; others wait."""
        page_model = self.models[name]
        model: Any = page_model.chat.model
        with self._lock:
            if not page_model.shares:
                yield page_model.chat
            elif page_model.adapter is None:
                with model.disable_adapter():
                    yield page_model.chat
            else:
                model.set_adapter(page_model.adapter, inference_mode=True)
                yield page_model.chat


def open_models(names: Sequence[str], *, base: str | None = None) -> list[_Named]:
    """Check each model without its weights.

    Args:
        names: folders or hub ids.
        base: folder or hub id of the adapters' base; None for the one that each was trained on.

    Raises:
        UserError: there is no such model, it has no chat template, or a name comes twice.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice", where="MODEL", hint="Name each model once.")
    named = []
    for name in names:
        kind = ModelSource.open(name).kind
        source, tokenizer = open_for_chat(name, base=base if kind is ModelKind.ADAPTER else None)
        named.append(_Named(name, source, tokenizer))
    if base is not None and all(one.source.kind is not ModelKind.ADAPTER for one in named):
        raise UserError("no model here needs a base", where=f"--base {base}", hint="Leave the option out.")
    return named


def load_models(named: Sequence[_Named], *, allow_changed: bool = False) -> LoadedModels:
    """Load the models; adapters of one base, and that base, share its weights where PEFT can switch them.

    Args:
        named: from `open_models`.
        allow_changed: load although base, tokenizer or template changed since a run.

    Raises:
        UserError: a model cannot be loaded.
    """
    loaded: dict[str, PageModel] = {}
    for group in _groups(named):
        loaded.update(_load_group(group, allow_changed=allow_changed))
    return LoadedModels({one.name: loaded[one.name] for one in named})


def _groups(named: Sequence[_Named]) -> list[list[_Named]]:
    """Put adapters of one base together, and that base behind them."""
    by_base: dict[tuple[Any, ...], list[_Named]] = {}
    alone: list[_Named] = []
    for one in named:
        key = _sharing_key(one.source)
        if key is None:
            alone.append(one)
        else:
            by_base.setdefault(key, []).append(one)
    for one in [*alone]:
        place = _place_of(one.source)
        key = next((key for key in by_base if key[0] == place), None)
        if key is not None:
            by_base[key].append(one)
            alone.remove(one)
    # The adapter with the most rows decides how far the base's embedding grows.
    groups = [sorted(group, key=_rows_needed, reverse=True) for group in by_base.values()]
    return [*groups, *([one] for one in alone)]


def _sharing_key(source: ModelSource) -> tuple[Any, ...] | None:
    """Return what adapters that share their base have in common; None for a model that shares nothing."""
    from peftchat.models.saving import TOKEN_ROWS

    if source.kind is not ModelKind.ADAPTER or (source.path / TOKEN_ROWS).is_dir():
        return None
    config = _adapter_config(source)
    if config.is_prompt_learning or config.is_adaption_prompt:
        return None
    loaded = source.recipe()
    how = None if loaded is None else (loaded.recipe.model.dtype, str(loaded.recipe.quantization))
    return (_place_of(source.base()), config.peft_type, how)


def _place_of(source: ModelSource) -> tuple[str, str | None]:
    if source.kind is ModelKind.HUB:
        return source.name, source.revision if source.revision != "main" else None
    return os.path.realpath(source.path), None


def _adapter_config(source: ModelSource) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(source.path))
    except LOAD_ERRORS as error:
        raise UserError(f"the adapter's config cannot be read: {first_line(error)}", where=source.where) from error


def _rows_needed(one: _Named) -> int:
    from peftchat.merging.adapter_file import vocabulary_needed

    if one.source.kind is not ModelKind.ADAPTER:
        return -1
    return vocabulary_needed(_adapter_config(one.source), Path(one.source.path))


def _load_group(group: Sequence[_Named], *, allow_changed: bool) -> dict[str, PageModel]:
    first, *others = group
    model: Any = load_with_adapter(first.source, allow_changed=allow_changed)
    check_vocabulary(first.tokenizer, model, first.name)
    compute_in_float32_if_faster(model)
    found = {first.name: PageModel(first.name, _chat_model(first, model))}
    for number, one in enumerate(others, start=1):
        shared = _switched(one, model, f"adapter{number}", allow_changed=allow_changed)
        if shared is None:
            own: Any = load_with_adapter(one.source, allow_changed=allow_changed)
            check_vocabulary(one.tokenizer, own, one.name)
            compute_in_float32_if_faster(own)
            found[one.name] = PageModel(one.name, _chat_model(one, own))
            continue
        found[one.name] = shared
        found[first.name] = replace(found[first.name], shares=True, adapter="default")
    return found


def _switched(one: _Named, model: Any, adapter: str, *, allow_changed: bool) -> PageModel | None:
    """Add a model to loaded weights; None where it cannot share them."""
    from peft.utils.other import TrainableTokensWrapper

    from peftchat.models.base_content import check_run

    base = model.get_base_model()
    if any(getattr(layer, "merged", False) for layer in base.modules()):
        return None
    head = base.get_output_embeddings()
    if getattr(head, "bias", None) is not None and not isinstance(head, TrainableTokensWrapper):
        # Trained tokens of such a head are merged into it, so the base is no longer below them.
        return None
    rows = model.get_input_embeddings().weight.shape[0]
    if one.source.kind is not ModelKind.ADAPTER:
        chat = _chat_model(one, model)
        own_rows = one.source.config().get_text_config().vocab_size
        if own_rows < rows:
            # The rows that the adapter brought are noise without it.
            chat.generation_config.suppress_tokens = [
                *(chat.generation_config.suppress_tokens or []),
                *range(own_rows, rows),
            ]
        return PageModel(one.name, chat, shares=True)
    if _rows_needed(one) > rows or len(one.tokenizer) > rows:
        return None
    check_run(one.source, one.source.base(), allow_changed=allow_changed, exact=False)
    try:
        model.load_adapter(str(one.source.path), adapter_name=adapter)
    except (*LOAD_ERRORS, *MISFIT_ERRORS) as error:
        if adapter in model.peft_config:
            model.delete_adapter(adapter)
        stderr.print(f"{one.name} gets its own copy of the base: {first_line(error)}", markup=False, style="dim")
        return None
    model.eval()
    return PageModel(one.name, _chat_model(one, model), shares=True, adapter=adapter)


def _chat_model(one: _Named, model: Any) -> ChatModel:
    return ChatModel(one.name, model, one.tokenizer, one.source.generation_config())
