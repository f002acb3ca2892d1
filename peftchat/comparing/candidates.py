"""What is compared: variants by name, crossed with a grid of settings."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from peftchat.errors import UserError
from peftchat.recipe.document import parse_yaml, to_plain
from peftchat.variants import ADAPTERS, canonical_name

Settings = Mapping[str, Any]
"""Dotted keys of a recipe and their values."""

_SHORT = {"learning_rate": "lr"}
_DECIDED_HERE = {
    "method": "--variants",
    "adapter.variant": "--variants",
    "output_dir": "--out",
    "extends": "the recipe",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the comparison.

    Attributes:
        name: how it is called in tables.
        variant: the `adapter.variant`, or `full`.
        settings: what sets it apart from the others.
    """

    name: str
    variant: str
    settings: Settings

    @property
    def slug(self) -> str:
        """Its part of a file's name."""
        return _tidy(self.name, self.settings)


@dataclass(frozen=True, slots=True)
class Axis:
    """A key and the values that it takes, one of them where it is merely set."""

    key: str
    values: tuple[Any, ...]


def parse_axis(flag: str) -> Axis:
    """`adapter.r=8,16` as an axis: commas outside brackets and quotes part values, each of which is YAML.

    Raises:
        UserError: not of that form, or a key that the comparison itself decides.
    """
    key, equals, text = (part.strip() for part in flag.partition("="))
    where = f"--set {key}"
    if not equals or not all(key.split(".")):
        hint = "Write for example `--set adapter.r=8,16,64`."
        raise UserError("not of the form KEY=VALUE[,VALUE...]", where=f"--set {flag}", hint=hint)
    if key in _DECIDED_HERE:
        raise UserError("this key is not for `--set` here", where=where, hint=f"Use {_DECIDED_HERE[key]}.")
    values, _ = to_plain(parse_yaml(f"[{text}]", where), where)
    if not values:
        raise UserError("no value is given", where=where)
    if len(values) > 1 and key in ("training.learning_rate", "training.seed"):
        hint = "Use --learning-rates, which are compared within each variant." if "rate" in key else "Use --seeds N."
        raise UserError("several values of this key are no candidates of their own", where=where, hint=hint)
    return Axis(key, tuple(values))


def flags(settings: Settings) -> list[str]:
    """The settings as `--set` flags; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def make_candidates(names: Sequence[str], axes: Sequence[Axis]) -> list[Candidate]:
    """Every variant with every combination of values on the grid.

    Settings of an adapter do not multiply `full`, which has none.

    Raises:
        UserError: an unknown name, or one that is given twice.
    """
    made: dict[str, Candidate] = {}
    for name in names:
        variant, settings = _variant(name)
        own = [axis for axis in axes if variant != "full" or not axis.key.startswith("adapter.")]
        for values in itertools.product(*(axis.values for axis in own)):
            chosen = {axis.key: value for axis, value in zip(own, values, strict=True)}
            told = [f"{label(key)}={_text(chosen[key])}" for key in (axis.key for axis in own if len(axis.values) > 1)]
            candidate = Candidate(" ".join([name, *told]), variant, settings | chosen)
            if candidate.name in made:
                raise UserError(f"`{candidate.name}` is given twice", where="--variants", hint="Name it once.")
            made[candidate.name] = candidate
    if not made:
        raise UserError("no variant is given", where="--variants", hint="Name some, such as lora,dora,full.")
    return list(made.values())


def _variant(name: str) -> tuple[str, dict[str, Any]]:
    """The variant that a name means, and what it sets."""
    if name == "full":
        return "full", {"method": "full"}
    for quantized, part in ((False, name), *((True, part) for part in _beside_qlora(name))):
        variant = canonical_name(part)
        if variant in ADAPTERS:
            method = "qlora" if quantized or "unquantized" in ADAPTERS[variant].incompatible_with else "lora"
            return variant, {"method": method, "adapter.variant": variant}
    words = ["full", "qlora", *ADAPTERS]
    near = get_close_matches(name, words, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(words)}; and pairs such as qlora+dora."
    raise UserError(f"`{name}` is no variant", where="--variants", hint=hint)


def _beside_qlora(name: str) -> list[str]:
    """What stands beside `qlora` in a pair, on either side; alone it means LoRA."""
    if name == "qlora":
        return ["lora"]
    return [part for part in (name.removeprefix("qlora+"), name.removesuffix("+qlora")) if part != name]


def label(key: str) -> str:
    """The last word of a dotted key, shortened where that is customary."""
    last = key.rpartition(".")[2]
    return _SHORT.get(last, last)


def describe(settings: Settings) -> str:
    """Settings for people: `lr 2e-4, r 8`."""
    return ", ".join(f"{label(key)} {_text(value)}" for key, value in settings.items())


def slug(settings: Settings) -> str:
    """Settings as a part of a file's name; different settings give different names."""
    return _tidy("-".join(f"{label(key)}{_text(value)}" for key, value in settings.items()), settings)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return rate_text(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def rate_text(rate: float) -> str:
    """A rate in the fewest characters that keep it: `2e-4`, `0.3`."""
    if rate == 0 or 0.1 <= abs(rate) < 1e5:
        return f"{rate:.17g}" if float(f"{rate:.6g}") != rate else f"{rate:.6g}"
    text = next((short for short in (f"{rate:.2e}", f"{rate:.5e}") if float(short) == rate), f"{rate:.16e}")
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _tidy(text: str, settings: Settings) -> str:
    """`text` with nothing but letters that every file system takes; what that loses is told by a digest."""
    tidy = re.sub(r"[^a-z0-9.+=_-]+", "-", text.lower()).strip("-.")[:60]
    if tidy == text.replace(" ", "-"):
        return tidy
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]
    return f"{tidy}-{digest}"


def split_names(texts: Iterable[str]) -> list[str]:
    """Names of one or several comma lists."""
    return [name for text in texts for part in text.split(",") if (name := part.strip())]
