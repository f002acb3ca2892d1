"""How time and memory of training grow: with length, with width, with processes and with new tokens.

    python scripts/bench_scale.py --model .cache/smollm2-135m
    python scripts/bench_scale.py --model FOLDER --only length,vocabulary

Every line is `peftchat train` on a Llama of random weights, made on the spot with the tokenizer of the model given, a
few steps each. How memory grows with the number of rows is measured by `bench_data.py --memory`.

- length: one conversation of that many tokens a step, and beside it short conversations packed to the same length;
- width: the same tokens through wider layers;
- processes: the same rows a step through 1 and 2 processes;
- vocabulary: the same rows with the four tokens of `starchat` new, and with a model that has them already, at 48k,
  128k and 256k rows; layers as SmolLM2-135M's.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STEPS = 5


@dataclass(frozen=True)
class Shape:
    """A Llama to make.

    Attributes:
        intermediate: None for the usual share of the hidden size.
        knows_tokens: whether its tokenizer and vocabulary have the tokens of `starchat` already.
    """

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 49152
    intermediate: int | None = None
    knows_tokens: bool = False


@dataclass(frozen=True)
class Line:
    """One training run: seconds a step (median without the first), bytes held at most, real tokens a second."""

    seconds: float
    peak: int
    speed: float


@dataclass(frozen=True)
class Bench:
    """Where runs are made, and whose tokenizer they use."""

    folder: Path
    tokenizer: Path

    def model(self, shape: Shape) -> Path:
        """A folder with a random model of this shape, made once."""
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        from peftchat.chat_template.templates import CHAT_TEMPLATES

        folder = self.folder / f"{shape}"
        if folder.exists():
            return folder
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        if shape.knows_tokens:
            tokenizer.add_tokens(list(CHAT_TEMPLATES["starchat"].special_tokens), special_tokens=True)
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate or shape.hidden * 8 // 3 // 64 * 64,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // 64,
            num_key_value_heads=shape.hidden // 64,
            vocab_size=max(shape.vocabulary, len(tokenizer)),
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        return folder

    def conversations(self, tokens: int, count: int) -> Path:
        """A file of equal conversations of about that many tokens each, half of them the answer's."""
        path = self.folder / f"d{tokens}-{count}.jsonl"
        if not path.exists():
            half = max(1, (tokens - 16) // 2)
            # " a" is one token for every tokenizer of the GPT-2 kind.
            pair = [{"role": "user", "content": "a" + " a" * half}, {"role": "assistant", "content": "a" + " a" * half}]
            path.write_text((json.dumps({"messages": pair}) + "\n") * count, encoding="utf-8")
        return path

    def train(self, shape: Shape, source: Path, length: int, **changes: Any) -> Line:
        """`peftchat train` once, from the outside."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        recipe = {
            "model": {"name": str(self.model(shape))},
            "method": "lora",
            "adapter": {"dropout": 0.0},
            "chat": {"template": "starchat"},
            "data": {"train": [{"path": str(source)}], "max_length": length, "packing": changes.get("packing", True)},
            "training": {
                "max_steps": changes.get("steps", STEPS),
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": changes.get("passes", 1),
                "gradient_checkpointing": False,
                "torch_compile": False,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
            },
            "distributed": {"strategy": changes.get("strategy", "single"), "processes": changes.get("processes", 1)},
            "output_dir": str(run),
        }
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "peftchat", "train", str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        clock = [line["seconds"] for line in lines if "loss" in line]
        step = statistics.median(after - before for before, after in itertools.pairwise(clock))
        summary = json.loads((run / "run.json").read_text())
        return Line(step, summary["peak_memory_bytes"], summary["tokens"] / summary["steps"] / step)


def length(bench: Bench, most: int) -> Iterator[str]:
    """One long conversation a step, and short ones of the same tokens together."""
    yield "| tokens | one conversation: s a step | tokens/s | peak GB | of 128 tokens: s a step | tokens/s | peak GB |"
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    tokens = 1024
    while tokens <= most:
        one = bench.train(Shape(), bench.conversations(tokens - 64, 8), tokens)
        many = bench.train(Shape(), bench.conversations(120, 8 * tokens // 128), tokens)
        yield f"| {tokens:,} | {_cells(one)} | {_cells(many)} |"
        tokens *= 2


def width(bench: Bench, most: int) -> Iterator[str]:
    """The same tokens through wider layers."""
    yield "| hidden size | s a step of 1,024 tokens | tokens/s | peak GB |"
    yield "|---:|---:|---:|---:|"
    for hidden in (256, 512, 1024, 2048):
        yield f"| {hidden:,} | {_cells(bench.train(Shape(hidden), bench.conversations(120, 64), 1024))} |"


def processes(bench: Bench, most: int) -> Iterator[str]:
    """The same rows a step through one process and two, each on its share of the cores."""
    yield "| strategy | s a step of 4 x 1,024 tokens | peak GB of a process |"
    yield "|---|---:|---:|"
    source = bench.conversations(120, 256)
    for strategy, count in (("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)):
        line = bench.train(Shape(512), source, 1024, strategy=strategy, processes=count, passes=4 // count)
        yield f"| {strategy}, {count} | {line.seconds:.2f} | {line.peak / 1e9:.2f} |"


def vocabulary(bench: Bench, most: int) -> Iterator[str]:
    """What the four new tokens add to a step."""
    yield "| vocabulary | s a step, tokens known | four new tokens | more | more memory, MB |"
    yield "|---:|---:|---:|---:|---:|"
    source = bench.conversations(120, 64)
    for rows in (49152, 131072, 262144):
        shape = Shape(hidden=576, layers=30, vocabulary=rows, intermediate=1536)
        # Both models have the same number of logits: rows that are new are not in the model yet.
        known = replace(shape, vocabulary=rows + 4, knows_tokens=True)
        found: dict[Shape, list[Line]] = {known: [], shape: []}
        for _ in range(3):
            for each, lines in found.items():
                lines.append(bench.train(each, source, 1024, steps=10))
        without, four = (statistics.median(line.seconds for line in lines) for lines in found.values())
        memory = min(line.peak for line in found[shape]) - min(line.peak for line in found[known])
        yield f"| {rows:,} | {without:.3f} | {four:.3f} | {four / without - 1:.1%} | {memory / 1e6:.0f} |"


def _cells(line: Line) -> str:
    return f"{line.seconds:.2f} | {line.speed:,.0f} | {line.peak / 1e9:.2f}"


PARTS: dict[str, Callable[[Bench, int], Iterator[str]]] = {
    "length": length,
    "width": width,
    "processes": processes,
    "vocabulary": vocabulary,
}


def main() -> None:
    """Measure the parts asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model folder, for its tokenizer")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--longest", type=int, default=16384)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.model)
        for name in arguments.only.split(","):
            print(f"\n{name}")
            for line in PARTS[name](bench, arguments.longest):
                print(line, flush=True)


if __name__ == "__main__":
    main()
