"""JSON text that keeps numbers as they were written, which no JSON parser of Python does."""

import json
from typing import Any

_SAFE_DIGITS = 18


class _Number(str):
    """A number by its spelling: `1.50`, `1E5`, or an integer of any length."""

    __slots__ = ()


def normalize_json(text: str) -> str:
    """Return the same JSON in one spelling: `, ` and `: ` between values, characters unescaped, numbers as written.

    This is how `json.dumps(…, ensure_ascii=False)` and the `tojson` of chat templates write it, except that `1.50`
    stays `1.50`, and a long integer what it is.

    Raises:
        ValueError: the text is not JSON, or is nested too deep.
    """
    return _write(_parse(text))


def split_json_list(text: str) -> list[str]:
    """Return the items of a JSON list, each in the spelling of `normalize_json`.

    Raises:
        ValueError: the text is not a JSON list.
    """
    value = _parse(text)
    if not isinstance(value, list):
        raise ValueError("not a JSON list")
    return [_write(item) for item in value]


def write_json(value: Any) -> str:
    """Return a parsed value in the spelling of `normalize_json`.

    Raises:
        ValueError: the value is nothing that JSON has, or is nested too deep.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not a JSON value: {error}") from None


def _parse(text: str) -> Any:
    """Return the value; numbers that Python would respell are `_Number`."""
    try:
        return json.loads(text, parse_float=_Number, parse_int=_integer, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None


def _integer(spelling: str) -> int | _Number:
    return int(spelling) if len(spelling) <= _SAFE_DIGITS and spelling != "-0" else _Number(spelling)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _write(value: Any) -> str:
    try:
        return _write_nested(value)
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None


def _write_nested(value: Any) -> str:
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join([f"{_write_nested(key)}: {_write_nested(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_write_nested, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
