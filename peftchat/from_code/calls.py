"""Calls of an object: an example call, and the parameters in words."""

import builtins
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass

from peftchat.from_code.behavior import ResultKind, result_kind
from peftchat.from_code.english import join_words
from peftchat.from_code.inventory import CodeObject, Parameter

MAX_NAMED_OPTIONAL = 4
"""Most optional parameters that a sentence names with their defaults."""
_LITERALS = {"int": "3", "float": "0.5", "bool": "True"}


@dataclass(frozen=True, slots=True)
class ExampleCall:
    """A call as code.

    Attributes:
        code: the program.
        placeholders: names in it that stand for the reader's own values.
    """

    code: str
    placeholders: tuple[str, ...]


def example_call(item: CodeObject, *, from_import: bool) -> ExampleCall | None:
    """Return a call with every required argument.

    It is None if the source does not determine the signature.

    Args:
        item: a function, method, property or class.
        from_import: write `from module import name` instead of `import module`.
    """
    outer, _, inner = item.name.rpartition(".")
    top = item.name.split(".")[0]
    start = f"from {item.module} import {top}" if from_import else f"import {item.module}"
    reference = item.name if from_import else item.full_name
    if item.kind in {"method", "property"} and item.binding == "instance":
        receiver = _instance_name(outer, item.module)
        if item.kind == "property":
            return ExampleCall(f"print({receiver}.{inner})", (receiver,))
        call = _call_expression(f"{receiver}.{inner}", item)
        return call and ExampleCall(_as_statement(call.code, item, avoid=receiver), (receiver, *call.placeholders))
    call = _call_expression(reference, item)
    if call is None:
        return None
    if item.kind == "class":
        name = _instance_name(item.name, item.module)
        line = call.code if name in call.placeholders else f"{name} = {call.code}"
    else:
        line = _as_statement(call.code, item)
    return ExampleCall(f"{start}\n\n{line}", call.placeholders)


def signature(item: CodeObject) -> str:
    """Return the signature: `shorten(text, width, **kwargs)`."""
    parts: list[str] = []
    parameters = item.parameters or ()
    keyword_only = False
    for index, parameter in enumerate(parameters):
        if parameter.kind == "keyword-only" and not keyword_only:
            keyword_only = True
            if not any(other.kind == "var-positional" for other in parameters[:index]):
                parts.append("*")
        star = {"var-positional": "*", "var-keyword": "**"}.get(parameter.kind, "")
        annotation = f": {parameter.annotation}" if parameter.annotation else ""
        equals = " = " if annotation else "="
        parts.append(
            f"{star}{parameter.name}{annotation}{equals}{parameter.default}"
            if parameter.default
            else f"{star}{parameter.name}{annotation}"
        )
        following = parameters[index + 1].kind if index + 1 < len(parameters) else None
        if parameter.kind == "positional-only" and following != "positional-only":
            parts.append("/")
    return f"{item.name.rpartition('.')[2]}({', '.join(parts)})"


def describe_parameters(item: CodeObject) -> str | None:
    """Describe the parameters in one to three sentences.

    Returns None if the signature is unknown.
    """
    if item.parameters is None or item.kind == "property":
        return None
    if not item.parameters:
        return "It takes no arguments."
    required = [parameter for parameter in item.parameters if parameter.required]
    sentences = [_describe_required(required)] if required else []
    if item.optional_parameters:
        sentences.append(_describe_optional(item.optional_parameters, also=bool(required)))
    rest = [parameter for parameter in item.parameters if parameter.kind in {"var-positional", "var-keyword"}]
    if rest:
        kinds = {"var-positional": "positional arguments (`*{}`)", "var-keyword": "keyword arguments (`**{}`)"}
        words = [kinds[parameter.kind].format(parameter.name) for parameter in rest]
        sentences.append(f"It {'also ' if sentences else ''}accepts any {join_words(words)}.")
    return " ".join(sentences)


def describe_optional_parameters(item: CodeObject) -> str | None:
    """Describe the optional parameters in one or two sentences.

    Returns None if there are none.
    """
    if len(item.optional_parameters) == 1:
        return describe_default(item.optional_parameters[0])
    return _describe_optional(item.optional_parameters, also=False) if item.optional_parameters else None


def describe_default(parameter: Parameter) -> str:
    """Describe the default of an optional parameter."""
    how = " You can only pass it by name." if parameter.kind == "keyword-only" else ""
    if _is_sentinel(parameter):
        return f"`{parameter.name}` is optional: you can leave it out.{how}"
    return f"`{parameter.name}` defaults to `{parameter.default}`, so you can leave it out.{how}"


def _describe_required(required: list[Parameter]) -> str:
    names = [_with_annotation(parameter) for parameter in required]
    keyword_only = [parameter for parameter in required if parameter.kind == "keyword-only"]
    count = "one required argument, " if len(names) == 1 else ""
    tail = f" ({join_words([f'`{p.name}`' for p in keyword_only])} by name only)" if keyword_only else ""
    return f"It takes {count}{join_words(names)}{tail}."


def _describe_optional(optional: Sequence[Parameter], *, also: bool) -> str:
    if len(optional) > MAX_NAMED_OPTIONAL:
        shown = join_words([f"`{parameter.name}`" for parameter in optional[:3]])
        return f"It {'also ' if also else ''}has {len(optional)} optional arguments, among them {shown}."
    if len(optional) == 1:
        (parameter,) = optional
        value = "is optional" if _is_sentinel(parameter) else f"is optional and defaults to `{parameter.default}`"
        name_only = " (by name only)" if parameter.kind == "keyword-only" else ""
        return f"{_with_annotation(parameter)} {value}{name_only}."
    words = [
        f"`{parameter.name}`" if _is_sentinel(parameter) else f"`{parameter.name}` (default `{parameter.default}`)"
        for parameter in optional
    ]
    return f"Optional are {join_words(words)}."


def _with_annotation(parameter: Parameter) -> str:
    if parameter.annotation is None or len(parameter.annotation) > 30:
        return f"`{parameter.name}`"
    return f"`{parameter.name}` (`{parameter.annotation.strip(chr(39))}`)"


def _is_sentinel(parameter: Parameter) -> bool:
    """Return whether the default is a marker that means "not given"."""
    default = parameter.default or ""
    return bool(re.match(r"(\w+\.)*_\w|object\(|[A-Z_]*(SENTINEL|MISSING|UNSET)|\.\.\.", default)) or len(default) > 40


def _call_expression(reference: str, item: CodeObject) -> ExampleCall | None:
    if item.parameters is None:
        return None
    written: list[str] = []
    placeholders: list[str] = []
    for parameter in item.parameters:
        if parameter.kind == "var-positional" and not written:
            written.append(f"*{parameter.name}")
            placeholders.append(parameter.name)
        elif parameter.required:
            sample = _literal(parameter)
            if sample is None:
                sample = f"my_{parameter.name}" if parameter.name in dir(builtins) else parameter.name
                placeholders.append(sample)
            written.append(f"{parameter.name}={sample}" if parameter.kind == "keyword-only" else sample)
    return ExampleCall(f"{reference}({', '.join(written)})", tuple(placeholders))


def _literal(parameter: Parameter) -> str | None:
    """Return a literal of the annotated type; None for any other type."""
    annotation = (parameter.annotation or "").strip("'\"").replace("typing.", "")
    if annotation in {"str", "str | None", "Optional[str]"}:
        return f'"{parameter.name}"'
    return _LITERALS.get(annotation)


def _instance_name(owner: str, module: str) -> str:
    """Return a variable name for an instance: `http_server` for `HTTPServer`."""
    bare = owner.rpartition(".")[2].lstrip("_")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z]{2})(?=[A-Z][a-z])", "_", bare).lower()
    taken = keyword.iskeyword(snake) or snake in dir(builtins) or snake in {bare, *module.split(".")}
    return f"my_{snake}" if taken else snake


def _as_statement(call: str, item: CodeObject, *, avoid: str = "") -> str:
    """Return the statement that a call needs, by the kind of its result."""
    taken = {parameter.name for parameter in item.parameters or ()} | {avoid}
    name = "result" if "result" not in taken else "value"
    element = "element" if "item" in taken else "item"
    match result_kind(item.node):
        case ResultKind.CONTEXT_MANAGER:
            return f"with {call}:\n    ..."
        case ResultKind.ASYNC_CONTEXT_MANAGER:
            return f"async def main():\n    async with {call}:\n        ..."
        case ResultKind.GENERATOR:
            return f"for {element} in {call}:\n    print({element})"
        case ResultKind.ASYNC_GENERATOR:
            return f"async def main():\n    async for {element} in {call}:\n        print({element})"
        case ResultKind.COROUTINE:
            return f"async def main():\n    return await {call}"
        case ResultKind.VALUE:
            return f"{name} = {call}"
        case _:
            return call
