"""What a template may ask of a content, of a reasoning and of the arguments of a call, read from its source."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from peftchat.errors import UserError, first_line

_SEARCHES = {
    "split",
    "rsplit",
    "startswith",
    "endswith",
    "replace",
    "find",
    "rfind",
    "index",
    "partition",
    "rpartition",
}
_SEARCHES |= {"count", "removeprefix", "removesuffix"}
_STRIPS = {"strip", "lstrip", "rstrip"}
_HARMLESS = {"upper", "lower", "title", "capitalize", "items", "keys", "values", "get", "append", "pop", "update"}
_FILTERS = {"trim", "length", "count", "tojson", "string", "safe", "default", "d", "list", "map", "selectattr", "items"}
_FILTERS |= {
    "rejectattr",
    "select",
    "reject",
    "join",
    "first",
    "last",
    "dictsort",
    "upper",
    "lower",
    "title",
    "replace",
}


@dataclass(frozen=True, slots=True)
class ContentConditions:
    """What a template may ask of a content.

    Attributes:
        parts: matches text in a content that the template may look for.
        whole: contents that it may compare with.
        strips: whether it may take white space away.
        calls: whether it asks nothing of calls but their names and their number.
    """

    parts: re.Pattern[str]
    whole: frozenset[str]
    strips: bool
    calls: bool = True

    def met_by(self, content: str) -> bool:
        """Return whether the template may treat this content in a way of its own."""
        stripped = content.strip()
        if not stripped or (self.strips and content != stripped):
            return True
        return stripped in self.whole or bool(self.parts.search(content))


class _Unknown(Exception):
    """The template does something with contents that is not understood."""


def _parse(source: str) -> Any:
    """Return the syntax tree of a template, with the extensions that transformers gives it."""
    from jinja2 import Environment
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[Any]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    return Environment(extensions=[loopcontrols, Generation]).parse(source)  # noqa: S701 - parsed, never rendered


def check_syntax(source: str) -> None:
    """Check that a template is Jinja that transformers can render.

    Raises:
        UserError: it is none, with the line; or it needs other files.
    """
    from jinja2 import TemplateSyntaxError, nodes

    try:
        tree = _parse(source)
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is no valid Jinja: {first_line(error)}",
            where=f"chat.template, line {error.lineno}",
            hint="Repair that line, or choose another template.",
        ) from error
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise UserError(
            "the chat template includes another file, and transformers renders one text only",
            where=f"chat.template, line {node.lineno}",
            hint="Copy the other file's text into the template.",
        )


@cache
def variables_of(source: str) -> frozenset[str]:
    """Return the variables that a template reads before it sets them, if it does."""
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables

    try:
        return frozenset(find_undeclared_variables(_parse(source)))
    except TemplateError:
        return frozenset()  # `check_syntax` tells it


@cache
def content_conditions(source: str) -> ContentConditions | None:
    """Return what a template may ask of contents; None if that cannot be told."""
    from jinja2 import TemplateError, nodes

    try:
        tree = _parse(source)
        parts: set[str] = set()
        whole: set[str] = set()
        of_tools, definitions, calls = _tool_names(tree), _tool_names(tree, calls=False), True
        for compare in tree.find_all(nodes.Compare):
            # Nothing is asked of contents there. Definitions of tools are the same in conversations of one shape.
            if not _is_of_tools(compare.expr, of_tools):
                _add_comparison(compare, parts, whole)
            for side in (compare.expr, *(operand.expr for operand in compare.ops)):
                asked = _is_of_tools(side, of_tools) and not _is_of_tools(side, definitions, calls=False)
                calls = calls and not (asked and not _is_exact(side))
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Getattr):
                _add_method(call.node.attr, call.args, parts)
        for filtered in tree.find_all(nodes.Filter):
            if filtered.name not in _FILTERS:
                raise _Unknown
            if filtered.name == "replace":
                _add_method("replace", filtered.args, parts)
        for item in tree.find_all(nodes.Getitem):
            if isinstance(item.arg, nodes.Slice) and not isinstance(item.node, nodes.Name):
                raise _Unknown
    except (_Unknown, TemplateError):
        return None
    pattern = "|".join(map(re.escape, sorted(part for part in parts if part))) or "(?!)"
    strips = any(call.attr in _STRIPS | {"split", "rsplit"} for call in tree.find_all(nodes.Getattr))
    strips = strips or any(filtered.name == "trim" for filtered in tree.find_all(nodes.Filter))
    return ContentConditions(re.compile(pattern, re.IGNORECASE), frozenset(whole), strips, calls)


def _tool_names(tree: Any, *, calls: bool = True) -> frozenset[str]:
    """Return the variables of a template that hold nothing but tools, calls, and parts of them; or no calls either."""
    from jinja2 import nodes

    bound: dict[str, list[Any]] = {}
    for node in tree.find_all((nodes.Assign, nodes.For)):
        source = node.node if isinstance(node, nodes.Assign) else node.iter
        for target in [node.target, *node.target.find_all(nodes.Name)]:
            if isinstance(target, nodes.Name):
                bound.setdefault(target.name, []).append(source)
    other = {target.name for block in tree.find_all(nodes.AssignBlock) for target in [block.target]
             if isinstance(target, nodes.Name)}  # fmt: skip
    other |= {argument.name for macro in tree.find_all((nodes.Macro, nodes.CallBlock)) for argument in macro.args}
    found = frozenset({"tools"} - other - bound.keys())
    while True:
        more = {
            name for name, sources in bound.items()
            if name not in other and all(_is_of_tools(source, found, calls=calls) for source in sources)
        }  # fmt: skip
        if more <= found:
            return found
        found |= more


def _is_of_tools(node: Any, of_tools: frozenset[str], *, calls: bool = True) -> bool:
    """Return whether an expression is a part of tools or calls: `tools`, `message.tool_calls`, or what is within."""
    from jinja2 import nodes

    while not isinstance(node, nodes.Name):
        if isinstance(node, nodes.Getattr) and node.attr == "tool_calls":
            return calls
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "tool_calls":
            return calls
        if not isinstance(node, nodes.Getattr | nodes.Getitem | nodes.Call | nodes.Filter) or node.node is None:
            return False
        node = node.node
    return node.name in of_tools


def _is_exact(node: Any) -> bool:
    """Return whether an expression of calls is the same in conversations of one shape: a name, a type, their number."""
    from jinja2 import nodes

    if isinstance(node, nodes.Filter):
        inner = node.node
        of_calls = isinstance(inner, nodes.Getattr) and inner.attr == "tool_calls"
        of_calls = of_calls or (isinstance(inner, nodes.Getitem) and getattr(inner.arg, "value", "") == "tool_calls")
        return node.name in ("length", "count") and of_calls
    last = node.attr if isinstance(node, nodes.Getattr) else getattr(getattr(node, "arg", None), "value", None)
    return last in ("name", "type")


def _add_comparison(compare: Any, parts: set[str], whole: set[str]) -> None:
    from jinja2 import nodes

    sides = [compare.expr, *(operand.expr for operand in compare.ops)]
    texts = {side.value for side in sides if isinstance(side, nodes.Const) and isinstance(side.value, str)}
    for operand in compare.ops:
        if operand.op.endswith("in"):
            if texts:
                parts |= texts
            elif isinstance(operand.expr, nodes.List | nodes.Tuple):
                whole |= {item.value for item in operand.expr.items if isinstance(item, nodes.Const)}
            else:
                raise _Unknown
        elif operand.op in ("eq", "ne"):
            others = [side for side in sides if not isinstance(side, nodes.Const)]
            plain = all(
                isinstance(side, nodes.Name | nodes.Getattr)
                or (isinstance(side, nodes.Getitem) and isinstance(side.arg, nodes.Const | nodes.Name)
                    and not isinstance(getattr(side.arg, "value", ""), int))
                for side in others
            )  # fmt: skip
            (whole if plain else parts).update(texts)
        numbers = {side.value for side in sides if isinstance(side, nodes.Const) and isinstance(side.value, int)}
        if numbers - {0, 1} and any(_is_length_of_content(side) for side in sides):
            raise _Unknown


def _is_length_of_content(node: Any) -> bool:
    from jinja2 import nodes

    if not (isinstance(node, nodes.Filter) and node.name in ("length", "count")):
        return False
    names = [str(getattr(one, "name", "")) + str(getattr(one, "attr", "")) for one in node.find_all(nodes.Expr)]
    names += [str(one.value) for one in node.find_all(nodes.Const)]
    return not any("messages" in name or "tools" in name or "calls" in name for name in names)


def _add_method(name: str, args: Sequence[Any], parts: set[str]) -> None:
    from jinja2 import nodes

    if name in _HARMLESS:
        return
    if name not in _SEARCHES | _STRIPS:
        raise _Unknown
    for arg in args[:1]:
        if not (isinstance(arg, nodes.Const) and isinstance(arg.value, str)):
            raise _Unknown
        if name in _SEARCHES or arg.value.strip():
            parts.add(arg.value)
            if name in _STRIPS:
                parts.update(arg.value)


def source_of(jinja: str | Mapping[str, str]) -> str:
    """Return the source that conversations without tools are rendered with."""
    return jinja if isinstance(jinja, str) else jinja.get("default", "")
