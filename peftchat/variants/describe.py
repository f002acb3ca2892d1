"""The variants for people and for programs: a table, a page on one variant, plain values."""

from collections.abc import Iterable, Iterator
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftchat.formatting import format_rate
from peftchat.variants.base import Setting, Variant

_BASES: tuple[Setting, ...] = ("unquantized", "8 bits", "4 bits")
_BITS = {"unquantized": "16", "8 bits": "8", "4 bits": "4"}


def overview(variants: Iterable[type[Variant]]) -> Table:
    """Return a table with one line per variant."""
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        caption="Rate: the learning rate if the recipe sets none; auto follows from the model's width, "
        "auto/10 is a tenth of it. Bits: of the base it trains on. ZeRO: the stages it "
        "trains under; ? = expected to work, not tested. Merges: `peftchat merge` turns it into plain weights. vLLM: "
        "how it serves the result (an adapter with embeddings of added tokens is always merged first). "
        "`peftchat variants NAME` shows the reasons.",
        caption_justify="left",
    )
    for column in ("Variant", "Paper", "Rate", "Bits", "ZeRO", "Merges", "vLLM"):
        table.add_column(column, no_wrap=True)
    for variant in variants:
        table.add_row(
            variant.name,
            f"{variant.paper.authors} {variant.paper.year}" if variant.paper else "",
            rate_text(variant),
            bits(variant),
            variant.zero_stages() or "no",
            "yes" if variant.mergeable else "no",
            variant.vllm,
        )
    return table


def rate_text(variant: type[Variant]) -> str:
    """Return the learning rate of a recipe that sets none: `5e-3`, or `auto/2` for half of LoRA's rule by width."""
    if variant.auto_factor is None:
        return format_rate(variant.learning_rate)
    return "auto" if variant.auto_factor == 1 else f"auto/{1 / variant.auto_factor:g}"


def bits(variant: type[Variant]) -> str:
    """Return the bits per weight of the bases that a variant trains on."""
    return " ".join(_BITS[base] for base in _BASES if base not in variant.incompatible_with)


def details(variant: type[Variant]) -> RenderableType:
    """Return a page on one variant."""
    heading = Text(f"{variant.title} ({variant.name})", style="bold")
    parts: list[RenderableType] = [heading, Text(variant.summary), Text()]
    lines = Table.grid(padding=(0, 2))
    for label, text in _lines(variant):
        lines.add_row(Text(label, style="dim"), Text(text))
    parts.append(lines)
    if variant.setting_names():
        parts += [Text(), Text("Settings of the section `adapter`", style="bold"), _settings(variant)]
    parts += [Text(), Text("In a recipe", style="bold"), Text(example(variant))]
    return Group(*parts)


def _lines(variant: type[Variant]) -> Iterator[tuple[str, str]]:
    if variant.paper is not None:
        yield "paper", str(variant.paper)
    if variant.aliases:
        yield "also called", ", ".join(variant.aliases)
    yield "learning rate", _rate_sentence(variant)
    yield "merge", "yes, by `peftchat merge`" if variant.mergeable else f"no. {variant.merge_hint}"
    yield "vLLM", variant.vllm
    if variant.needs_calibration_data:
        yield "initialization", "computed from training examples before the first step"
    if variant.name != "full":
        inside = variant.supports_trainable_tokens
        yield "added tokens", "inside the adapter" if inside else "in a second adapter, in the folder token_rows"
    for setting, reason in variant.incompatible_with.items():
        yield f"not with {setting}", reason


def _rate_sentence(variant: type[Variant]) -> str:
    if variant.auto_factor is None:
        return f"{variant.learning_rate:g} if the recipe sets none; no rule by width is known"
    share = "" if variant.auto_factor == 1 else f", times {variant.auto_factor:g}"
    return f"by the model's width if the recipe sets none{share}; LoRA with alpha 32: 5e-4 at width 2000"


def _settings(variant: type[Variant]) -> Table:
    table = Table("Key", "Default", "Meaning")
    for name in variant.setting_names():
        info = variant.model_fields[name]
        default = "chosen by the model" if info.default is None else str(info.default)
        table.add_row(Text(name), Text(default), Text(info.description or ""))
    return table


def example(variant: type[Variant]) -> str:
    """Return lines of a recipe that use the variant."""
    if variant.name == "full":
        return "method: full"
    method = "qlora" if "unquantized" in variant.incompatible_with else "lora"
    lines = [f"method: {method}", "adapter:", f"  variant: {variant.name}"]
    for name in variant.setting_names():
        default = variant.model_fields[name].default
        if default is not None:
            lines.append(f"  {name}: {default}")
    return "\n".join(lines)


def as_dict(variant: type[Variant]) -> dict[str, Any]:
    """Return all that is known of the variant as plain values."""
    fields = {name: variant.model_fields[name] for name in variant.setting_names()}
    return {
        "name": variant.name,
        "title": variant.title,
        "summary": variant.summary,
        "paper": str(variant.paper) if variant.paper else None,
        "aliases": list(variant.aliases),
        "settings": {name: {"default": info.default, "meaning": info.description} for name, info in fields.items()},
        "learning_rate": variant.learning_rate,
        "auto_factor": variant.auto_factor,
        "works_with": {setting: setting not in variant.incompatible_with for setting in get_args(Setting)},
        "incompatible_with": dict(variant.incompatible_with),
        "tested_zero_stages": sorted(variant.tested_zero_stages),
        "mergeable": variant.mergeable,
        "merge_hint": variant.merge_hint,
        "vllm": variant.vllm,
        "supports_trainable_tokens": variant.supports_trainable_tokens,
        "needs_calibration_data": variant.needs_calibration_data,
        "recipe": example(variant),
    }
