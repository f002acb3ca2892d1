"""Train every variant on real models, check what it left behind, and write docs/variants.md from what was measured.

    python scripts/make_variant_docs.py --model stories260K=FOLDER --data FILE [--only lora,dora]
    python scripts/make_variant_docs.py --write

Each variant runs in a process of its own, and its results stay in .cache/variants, so that the work can be cut into
pieces: what is there is not measured again (--again does). The page holds what lies there, and the reason for each
empty cell.
"""

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftchat.errors import UserError, VerificationError
from peftchat.files import write_text
from peftchat.formatting import format_bytes
from peftchat.logging_setup import quiet_libraries
from peftchat.variants import VARIANTS, Variant, get_variant

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".cache" / "variants"
PAGE = ROOT / "docs" / "variants.md"

STEPS = 4
RATES = (5.0, 1.0, 0.2, 0.04)
"""Multiples of a variant's learning rate that are tried until the held-out loss falls: four steps are few."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="a base model to train")
    parser.add_argument("--data", metavar="FILE", help="conversations, in any form that peftchat reads")
    parser.add_argument("--length", type=int, default=256, metavar="TOKENS", help="longest conversations to train on")
    parser.add_argument("--only", metavar="NAMES", help="these variants, separated by commas")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further variant after this time")
    parser.add_argument("--again", action="store_true", help="measure also what is there already")
    parser.add_argument("--write", action="store_true", help="write the page from the results that are there")
    chosen = parser.parse_args()
    wanted = [get_variant(name) for name in chosen.only.split(",")] if chosen.only else list(VARIANTS.values())
    started = time.monotonic()
    quiet_libraries()
    for model in chosen.model:
        name, _, folder = model.partition("=")
        for variant in wanted:
            kept = RESULTS / name / f"{variant.name}.json"
            if (kept.is_file() and not chosen.again) or time.monotonic() - started > chosen.seconds:
                continue
            result = _in_a_process(variant.name, Path(folder), Path(chosen.data), chosen.length)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(result, indent=1) + "\n")
            print(f"{name:12} {variant.name:18} {json.dumps(result)}", flush=True)
    if chosen.write:
        write_text(PAGE, page())
        print(f"wrote {PAGE}")


def _in_a_process(variant: str, model: Path, data: Path, length: int) -> dict[str, Any]:
    # Children of a process that has imported the libraries, and run nothing with them, start at once.
    import peftchat.merging
    import peftchat.training.train  # noqa: F401

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure_into, args=(queue, variant, model, data, length))
    process.start()
    process.join()
    if queue.empty():
        return {"failed": f"the process ended with status {process.exitcode}"}
    told: dict[str, Any] = queue.get()
    return told


def _measure_into(queue: Any, variant: str, model: Path, data: Path, length: int) -> None:
    try:
        queue.put(measure(variant, model, data, length))
    except (UserError, VerificationError) as error:
        queue.put({"failed": str(error).replace(str(model), model.name)})


def measure(name: str, model: Path, data: Path, length: int) -> dict[str, Any]:
    """Train a variant for a few steps, load it by stock libraries, and fold it.

    Raises:
        UserError: it cannot be trained on this model.
        VerificationError: something that was checked is not as it should be.
    """
    from peftchat.recipe import load_recipe
    from peftchat.training.train import train

    work = RESULTS / "work" / f"{model.name}-{name}"
    for factor in RATES:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_text(
            work / "recipe.yaml", json.dumps(_recipe(get_variant(name), model, data, work / "run", factor, length))
        )
        loaded = load_recipe(work / "recipe.yaml")
        try:
            told = train(loaded).model_dump()
        except VerificationError as error:
            if "diverged" in str(error):
                continue
            raise
        if told["eval_loss"] < told["eval_loss_before"]:
            break
    else:
        raise VerificationError("the held-out loss did not fall at any of the learning rates tried")
    run = work / "run"
    stock = _stock_loss(run, model, loaded.recipe)
    if abs(stock - told["eval_loss"]) > 1e-4 * told["eval_loss"]:
        raise VerificationError(f"stock peft finds a held-out loss of {stock}, and training found {told['eval_loss']}")
    result = {
        "learning_rate": loaded.recipe.training.learning_rate,
        "before": told["eval_loss_before"],
        "after": told["eval_loss"],
        "stock": stock,
        "trainable": told["trainable_parameters"],
        "memory": told["peak_memory_bytes"],
        "bytes": sum(file.stat().st_size for file in run.rglob("*.safetensors")),
        "fold": _fold(run) if get_variant(name).mergeable else None,
    }
    shutil.rmtree(work)
    return result


def _recipe(variant: type[Variant], model: Path, data: Path, run: Path, factor: float, length: int) -> dict[str, Any]:
    method = "full" if variant.name == "full" else "qlora" if "unquantized" in variant.incompatible_with else "lora"
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "method": method,
        **({"adapter": {"variant": variant.name}} if variant.name != "full" else {}),
        "data": {
            "train": [{"path": str(data)}],
            "eval_fraction": 0.2,
            "max_length": length,
        },
        "training": {
            "learning_rate": variant.learning_rate * factor,
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "output_dir": str(run),
    }


def _stock_loss(run: Path, base: Path, recipe: Any) -> float:
    """The held-out loss of a run that stock transformers and peft have loaded, over the run's own held-out rows."""
    import torch

    from peftchat.dataset.cache import load_splits
    from peftchat.training.context import load_chat_format

    model = _stock_model(run, base, recipe)
    chat = load_chat_format(recipe)
    from peftchat.dataset.collator import ChatCollator

    rows = load_splits(recipe, chat)["eval"].store
    collator = ChatCollator(rows, loss_on=recipe.chat.loss_on, layout="padded", pad_token_id=0)
    total, count = 0.0, 0
    for row in rows:
        batch = collator.collate([[row]])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, -len(row.ids) :].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], batch["labels"][0, 1:], reduction="none")
        total += float(losses.sum())
        count += int((batch["labels"][0, 1:] >= 0).sum())
    return total / count


def _stock_model(run: Path, base: Path, recipe: Any) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from peftchat.models.loading import keep_4bit_weights_as_quantized, quantization_config

    if recipe.method == "full":
        return AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    quantized = None if recipe.quantization is None else quantization_config(recipe)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantized)
    rows = run / "token_rows"
    holder = json.loads(((rows if rows.is_dir() else run) / "adapter_config.json").read_text(encoding="utf-8"))
    ids = holder.get("token_indices") or max((holder.get("trainable_token_indices") or {"": [0]}).values(), key=max)
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    if rows.is_dir():
        model = PeftModel.from_pretrained(model, str(rows)).merge_and_unload()
    model = PeftModel.from_pretrained(model, str(run)).eval()
    if quantized is not None:
        keep_4bit_weights_as_quantized(model)
    return model


def _fold(run: Path) -> float:
    """Largest difference between the logits of adapter and merged model, as a share of their range."""
    import torch

    from peftchat.merging import MergeOptions, merge_run

    proof = merge_run(run, MergeOptions(dtype=torch.float32)).report.verification
    assert proof is not None
    if not proof.passed:
        raise VerificationError(proof.verdict)
    return float(proof.max_difference)


_HEAD = """\
# Variants

<!-- Written by scripts/make_variant_docs.py from what it measured. Change that, not this page. -->

`method: full` trains every weight. The other methods leave the base as it is and train something beside it, and
`adapter.variant` says what. `peftchat variants` prints the table of this page; `peftchat variants NAME` tells the
settings of one, and [recipe.md](recipe.md) lists them all.
"""

_MEASURED = """\
## Measured

Each variant trained for {steps} steps of one pack of conversations, in float32 on a CPU, at the first of a few learning
rates at which the held-out loss fell. Four steps say that it learns, not which learns best: that is what
`peftchat compare` is for. "Reloaded" is the held-out loss of the saved run once stock transformers and peft have
loaded it, without peftchat. "Fold" is the largest difference between the logits of the adapter and of the model that
`peftchat merge` made of it, as a share of their range (float32 runs; `merge` allows 1e-4). "Memory" is the peak of the
whole process.
"""


_BASES = {"16": "unquantized", "8": "8 bits", "4": "4 bits"}


def page() -> str:
    """The page, from the registry and the results that are there."""
    parts = [_HEAD, "## What there is\n", *_registry(), "## What does not go together, and why\n", *_refusals()]
    parts.append(_MEASURED.format(steps=STEPS))
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name != "work"):
        parts += [f"### {folder.name}\n", *_measured(folder)]
    parts.append(_NOTES)
    return "\n".join(parts).rstrip() + "\n"


def _registry() -> Iterator[str]:
    yield (
        "Rate: the learning rate where the recipe gives none. ZeRO: the stages it trains under; ? stands for one that "
        "nothing speaks against and that was not run. vLLM: how it serves the result, from its documentation and "
        "`vllm/lora/peft_helper.py`, not run here; one that brings rows for new tokens is always merged first.\n"
    )
    yield "| Variant | What it does | Paper | Rate | Base, bits | ZeRO | Folds | vLLM |"
    yield "|---|---|---|---|---|---|---|---|"
    for variant in VARIANTS.values():
        bits = [bit for bit, base in _BASES.items() if not variant.incompatibility(base)]
        cells = (
            f"`{variant.name}`",
            variant.summary,
            _paper(variant),
            f"{variant.learning_rate:.0e}".replace("e-0", "e-"),
            " ".join(bits),
            variant.zero_stages() or "no",
            "yes" if variant.mergeable else f"no: {variant.merge_hint}",
            {"adapter": "as an adapter", "merged": "merged", "no": "no"}[variant.vllm],
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _paper(variant: type[Variant]) -> str:
    if variant.paper is None:
        return "none"
    text = f"{variant.paper.authors} {variant.paper.year}"
    return f"[{text}](https://arxiv.org/abs/{variant.paper.arxiv})" if variant.paper.arxiv else text


def _refusals() -> Iterator[str]:
    yield "| Variant | Not with | Because |"
    yield "|---|---|---|"
    for variant in VARIANTS.values():
        for setting, why in variant.incompatible_with.items():
            yield f"| `{variant.name}` | {setting} | {why} |"
    yield ""


def _measured(folder: Path) -> Iterator[str]:
    yield "| Variant | Rate | Held-out loss | Reloaded | Trained | File | Memory | Fold |"
    yield "|---|---|---|---|---|---|---|---|"
    for variant in VARIANTS.values():
        kept = folder / f"{variant.name}.json"
        if not kept.is_file():
            yield f"| `{variant.name}` | not measured | | | | | | |"
            continue
        told = json.loads(kept.read_text(encoding="utf-8"))
        if "failed" in told:
            yield f"| `{variant.name}` | {told['failed']} | | | | | | |"
            continue
        fold = f"{told['fold']:.0e}" if told["fold"] is not None else "does not fold"
        cells = (
            f"`{variant.name}`",
            f"{told['learning_rate']:.0e}",
            f"{told['before']:.4f} → {told['after']:.4f}",
            f"{told['stock']:.4f}",
            f"{told['trainable']:,}",
            format_bytes(told["bytes"]),
            format_bytes(told["memory"]),
            fold,
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


_NOTES = """\
## How some of them are done here

**Starts cut out of the base** (`pissa`, `olora`, `corda`, `lora_ga`). These train `W - s B0 A0 + s B A`, where the
start `s B0 A0` is a part of the weight, or made from the gradient. PEFT changes the base for that, rounds the rest to
the base's number type, and its file then fits only a base changed in the same way. Here the base stays as it is, and
`-B0`, `A0` are a second LoRA that is never trained. The function and all gradients are the same. What is saved is one
LoRA of twice the rank that holds both: a plain adapter for the untouched base.

**Starts that read rows** (`eva`, `corda`, `lora_ga`) take the first `start_rows` training rows, before the first
step, by PEFT's own code.

**`loftq`** begins at the best low-rank fit of what 4-bit quantization took from each weight, computed from the base's
own file, and divided by the adapter's scale, which PEFT's function leaves out.

**`adalora`** drops directions by a schedule over all steps, and adds its orthogonality term to the loss of each
optimizer step, not to the held-out loss. Its matrices are saved whole, dropped directions as zeros: cut down by PEFT
they can be empty.

**New tokens.** PEFT keeps the rows of new tokens inside an adapter of the LoRA class (and AdaLoRA). Beside any other
variant they are an adapter of their own in the run's folder `token_rows`, of PEFT's kind `TRAINABLE_TOKENS`:

```python
model = AutoModelForCausalLM.from_pretrained(base)
model.resize_token_embeddings(size)  # where the new ids lie beyond the base's vocabulary
model = PeftModel.from_pretrained(model, f"{run}/token_rows").merge_and_unload()
model = PeftModel.from_pretrained(model, run)
```

`peftchat chat`, `merge` and `export` do it by themselves, and the run's `README.md` holds the lines.

**Prompts** (`prompt_tuning`, `p_tuning`, `prefix_tuning`) stand once before a row, so these variants train with
`data.packing: false`, which is their default.
"""

if __name__ == "__main__":
    main()
