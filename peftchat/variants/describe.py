"""The registry for people and for programs: a table, a page on one variant, plain values."""

from collections.abc import Iterable, Iterator
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftchat.variants.base import AdapterSection, Setting, Variant

_BASES: tuple[Setting, ...] = ("unquantized", "8 bits", "4 bits")
_SHORT = {"unquantized": "16", "8 bits": "8", "4 bits": "4"}
_VLLM = {"adapter": "adapter", "merged": "merged", "no": "no"}


def overview(variants: Iterable[Variant]) -> Table:
    """A line a variant."""
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        caption="Rate: the learning rate where the recipe gives none. Bits: of the base it trains on. ZeRO: the stages "
        "it trains under; ? stands for one that nothing speaks against and that was not run. Folds: `peftchat merge` "
        "makes plain weights of it. vLLM: how it serves the result (one that brings rows for new tokens is always "
        "merged first). `peftchat variants NAME` tells the reasons.",
        caption_justify="left",
    )
    for column in ("Variant", "Paper", "Rate", "Bits", "ZeRO", "Folds", "vLLM"):
        table.add_column(column, no_wrap=True)
    for variant in variants:
        paper = f"{variant.paper.authors} {variant.paper.year}" if variant.paper else ""
        table.add_row(
            variant.name,
            paper,
            f"{variant.learning_rate:.0e}".replace("e-0", "e-"),
            " ".join(_SHORT[base] for base in _BASES if base not in variant.refuses),
            variant.stages or "no",
            "yes" if variant.folds else "no",
            _VLLM[variant.vllm],
        )
    return table


def details(variant: Variant) -> RenderableType:
    """All there is to tell about one variant."""
    heading = Text(f"{variant.title} ({variant.name})", style="bold")
    parts: list[RenderableType] = [heading, Text(variant.summary), Text()]
    lines = Table.grid(padding=(0, 2))
    for label, text in _lines(variant):
        lines.add_row(Text(label, style="dim"), Text(text))
    parts.append(lines)
    if variant.options is not None:
        parts += [Text(), Text("Settings of the section `adapter`", style="bold"), _settings(variant.options)]
    parts += [Text(), Text("In a recipe", style="bold"), Text(example(variant))]
    return Group(*parts)


def _lines(variant: Variant) -> Iterator[tuple[str, str]]:
    if variant.paper is not None:
        yield "paper", str(variant.paper)
    if variant.aliases:
        yield "also called", ", ".join(variant.aliases)
    yield "learning rate", f"{variant.learning_rate:g} unless the recipe gives one"
    yield "folds", "yes, by `peftchat merge`" if variant.folds else f"no. {variant.instead}"
    yield "vLLM", _VLLM[variant.vllm]
    if variant.starts_on_data:
        yield "start", "is found in the training rows, by itself"
    if variant.options is not None:
        where = "inside the adapter" if variant.rows_inside else "an adapter of their own, in the folder token_rows"
        yield "new tokens", where
    for setting, why in variant.refuses.items():
        yield f"not with {setting}", why


def _settings(options: type[AdapterSection]) -> Table:
    table = Table("Key", "Default", "Meaning")
    for name, info in options.model_fields.items():
        if name != "variant":
            default = "chosen by the model" if info.default is None else str(info.default)
            table.add_row(Text(name), Text(default), Text(info.description or ""))
    return table


def example(variant: Variant) -> str:
    """Lines of a recipe that use the variant."""
    if variant.options is None:
        return "method: full"
    method = "qlora" if "unquantized" in variant.refuses else "lora"
    lines = [f"method: {method}", "adapter:", f"  variant: {variant.name}"]
    for name, info in variant.options.model_fields.items():
        if name != "variant" and info.default is not None:
            lines.append(f"  {name}: {info.default}")
    return "\n".join(lines)


def facts_of(variant: Variant) -> dict[str, Any]:
    """The entry as plain values."""
    fields = {} if variant.options is None else variant.options.model_fields
    return {
        "name": variant.name,
        "title": variant.title,
        "summary": variant.summary,
        "paper": str(variant.paper) if variant.paper else None,
        "aliases": list(variant.aliases),
        "settings": {
            name: {"default": info.default, "meaning": info.description}
            for name, info in fields.items()
            if name != "variant"
        },
        "learning_rate": variant.learning_rate,
        "works_with": {setting: setting not in variant.refuses for setting in get_args(Setting)},
        "refuses": dict(variant.refuses),
        "proved": sorted(variant.proved),
        "folds": variant.folds,
        "instead": variant.instead,
        "vllm": variant.vllm,
        "rows_inside": variant.rows_inside,
        "starts_on_data": variant.starts_on_data,
        "recipe": example(variant),
    }
