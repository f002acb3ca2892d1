"""What a signature says: an example call, and its parameters in words."""

import builtins
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass

from peftchat.from_code.behavior import Shape, shape_of
from peftchat.from_code.english import listing
from peftchat.from_code.inventory import CodeObject, Parameter

MANY = 4
_SAMPLES = {"int": "3", "float": "0.5", "bool": "True"}


@dataclass(frozen=True, slots=True)
class ExampleCall:
    """A call as a program, and the names in it that stand for the reader's own values."""

    code: str
    placeholders: tuple[str, ...]


def example_call(item: CodeObject, *, from_import: bool) -> ExampleCall | None:
    """A call with every required argument; None where the source does not settle the signature.

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
        call = _call(f"{receiver}.{inner}", item)
        return call and ExampleCall(_result(call.code, item, avoid=receiver), (receiver, *call.placeholders))
    call = _call(reference, item)
    if call is None:
        return None
    if item.kind == "class":
        name = _instance_name(item.name, item.module)
        line = call.code if name in call.placeholders else f"{name} = {call.code}"
    else:
        line = _result(call.code, item)
    return ExampleCall(f"{start}\n\n{line}", call.placeholders)


def signature(item: CodeObject) -> str:
    """The call as a reader writes it: `shorten(text, width, **kwargs)`."""
    parts: list[str] = []
    parameters = item.parameters or ()
    by_name = False
    for index, parameter in enumerate(parameters):
        if parameter.kind == "by-name" and not by_name:
            by_name = True
            if not any(other.kind == "more-positional" for other in parameters[:index]):
                parts.append("*")
        star = {"more-positional": "*", "more-by-name": "**"}.get(parameter.kind, "")
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
    """The parameters in one to three sentences, or None where the signature is not known."""
    if item.parameters is None or item.kind == "property":
        return None
    if not item.parameters:
        return "It takes no arguments."
    required = [parameter for parameter in item.parameters if parameter.required]
    said = [_required(required)] if required else []
    if item.options:
        said.append(_optional(item.options, also=bool(required)))
    rest = [parameter for parameter in item.parameters if parameter.kind in {"more-positional", "more-by-name"}]
    if rest:
        kinds = {"more-positional": "positional arguments (`*{}`)", "more-by-name": "keyword arguments (`**{}`)"}
        words = [kinds[parameter.kind].format(parameter.name) for parameter in rest]
        said.append(f"It {'also ' if said else ''}accepts any {listing(words)}.")
    return " ".join(said)


def describe_options(item: CodeObject) -> str | None:
    """The parameters that a call may leave out, in one or two sentences; None where there are none."""
    if len(item.options) == 1:
        return describe_default(item.options[0])
    return _optional(item.options, also=False) if item.options else None


def describe_default(parameter: Parameter) -> str:
    """What happens when an optional parameter is left out, as far as the signature tells."""
    how = " You can only pass it by name." if parameter.kind == "by-name" else ""
    if _is_sentinel(parameter):
        return f"`{parameter.name}` is optional: you can leave it out.{how}"
    return f"`{parameter.name}` defaults to `{parameter.default}`, so you can leave it out.{how}"


def _required(required: list[Parameter]) -> str:
    names = [_typed(parameter) for parameter in required]
    by_name = [parameter for parameter in required if parameter.kind == "by-name"]
    count = "one required argument, " if len(names) == 1 else ""
    tail = f" ({listing([f'`{p.name}`' for p in by_name])} by name only)" if by_name else ""
    return f"It takes {count}{listing(names)}{tail}."


def _optional(optional: Sequence[Parameter], *, also: bool) -> str:
    if len(optional) > MANY:
        shown = listing([f"`{parameter.name}`" for parameter in optional[:3]])
        return f"It {'also ' if also else ''}has {len(optional)} optional arguments, among them {shown}."
    if len(optional) == 1:
        (parameter,) = optional
        value = "is optional" if _is_sentinel(parameter) else f"is optional and defaults to `{parameter.default}`"
        name_only = " (by name only)" if parameter.kind == "by-name" else ""
        return f"{_typed(parameter)} {value}{name_only}."
    words = [
        f"`{parameter.name}`" if _is_sentinel(parameter) else f"`{parameter.name}` (default `{parameter.default}`)"
        for parameter in optional
    ]
    return f"Optional are {listing(words)}."


def _typed(parameter: Parameter) -> str:
    if parameter.annotation is None or len(parameter.annotation) > 30:
        return f"`{parameter.name}`"
    return f"`{parameter.name}` (`{parameter.annotation.strip(chr(39))}`)"


def _is_sentinel(parameter: Parameter) -> bool:
    """Whether the default is a marker that means "not given" rather than a value."""
    default = parameter.default or ""
    return bool(re.match(r"(\w+\.)*_\w|object\(|[A-Z_]*(SENTINEL|MISSING|UNSET)|\.\.\.", default)) or len(default) > 40


def _call(reference: str, item: CodeObject) -> ExampleCall | None:
    if item.parameters is None:
        return None
    written: list[str] = []
    placeholders: list[str] = []
    for parameter in item.parameters:
        if parameter.kind == "more-positional" and not written:
            written.append(f"*{parameter.name}")
            placeholders.append(parameter.name)
        elif parameter.required:
            sample = _sample(parameter)
            if sample is None:
                sample = f"my_{parameter.name}" if parameter.name in dir(builtins) else parameter.name
                placeholders.append(sample)
            written.append(f"{parameter.name}={sample}" if parameter.kind == "by-name" else sample)
    return ExampleCall(f"{reference}({', '.join(written)})", tuple(placeholders))


def _sample(parameter: Parameter) -> str | None:
    """A literal of the annotated type, or None where the reader's own value must stand."""
    annotation = (parameter.annotation or "").strip("'\"").replace("typing.", "")
    if annotation in {"str", "str | None", "Optional[str]"}:
        return f'"{parameter.name}"'
    return _SAMPLES.get(annotation)


def _instance_name(owner: str, module: str) -> str:
    """A variable for an instance: `HTTPServer` gives `http_server`."""
    bare = owner.rpartition(".")[2].lstrip("_")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z]{2})(?=[A-Z][a-z])", "_", bare).lower()
    taken = keyword.iskeyword(snake) or snake in dir(builtins) or snake in {bare, *module.split(".")}
    return f"my_{snake}" if taken else snake


def _result(call: str, item: CodeObject, *, avoid: str = "") -> str:
    """The call as a statement: awaited, looped over, entered or assigned as its definition demands."""
    taken = {parameter.name for parameter in item.parameters or ()} | {avoid}
    name = "result" if "result" not in taken else "value"
    element = "element" if "item" in taken else "item"
    match shape_of(item.node):
        case Shape.CONTEXT_MANAGER:
            return f"with {call}:\n    ..."
        case Shape.ASYNC_CONTEXT_MANAGER:
            return f"async def main():\n    async with {call}:\n        ..."
        case Shape.GENERATOR:
            return f"for {element} in {call}:\n    print({element})"
        case Shape.ASYNC_GENERATOR:
            return f"async def main():\n    async for {element} in {call}:\n        print({element})"
        case Shape.COROUTINE:
            return f"async def main():\n    return await {call}"
        case Shape.VALUE:
            return f"{name} = {call}"
        case _:
            return call
