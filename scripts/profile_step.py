"""Where the time of a training step goes: torch's profiler around steps of `peftchat train`'s own trainer.

    python scripts/profile_step.py conversations.jsonl --model .cache/smollm2-135m
    python scripts/profile_step.py conversations.jsonl --model FOLDER --method full --write docs/benchmarks.md
    python scripts/profile_step.py conversations.jsonl --model FOLDER --compiled --warm 3

Every operator's own time goes to the innermost part that it ran in. A backward operator goes to the part of the forward
operator that it belongs to (the profiler numbers both alike). What no operator accounts for is Python. The profiler
itself takes time, so the same number of steps is timed without it first.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_train import recipe
from page_tables import write_table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from peftchat.malloc import keep_large_blocks
from peftchat.models.base_config import attention_shape
from peftchat.recipe import load_recipe
from peftchat.training.build_trainer import build_trainer, sft_config
from peftchat.training.context import TrainOptions, open_context
from peftchat.training.model import load_trainable_model
from peftchat.training.throughput import attention_flops, measure_matmul_flops, training_flops
from peftchat.training.trainer import ChatTrainer

MATMULS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")
"""Operators whose own time is a matrix product."""

PARTS = (
    "matrix products with the base's weights",
    "matrix products with the adapter's weights",
    "attention",
    "LM head and loss",
    "norms",
    "rotary embeddings",
    "gates of the MLP",
    "norms, rotary embeddings and gates, compiled",
    "optimizer and clipping",
    "sums and other operators",
    "Python, and waiting",
)

COMPILED, OTHERS, WAITING = PARTS[7], PARTS[9], PARTS[10]


def part_of_name(name: str) -> str | None:
    """Return the part that an operator or a marked block stands for by its name; None where it tells nothing."""
    marks = (
        ("part: ", name.removeprefix("part: ")),
        ("peftchat::varlen_attention", "attention"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("_LinearCrossEntropy", "LM head and loss"),
        ("## Call CompiledFxGraph", COMPILED),
        ("Optimizer.", "optimizer and clipping"),
        ("aten::_foreach_norm", "optimizer and clipping"),
    )
    return next((part for mark, part in marks if name.startswith(mark)), None)


def part_of(event: Any, forward: Mapping[int, str], rank: int) -> str:
    """Return the part that an operator's own time belongs to.

    Args:
        event: of the profiler.
        forward: number of a forward operator -> its part.
        rank: of the adapter; 0 without one.
    """
    found, ancestor = None, event
    while ancestor is not None and found in (None, COMPILED):
        # The loss has a compiled part too.
        found = part_of_name(ancestor.name) or found
        if found is None and ancestor.name.startswith("autograd::engine::evaluate_function"):
            found = forward.get(ancestor.sequence_nr)
        ancestor = ancestor.cpu_parent
    if found in ("attention", "LM head and loss", "optimizer and clipping"):
        return found
    if event.name in MATMULS:
        # The adapter's products are those with a side as narrow as its rank.
        sides = {side for shape in event.input_shapes or () if len(shape) == 2 for side in shape}
        return PARTS[1] if rank in sides else PARTS[0]
    return found or OTHERS


def seconds_by_part(events: Sequence[Any], rank: int, wall: float) -> dict[str, float]:
    """Return the seconds of each part, given all events of a profile and the time that passed."""
    forward: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::engine"):
            part = part_of(event, {}, rank)
            if part != OTHERS:
                forward.setdefault(event.sequence_nr, part)
    found: dict[str, float] = defaultdict(float)
    for event in events:
        own = event.self_cpu_time_total / 1e6
        # The time of a marked block itself is Python's.
        if not event.name.startswith(("part: ", "step", "ProfilerStep", "Torch-Compiled Region", "CompiledFunction")):
            found[part_of(event, forward, rank)] += own
    found[WAITING] = max(0.0, wall - sum(found.values()))
    return {part: found[part] for part in PARTS}


def mark_parts(model: nn.Module) -> None:
    """Name the blocks of a model in its profile."""

    def marked(forward: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part: {part}"):
                return forward(*args, **kwargs)

        return run

    for module in model.modules():
        kind = type(module).__name__
        if re.search("RMSNorm|LayerNorm", kind):
            module.forward = marked(module.forward, PARTS[4])
        elif "Rotary" in kind:
            module.forward = marked(module.forward, PARTS[5])
        elif kind.endswith("MLP"):
            module.forward = marked(module.forward, PARTS[6])
        elif kind.endswith("Attention"):
            # What it computes besides its products and `varlen_attention` turns queries and keys.
            module.forward = marked(module.forward, PARTS[5])


class Steps(TrainerCallback):
    """Times steps, and profiles those behind the first ones.

    Args:
        warm: steps that are not counted.
        timed: steps that are timed.
        profiled: steps that are profiled.
        begin: called before the profile.
    """

    def __init__(self, warm: int, timed: int, profiled: int, begin: Callable[[], None]) -> None:
        self.warm, self.timed, self.profiled, self._begin = warm, timed, profiled, begin
        self.seconds: list[float] = []
        self.wall = 0.0
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warm + self.timed:
            self._begin()
            self.profile.start()
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = time.perf_counter() - self._since
        if self.warm < state.global_step <= self.warm + self.timed:
            self.seconds.append(taken)
        elif state.global_step > self.warm + self.timed:
            self.wall += taken
        if state.global_step == self.warm + self.timed + self.profiled:
            self.profile.stop()


def make_trainer(args: argparse.Namespace, folder: Path) -> ChatTrainer:
    """Return the trainer of a run of packs, as `peftchat train` builds it."""
    steps = argparse.Namespace(
        model=args.model,
        dtype=args.dtype,
        max_length=args.length,
        batch=1,
        steps=args.warm + args.timed + args.profiled,
    )
    path = recipe(args.conversations, args.method, steps, folder, f"peftchat packed{' compiled' * args.compiled}")
    values = json.loads(path.read_text(encoding="utf-8"))
    values["training"] |= {"per_device_train_batch_size": args.packs, "autotune": False}
    path.write_text(json.dumps(values), encoding="utf-8")
    context = open_context(load_recipe(path), TrainOptions())
    config = sft_config(context)
    return build_trainer(context, load_trainable_model(context), config)


def table(args: argparse.Namespace, steps: Steps, parts: Mapping[str, float], trainer: ChatTrainer) -> str:
    """Return the profile as Markdown."""
    counts = trainer.throughput.collect()
    weights = {name: weight.numel() for name, weight in trainer.causal_model.named_parameters()}
    trained = sum(w.numel() for w in trainer.causal_model.parameters() if w.requires_grad)
    head = trainer.causal_model.get_output_embeddings().weight.numel()
    body = sum(weights.values()) - head
    is_full = args.method == "full"
    number = trainer.state.global_step
    flops = training_flops(
        body=body, head=head, trained_body=trained - head if is_full else trained, trains_head=is_full,
        tokens=counts.tokens // number, supervised=counts.supervised // number,
    )  # fmt: skip
    layers, width = attention_shape(trainer.causal_model.config, args.length)
    in_attention = attention_flops(layers=layers, width=width, pairs=counts.attended_pairs / number)
    flops += in_attention
    peak = measure_matmul_flops(trainer.args.device, getattr(torch, trainer._context.recipe.model.computed_in))
    median = statistics.median(steps.seconds)
    without = (flops - in_attention) / median / peak
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {torch.get_num_threads()} threads, {args.method} in "
        f"{trainer._context.recipe.model.computed_in}, {counts.tokens // number:,} tokens a step, "
        f"{counts.supervised // number:,} of them supervised{', compiled' * args.compiled}. A step took "
        f"{median:.2f} s ({min(steps.seconds):.2f} to {max(steps.seconds):.2f}): {flops / median / 1e9:.0f} of "
        f"{peak / 1e9:.0f} GFLOP/s, {flops / median / peak:.0%} of the matrix peak ({without:.0%} without attention's "
        f"products). Under the profiler it took {steps.wall / steps.profiled:.2f} s:",
        "",
        "| part | s | share |",
        "| --- | ---: | ---: |",
    ]
    total = sum(parts.values())
    lines += [
        f"| {part} | {seconds / steps.profiled:.3f} | {seconds / total:.1%} |"
        for part, seconds in parts.items()
        if seconds
    ]
    return "\n".join(lines)


def main() -> None:
    """Train some steps, profile the last ones, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--model", default=".cache/smollm2-135m")
    parser.add_argument("--method", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a pack")
    parser.add_argument("--packs", type=int, default=1, help="packs of a step")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--timed", type=int, default=3)
    parser.add_argument("--profiled", type=int, default=2)
    parser.add_argument("--top", type=int, default=0, help="print so many of the longest operators too")
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="write the table into this page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, Path(folder))
        # Compiled layers are one block, and marks would have them compiled again.
        steps = Steps(
            args.warm, args.timed, args.profiled, lambda: None if args.compiled else mark_parts(trainer.causal_model)
        )
        trainer.add_callback(steps)
        keep_large_blocks()
        trainer.train()
    adapter = trainer._context.recipe.adapter
    parts = seconds_by_part(steps.profile.events(), getattr(adapter, "r", 0), steps.wall)
    if args.top:
        averages = steps.profile.key_averages(group_by_input_shape=True)
        print(averages.table(sort_by="self_cpu_time_total", row_limit=args.top, max_name_column_width=60))
    shown = table(args, steps, parts, trainer)
    print(shown)
    if args.write is not None:
        name = f"profile_step {args.method} {args.dtype}{' compiled' * args.compiled}"
        write_table(args.write, name, f"\n{shown}\n")


if __name__ == "__main__":
    main()
