"""Values of Arrow's types that Python gets as something else: JSON text, text as bytes, and maps as lists of pairs.

`datasets` keeps objects of mixed fields as JSON text of the type `arrow.json`.
"""

from collections.abc import Callable
from typing import Any

from peftchat.json_text import parse_json

Decoder = Callable[[Any], Any]


def decoder_of(data_type: Any) -> Decoder | None:
    """What opens the JSON text, bytes and maps in a Python value of an Arrow type; None if the type holds none.

    Lists and structs are searched (https://arrow.apache.org/docs/format/CanonicalExtensions.html#json).
    """
    from pyarrow import types

    if getattr(data_type, "extension_name", "") == "arrow.json":
        return _parsed
    if types.is_binary(data_type) or types.is_large_binary(data_type) or types.is_binary_view(data_type):
        return _text_of_bytes
    if types.is_map(data_type):
        inner = decoder_of(data_type.item_type)
        return lambda pairs: None if pairs is None else {key: inner(item) if inner else item for key, item in pairs}
    if types.is_list(data_type) or types.is_large_list(data_type) or types.is_fixed_size_list(data_type):
        inner = decoder_of(data_type.value_type)
        return None if inner is None else _decode_list(inner)
    if types.is_struct(data_type):
        return decoder_of_fields([data_type.field(index) for index in range(data_type.num_fields)])
    return None


def decoder_of_fields(fields: Any) -> Decoder | None:
    """The same for the fields of a struct, or of a table."""
    decoders = {field.name: found for field in fields if (found := decoder_of(field.type)) is not None}
    if not decoders:
        return None

    def decode(value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {name: decoders[name](item) if name in decoders else item for name, item in value.items()}

    return decode


def _decode_list(inner: Decoder) -> Decoder:
    def decode(items: list[Any] | None) -> list[Any] | None:
        return None if items is None else [inner(item) for item in items]

    return decode


def _text_of_bytes(value: bytes | None) -> str | bytes | None:
    """Bytes as text: some writers, such as older ones of Spark, do not mark texts as such. Others stay bytes."""
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _parsed(text: object) -> Any:
    """The value of JSON text; text that is no JSON stays as it is, and the format refuses it with its place."""
    if not isinstance(text, str):
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text
