"""Answers about one object of the code, one method per question.

A method returns None where the source does not contain the answer.
"""

import ast
import re
from dataclasses import dataclass
from functools import cached_property

from peftchat.from_code.behavior import behavior, body_of, describe_raise, is_stub, raised_exceptions
from peftchat.from_code.calls import (
    describe_default,
    describe_optional_parameters,
    describe_parameters,
    example_call,
    signature,
)
from peftchat.from_code.docstrings import Docstring, read_docstring, worked_example
from peftchat.from_code.english import following_sentence, infinitive_phrase, join_words, sentence_about
from peftchat.from_code.inventory import UNPARSABLE, CodeObject, Parameter

MAX_ANSWER = 800
"""Most characters of an answer, about 200 tokens."""

MAX_LISTED = 8
"""Most members of a kind that an answer names."""


@dataclass(frozen=True)
class Answers:
    """The answers about one object.

    Args:
        item: the object.
        siblings: the public names of its module.
    """

    item: CodeObject
    siblings: frozenset[str]

    @cached_property
    def doc(self) -> Docstring:
        """The parsed docstring."""
        text = self.item.docstring
        for parameter in self.item.parameters or ():
            text = text and re.sub(rf"(?<!\w)'{parameter.name}'(?!\w)", f"`{parameter.name}`", text)
        return read_docstring(text)

    @cached_property
    def task(self) -> str | None:
        """The object's purpose as an infinitive: `copy data and metadata`."""
        phrase = infinitive_phrase(self.doc.prose[0]) if self.doc.prose else None
        if phrase is None or len(phrase.split()) > 18 or " self" in phrase or ". " in phrase:
            return None
        return f"get {phrase.removeprefix('return ')}" if phrase.startswith("return ") else phrase

    def description(self) -> str | None:
        """Return a description from the docstring's first sentences."""
        if not self.doc.prose:
            return None
        first, *others = self.doc.prose
        subject = f"`{self.item.full_name}`"
        opening = sentence_about(subject, first, kind=self.item.kind)
        if opening is None:
            quoted = first.rstrip(".").replace('"', "'")
            opening = f'The documentation of {subject} says: "{quoted}."'
        return _join_within_limit([opening, *(following_sentence(sentence) for sentence in others)])

    def usage(self, *, from_import: bool) -> str | None:
        """Return an example call and explain its placeholders."""
        name = self.item.name.rpartition(".")[2]
        if self.item.kind in {"function", "class"} and (
            code := worked_example(self.doc.examples, name, self.item.module, self.siblings)
        ):
            return f"An example from its documentation:\n\n{_block(code)}"
        if (example := example_call(self.item, from_import=from_import)) is None:
            return None
        opening = "Like this:" if self.doc.prose else "It has no docstring to go by; from its signature:"
        notes = [self._placeholders(example.placeholders), describe_optional_parameters(self.item)]
        return "\n\n".join(filter(None, [opening, _block(example.code), " ".join(filter(None, notes))]))

    def parameters(self) -> str | None:
        """Describe the parameters, with their documentation if there is one."""
        text = describe_parameters(self.item)
        if text is None or not self.item.parameters:
            return None
        if text.startswith("It "):
            text = f"`{self.item.full_name}` {text[3:]}"
        for parameter in self.item.parameters:
            line = f"\n- `{parameter.name}`: {self.doc.parameters.get(parameter.name)}"
            if parameter.name in self.doc.parameters and len(text) + len(line) <= MAX_ANSWER:
                text += line
        return text

    def parameter(self, parameter: Parameter) -> str | None:
        """Describe one documented parameter."""
        if (text := self.doc.parameters.get(parameter.name)) is None:
            return None
        meaning = text[:1].upper() + text[1:]
        default = f" {describe_default(parameter)}" if parameter.default is not None else " It is required."
        typed = f" Its annotation is `{parameter.annotation}`." if parameter.annotation else ""
        return f"{meaning}{typed}{default}"

    def default(self, parameter: Parameter) -> str:
        """Describe the default of one optional parameter."""
        return describe_default(parameter)

    def raises(self) -> str | None:
        """Describe the exceptions that its own statements raise."""
        found = raised_exceptions(self.item.node) if self.item.kind in {"function", "method"} else ()
        if not found:
            return None
        sentences = [describe_raise(item) for item in found[:3]]
        sentences[0] = sentences[0].replace("It ", f"`{self.item.full_name}` ", 1)
        return _join_within_limit([*sentences, "Functions that it calls may raise others."])

    def source(self) -> str | None:
        """Return the source of a short function, without a long docstring."""
        node = self.item.node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_stub(node):
            return None
        code = _without_docstring(self.item.source)
        if code is None or len(code) > 600 or not 2 <= code.count("\n") + 1 <= 20:
            return None
        return code

    def explanation(self) -> str | None:
        """Explain how it works, from the docstring and the statements."""
        description, sentences = self.description(), behavior(self.item.node)
        if description is None or not sentences:
            return None
        return _join_within_limit([description, *sentences])

    def statements(self) -> str | None:
        """Explain the statements alone, for a reader who knows the description."""
        sentences = behavior(self.item.node)
        return _join_within_limit(sentences) if len(sentences) >= 2 else None

    def members(self) -> str | None:
        """List the documented names inside a class or module."""
        parts: list[str] = []
        for kind, plural in (
            ("function", "functions"),
            ("class", "classes"),
            ("method", "methods"),
            ("property", "properties"),
        ):
            if names := [name for own_kind, name in self.item.members if own_kind == kind]:
                shown = [f"`{name}`" for name in names[:MAX_LISTED]]
                rest = len(names) - len(shown)
                word = kind if len(names) == 1 else plural
                parts.append(f"the {word} {join_words([*shown, f'{rest} more'] if rest else shown)}")
        if not parts or len(self.item.members) < 2:
            return None
        return f"`{self.item.full_name}` has {', '.join(parts[:-1])}{', and ' if len(parts) > 1 else ''}{parts[-1]}."

    def signature(self) -> str:
        """Return the signature: `shorten(text, width, **kwargs)`."""
        return signature(self.item)

    def _placeholders(self, names: tuple[str, ...]) -> str | None:
        if not names:
            return None
        owner = self.item.full_name.rpartition(".")[0]
        if self.item.kind in {"method", "property"} and self.item.binding == "instance":
            receiver, *others = names
            sentence = f"`{receiver}` is an instance of `{owner}`"
            return f"{sentence}, and {_stand_for(others)}." if others else f"{sentence}."
        return f"Here {_stand_for(list(names))}."


def _stand_for(names: list[str]) -> str:
    shown = join_words([f"`{name}`" for name in names])
    return f"{shown} {'stands' if len(names) == 1 else 'stand'} for your own value{'s' if len(names) > 1 else ''}"


def _block(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _join_within_limit(parts: list[str]) -> str:
    """Join as many leading parts as `MAX_ANSWER` allows."""
    kept = ""
    for part in parts:
        if kept and len(kept) + len(part) + 1 > MAX_ANSWER:
            break
        kept = f"{kept} {part}".strip(" ")
    return kept


def _without_docstring(source: str) -> str | None:
    """Remove a docstring of several lines from a definition.

    Returns None if the remaining code is not valid.
    """
    try:
        (node,) = ast.parse(source).body
    except UNPARSABLE:
        return None
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    text = node.body[0]
    if body_of(node) is not node.body and text.end_lineno is not None:
        body = body_of(node)
        if not body or body[0].lineno <= text.end_lineno:
            return None
        if text.end_lineno > text.lineno:
            lines = source.splitlines()
            after = next(number for number in range(text.end_lineno, len(lines)) if lines[number].strip())
            source = "\n".join(lines[: text.lineno - 1] + lines[after:])
    source = "\n".join(line.rstrip() for line in source.splitlines()).strip("\n")
    try:
        ast.parse(source)
    except UNPARSABLE:
        return None
    return source
