"""Held-out loss of a run on a file of conversations, beside its base or other runs, by role, kind, turn and length."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from peftchat.errors import UserError
from peftchat.evaluating.evaluated_model import EvaluatedModel
from peftchat.evaluating.paired import Difference, paired_ratio
from peftchat.files import write_text
from peftchat.formatting import format_count, format_decimal
from peftchat.runs.eval_losses import ConversationLoss, PartLoss, grouped_parts, write_eval_losses

if TYPE_CHECKING:
    from peftchat.chat_template.chat_format import ChatFormat
    from peftchat.dataset.cache import EncodedSplit
    from peftchat.recipe import Recipe

_BATCH = 8
_ALL = "all"


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A group of targets for all models.

    Attributes:
        by: what the groups differ in: `all`, `source`, `role`, `kind`, `turn` or `length`.
        group: which of them.
        conversations: those with a target in it.
        tokens: its targets.
        losses: of each model, in nats per token.
        differences: the first model minus each other one, paired by conversation.
    """

    by: str
    group: str
    conversations: int
    tokens: int
    losses: tuple[float, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class DataLosses:
    """The losses of several models on the same conversations.

    Attributes:
        models: their names, the evaluated one first.
        data: the file.
        rows: the groups.
        conversations: the losses of each model.
    """

    models: tuple[str, ...]
    data: str
    rows: tuple[GroupRow, ...]
    conversations: tuple[tuple[ConversationLoss, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, without single conversations."""
        return {"models": self.models, "data": self.data, "groups": [asdict(row) for row in self.rows]}

    def write(self, folder: Path) -> None:
        """Write `losses.json`, and the losses of each conversation in `losses-N.jsonl`."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(self.conversations, start=1):
            write_eval_losses(folder / f"losses-{number}.jsonl", one)
        write_text(folder / "losses.json", json.dumps(self.as_dict(), indent=2) + "\n")


def data_losses(
    models: Sequence[EvaluatedModel],
    data: Path,
    *,
    limit: int | None = None,
    on_model: Callable[[EvaluatedModel], None] = lambda model: None,
    on_answer: Callable[[int], None] = lambda count: None,
) -> DataLosses:
    """Compute the losses of models on a file of conversations, encoded as the run's training data.

    Args:
        models: a run first; then its base, or other runs with the same tokens.
        data: the file.
        limit: the most conversations.
        on_model: called with each model before it is loaded.
        on_answer: called with the number of examples of each batch.

    Raises:
        UserError: a model is no run, the data cannot be used, or the runs encode it differently.
    """
    encoded = [_encode(model, data, limit) for model in models]
    first = encoded[0][2].store
    for model, (_, _, other) in zip(models, encoded, strict=True):
        same = len(other.store) == len(first) and all(
            np.array_equal(other.store[place].ids, first[place].ids) for place in range(len(first))
        )
        if not same:
            raise UserError(
                "its tokens of the data are other ones, so losses per token cannot be compared",
                where=model.name,
                hint="Compare runs with one tokenizer and chat template.",
            )
    found = []
    for model, (recipe, chat, split) in zip(models, encoded, strict=True):
        on_model(model)
        found.append(tuple(_losses(model, recipe, chat, split, on_answer)))
        gc.collect()
    return DataLosses(tuple(model.name for model in models), str(data), tuple(_rows(found)), tuple(found))


def _encode(model: EvaluatedModel, data: Path, limit: int | None) -> "tuple[Recipe, ChatFormat, EncodedSplit]":
    from peftchat.dataset.cache import load_splits
    from peftchat.models.source import ModelKind
    from peftchat.recipe import DataEntry
    from peftchat.recipe.objectives import PAIR_OBJECTIVES
    from peftchat.training.context import load_chat_format

    if model.recipe is None:
        raise UserError(
            "the model is no run, so nothing says how conversations become its tokens",
            where=model.name,
            hint="Name a run folder.",
        )
    recipe = model.recipe
    base = model.source.base() if model.source.kind is ModelKind.ADAPTER else None
    if base is not None:
        place = recipe.model.model_copy(update={"name": base.name, "revision": base.revision})
        recipe = recipe.model_copy(update={"model": place})
    entries = {"train": (DataEntry(path=str(data)),), "eval": None, "eval_fraction": None, "max_train_samples": limit}
    # A preference run is measured on conversations, or on the chosen answers of pairs, as any other.
    others = {**dict.fromkeys(map(str, PAIR_OBJECTIVES)), "objective": "sft"}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=entries), **others})
    chat = load_chat_format(recipe)
    try:
        return recipe, chat, load_splits(recipe, chat)["train"]
    except UserError as error:
        origin = "" if error.where is None or "data.train" in error.where else f"{error.where}: "
        message = f"{origin}{error.message.replace('data.train: ', '')}"
        raise UserError(message, where=f"--data {data}", hint=error.hint) from error


def _losses(
    model: EvaluatedModel, recipe: "Recipe", chat: "ChatFormat", split: "EncodedSplit", on_answer: Callable[[int], None]
) -> list[ConversationLoss]:
    import torch
    import torch.nn.functional as F

    from peftchat.dataset.collator import IGNORE_INDEX, ChatCollator
    from peftchat.models.added_tokens import resize_embeddings
    from peftchat.training.held_out import HeldOutLosses

    loaded = model.load()
    if model.is_base:
        # As before the first step of training.
        resize_embeddings(loaded, chat.tokenizer, chat.new_tokens, recipe.chat.new_token_init)
    device = loaded.get_input_embeddings().weight.device
    pad = int(chat.tokenizer.pad_token_id)
    collator = ChatCollator(split.store, loss_on=recipe.chat.loss_policy, layout="padded", pad_token_id=pad)
    order = sorted(range(len(split.store)), key=lambda place: -int(split.store.lengths[place]))
    held_out = HeldOutLosses()
    for start in range(0, len(order), _BATCH):
        packs = [{"examples": [place]} for place in order[start : start + _BATCH]]
        batch = collator(packs)
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        with torch.no_grad():
            # Virtual tokens of a prompt adapter have logits in front of those of the text.
            logits = loaded(input_ids=ids, attention_mask=batch["attention_mask"].to(device), use_cache=False).logits
        targets = labels[:, 1:]
        scored = logits[:, -ids.shape[1] : -1][targets != IGNORE_INDEX].float()
        losses = F.cross_entropy(scored, targets[targets != IGNORE_INDEX], reduction="none").double()
        held_out.add(collator.target_cells(packs), losses.cpu().numpy())
        on_answer(len(packs))
    return held_out.conversations(split.store, lambda value: [value])


def _rows(found: Sequence[Sequence[ConversationLoss]]) -> list[GroupRow]:
    groups = [{_ALL: {"": [(number, part) for number, one in enumerate(of_model) for part in one.parts]},
               **grouped_parts(of_model)} for of_model in found]  # fmt: skip
    rows = []
    for by, of_first in groups[0].items():
        if by != _ALL and len(of_first) < 2:
            continue
        for group, parts in of_first.items():
            sizes = _sums(parts, lambda part: part.tokens)
            totals = [_sums(of_model[by][group], lambda part: part.loss) for of_model in groups]
            tokens = int(sum(sizes))
            rows.append(
                GroupRow(
                    by,
                    group,
                    len(sizes),
                    tokens,
                    tuple(sum(total) / tokens for total in totals),
                    tuple(paired_ratio(totals[0], other, [int(size) for size in sizes]) for other in totals[1:]),
                )
            )
    return rows


def _sums(parts: Sequence[tuple[int, PartLoss]], value: Callable[[PartLoss], float]) -> list[float]:
    """Return a sum for each conversation, in order."""
    sums: dict[int, float] = {}
    for number, part in parts:
        sums[number] = sums.get(number, 0.0) + value(part)
    return list(sums.values())


def loss_table(result: DataLosses) -> Table:
    """Return the losses as a table for the terminal."""
    first, *others = result.models
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("targets")
    for name in ("conversations", "tokens", first):
        table.add_column(name, justify="right")
    for name in others:
        for header in (name, "difference", ""):
            table.add_column(header, justify="right")
    for row in result.rows:
        cells = [f"{row.by} {row.group}".strip(), format_count(row.conversations), format_count(row.tokens)]
        cells.append(format_decimal(row.losses[0]))
        for loss, difference in zip(row.losses[1:], row.differences, strict=True):
            cells += [format_decimal(loss), _interval(difference), _verdict(difference)]
        table.add_row(*map(Text, cells))
    return table


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _verdict(difference: Difference) -> str:
    if difference.low is None:
        return "no interval"
    if not difference.excludes_zero:
        return "not told apart"
    return "better" if difference.mean < 0 else "worse"
