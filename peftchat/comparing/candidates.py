"""Candidates of a comparison: variants by name, crossed with a grid of settings."""

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
from peftchat.recipe.objectives import PAIR_OBJECTIVES
from peftchat.variants import ADAPTERS, canonical_name

Settings = Mapping[str, Any]
"""Dotted keys of a recipe and their values."""

OBJECTIVE = "objective"

_SHORT_KEYS = {"learning_rate": "lr"}
_RESERVED_KEYS = {
    "method": "--variants",
    "adapter.variant": "--variants",
    "output_dir": "--output",
    "extends": "the recipe",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant with its settings.

    Attributes:
        name: its name in tables.
        variant: its `adapter.variant`, or `full`.
        settings: the recipe keys that distinguish it from other candidates.
    """

    name: str
    variant: str
    settings: Settings

    @property
    def slug(self) -> str:
        """Its part of a file name."""
        return _file_name(self.name, self.settings)


@dataclass(frozen=True, slots=True)
class Axis:
    """A recipe key and its values; a key that is only set has one."""

    key: str
    values: tuple[Any, ...]


def parse_axis(flag: str) -> Axis:
    """Parse a flag such as `adapter.r=8,16`.

    Commas inside brackets or quotes do not separate values. Each value is YAML.

    Raises:
        UserError: the flag is malformed, or the comparison itself decides the key.
    """
    key, equals, text = (part.strip() for part in flag.partition("="))
    where = f"--set {key}"
    if not equals or not all(key.split(".")):
        hint = "Write for example `--set adapter.r=8,16,64`."
        raise UserError("expected KEY=VALUE[,VALUE...]", where=f"--set {flag}", hint=hint)
    if key in _RESERVED_KEYS:
        raise UserError("`compare` sets this key itself", where=where, hint=f"Use {_RESERVED_KEYS[key]}.")
    values, _ = to_plain(parse_yaml(f"[{text}]", where), where)
    if not values:
        raise UserError("the key has no value", where=where, hint="Write for example `--set adapter.r=8`.")
    if len(values) > 1 and key in ("training.learning_rate", "training.seed"):
        hint = "Use --learning-rates A,B,..." if key == "training.learning_rate" else "Use --seeds N."
        raise UserError(f"expected one value for this key, got {len(values)}", where=where, hint=hint)
    return Axis(key, tuple(values))


def override_flags(settings: Settings) -> list[str]:
    """Return the settings as `--set` flags; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def make_candidates(names: Sequence[str], axes: Sequence[Axis]) -> list[Candidate]:
    """Combine every variant with every combination of values.

    Adapter settings do not apply to `full`, which has no adapter, nor an objective's options to another objective.

    Raises:
        UserError: a name is unknown, or a variant is given twice, perhaps by two of its names.
    """
    candidates: dict[str, Candidate] = {}
    for name in names:
        variant, settings = _parse_variant(name)
        used = [axis for axis in axes if variant != "full" or not axis.key.startswith("adapter.")]
        compared = [axis.key for axis in used if len(axis.values) > 1]
        combined = [
            _without_other_objectives({axis.key: value for axis, value in zip(used, values, strict=True)})
            for values in itertools.product(*(axis.values for axis in used))
        ]
        # Without the options of other objectives, some combinations are the same.
        for chosen in (one for place, one in enumerate(combined) if one not in combined[:place]):
            labels = [_label(key, chosen[key]) for key in compared if key in chosen]
            candidate = Candidate(" ".join([name, *labels]), variant, settings | chosen)
            same = next(
                (
                    one
                    for one in candidates.values()
                    if candidate.name == one.name or candidate.settings == one.settings
                ),
                None,
            )
            if same is not None:
                other = f" (`{same.name}` is the same)" if same.name != candidate.name else ""
                raise UserError(f"`{candidate.name}` is given twice{other}", where="--variants", hint="Name it once.")
            candidates[candidate.name] = candidate
    if not candidates:
        raise UserError("no variant is given", where="--variants", hint="Name some, such as lora,dora,full.")
    return list(candidates.values())


def is_of_all(key: str) -> bool:
    """Return whether a recipe key is no option of an objective."""
    return key.partition(".")[0] not in PAIR_OBJECTIVES


def _without_other_objectives(settings: Settings) -> dict[str, Any]:
    """Return settings without the options of other objectives, where they name an objective."""
    if OBJECTIVE not in settings:
        return dict(settings)
    own = f"{settings[OBJECTIVE]}."
    return {key: value for key, value in settings.items() if is_of_all(key) or key.startswith(own)}


def _parse_variant(name: str) -> tuple[str, dict[str, Any]]:
    """Return the variant of a name and the recipe keys that it sets."""
    if name == "full":
        return "full", {"method": "full"}
    for quantized, part in ((False, name), *((True, part) for part in _qlora_partners(name))):
        variant = canonical_name(part)
        if variant in ADAPTERS:
            method = "qlora" if quantized or "unquantized" in ADAPTERS[variant].incompatible_with else "lora"
            return variant, {"method": method, "adapter.variant": variant}
    known = ["full", "qlora", *ADAPTERS]
    near = get_close_matches(name, known, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"Use one of {', '.join(known)}, or a pair such as qlora+dora."
    raise UserError(f"unknown variant `{name}`", where="--variants", hint=hint)


def _qlora_partners(name: str) -> list[str]:
    """Return the variants that a name may pair with `qlora`, which alone means LoRA."""
    if name == "qlora":
        return ["lora"]
    return [part for part in (name.removeprefix("qlora+"), name.removesuffix("+qlora")) if part != name]


def _short_key(key: str) -> str:
    """Return the last part of a dotted key, abbreviated where that is common."""
    last = key.rpartition(".")[2]
    return _SHORT_KEYS.get(last, last)


def _label(key: str, value: Any) -> str:
    """Return what a setting adds to the name of a candidate: `r=8`; an objective is named as it is."""
    return str(value) if key == OBJECTIVE else f"{_short_key(key)}={_format_value(value)}"


def describe(settings: Settings) -> str:
    """Format settings for people: `lr 2e-4, r 8`."""
    return ", ".join(f"{_short_key(key)} {_format_value(value)}" for key, value in settings.items())


def slug(settings: Settings) -> str:
    """Format settings as part of a file name; different settings give different names."""
    return _file_name("-".join(f"{_short_key(key)}{_format_value(value)}" for key, value in settings.items()), settings)


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return format_lr(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def format_lr(rate: float) -> str:
    """Format a learning rate in as few characters as possible: `2e-4`, `0.3`."""
    if rate == 0 or 0.1 <= abs(rate) < 1e5:
        return f"{rate:.17g}" if float(f"{rate:.6g}") != rate else f"{rate:.6g}"
    text = next((short for short in (f"{rate:.2e}", f"{rate:.5e}") if float(short) == rate), f"{rate:.16e}")
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _file_name(text: str, settings: Settings) -> str:
    """Keep only characters that every file system supports.

    If any was removed, a digest of the settings is appended.
    """
    cleaned = re.sub(r"[^a-z0-9.+=_-]+", "-", text.lower()).strip("-.")[:60]
    if cleaned == text.replace(" ", "-"):
        return cleaned
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]
    return f"{cleaned}-{digest}"


def split_names(texts: Iterable[str]) -> list[str]:
    """Return the names in one or several comma-separated lists."""
    return [name for text in texts for part in text.split(",") if (name := part.strip())]
