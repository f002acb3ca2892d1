"""`train --dry-run`: everything that can be known before a weight is loaded."""

import itertools
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.chat_template.registry import ChatFormat
from peftchat.console import stdout
from peftchat.dataset.cache import EncodedSplit, load_splits
from peftchat.dataset.encode import EncodingStats
from peftchat.formatting import format_bytes, format_count, format_percent
from peftchat.models.loading import load_config
from peftchat.planning.hardware import own_hardware
from peftchat.planning.make import settings_on
from peftchat.planning.planner import Planner
from peftchat.planning.settings import PlanSettings
from peftchat.planning.workload import Workload, steps_an_epoch, steps_of, workload_of
from peftchat.training.distributed import DistributedSetup
from peftchat.training.model import chat_format

if TYPE_CHECKING:
    from peftchat.recipe import LoadedRecipe, Recipe

_SHOWN_TOKENS = 160


def print_plan(loaded: "LoadedRecipe", placement: DistributedSetup) -> None:
    """Encode the data, count the steps, and show the plan and one row. Trains and writes nothing.

    Raises:
        InputError: whatever training would raise before its first step, short of loading the weights.
    """
    recipe = loaded.recipe
    config = load_config(recipe)
    chat = chat_format(recipe)
    rows = load_splits(recipe, chat)
    workload = workload_of(recipe, chat, rows["train"])
    hardware = own_hardware(placement.processes)
    settings = settings_on(recipe, hardware, workload, placement)
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
        ("steps", _steps(recipe, settings, workload)),
        ("memory", _memory(Planner(config, recipe), settings, hardware.memory)),
        ("output", f"{recipe.output_dir} (nothing is written now)"),
    ):
        table.add_row(name, value)
    stdout.print(table)
    stdout.print()
    stdout.print(_row_text(recipe, chat, rows["train"]))


def _memory(planner: Planner, settings: PlanSettings, room: int) -> str:
    """The predicted peak of each process beside what there is."""
    needed = planner.memory(settings).total
    verdict = "" if needed <= room else ": it does not fit, `peftchat plan` says what would"
    return f"about {format_bytes(needed)} at the peak, of {format_bytes(room)}{verdict}"


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


def _place(placement: DistributedSetup) -> str:
    what = f"{placement.gpus} GPUs here" if placement.gpus else "CPU"
    many = "1 process" if placement.world_size == 1 else f"{placement.world_size} processes"
    return f"{placement.strategy}, {many} ({what})"


def _chat(recipe: "Recipe", chat: ChatFormat) -> str:
    new = ", ".join(f"{token.token} = {token.id}" for token in chat.new_tokens) or "none"
    return f"{recipe.chat.template}, trains {recipe.chat.loss_on}; new tokens: {new}"


def _data(recipe: "Recipe", stats: EncodingStats, name: str) -> list[tuple[str, str]]:
    text = (
        f"{format_count(stats.rows)} rows, {format_count(stats.tokens)} tokens, "
        f"{format_percent(stats.supervised / stats.tokens)} of them supervised"
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


def _steps(recipe: "Recipe", settings: PlanSettings, workload: Workload) -> str:
    """How the rows become optimizer steps."""
    shape = "padded rows"
    if recipe.data.packing:
        length = recipe.data.max_length
        shape = f"packs of {length} ({format_percent(workload.tokens / (workload.sequences * length))} full)"
    steps, an_epoch = steps_of(recipe, workload, settings), steps_an_epoch(workload, settings)
    whole = settings.batch * settings.accumulation * settings.processes
    return f"{steps} ({an_epoch} an epoch) of {whole} {shape}, {workload.sequences} in all"


def _row_text(recipe: "Recipe", chat: ChatFormat, rows: EncodedSplit) -> Text:
    """A row of middling length, what is trained in green."""
    middle = int(np.argsort(rows.store.lengths)[len(rows.store) // 2])
    row = rows.store[middle]
    trained = loss_mask_table(recipe.chat.loss_on)[row.codes]
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
