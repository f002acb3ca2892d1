"""Examples of plain conversations by their shape: what a template writes for the same turns with marks as contents.

Rendering answer by answer costs several renderings each. Conversations with the same roles differ in their contents
only. So the renderings of one of them, with a mark in the place of each content, serve all others: the contents are put
in. That holds where the template does nothing with a content but write it. `content_conditions` finds in its source
what it asks of contents; a conversation that has such text is rendered answer by answer. Beyond that, the whole
conversation is rendered once, and must equal what was put together.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from peftchat.chat_template.answer_rendering import RenderedAnswer
from peftchat.chat_template.answer_spans import ExampleBuilder
from peftchat.chat_template.templates import TemplateSpan
from peftchat.conversation import Conversation
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
_SHAPES = 4096
"""The most shapes that are remembered."""


@dataclass(frozen=True, slots=True)
class ContentConditions:
    """What a template may ask of a content.

    Attributes:
        parts: matches text in a content that the template may look for.
        whole: contents that it may compare with.
        strips: whether it may take white space away.
    """

    parts: re.Pattern[str]
    whole: frozenset[str]
    strips: bool

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
        of_tools = _tool_names(tree)
        for compare in tree.find_all(nodes.Compare):
            # Plain conversations have no tools and no calls, so that nothing is asked of contents there.
            if not _is_of_tools(compare.expr, of_tools):
                _add_comparison(compare, parts, whole)
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
    return ContentConditions(re.compile(pattern, re.IGNORECASE), frozenset(whole), strips)


def _tool_names(tree: Any) -> frozenset[str]:
    """Return the variables of a template that hold nothing but tools, calls, and parts of them."""
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
            if name not in other and all(_is_of_tools(source, found) for source in sources)
        }  # fmt: skip
        if more <= found:
            return found
        found |= more


def _is_of_tools(node: Any, of_tools: frozenset[str]) -> bool:
    """Return whether an expression is a part of tools or calls: `tools`, `message.tool_calls`, or what is within."""
    from jinja2 import nodes

    while not isinstance(node, nodes.Name):
        if isinstance(node, nodes.Getattr) and node.attr == "tool_calls":
            return True
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "tool_calls":
            return True
        if not isinstance(node, nodes.Getattr | nodes.Getitem | nodes.Call | nodes.Filter) or node.node is None:
            return False
        node = node.node
    return node.name in of_tools


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


@dataclass(frozen=True, slots=True)
class FilledText:
    """A text of a template with contents in it: pieces, and between them the numbers of the messages."""

    pieces: tuple[str, ...]
    messages: tuple[int, ...]

    def fill(self, contents: Sequence[str]) -> str:
        """Return the text with these contents."""
        if not self.messages:
            return self.pieces[0]
        found = [self.pieces[0]]
        for number, piece in zip(self.messages, self.pieces[1:], strict=True):
            found.append(contents[number])
            found.append(piece)
        return "".join(found)


@dataclass(slots=True)
class Shape:
    """What a template writes for conversations with the same turns.

    Attributes:
        whole: the conversation.
        answers: the trained answers, with marks as contents.
        borders: for each answer but the last, the text on both sides of the border between prompt and answer; None
            where the next prompt does not begin with them.
        builder: builds the spans, with marks as contents.
        examples: spans by which answers begin a new example, each with its text if that holds contents.
    """

    whole: FilledText
    answers: Sequence[RenderedAnswer]
    borders: Sequence[tuple[FilledText, FilledText] | None]
    builder: ExampleBuilder
    examples: dict[tuple[bool, ...], list[list[tuple[TemplateSpan, FilledText | None]]]] = field(default_factory=dict)


class Marks:
    """Contents that stand for the messages of a conversation, and can be found in a rendering."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(6)
        self._pattern = re.compile(rf"x{self._nonce}m(\d+)x")

    def conversation(self, conversation: Conversation) -> Conversation:
        """Return the conversation with a mark as the content of each message."""
        messages = [
            message._replace(content=f"x{self._nonce}m{number}x")
            for number, message in enumerate(conversation.messages)
        ]
        return Conversation(tuple(messages))

    def text(self, rendered: str) -> FilledText:
        """Return a rendering with marks as pieces and numbers of messages."""
        parts = self._pattern.split(rendered)
        return FilledText(tuple(parts[::2]), tuple(map(int, parts[1::2])))


ShapeKey = tuple[tuple[str, bool], ...]


def shape_key(conversation: Conversation, conditions: ContentConditions, special: re.Pattern[str]) -> ShapeKey | None:
    """Return what conversations of one shape have in common; None for one that has to be rendered answer by answer."""
    if conversation.tools is not None:
        return None
    seen = set()
    key = []
    for message in conversation.messages:
        if message[2:6] != ((), None, None, None) or conditions.met_by(message.content):
            return None
        if special.search(message.content):
            return None
        seen.add(message.content)
        key.append((message.role, message.train is False))
    return tuple(key) if len(seen) == len(key) else None


class ShapeCache:
    """The shapes that were met, by their key. A shape is made when it is met for the second time."""

    def __init__(self) -> None:
        self._met: dict[ShapeKey, Shape | None] = {}
        self._once: set[ShapeKey] = set()

    def get(self, key: ShapeKey, make: Any) -> Shape | None:
        """Return the shape of a key; None where there is none yet, or none can be made."""
        if key in self._met:
            return self._met[key]
        if key not in self._once or len(self._met) >= _SHAPES:
            if len(self._once) < _SHAPES:
                self._once.add(key)
            return None
        self._met[key] = made = make()
        return made


def source_of(jinja: str | Mapping[str, str]) -> str:
    """Return the source that conversations without tools are rendered with."""
    return jinja if isinstance(jinja, str) else jinja.get("default", "")
