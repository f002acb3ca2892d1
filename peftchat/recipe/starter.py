"""A first recipe to fill in: every key with its meaning, those that most people set written out."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap

from peftchat.recipe.choices import Method
from peftchat.recipe.json_schema import SCHEMA_FILE
from peftchat.recipe.reference import KeyRow, SectionRows, sections
from peftchat.recipe.training import LEARNING_RATES

_WIDTH = 100

_ALWAYS = {
    "model": ("name",),
    "adapter": ("r", "alpha"),
    "quantization": ("bits",),
    "chat": ("template", "system", "loss_on"),
    "data": ("train", "eval_fraction", "max_length"),
    "training": (
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ),
}
"""The keys that are written out; all others stand as comments with their defaults."""

_SECTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "lora": ("adapter",),
    "qlora": ("adapter", "quantization"),
}


def starting_recipe(method: Method, target: Path, *, model: str | None = None, data: str | None = None) -> str:
    """The text of a commented recipe for `method`.

    Args:
        method: what is to be trained.
        target: where the recipe will lie, for the command in its first lines.
        model: folder or hub id of the base model; left to be filled in where it is None.
        data: file, folder or hub id of the dialogues; left to be filled in where it is None.
    """
    values = {
        "method": method,
        "output_dir": json.dumps(f"runs/{target.stem}", ensure_ascii=False),
        "model.name": "" if model is None else json.dumps(model, ensure_ascii=False),
        "data.train": "" if data is None else f"[{{path: {json.dumps(data, ensure_ascii=False)}}}]",
        "data.eval_fraction": "0.05",
        "training.learning_rate": f"{LEARNING_RATES[method]:.0e}".replace("e-0", "e-"),
    }
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "#",
        f"#     peftchat train {target}",
        "#",
        "# Keys that are commented out show their defaults. Check before training: `--dry-run`.",
    ]
    top, *others = sections()
    for section in (top, *others):
        if section.name in ("adapter", "quantization") and section.name not in _SECTIONS_OF[method]:
            continue
        lines += ["", *_section(section, values)]
    return "\n".join(lines) + "\n"


def _section(section: SectionRows, values: Mapping[str, str]) -> Iterator[str]:
    indent = "  " if section.name else ""
    if section.name:
        yield from _comment(section.meaning, "")
        yield f"{section.name}:"
    for row in section.keys:
        yield from _comment(row.meaning, indent)
        yield from _key(row, section.name, values, indent)


def _key(row: KeyRow, section: str, values: Mapping[str, str], indent: str) -> Iterator[str]:
    value = values.get(f"{section}.{row.name}" if section else row.name, row.default)
    if section and row.name not in _ALWAYS.get(section, ()):
        yield f"{indent}# {row.name}: {value}"
    elif value:
        yield f"{indent}{row.name}: {value}"
    else:
        yield f"{indent}{row.name}:  # to be filled in"


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in wrap(text, _WIDTH - len(indent) - 2):
        yield f"{indent}# {line}"
