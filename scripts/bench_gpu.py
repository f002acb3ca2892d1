"""Speed, utilization and memory on a GPU: shapes of Llama 3 with random weights, peftchat beside plain TRL.

    python scripts/bench_gpu.py --tokenizer FOLDER --write docs/benchmarks.md
    python scripts/bench_gpu.py --tokenizer FOLDER --shapes tiny --dtype float32 --length 128 --row-tokens 32 --steps 3

Weights are drawn on the device and written into a temporary folder, because both tools load a folder: 6 GB for 3B and
16 GB for 8B. Conversations are random words of the tokenizer, all of one length, so that those of a step fill a pack.
The second line runs everything on a CPU in a minute. Before anything is timed, packs are proved isolated on the device:
other tokens in the first conversation must leave the losses of the second as they are.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_train import Measured, encode, with_peftchat, with_trl
from page_tables import write_table
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peftchat.models import varlen_attention
from peftchat.models.loading import VARLEN
from peftchat.training.throughput import attention_flops, measure_matmul_flops, training_flops

_ROPE: Mapping[str, Any] = {"rope_theta": 500000.0, "rope_type": "default"}
_LLAMA: Mapping[str, Any] = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_parameters": _ROPE}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **_LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""From the `config.json` of the two models; lengths here are below those at which their scaled positions matter."""

CONTENDERS = ("trl", "trl tuned", "peftchat packed")
RANK = 16


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of weights.

    Attributes:
        body: in matrix products of the layers.
        head: of the head.
        adapter: of LoRA on all linear layers.
        layers: of the model.
        width: channels of a layer's query heads.
    """

    body: int
    head: int
    adapter: int
    layers: int
    width: int

    @classmethod
    def of(cls, config: LlamaConfig) -> "Weights":
        """Count those of a config."""
        width, inner = config.hidden_size, config.intermediate_size
        keys = width // config.num_attention_heads * config.num_key_value_heads
        products = [(width, width)] * 2 + [(width, keys)] * 2 + [(width, inner)] * 3
        layers = config.num_hidden_layers
        return cls(
            layers * sum(one * other for one, other in products), width * config.vocab_size,
            layers * sum(RANK * (one + other) for one, other in products), layers, width,
        )  # fmt: skip

    def flops(self, method: str, tokens: float, supervised: float, length: int) -> float:
        """Return the floating-point operations that a method needs for some tokens, in conversations of a length."""
        is_full = method == "full"
        return training_flops(
            body=self.body, head=self.head, trained_body=self.body if is_full else self.adapter, trains_head=is_full,
            tokens=int(tokens), supervised=int(supervised),
        ) + attention_flops(layers=self.layers, width=self.width, pairs=tokens * (length + 1) / 2)  # fmt: skip


def config_of(shape: str, smallest_vocabulary: int) -> LlamaConfig:
    """Return the config of a shape, with a vocabulary that the tokenizer fits into."""
    values = dict(SHAPES[shape])
    values["vocab_size"] = max(values["vocab_size"], smallest_vocabulary)
    return LlamaConfig(**values, initializer_range=0.02)


def make_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of random weights, drawn on the device."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def make_rows(tokenizer: Any, count: int, tokens: int) -> list[dict[str, Any]]:
    """Return conversations of random words, each of about so many tokens, half of them in the answer."""
    chooser = random.Random(0)
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())

    def text(wanted: int) -> str:
        found = ""
        while len(tokenizer(found, add_special_tokens=False)["input_ids"]) < wanted:
            found += " " * bool(found) + chooser.choice(words)
        return found

    half = max(1, tokens // 2 - 8)
    return [
        {"messages": [{"role": "user", "content": text(half)}, {"role": "assistant", "content": text(half)}]}
        for _ in range(count)
    ]


def second_losses(model: PreTrainedModel, first: Tensor, second: Tensor, *, attention: str, apart: bool) -> Tensor:
    """Return the losses of the second conversation of a pack.

    Args:
        model: its attention is changed.
        first: token ids, shape (n,).
        second: token ids, shape (m,).
        attention: transformers' name: `varlen` of peftchat, or another, which gets positions alone.
        apart: whether the pack has a border between both; without one, the second sees the first.
    """
    ids = torch.cat([first, second])[None]
    lengths = [len(first), len(second)] if apart else [len(first) + len(second)]
    borders = torch.tensor([0, *lengths], device=ids.device).cumsum(0).int()
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None]
    options: dict[str, Any] = {"position_ids": positions}
    if attention == VARLEN:
        varlen_attention.register(ids.shape[1])
        options |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **options).logits[0, len(first) : -1].float()
    return torch.nn.functional.cross_entropy(logits, second[1:], reduction="none")


def leak(model: PreTrainedModel, attention: str, tokens: int, *, apart: bool = True) -> float:
    """Return by how much the second conversation's losses move at most when the first one's tokens are others."""
    generator = torch.Generator().manual_seed(0)
    device, size = model.device, model.config.vocab_size
    one, other, second = (torch.randint(size, (tokens,), generator=generator).to(device) for _ in range(3))
    losses = [second_losses(model, first, second, attention=attention, apart=apart) for first in (one, other)]
    return float((losses[0] - losses[1]).abs().max())


def prove_isolation(model: PreTrainedModel, tokens: int) -> str:
    """Return what was found about packs, as a sentence.

    Raises:
        SystemExit: a conversation reaches the next one.
    """
    found = {attention: leak(model, attention, tokens) for attention in (VARLEN, "sdpa")}
    seen = leak(model, VARLEN, tokens, apart=False)
    if max(found.values()) > 1e-6:
        raise SystemExit(f"packs are not isolated: losses of the second conversation moved by {found}")
    if seen == 0:
        raise SystemExit("the probe sees nothing: even one conversation without a border kept its losses")
    return (
        f"Other tokens in the first of two conversations moved the losses of the second by {found[VARLEN]:.1g} "
        f"(`{VARLEN}`) and {found['sdpa']:.1g} (`sdpa`); without a border between them by {seen:.2g}."
    )


def row_of(name: str, runs: Sequence[Measured], weights: Weights, method: str, length: int, peak: float) -> list[str]:
    """Return the cells of one line. The conversations are of about `length` tokens."""
    speed = statistics.median(run.speed for run in runs)
    supervised = statistics.median(run.supervised for run in runs)
    share = weights.flops(method, speed, supervised, length) / peak
    return [
        method, name, ", ".join(f"{run.speed:,.0f}" for run in runs), f"{share:.1%}",
        f"{max(run.peak for run in runs) / 1e9:.2f}", f"{runs[0].losses[0]:.3f}", f"{runs[0].losses[-1]:.3f}",
    ]  # fmt: skip


def measure(shape: str, args: Namespace, folder: Path, device: torch.device) -> str:
    """Measure every method on a shape; return the Markdown."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = config_of(shape, len(tokenizer))
    model = make_model(config, device, getattr(torch, args.dtype))
    isolation = prove_isolation(model.eval(), min(256, args.length // 2))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    del model
    torch.cuda.empty_cache()
    source = folder / "rows.jsonl"
    batch = max(1, args.length // args.row_tokens)
    rows = make_rows(tokenizer, args.steps * batch, args.row_tokens)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Namespace(
        model=str(folder / "model"), steps=args.steps, batch=batch, max_length=args.length, dtype=args.dtype
    )
    encoded = encode(source, settings, folder)
    peak = measure_matmul_flops(device, getattr(torch, args.dtype))
    heads = ["method", "", "real tokens/s", "of the matrix peak", "peak GB", "first loss", "last loss"]
    lines = [heads, ["---", "---", *["---:"] * 5]]
    for method in args.methods.split(","):
        found: dict[str, list[Measured]] = {name: [] for name in args.contenders.split(",")}
        for number in range(args.rounds):
            for name, runs in found.items():
                print(f"{shape}, {method}, round {number + 1}: {name}", file=sys.stderr, flush=True)
                run = with_peftchat if name.startswith("peftchat") else with_trl
                runs.append(run(name, source, method, encoded, settings, folder))
        weights = Weights.of(config)
        lines += [row_of(name, runs, weights, method, args.row_tokens, peak) for name, runs in found.items()]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"{shape}: {datetime.now(UTC):%Y-%m-%d}, {where}, {args.dtype}, matrix peak {peak / 1e12:.2f} TFLOP/s, "
        f"packs of {args.length:,} tokens. {isolation}\n\n{text}"
    )


def main() -> None:
    """Measure every shape and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with ChatML's tokens")
    parser.add_argument("--shapes", default="llama-3.2-3b,llama-3.1-8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--methods", default="lora,qlora,full")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--length", type=int, default=4096, help="tokens of a pack")
    parser.add_argument("--row-tokens", type=int, default=512, help="tokens of a conversation")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="write the tables into this page")
    args = parser.parse_args()
    unknown = [shape for shape in args.shapes.split(",") if shape not in SHAPES]
    if unknown:
        parser.error(f"no shape is named {', '.join(unknown)}; known: {', '.join(SHAPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown = []
    for shape in args.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            shown.append(measure(shape, args, Path(folder), device))
            print(shown[-1], flush=True)
    if args.write is not None:
        write_table(args.write, "bench_gpu", "\n" + "\n\n".join(shown) + "\n")


if __name__ == "__main__":
    main()
