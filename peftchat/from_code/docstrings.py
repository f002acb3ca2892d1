"""Docstring parser: prose without markup, parameters and examples."""

import ast
import builtins
import doctest
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from peftchat.from_code.english import is_aside, sentences
from peftchat.from_code.inventory import UNPARSABLE

MAX_SENTENCES = 4
"""Most sentences of a docstring's prose."""

MAX_WORDS = 70
"""Words of a docstring's prose beyond which no sentence is added."""
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`~?\.?([^`<]+?)(?:\s*<[^>]*>)?`")
_LITERAL = re.compile(r"``([^`\n]+)``")
_SIGNATURE_LINE = re.compile(r"^[\w.]+\([^)]*\)(\s*->\s*[^.]*)?$")
_ARROW = re.compile(r"^[\w.]+\([^)]*\)\s*-+>?\s*")
_BULLET = re.compile(r"([-*+o•]|\(?\d+[.)])\s")
_SECTION = re.compile(
    r"^(args|arguments|parameters|params|returns?|yields?|raises?|examples?|notes?|see also|attributes|references|"
    r"usage|keyword args|keyword arguments|other parameters|warnings?|todo)\s*:?$",
    re.I,
)
_GOOGLE = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s+(\S.*)$")
_NUMPY = re.compile(r"^\*{0,2}(\w+)\s*(?::.*)?$")
_SPHINX = re.compile(r":param(?:eter)?\s+(?:[\w\[\], .|]+\s)?\*{0,2}(\w+):\s*(.+?)(?=\n\s*:|\n\s*\n|\Z)", re.S)
_HISTORY = re.compile(r"\b(new|added|changed|deprecated) (in|since) (python|version)\b", re.I)
_PARAMETER_SECTION = re.compile(r"^(args|arguments|parameters|params|keyword args|keyword arguments)\s*:?$", re.I)


@dataclass(frozen=True, slots=True)
class Docstring:
    """A parsed docstring.

    Attributes:
        prose: its leading sentences, without markup.
        parameters: the first sentence about each documented parameter.
        examples: its interactive examples.
    """

    prose: tuple[str, ...]
    parameters: Mapping[str, str]
    examples: tuple[doctest.Example, ...]


def read_docstring(text: str | None) -> Docstring:
    """Parse a docstring; parts that cannot be used are left out."""
    if not text:
        return Docstring((), {}, ())
    clean = inspect.cleandoc(text)
    return Docstring(_prose(clean), _parameters(clean), _examples(clean))


def strip_markup(text: str) -> str:
    """Return text on one line without markup.

    reStructuredText roles and double backquotes become single backquotes.
    """
    text = _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", " ".join(text.split())))
    text = re.sub(r"`([\w.]+)'|(?<![\w*`])\*(\w+)\*(?![\w*`])", r"`\1\2`", text)
    text = re.sub(r"(?<![\w`.])(__\w+__)(?![\w`(])", r"`\1`", text)
    text = re.sub(r"(?<![\w`.(])((?:\w+\.)*\w+\(\))(?![\w`])", r"`\1`", text)
    text = re.sub(r"\b([Rr]eturns? )(true|false)(?= (if|when|iff)\b)", lambda m: f"{m[1]}`{m[2].title()}`", text)
    return re.sub(r"\s*--\s+", ": ", text).strip()


def _prose(text: str) -> tuple[str, ...]:
    """Return the sentences of the leading paragraphs, up to a length limit."""
    kept: list[str] = []
    words = 0
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        lines = lines[: next((n for n, line in enumerate(lines) if n and _BULLET.match(line.lstrip())), None)]
        while lines and _SIGNATURE_LINE.match(lines[0].strip()):
            lines = lines[1:]
        if not lines:
            continue
        if not _is_prose(lines):
            break
        found = sentences(_ARROW.sub("", strip_markup("\n".join(lines))))
        for sentence in found:
            length = len(sentence.split())
            if is_aside(sentence) or _HISTORY.search(sentence) or not _is_sentence(sentence):
                continue
            if kept and (len(kept) >= MAX_SENTENCES or words + length > MAX_WORDS):
                return tuple(kept)
            kept.append(sentence)
            words += length
        if not kept or words >= MAX_WORDS // 2:
            break
    return tuple(kept) if words <= 2 * MAX_WORDS else ()


def _is_prose(lines: list[str]) -> bool:
    """Return whether a paragraph is running text.

    Sections, lists, tables, code and field lists are not.
    """
    if _SECTION.match(lines[0].strip()) or any(
        line.strip().startswith((">>>", ":param", ":return", "..")) for line in lines
    ):
        return False
    if len(lines) > 1 and set(lines[1].strip()) <= set("-=~") and lines[1].strip():
        return False
    first = lines[0].lstrip()
    if _BULLET.match(first):
        return False
    # Indented or column-aligned lines are code or tables, even if they contain words.
    return not any(line.startswith(("  ", "\t")) or re.search(r"\S {3,}\S", line) for line in lines)


def _is_sentence(text: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(text.split()) >= 2 and letters >= 0.7 * len(text) and text.count("`") % 2 == 0 and "|" not in text


def _parameters(text: str) -> dict[str, str]:
    """Return the first sentence about each parameter.

    Google's, NumPy's and Sphinx's styles are supported.
    """
    found = {match[1]: match[2] for match in _SPHINX.finditer(text)}
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if not _PARAMETER_SECTION.match(line.strip()):
            continue
        numpy = start + 1 < len(lines) and bool(re.fullmatch(r"\s*-{3,}\s*", lines[start + 1]))
        found |= _section(lines[start + 2 :], _NUMPY) if numpy else _section(lines[start + 1 :], _GOOGLE)
    cleaned = {name: sentences(strip_markup(description)) for name, description in found.items()}
    return {name: described[0].rstrip(". ") + "." for name, described in cleaned.items() if described}


def _section(lines: list[str], head: re.Pattern[str]) -> dict[str, str]:
    """Return the entries of one parameter section by name.

    An entry has one head line; lines with more indentation continue it.
    """
    found: dict[str, str] = {}
    indent: int | None = None
    name = ""
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        underlined = position + 1 < len(lines) and bool(re.fullmatch(r"\s*-{3,}\s*", lines[position + 1]))
        if depth < indent or underlined or _SECTION.match(line.strip()):
            break
        if depth > indent:
            if name:
                found[name] = f"{found[name]} {line.strip()}".strip()
        elif match := head.match(line.strip()):
            name = match[1]
            found[name] = match[2] if head.groups > 1 else ""
        else:
            name = ""
    return {name: text for name, text in found.items() if text}


def _examples(text: str) -> tuple[doctest.Example, ...]:
    try:
        return tuple(doctest.DocTestParser().get_examples(text))
    except ValueError:  # prompts or indentation are inconsistent, so the example cannot run
        return ()


def worked_example(
    examples: tuple[doctest.Example, ...], name: str, module: str, siblings: frozenset[str]
) -> str | None:
    """Return a docstring's own example of `name` as a program.

    Results become comments. It is None if no example runs by itself.

    Args:
        examples: the docstring's interactive examples.
        name: the bare name that the example must use.
        module: the module to import it from.
        siblings: the other public names of that module, which are imported if the example uses them.
    """
    lines: list[str] = []
    used = False
    for example in examples[:8]:
        if example.exc_msg or len(lines) > 8 or (used and name not in example.source):
            break
        want = example.want.strip()
        if want.count("\n") > 2 or len(want) > 160 or "<BLANKLINE>" in want:
            break
        lines += example.source.rstrip().splitlines()
        lines += [f"# {line.strip()}" for line in want.splitlines()]
        used = used or bool(re.search(rf"\b{re.escape(name)}\b", example.source))
    code = "\n".join(re.sub(r"\s*#\s*doctest:.*", "", line) for line in lines)
    if not used or len(code) > 500:
        return None
    return _self_contained(code, name, module, siblings)


def _self_contained(code: str, name: str, module: str, siblings: frozenset[str]) -> str | None:
    try:
        tree = ast.parse(code)
    except UNPARSABLE:
        return None
    nodes = list(ast.walk(tree))
    imported = {
        alias.asname or alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    loaded = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    free = loaded - bound - imported - set(dir(builtins))
    heads = {module.split(".")[0]} & free
    wanted = sorted((free - heads) & (siblings | {name}))
    if free - heads - set(wanted):
        return None
    imports = [f"import {module}"] * bool(heads) + [f"from {module} import {', '.join(wanted)}"] * bool(wanted)
    return "\n".join([*imports, "", code]) if imports else code
