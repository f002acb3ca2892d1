"""Plan report: a plan on the terminal, as JSON, and in the summary of a dry run."""

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
from peftchat.dataset.cache import EncodedSplit, Split, load_splits
from peftchat.dataset.encode import EncodingStats
from peftchat.dataset.mixture import data_notes
from peftchat.formatting import format_bytes, format_count, format_duration, format_percent, format_short_count
from peftchat.models.source import ModelSource
from peftchat.planning.hardware import this_machine
from peftchat.planning.memory import PARTS
from peftchat.planning.plan import planned_hints
from peftchat.planning.planner import Planner, pair_layout
from peftchat.planning.settings import (
    DatasetSize,
    PlanSettings,
    dataset_size,
    settings_for,
    steps_per_epoch,
    total_steps,
)
from peftchat.training.context import load_chat_format
from peftchat.training.distributed import DistributedSetup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftchat.planning.measure import MeasuredRun
    from peftchat.planning.memory import MemoryPlan
    from peftchat.planning.parameter_counts import ParameterCounts, TrainableCounts
    from peftchat.planning.plan import TrainingPlan
    from peftchat.planning.planner import Change, GridCell
    from peftchat.recipe import LoadedRecipe, Recipe


_GIB = 2**30
_PHASES = {
    "loading": "loading",
    "forward": "the end of the forward pass",
    "backward": "the backward pass",
    "step": "the optimizer step",
}
_PART_DESCRIPTIONS = {
    "weights": "the base model",
    "adapter": "the adapter and added tokens",
    "gradients": "of the trainable weights",
    "optimizer": "optimizer states and float32 master weights",
    "activations": "saved for the backward pass",
    "logits": "LM head and loss",
    "buffers": "communication, gathered weights, work space",
    "framework": "libraries and kernels",
    "fragmentation": "lost between allocations",
}
_MAX_PROBE_ERROR = 0.15
_MAX_TOKENS_SHOWN = 160


def format_gib(value: float) -> str:
    """Format bytes in the unit of GPU memory: `7.4 GiB`, `0.03 GiB`."""
    amount = value / _GIB
    return f"{amount:.1f} GiB" if amount >= 1 else f"{amount:.2f} GiB"


def print_plan(plan: "TrainingPlan", console: Console) -> None:
    """Print the plan: fit, memory by part, changes, alternatives, time and cost."""
    console.print(_headline(plan), soft_wrap=False)
    console.print(_overview(plan))
    console.print(_memory_table(plan.memory))
    if plan.changes:
        console.print(_changes_table(plan))
    if plan.grid:
        console.print(_grid_table(plan.grid))
    for note in _notes(plan):
        console.print(Text.assemble(("note: ", "yellow"), note), soft_wrap=False)
    for hint in plan.hints:
        console.print(Text.assemble(("hint: ", "cyan"), hint), soft_wrap=False)


def _headline(plan: "TrainingPlan") -> Text:
    needed, available = plan.memory.total, plan.hardware.memory
    if plan.fits:
        spare = format_gib(available - needed)
        return Text(f"It fits: {format_gib(needed)} of {format_gib(available)}, {spare} to spare.", style="bold green")
    text = f"It does not fit: {format_gib(needed)} needed, {format_gib(available)} available."
    if plan.cheapest_fix is not None:
        fix = plan.cheapest_fix
        text += f" The cheapest fix is {fix.name} ({format_gib(fix.memory.total)}): {_set_options(fix)}"
    else:
        text += " No change that peftchat supports makes it fit."
    return Text(text, style="bold red")


def _heads_text(counts: "ParameterCounts") -> str:
    if not counts.num_heads:
        return "no attention"
    return f"{counts.num_heads} heads ({counts.num_key_value_heads} for keys)"


def _overview(plan: "TrainingPlan") -> Table:
    counts, hardware = plan.counts, plan.hardware
    tie = "tied head" if counts.tied_head else "untied head"
    trainable = plan.trainable.parameters + plan.trainable.new_token_parameters
    rows = [
        (
            "model",
            f"{plan.model}: {format_short_count(counts.parameters)} parameters; {counts.num_layers} layers of width "
            f"{counts.hidden_size}, {_heads_text(counts)}",
        ),
        (
            "",
            f"embedding {format_short_count(counts.embedding)} ({tie}), linear layers "
            f"{format_short_count(counts.linear)}, {_experts_text(counts)}other {format_short_count(counts.other)}",
        ),
        (
            "trainable",
            f"{format_short_count(trainable)} parameters, {format_percent(trainable / counts.parameters)} of the model"
            + _active_text(counts, plan.trainable),
        ),
        *([("", _modules_text(plan.trainable))] if counts.experts and plan.settings.method != "full" else ()),
        ("settings", _settings_text(plan.settings)),
        ("hardware", f"{hardware.count} x {hardware.label}, {format_gib(hardware.memory)} each"),
    ]
    if plan.dataset is not None:
        rows.append(("data", _dataset_text(plan.dataset, plan.settings)))
    if plan.cost is not None:
        rows.append(("time", _cost_text(plan)))
    rows.append(("fits", _largest_text(plan)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _experts_text(counts: "ParameterCounts") -> str:
    if not counts.experts:
        return ""
    return (
        f"experts {format_short_count(counts.experts)} ({format_short_count(counts.active_experts)} active), "
        f"{format_short_count(counts.active)} active per token in all, "
    )


def _active_text(counts: "ParameterCounts", trainable: "TrainableCounts") -> str:
    if not counts.experts:
        return ""
    share = format_percent(trainable.active / counts.active)
    return f"; {format_short_count(trainable.active)} active per token, {share} of the active ones"


def _modules_text(trainable: "TrainableCounts") -> str:
    """Return the kinds of trained modules with their number and weights."""
    return ", ".join(
        f"{count} x {kind} ({format_short_count(weights)})" for kind, (count, weights) in trainable.modules.items()
    )


def _settings_text(settings: "PlanSettings") -> str:
    bits = "" if settings.bits is None else f", base model in {settings.bits} bits"
    checkpointing = "checkpointing" if settings.checkpointing else "no checkpointing"
    return (
        f"{settings.method}{bits}, {settings.strategy}, {settings.pass_text}, "
        f"{settings.accumulation} accumulated, {checkpointing}, {settings.optimizer}, {settings.attention} attention"
    )


def _dataset_text(dataset: DatasetSize, settings: "PlanSettings") -> str:
    longest = f"at most {format_count(settings.rows * dataset.longest)} per {settings.unit.removesuffix('s')}"
    return (
        f"{format_count(dataset.sequences)} {settings.unit}, {format_short_count(dataset.tokens)} tokens per epoch, "
        f"{longest}, {format_percent(dataset.supervised)} supervised"
    )


def _cost_text(plan: "TrainingPlan") -> str:
    cost = plan.cost
    assert cost is not None
    money = "" if cost.money is None else f" and {cost.money:,.2f} at the given price"
    work = f"{format_count(cost.steps)} steps and {format_short_count(cost.tokens)} tokens"
    return f"about {format_duration(cost.seconds)}{money}, for {work}"


def _largest_text(plan: "TrainingPlan") -> str:
    settings = plan.settings
    if not plan.largest_batch:
        return f"not even a batch of {settings.with_changes(batch=1).pass_text}"
    longest = settings.with_changes(length=plan.largest_length).pass_text
    return f"batches of up to {settings.with_changes(batch=plan.largest_batch).pass_text}, or {longest}"


def _memory_table(memory: "MemoryPlan") -> Table:
    table = _table("memory per device", "GiB")
    table.add_column("", style="dim")
    for part in PARTS:
        if memory.parts[part]:
            table.add_row(part, f"{memory.parts[part] / _GIB:.2f}", _PART_DESCRIPTIONS[part])
    table.add_section()
    table.add_row("total", f"{memory.total / _GIB:.2f}", f"the peak, in {_PHASES[memory.peak_phase]}", style="bold")
    if memory.host:
        table.add_row("RAM", f"{memory.host / _GIB:.2f}", "per process, by offloading")
    return table


def _changes_table(plan: "TrainingPlan") -> Table:
    table = _table("to save memory, the cheapest first", "GiB")
    table.add_column("fits")
    table.add_column("costs")
    table.add_column("options", overflow="fold")
    fix = [] if plan.cheapest_fix is None or plan.cheapest_fix in plan.changes else [plan.cheapest_fix]
    for change in [*plan.changes, *fix]:
        fits = change.memory.total <= plan.hardware.memory
        answer = Text("yes", style="green") if fits else Text("no", style="red")
        table.add_row(change.name, f"{change.memory.total / _GIB:.2f}", answer, change.costs, _set_options(change))
    return table


def _grid_table(grid: "Sequence[GridCell]") -> Table:
    table = _table("method")
    table.add_column("strategy")
    for title in ("GiB", "largest batch", "GiB, checkpointing", "largest batch"):
        table.add_column(title, justify="right")
    for plain, checkpointed in zip(grid[::2], grid[1::2], strict=True):
        settings = plain.settings
        name = settings.method if settings.bits is None else f"{settings.method}, {settings.bits} bits"
        table.add_row(name, settings.strategy, *_grid_cell(plain), *_grid_cell(checkpointed))
    return table


def _grid_cell(cell: "GridCell") -> tuple[Text, Text]:
    peak = Text(f"{cell.peak_bytes / _GIB:.1f}", style="green" if cell.fits else "red")
    return peak, Text(format_count(cell.largest_batch) if cell.largest_batch else "none")


def _notes(plan: "TrainingPlan") -> list[str]:
    notes = [f"Chosen automatically: {setting}." for setting in plan.auto_settings]
    notes += plan.dataset.notes if plan.dataset is not None else ()
    if plan.unread_reason is not None:
        settings = plan.settings
        notes.append(
            f"The data was not read ({plan.unread_reason}). The plan assumes {settings.unit} of "
            f"{settings.rows * settings.length} tokens, {format_percent(settings.supervised)} of them supervised."
        )
    notes += plan.trainable.notes
    if plan.estimated:
        notes.append("This architecture cannot be traced; its activations are an analytical estimate.")
    if not plan.hardware.bf16 and plan.settings.dtype == "bfloat16":
        notes.append(f"{plan.hardware.label} does not support bfloat16; set model.dtype to float16.")
    if plan.cost is not None:
        notes.append(f"Assumptions of the time: {'; '.join(plan.cost.assumptions)}.")
    return notes


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column(first)
    for title in numbers:
        table.add_column(title, justify="right")
    return table


def _set_options(change: "Change") -> str:
    return " ".join(f"--set {flag}" for flag in change.flags)


def print_measured(plan: "TrainingPlan", probe: "MeasuredRun", console: Console) -> None:
    """Print the measured memory and time next to the predicted memory."""
    predicted = plan.memory.total if plan.settings.device == "cpu" else plan.memory.allocated
    error = predicted / probe.peak_bytes - 1
    text = (
        f"Probe: {format_gib(probe.peak_bytes)} measured, {format_gib(predicted)} predicted ({error:+.0%}); "
        f"{format_duration(probe.seconds)} per step of {plan.settings.pass_text}."
    )
    console.print(Text(text, style="green" if abs(error) <= _MAX_PROBE_ERROR else "yellow"), soft_wrap=False)


def as_json(plan: "TrainingPlan", probe: "MeasuredRun | None") -> dict[str, Any]:
    """Return the plan as plain values for JSON; sizes are in bytes."""
    device_memory = plan.hardware.memory
    return {
        "model": plan.model,
        "fits": plan.fits,
        "memory": {"total": plan.memory.total, "allocated": plan.memory.allocated, **asdict(plan.memory)},
        "device_memory": device_memory,
        "hardware": asdict(plan.hardware),
        "settings": asdict(plan.settings),
        "parameters": {**asdict(plan.counts), "all": plan.counts.parameters},
        "trainable": asdict(plan.trainable),
        "largest_batch": plan.largest_batch,
        "largest_length": plan.largest_length,
        "changes": [_change_json(change, device_memory) for change in plan.changes],
        "cheapest_fix": None if plan.cheapest_fix is None else _change_json(plan.cheapest_fix, device_memory),
        "grid": [asdict(cell) for cell in plan.grid],
        "cost": None if plan.cost is None else asdict(plan.cost),
        "dataset": None if plan.dataset is None else asdict(plan.dataset),
        "estimated": plan.estimated,
        "auto_settings": list(plan.auto_settings),
        "hints": list(plan.hints),
        "probe": None if probe is None else asdict(probe),
    }


def _change_json(change: "Change", device_memory: int) -> dict[str, Any]:
    return {
        "name": change.name,
        "costs": change.costs,
        "set": list(change.flags),
        "peak_bytes": change.memory.total,
        "fits": change.memory.total <= device_memory,
    }


def print_dry_run(loaded: "LoadedRecipe", distributed: DistributedSetup) -> None:
    """Encode the data and print the steps, the plan and one example.

    Nothing is trained.

    Raises:
        UserError: training would fail before its first step, except for errors in the weights.
    """
    recipe = loaded.recipe
    source = ModelSource.of_recipe(recipe)
    source.check_weights()
    config = source.config()
    chat = load_chat_format(recipe)
    splits = load_splits(recipe, chat)
    hardware = this_machine(distributed.processes)
    layout = pair_layout(recipe, hardware.device, config)
    dataset = dataset_size(recipe, chat, splits["train"], layout)
    settings = settings_for(recipe, hardware, dataset, distributed, layout)
    planner = Planner(config, recipe)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("model", f"{recipe.model.name} ({config.model_type}, {recipe.model.dtype})"),
        ("method", _method_text(recipe)),
        *([("objective", _objective_text(recipe))] if recipe.has_pairs else ()),
        ("hardware", _hardware_text(distributed)),
        ("chat", _chat_text(recipe, chat)),
        ("training", _split_text(recipe, "train", splits["train"].stats)),
        *([("held out", _split_text(recipe, "eval", splits["eval"].stats))] if "eval" in splits else ()),
        ("steps", _steps_text(recipe, settings, dataset)),
        *_expert_rows(planner, settings),
        ("memory", _peak_text(planner, settings, hardware.memory)),
        ("output", f"{recipe.output_dir} (a dry run writes nothing)"),
    ):
        table.add_row(name, value)
    stdout.print(table)
    for hint in planned_hints(recipe, planner, settings, dataset):
        stdout.print(Text.assemble(("hint: ", "cyan"), hint))
    stdout.print()
    stdout.print(_example_text(recipe, chat, splits["train"]))


def _expert_rows(planner: Planner, settings: PlanSettings) -> "list[tuple[str, str]]":
    """Return what is trained in a mixture of experts; nothing for another model."""
    counts, trainable = planner.counts, planner.trainable(settings)
    if not counts.experts:
        return []
    text = f"{format_short_count(trainable.parameters)} parameters" + _active_text(counts, trainable)
    if settings.method != "full":
        text += f": {_modules_text(trainable)}"
    return [("trained", text), *(("note", note) for note in trainable.notes)]


def _method_text(recipe: "Recipe") -> str:
    if recipe.adapter is None:
        return "full fine-tuning"
    options = recipe.adapter.model_dump(exclude={"variant"}, exclude_none=True)
    text = ", ".join([f"{recipe.method}: {recipe.adapter.variant}", *(f"{key} {one}" for key, one in options.items())])
    if recipe.quantization is not None:
        text += f"; base model in {recipe.quantization.bits} bits"
    return text


def _objective_text(recipe: "Recipe") -> str:
    options = getattr(recipe, recipe.objective).model_dump(exclude_none=True)
    return f"{recipe.objective}: {', '.join(f'{key} {value}' for key, value in options.items())}"


def _hardware_text(distributed: DistributedSetup) -> str:
    device = f"{distributed.gpus} GPUs" if distributed.gpus else "CPU"
    processes = "1 process" if distributed.world_size == 1 else f"{distributed.world_size} processes"
    return f"{distributed.strategy}, {processes} ({device})"


def _chat_text(recipe: "Recipe", chat: ChatFormat) -> str:
    new_tokens = ", ".join(f"{token.token} = {token.id}" for token in chat.new_tokens) or "none"
    return f"{recipe.chat.template}, trains {recipe.chat.loss_policy}; new tokens: {new_tokens}"


def _split_text(recipe: "Recipe", split: Split, stats: EncodingStats) -> str:
    unit = "labeled answers" if recipe.has_labels else "pairs" if recipe.has_pairs else "examples"
    text = (
        f"{format_count(stats.examples)} {unit}, {format_count(stats.tokens)} tokens, "
        f"{format_percent(stats.supervised / stats.tokens)} of them supervised"
    )
    dropped = [f"{number} {reason.replace('_', ' ')}" for reason, number in stats.dropped.items()]
    if dropped:
        text += f"; dropped: {', '.join(dropped)}"
    if stats.truncated:
        text += f"; {stats.truncated} truncated to {recipe.data.max_length} tokens"
    if stats.split:
        text += f"; {stats.split} split into {stats.split_examples} examples"
    if stats.expanded:
        text += f"; {stats.expanded} made {stats.expanded_examples} examples, as the template rewrites earlier turns"
    if stats.special_token_text:
        text += f"; {stats.special_token_text} stretches of special-token text encoded as ordinary text"
    for note in data_notes(recipe, split, stats):
        text += f"; {note}"
    formats = ", ".join(sorted(set(stats.formats.values())))
    return f"{text} ({formats})" if formats else text


def _steps_text(recipe: "Recipe", settings: PlanSettings, dataset: DatasetSize) -> str:
    shape = "padded examples"
    if recipe.data.packing:
        length = recipe.data.max_length
        shape = f"packs of {length} tokens ({format_percent(dataset.tokens / (dataset.sequences * length))} full)"
    total, per_epoch = total_steps(recipe, dataset, settings), steps_per_epoch(dataset, settings)
    per_step = settings.batch * settings.accumulation * settings.processes
    if recipe.has_pairs:
        return f"{total} ({per_epoch} per epoch) of {per_step} {settings.unit}; {dataset.sequences} per epoch"
    return f"{total} ({per_epoch} per epoch) of {per_step} {shape}; {dataset.sequences} per epoch"


def _peak_text(planner: Planner, settings: PlanSettings, device_memory: int) -> str:
    needed = planner.memory(settings).total
    hint = "" if needed <= device_memory else "; it does not fit, and `peftchat plan` shows what would"
    return f"about {format_bytes(needed)} at the peak, of {format_bytes(device_memory)}{hint}"


def _example_text(recipe: "Recipe", chat: ChatFormat, split: EncodedSplit) -> Text:
    """Show an example of median length with its trained tokens in green."""
    # Every second example of labeled answers is another record's answer, which is not trained.
    places = np.arange(0, len(split.store), 2 if recipe.has_labels else 1)
    median = int(places[np.argsort(split.store.lengths[places])[len(places) // 2]])
    example = split.store[median]
    trained = loss_mask_table(recipe.chat.loss_policy)[example.token_tags]
    trained[:1] = False
    text = Text(f"An example ({example.source}), trained tokens in green:\n", style="bold")
    for start, stop in _runs(trained[:_MAX_TOKENS_SHOWN]):
        decoded = chat.tokenizer.decode(example.ids[start:stop].tolist())
        text.append(decoded, style="not bold green" if trained[start] else "not bold dim")
    if len(example.ids) > _MAX_TOKENS_SHOWN:
        text.append(f" … {len(example.ids) - _MAX_TOKENS_SHOWN} more tokens", style="not bold italic")
    return text


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return the start and end of each run of equal flags."""
    edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    return list(itertools.pairwise(edges))
