"""A plan as people read it, and as programs do."""

import itertools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.console import stdout
from peftchat.dataset.cache import EncodedSplit, load_splits
from peftchat.dataset.encode import EncodingStats
from peftchat.formatting import format_bytes, format_count, format_duration, format_percent, format_short_count
from peftchat.models.source import ModelSource
from peftchat.planning.hardware import this_machine
from peftchat.planning.memory import PARTS
from peftchat.planning.planner import Planner
from peftchat.planning.settings import (
    DatasetSize,
    PlanSettings,
    dataset_size_of,
    settings_on,
    steps_of,
    steps_per_epoch,
)
from peftchat.training.distributed import DistributedSetup
from peftchat.training.model import chat_format

if TYPE_CHECKING:
    from peftchat.planning.measure import MeasuredRun
    from peftchat.planning.plan import TrainingPlan
    from peftchat.planning.planner import Change, GridCell
    from peftchat.recipe import LoadedRecipe, Recipe


_GIB = 2**30
_MOMENTS = {
    "loading": "loading",
    "forward": "the end of the forward pass",
    "backward": "the backward pass",
    "step": "the optimizer's step",
}
_MEANING = {
    "weights": "the base model",
    "adapter": "what is trained beside it",
    "gradients": "of what is trained",
    "optimizer": "its states, and float32 masters",
    "activations": "kept for the backward pass",
    "logits": "head and loss",
    "buffers": "communication, gathered weights, work space",
    "framework": "libraries and kernels",
    "fragmentation": "lost between allocations",
}


def gib(value: float) -> str:
    """Bytes as people compare them with a card: `7.4 GiB`, `0.03 GiB`."""
    amount = value / _GIB
    return f"{amount:.1f} GiB" if amount >= 1 else f"{amount:.2f} GiB"


def print_plan(plan: "TrainingPlan", console: Console) -> None:
    """The verdict, memory by part, what fits, what would make it fit, other ways, time and cost."""
    console.print(_verdict(plan), soft_wrap=False)
    console.print(_facts(plan))
    console.print(_parts(plan))
    if plan.changes:
        console.print(_changes(plan))
    if plan.grid:
        console.print(_grid(plan))
    for line in _notes(plan):
        console.print(Text.assemble(("note: ", "yellow"), line), soft_wrap=False)


def _verdict(plan: "TrainingPlan") -> Text:
    room = plan.hardware.memory
    left = room - plan.memory.total
    if plan.fits:
        return Text(f"It fits: {gib(plan.memory.total)} of {gib(room)}, {gib(left)} to spare.", style="bold green")
    text = f"It does not fit: {gib(plan.memory.total)} needed, {gib(room)} there."
    if plan.cheapest is not None:
        flags = " ".join(f"--set {flag}" for flag in plan.cheapest.flags)
        text += f" The cheapest way: {plan.cheapest.name} ({gib(plan.cheapest.memory.total)}), {flags}"
    else:
        text += " Nothing that peftchat knows makes it fit."
    return Text(text, style="bold red")


def _facts(plan: "TrainingPlan") -> Table:
    table = _two_columns()
    facts, trained = plan.facts, plan.trained
    tie = "tied head" if facts.tied else "untied head"
    shape = f"{facts.layers} layers of width {facts.hidden}, {facts.heads} heads ({facts.key_value_heads} for keys)"
    table.add_row("model", f"{plan.model}: {format_short_count(facts.parameters)} parameters; {shape}")
    table.add_row(
        "", f"embedding {format_short_count(facts.embedding)} ({tie}), "
            f"linear layers {format_short_count(facts.linear)}, "
        f"the rest {format_short_count(facts.other)}",
    )  # fmt: skip
    weights = trained.parameters + trained.rows
    table.add_row(
        "trained",
        f"{format_short_count(weights)} parameters, {format_percent(weights / facts.parameters)} of the model",
    )
    table.add_row("settings", _settings(plan.settings))
    table.add_row("place", f"{plan.hardware.count} x {plan.hardware.label}, {gib(plan.hardware.memory)} each")
    if plan.workload is not None:
        work = plan.workload
        table.add_row(
            "data", f"{format_count(work.sequences)} sequences, "
                f"{format_short_count(work.tokens)} tokens an epoch, the longest "
            f"{format_count(work.longest)}, {format_percent(work.supervised)} supervised",
        )  # fmt: skip
    if plan.cost is not None:
        table.add_row("time", _cost(plan))
    table.add_row("fits", _largest(plan))
    return table


def _settings(settings: "PlanSettings") -> str:
    bits = "" if settings.bits is None else f", base in {settings.bits} bits"
    kept = "checkpointing" if settings.checkpointing else "no checkpointing"
    return (
        f"{settings.method}{bits}, {settings.strategy}, {settings.batch} x {settings.length} tokens, "
        f"{settings.accumulation} accumulated, {kept}, {settings.optimizer}, {settings.attention} attention"
    )


def _cost(plan: "TrainingPlan") -> str:
    cost = plan.cost
    assert cost is not None
    money = "" if cost.money is None else f", {cost.money:,.2f} at the given price"
    work = f"{format_count(cost.steps)} steps and {format_short_count(cost.tokens)} tokens"
    return f"about {format_duration(cost.seconds)}{money}, for {work}"


def _largest(plan: "TrainingPlan") -> str:
    if not plan.largest_batch:
        return f"not even one row of {plan.settings.length} tokens"
    longest = f"rows of {format_count(plan.largest_length)} tokens at a batch of {plan.settings.batch}"
    return f"up to {format_count(plan.largest_batch)} rows of {plan.settings.length} tokens at once, or {longest}"


def _parts(plan: "TrainingPlan") -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("memory of each device")
    table.add_column("GiB", justify="right")
    table.add_column("", style="dim")
    memory = plan.memory
    for part in PARTS:
        if memory.parts[part]:
            table.add_row(part, f"{memory.parts[part] / _GIB:.2f}", _MEANING[part])
    table.add_section()
    table.add_row("together", f"{memory.total / _GIB:.2f}", f"the peak, at {_MOMENTS[memory.moment]}", style="bold")
    if memory.host:
        table.add_row("main memory", f"{memory.host / _GIB:.2f}", "of each process, by offloading")
    return table


def _changes(plan: "TrainingPlan") -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("to save memory, the cheapest first")
    table.add_column("GiB", justify="right")
    table.add_column("fits")
    table.add_column("costs")
    table.add_column("write", overflow="fold")
    chosen = [] if plan.cheapest is None or plan.cheapest in plan.changes else [plan.cheapest]
    for change in [*plan.changes, *chosen]:
        fits = change.memory.total <= plan.hardware.memory
        flags = " ".join(f"--set {flag}" for flag in change.flags)
        table.add_row(change.name, f"{change.memory.total / _GIB:.2f}", _yes(fits), change.costs, flags)
    return table


def _grid(plan: "TrainingPlan") -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("method")
    table.add_column("shared by")
    for title in ("GiB", "rows that fit", "GiB, checkpointing", "rows that fit"):
        table.add_column(title, justify="right")
    for plain, checkpointed in zip(plan.grid[::2], plan.grid[1::2], strict=True):
        settings = plain.settings
        name = settings.method if settings.bits is None else f"{settings.method}, {settings.bits} bits"
        table.add_row(name, settings.strategy, *_cell(plain), *_cell(checkpointed))
    return table


def _cell(cell: "GridCell") -> tuple[Text, Text]:
    style = "green" if cell.fits else "red"
    return Text(f"{cell.peak / _GIB:.1f}", style=style), Text(
        format_count(cell.largest_batch) if cell.largest_batch else "none"
    )


def _yes(fits: bool) -> Text:
    return Text("yes", style="green") if fits else Text("no", style="red")


def _notes(plan: "TrainingPlan") -> list[str]:
    told = [f"Chosen, {choice}." for choice in plan.chosen]
    if plan.unread is not None:
        told.append(
            f"The data was not read ({plan.unread}): rows of {plan.settings.length} tokens, "
            f"{format_percent(plan.settings.supervised)} of them supervised, are assumed."
        )
    if plan.estimated:
        told.append("This architecture cannot be traced: its activations are a rule of thumb.")
    if not plan.hardware.bf16 and plan.settings.dtype == "bfloat16":
        told.append(f"{plan.hardware.label} does not compute in bfloat16: set model.dtype to float16.")
    if plan.cost is not None:
        told.append(f"The time assumes {'; '.join(plan.cost.assumptions)}.")
    return told


def print_measured(plan: "TrainingPlan", probe: "MeasuredRun", console: Console) -> None:
    """What was measured beside what was predicted."""
    predicted = plan.memory.total if plan.settings.device == "cpu" else plan.memory.allocated
    error = predicted / probe.peak - 1
    style = "green" if abs(error) <= 0.15 else "yellow"
    console.print(
        Text(
            f"Probe: {gib(probe.peak)} measured, {gib(predicted)} predicted ({error:+.0%}); "
            f"{format_duration(probe.seconds)} a step of {plan.settings.batch} x {plan.settings.length} tokens.",
            style=style,
        ),
        soft_wrap=False,
    )


def as_data(plan: "TrainingPlan", probe: "MeasuredRun | None") -> dict[str, Any]:
    """The plan as JSON knows it; sizes in bytes."""
    return {
        "model": plan.model,
        "fits": plan.fits,
        "memory": _memory(plan.memory),
        "room": plan.hardware.memory,
        "hardware": asdict(plan.hardware),
        "settings": asdict(plan.settings),
        "parameters": {**asdict(plan.facts), "all": plan.facts.parameters},
        "trained": asdict(plan.trained),
        "largest_batch": plan.largest_batch,
        "largest_length": plan.largest_length,
        "changes": [_change(change, plan.hardware.memory) for change in plan.changes],
        "cheapest_change": None if plan.cheapest is None else _change(plan.cheapest, plan.hardware.memory),
        "grid": [
            {"settings": asdict(cell.settings), "peak": cell.peak, "fits": cell.fits,
             "largest_batch": cell.largest_batch}
            for cell in plan.grid
        ],
        "cost": None if plan.cost is None else asdict(plan.cost),
        "workload": None if plan.workload is None else asdict(plan.workload),
        "estimated": plan.estimated,
        "chosen": list(plan.chosen),
        "probe": None if probe is None else asdict(probe),
    }  # fmt: skip


def _memory(memory: Any) -> dict[str, Any]:
    return {"total": memory.total, "allocated": memory.allocated, **asdict(memory)}


def _change(change: "Change", room: int) -> dict[str, Any]:
    return {
        "name": change.name,
        "costs": change.costs,
        "set": list(change.flags),
        "peak": change.memory.total,
        "fits": change.memory.total <= room,
    }


def _two_columns() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table


_SHOWN_TOKENS = 160


def print_dry_run(loaded: "LoadedRecipe", placement: DistributedSetup) -> None:
    """Encode the data, count the steps, and show the plan and one row. Trains and writes nothing.

    Raises:
        UserError: whatever training would raise before its first step, short of loading the weights.
    """
    recipe = loaded.recipe
    source = ModelSource.of_recipe(recipe)
    source.check_weights()
    config = source.config()
    chat = chat_format(recipe)
    rows = load_splits(recipe, chat)
    workload = dataset_size_of(recipe, chat, rows["train"])
    hardware = this_machine(placement.processes)
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
        ("memory", _memory_line(Planner(config, recipe), settings, hardware.memory)),
        ("output", f"{recipe.output_dir} (nothing is written now)"),
    ):
        table.add_row(name, value)
    stdout.print(table)
    stdout.print()
    stdout.print(_row_text(recipe, chat, rows["train"]))


def _memory_line(planner: Planner, settings: PlanSettings, room: int) -> str:
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


def _steps(recipe: "Recipe", settings: PlanSettings, workload: DatasetSize) -> str:
    """How the rows become optimizer steps."""
    shape = "padded rows"
    if recipe.data.packing:
        length = recipe.data.max_length
        shape = f"packs of {length} ({format_percent(workload.tokens / (workload.sequences * length))} full)"
    steps, an_epoch = steps_of(recipe, workload, settings), steps_per_epoch(workload, settings)
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
