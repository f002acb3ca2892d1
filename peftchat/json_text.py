"""JSON text that keeps numbers as they were written, which no JSON parser of Python does."""

import json
from typing import Any, Self

_SAFE_DIGITS = 4000
# Python refuses to convert longer integers.


class TextObject(dict[str, Any]):
    """An object out of JSON text: its nulls are its own, and not the filling of a table."""

    __slots__ = ()


class Number(float):
    """A number that remembers its spelling: `1.50`, `1E5`, or an integer of any length."""

    __slots__ = ("spelling",)
    spelling: str

    def __new__(cls, spelling: str) -> Self:
        """Make the number that the spelling means; it may round."""
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number


def normalize_json(text: str) -> str:
    """Return the same JSON in one spelling: `, ` and `: ` between values, characters unescaped, numbers as written.

    This is how `json.dumps(…, ensure_ascii=False)` and the `tojson` of chat templates write it, except that `1.50`
    stays `1.50`, and a long integer what it is.

    Raises:
        ValueError: the text is not JSON, or is nested too deep.
    """
    return write_json(parse_json(text))


def split_json_list(text: str) -> list[str]:
    """Return the items of a JSON list, each in the spelling of `normalize_json`.

    Raises:
        ValueError: the text is not a JSON list.
    """
    value = parse_json(text)
    if not isinstance(value, list):
        raise ValueError("not a JSON list")
    return [write_json(item) for item in value]


def write_json(value: Any) -> str:
    """Return a value in the spelling of `normalize_json`.

    Raises:
        ValueError: the value is nothing that JSON has, or is nested too deep.
    """
    try:
        return _write_nested(value)
    except TypeError as error:
        raise ValueError(f"not a JSON value: {error}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None


def parse_json(text: str | bytes, *, constants: bool = False) -> Any:
    """Return the value of a JSON text; each number that Python would respell is a `Number`, objects are `TextObject`.

    Args:
        text: of one value.
        constants: also read `NaN` and `Infinity`, which are no JSON, as floats.

    Raises:
        ValueError: the text is not JSON, or is nested too deep.
    """
    try:
        return json.loads(
            text,
            parse_float=Number,
            parse_int=exact_integer,
            parse_constant=float if constants else _no_constant,
            object_hook=TextObject,
        )
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None


def holds_floats(value: Any) -> bool:
    """Return whether there is a floating-point number in a value that a parser may have respelled."""
    if isinstance(value, dict):
        return any(map(holds_floats, value.values()))
    if isinstance(value, list):
        return any(map(holds_floats, value))
    return type(value) is float


def exact_integer(spelling: str) -> int | Number:
    """Return the integer, or a `Number` where Python would respell it or refuses to convert it."""
    return int(spelling) if len(spelling) <= _SAFE_DIGITS and spelling != "-0" else Number(spelling)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _write_nested(value: Any) -> str:
    if isinstance(value, Number):
        return value.spelling
    if isinstance(value, dict):
        return "{" + ", ".join([f"{_write_key(key)}: {_write_nested(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_write_nested, value)) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write_key(key: object) -> str:
    return json.dumps(key if isinstance(key, str) else str(key), ensure_ascii=False)
