"""Train every variant on real models, check what it left behind, and write docs/variants.md from what was measured.

    python scripts/make_variant_docs.py --model stories260K=FOLDER --data FILE [--only lora,dora]
    python scripts/make_variant_docs.py --write

Each variant runs in its own process, and its results stay in .cache/variants, so that the work can be split: what is
there is not measured again (--again does). The page shows those results. Variants without one keep the line that they
have on the page, so that a new variant can be measured alone.
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
from peftchat.library_setup import prepare_libraries
from peftchat.variants import VARIANTS, Variant, get_variant
from peftchat.variants.base import Adapter
from peftchat.variants.describe import bits, rate_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".cache" / "variants"
PAGE = ROOT / "docs" / "variants.md"

STEPS = 4
RATES = (5.0, 1.0, 0.2, 0.04)
"""Multiples of a variant's learning rate, tried in this order until the held-out loss falls: four steps are few."""


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
    prepare_libraries()
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
    result: dict[str, Any] = queue.get()
    return result


def _measure_into(queue: Any, variant: str, model: Path, data: Path, length: int) -> None:
    try:
        queue.put(measure(variant, model, data, length))
    except (UserError, VerificationError) as error:
        queue.put({"failed": str(error).replace(str(model), model.name)})


def measure(name: str, model: Path, data: Path, length: int) -> dict[str, Any]:
    """Train a variant for a few steps, load it by stock libraries, and merge it.

    Raises:
        UserError: it cannot be trained on this model.
        VerificationError: a check failed.
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
            summary = train(loaded)
        except VerificationError as error:
            if "diverged" in str(error):
                continue
            raise
        if summary.eval_loss < summary.eval_loss_before:
            break
    else:
        raise VerificationError("the held-out loss did not fall at any of the learning rates tried")
    run = work / "run"
    stock = _stock_loss(run, model, loaded.recipe)
    if abs(stock - summary.eval_loss) > 1e-4 * summary.eval_loss:
        raise VerificationError(f"stock peft finds a held-out loss of {stock}, and training found {summary.eval_loss}")
    result = {
        "learning_rate": loaded.recipe.training.learning_rate,
        "before": summary.eval_loss_before,
        "after": summary.eval_loss,
        "stock": stock,
        "trainable": summary.trainable_parameters,
        "memory": summary.peak_memory_bytes,
        "bytes": sum(file.stat().st_size for file in run.rglob("*.safetensors")),
        "merge": _merge(run) if get_variant(name).mergeable else None,
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
    """Return the held-out loss of a run as stock transformers and peft load it, over the run's held-out examples."""
    import torch

    from peftchat.dataset.cache import load_splits
    from peftchat.training.context import load_chat_format

    model = _stock_model(run, base, recipe)
    chat = load_chat_format(recipe)
    from peftchat.dataset.collator import ChatCollator

    examples = load_splits(recipe, chat)["eval"].store
    collator = ChatCollator(examples, loss_on=recipe.chat.loss_policy, layout="padded", pad_token_id=0)
    total, count = 0.0, 0
    for example in examples:
        batch = collator.collate([[example]])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, -len(example.ids) :].double()
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


def _merge(run: Path) -> float:
    """Return the largest difference between the logits of adapter and merged model, as a fraction of their range."""
    import torch

    from peftchat.merging import MergeOptions, merge_run

    verification = merge_run(run, MergeOptions(dtype=torch.float32)).report.verification
    assert verification is not None
    if not verification.passed:
        raise VerificationError(verification.verdict)
    return float(verification.max_difference)


_HEAD = """\
# Variants

<!-- Written by scripts/make_variant_docs.py from what it measured. Change that, not this page. -->

`method: full` trains every weight. The other methods leave the base as it is and train an adapter, whose kind is
`adapter.variant`. `peftchat variants` prints the table of this page, `peftchat variants NAME` shows the settings of
one, and [recipe.md](recipe.md) lists them all.
"""

_MEASURED = """\
## Measured

Each variant trained for {steps} steps of one pack of conversations, in float32 on a CPU, at the first of a few learning
rates at which the held-out loss fell. Four steps show that it learns, not which learns best: that is what
`peftchat compare` is for. "Reloaded" is the held-out loss of the saved run as stock transformers and peft load it,
without peftchat. "Merge" is the largest difference between the logits of the adapter and of the model that
`peftchat merge` made of it, as a fraction of their range (float32 runs; `merge` allows 1e-4). "Memory" is the peak of
the complete process.
"""


def page() -> str:
    """Return the page: from the registry, and from what was measured here or stands on the page already."""
    parts = [_HEAD, "## List\n", *_registry(), "## Incompatible settings\n", *_incompatibilities()]
    parts.append(_MEASURED.format(steps=STEPS))
    published = _published()
    RESULTS.mkdir(parents=True, exist_ok=True)
    measured = [path.name for path in RESULTS.iterdir() if path.is_dir() and path.name != "work"]
    for model in sorted({*measured, *published}):
        parts += [f"### {model}\n", *_measured(model, published.get(model, {}))]
    parts.append(_NOTES)
    return "\n".join(parts).rstrip() + "\n"


def _published() -> dict[str, dict[str, str]]:
    """Return the lines of the page's tables of measurements: model -> variant -> line."""
    lines: dict[str, dict[str, str]] = {}
    model = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            model = line.removeprefix("### ") if line.startswith("### ") else None
        elif model is not None and line.startswith("| `"):
            lines.setdefault(model, {})[line.split("`")[1]] = line
    return lines


def _registry() -> Iterator[str]:
    yield (
        "Rate: the learning rate if the recipe sets none; auto follows from the model's width, auto/10 is a tenth of "
        "it. ZeRO: the stages it trains under; ? = expected to work, not tested. vLLM: how it serves the result, "
        "by its documentation and `vllm/lora/peft_helper.py`, not run here; an adapter with embeddings of added tokens "
        "is always merged first. LoRA conversion: whether `peftchat export "
        "--to lora` makes a plain LoRA of it; `lower rank` for what is one already "
        "([serving.md](serving.md#plain-lora)).\n"
    )
    yield "| Variant | What it does | Paper | Rate | Base, bits | ZeRO | Merges | vLLM | LoRA conversion |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for variant in VARIANTS.values():
        cells = (
            f"`{variant.name}`",
            variant.summary,
            _paper(variant),
            rate_text(variant),
            bits(variant),
            variant.zero_stages() or "no",
            "yes" if variant.mergeable else f"no: {variant.merge_hint}",
            {"adapter": "as an adapter", "merged": "merged", "no": "no"}[variant.vllm],
            _conversion(variant),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _conversion(variant: type[Variant]) -> str:
    """Return whether a plain LoRA can be made of a variant."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from peftchat.export.lora import unconvertible

    types = {config.__name__: kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not issubclass(variant, Adapter) or variant.peft_class is None or unconvertible(types[variant.peft_class]):
        return "no"
    return "lower rank" if variant.vllm == "adapter" else "yes"


def _paper(variant: type[Variant]) -> str:
    if variant.paper is None:
        return "none"
    text = f"{variant.paper.authors} {variant.paper.year}"
    return f"[{text}](https://arxiv.org/abs/{variant.paper.arxiv})" if variant.paper.arxiv else text


def _incompatibilities() -> Iterator[str]:
    yield "| Variant | Not with | Reason |"
    yield "|---|---|---|"
    for variant in VARIANTS.values():
        for setting, reason in variant.incompatible_with.items():
            yield f"| `{variant.name}` | {setting} | {reason} |"
    yield ""


def _measured(model: str, published: dict[str, str]) -> Iterator[str]:
    yield "| Variant | Rate | Held-out loss | Reloaded | Trained | File | Memory | Merge |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in VARIANTS:
        file = RESULTS / model / f"{name}.json"
        if file.is_file():
            yield _line(name, json.loads(file.read_text(encoding="utf-8")))
        else:
            yield published.get(name, f"| `{name}` | not measured | | | | | | |")
    yield ""


def _line(name: str, result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"| `{name}` | {result['failed']} | | | | | | |"
    cells = (
        f"`{name}`",
        f"{result['learning_rate']:.0e}",
        f"{result['before']:.4f} → {result['after']:.4f}",
        f"{result['stock']:.4f}",
        f"{result['trainable']:,}",
        format_bytes(result["bytes"]),
        format_bytes(result["memory"]),
        "not mergeable" if result["merge"] is None else f"{result['merge']:.0e}",
    )
    return f"| {' | '.join(cells)} |"


_NOTES = """\
## Implementation notes

**Initializations subtracted from the base** (`pissa`, `olora`, `corda`, `lora_ga`). These train `W - s B0 A0 + s B A`.
The initialization `s B0 A0` is a part of the weight, or made from the gradient. PEFT changes the base for that and
rounds the rest to the base's dtype, and its file then fits only a base changed in the same way. Here the base stays as
it is, and `-B0`, `A0` are a second LoRA that is never trained. The function and all gradients are the same. The file
holds one LoRA of twice the rank with both: a plain adapter for the untouched base.

**Initializations that read examples** (`eva`, `corda`, `lora_ga`) take the first `calibration_samples` training
examples, before the first step, by PEFT's own code.

**`loftq`** starts from the best low-rank fit of the 4-bit quantization error of each weight. The error is computed
from the base's own file, and the fit is divided by the adapter's scale, which PEFT's function leaves out.

**`adalora`** drops directions by a schedule over all steps. Its orthogonality term is added to the loss of each
optimizer step, not to the held-out loss. The file holds full matrices, with zeros for dropped directions: PEFT's own
truncated ones can be empty.

**Added tokens.** PEFT keeps the embeddings of added tokens inside an adapter of the LoRA class (and AdaLoRA). Beside
any other variant they are a second adapter in the run's folder `token_rows`, of PEFT's type `TRAINABLE_TOKENS`:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(BASE)
model.resize_token_embeddings(VOCABULARY_SIZE)  # where the added ids lie beyond the base's vocabulary
model = PeftModel.from_pretrained(model, f"{RUN}/token_rows").merge_and_unload()
model = PeftModel.from_pretrained(model, RUN)
```

`peftchat chat`, `merge` and `export` do this themselves, and the run's `README.md` contains the code.

**Prompts** (`prompt_tuning`, `p_tuning`, `prefix_tuning`) come once per sequence, so these variants train with
`data.packing: false`, which is their default.

**Warnings of PEFT.** Where layers share tensors (`lily`, `vera`, `randlora`, `vblora`, `tinylora`, `unilora`), a file
holds each once. PEFT warns about missing keys when it loads such a file, and fills all layers through the first one.
"""

if __name__ == "__main__":
    main()
