"""`train --dry-run`: everything that can be known before a weight is loaded."""

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from peftchat.chatml.mask import policy_table
from peftchat.chatml.packing import efficiency, pack
from peftchat.chatml.registry import ChatFormat
from peftchat.console import output
from peftchat.models.load import load_config
from peftchat.numbers import count, share, size
from peftchat.planning.hardware import own_hardware
from peftchat.planning.make import settings_on
from peftchat.planning.planner import Planner
from peftchat.planning.workload import Workload, read_workload
from peftchat.training.build import chat_format
from peftchat.training.data import Rows, RowStats, prepare_rows
from peftchat.training.placement import Placement

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe

_SHOWN_TOKENS = 160


def print_plan(loaded: "LoadedRecipe", placement: Placement) -> None:
    """Encode the data, count the steps, and show the plan and one row. Trains and writes nothing.

    Raises:
        InputError: whatever training would raise before its first step, short of loading the weights.
    """
    recipe = loaded.recipe
    config = load_config(recipe)
    chat = chat_format(recipe)
    rows = prepare_rows(recipe, chat)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("model", f"{recipe.model.name} ({config.model_type}, {recipe.model.dtype})"),
        ("method", _method(recipe)),
        ("place", _place(placement)),
        ("chat", _chat(recipe, chat)),
        *_data(recipe, rows["train"].stats, "training"),
        *(_data(recipe, rows["eval"].stats, "held out") if "eval" in rows else ()),
        ("steps", _steps(recipe, placement, rows["train"])),
        ("memory", _memory(recipe, placement)),
        ("output", f"{recipe.output_dir} (nothing is written now)"),
    ):
        table.add_row(name, value)
    output.print(table)
    output.print()
    output.print(_row_text(recipe, chat, rows["train"]))


def _memory(recipe: "Recipe", placement: Placement) -> str:
    """The predicted peak of each process beside what there is."""
    hardware = own_hardware(placement.processes)
    workload = read_workload(recipe)
    settings = settings_on(recipe, hardware, workload if isinstance(workload, Workload) else None)
    settings = settings.with_changes(strategy=placement.strategy, processes=placement.world_size)
    memory = Planner(load_config(recipe, need_weights=False), recipe).memory(settings)
    verdict = "" if memory.total <= hardware.memory else ": it does not fit, `peftchat plan` says what would"
    return f"about {size(memory.total)} at the peak, of {size(hardware.memory)}{verdict}"


def _method(recipe: "Recipe") -> str:
    if recipe.adapter is None:
        return "full fine-tuning"
    settings = recipe.adapter.model_dump(exclude={"variant"}, exclude_none=True)
    text = ", ".join(
        [f"{recipe.method}: {recipe.adapter.variant}", *(f"{key} {held}" for key, held in settings.items())]
    )
    if recipe.quantization is not None:
        text += f"; base in {recipe.quantization.bits} bits"
    return text


def _place(placement: Placement) -> str:
    what = f"{placement.gpus} GPUs here" if placement.gpus else "CPU"
    many = "1 process" if placement.world_size == 1 else f"{placement.world_size} processes"
    return f"{placement.strategy}, {many} ({what})"


def _chat(recipe: "Recipe", chat: ChatFormat) -> str:
    new = ", ".join(f"{token.token} = {token.id}" for token in chat.new_tokens) or "none"
    return f"{recipe.chat.template}, trains {recipe.chat.loss_on}; new tokens: {new}"


def _data(recipe: "Recipe", stats: RowStats, name: str) -> list[tuple[str, str]]:
    text = (
        f"{count(stats.rows)} rows, {count(stats.tokens)} tokens, "
        f"{share(stats.supervised / stats.tokens)} of them supervised"
    )
    parts = [f"{number} {reason.replace('_', ' ')}" for reason, number in stats.dropped.items()]
    if parts:
        text += f"; left out: {', '.join(parts)}"
    if stats.shortened:
        text += f"; {stats.shortened} shortened to {recipe.data.max_length} tokens"
    if stats.divided:
        text += f"; {stats.divided} divided into {stats.parts} rows"
    if stats.lookalikes:
        text += f"; {stats.lookalikes} look-alikes of special tokens encoded as text"
    forms = ", ".join(sorted(set(stats.forms.values())))
    return [(name, f"{text} ({forms})" if forms else text)]


def _steps(recipe: "Recipe", placement: Placement, rows: Rows) -> str:
    """How the rows become optimizer steps, as the trainer will count them."""
    training, lengths = recipe.training, rows.store.lengths
    packs, shape = len(rows.store), "padded rows"
    if recipe.data.packing:
        groups = pack(lengths, recipe.data.max_length, training.seed)
        packs = len(groups)
        shape = f"packs of {recipe.data.max_length} ({share(efficiency(groups, lengths, recipe.data.max_length))} full)"
    batch = training.per_device_train_batch_size * placement.world_size
    an_epoch = max(1, math.ceil(math.ceil(packs / batch) / training.gradient_accumulation_steps))
    steps = training.max_steps if training.max_steps > 0 else math.ceil(an_epoch * training.num_train_epochs)
    whole = batch * training.gradient_accumulation_steps
    return f"{steps} ({an_epoch} an epoch) of {whole} {shape}, {packs} in all"


def _row_text(recipe: "Recipe", chat: ChatFormat, rows: Rows) -> Text:
    """A row of middling length, what is trained in green."""
    middle = int(np.argsort(rows.store.lengths)[len(rows.store) // 2])
    row = rows.store[middle]
    trained = policy_table(recipe.chat.loss_on)[row.codes]
    trained[:1] = False
    text = Text(f"A row ({row.source}), trained tokens in green:\n", style="bold")
    for start, stop in _runs(trained[:_SHOWN_TOKENS]):
        piece = chat.tokenizer.decode(row.ids[start:stop].tolist())
        text.append(piece, style="not bold green" if trained[start] else "not bold dim")
    if len(row.ids) > _SHOWN_TOKENS:
        text.append(f" … {len(row.ids) - _SHOWN_TOKENS} more tokens", style="not bold italic")
    return text


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of equal flags."""
    borders = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    return list(itertools.pairwise(borders))
