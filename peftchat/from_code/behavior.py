"""What a function's own statements show: how it hands back values, what it raises and when."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

MAX_CODE = 60
"""Longest expression quoted inside a sentence, in characters."""


class Shape(Enum):
    """How a call gives its result."""

    NOTHING = auto()
    VALUE = auto()
    GENERATOR = auto()
    COROUTINE = auto()
    ASYNC_GENERATOR = auto()
    CONTEXT_MANAGER = auto()
    ASYNC_CONTEXT_MANAGER = auto()


@dataclass(frozen=True, slots=True)
class Raised:
    """One `raise` of a named exception; `condition` is the test it stands under, `message` its literal text."""

    name: str
    condition: str | None
    message: str | None


def shape_of(node: ast.AST) -> Shape:
    """How a call of this function gives its result; classes and modules have no shape of their own."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return Shape.NOTHING
    decorators = {ast.unparse(item).rpartition(".")[2] for item in node.decorator_list}
    if "contextmanager" in decorators:
        return Shape.CONTEXT_MANAGER
    if "asynccontextmanager" in decorators:
        return Shape.ASYNC_CONTEXT_MANAGER
    own = list(own_nodes(node))
    yields = any(isinstance(item, ast.Yield | ast.YieldFrom) for item in own)
    if isinstance(node, ast.AsyncFunctionDef):
        return Shape.ASYNC_GENERATOR if yields else Shape.COROUTINE
    if yields:
        return Shape.GENERATOR
    returns = any(isinstance(item, ast.Return) and not _is_none(item.value) for item in own)
    return Shape.VALUE if returns else Shape.NOTHING


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body in source order, those of functions and classes inside it left out."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from own_nodes(child)


def body_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """The statements after the docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def is_stub(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether nothing is done: `pass`, `...`, a bare `raise NotImplementedError` or no statement at all."""
    body = body_of(node)
    if len(body) != 1:
        return not body
    (only,) = body
    if isinstance(only, ast.Raise):
        return only.exc is not None and "NotImplemented" in ast.unparse(only.exc)
    if isinstance(only, ast.Return):
        return _is_none(only.value)
    return isinstance(only, ast.Pass) or (isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant))


def raised(node: ast.AST) -> tuple[Raised, ...]:
    """The exceptions a function raises by name in its own statements, each name once, in source order."""
    found: dict[str, Raised] = {}
    parameters = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
    for item in _raises(node, None):
        # A test of local names alone tells a caller nothing.
        if item.condition and not parameters & _names(item.condition):
            item = replace(item, condition=None)
        found.setdefault(item.name, item)
    return tuple(found.values())


def behavior(node: ast.AST) -> list[str]:
    """Short sentences about how a function works, most telling first."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    said = list(_shape_sentences(node))
    body = body_of(node)
    if len(body) == 1 and isinstance(body[0], ast.Return) and (value := _short(body[0].value)):
        said.append(f"Its whole body is `return {value}`.")
        return said
    loops = [item for item in body if isinstance(item, ast.For | ast.AsyncFor)]
    if len(loops) == 1 and (over := _short(loops[0].iter)) and (target := _short(loops[0].target)):
        said.append(f"It loops over `{over}`, calling each element `{target}`.")
    managers = [item for item in body if isinstance(item, ast.With | ast.AsyncWith)]
    if len(managers) == 1 and (entered := _short(managers[0].items[0].context_expr)):
        said.append(f"Its work happens inside `with {entered}`.")
    said += [sentence for item in raised(node)[:2] if (sentence := describe_raise(item))]
    if len(body) > 1 and isinstance(body[-1], ast.Return) and (value := _short(body[-1].value)):
        said.append(f"At the end it returns `{value}`.")
    return said


def describe_raise(item: Raised) -> str:
    """One sentence about an exception: when it is raised and with which message."""
    when = f" when `{item.condition}` holds" if item.condition else ""
    message = f", with the message “{item.message}”" if item.message else ""
    return f"It {'raises' if when else 'can raise'} `{item.name}`{when}{message}."


def _shape_sentences(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    match shape_of(node):
        case Shape.GENERATOR:
            yield "It is a generator, so the values come one at a time as you loop over it."
        case Shape.COROUTINE:
            yield "It is a coroutine, so call it with `await`."
        case Shape.ASYNC_GENERATOR:
            yield "It is an asynchronous generator, so loop over it with `async for`."
        case Shape.CONTEXT_MANAGER:
            yield "It is a context manager, so use it in a `with` statement."
        case Shape.ASYNC_CONTEXT_MANAGER:
            yield "It is an asynchronous context manager, so use it with `async with`."
        case _:
            return


def _raises(node: ast.AST, condition: str | None, *, outermost: bool = True) -> Iterator[Raised]:
    """Every named raise below `node`.

    A test is named only for raises directly under an `if` of the function's outermost level and before any return:
    deeper down, later, or in an else branch, the exception depends on more than that one test.
    """
    for child in ast.iter_child_nodes(node):
        outermost = outermost and not _returned_before(node, child)
        if isinstance(child, ast.Raise):
            if found := _raise(child, condition):
                yield found
        elif isinstance(child, ast.If) and outermost and child in getattr(node, "body", ()):
            test = _short(child.test)
            yield from _raises(ast.Module(child.body, []), test, outermost=False)
            yield from _raises(ast.Module(child.orelse, []), None, outermost=False)
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _raises(child, None, outermost=False)


def _returned_before(node: ast.AST, child: ast.AST) -> bool:
    body = getattr(node, "body", [])
    earlier = body[: body.index(child)] if isinstance(body, list) and child in body else []
    return any(isinstance(item, ast.Return) for statement in earlier for item in ast.walk(statement))


def _raise(node: ast.Raise, condition: str | None) -> Raised | None:
    target = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    if not isinstance(target, ast.Name | ast.Attribute):
        return None
    name = ast.unparse(target)
    if not name.rpartition(".")[2][:1].isupper() or name in {"NotImplementedError", "AssertionError"}:
        return None
    message = None
    if isinstance(node.exc, ast.Call) and node.exc.args and isinstance(node.exc.args[0], ast.Constant):
        value = node.exc.args[0].value
        message = value if isinstance(value, str) and len(value) <= 80 and "%" not in value else None
    return Raised(name, condition, " ".join(message.split()).rstrip(".") if message else None)


def _short(node: ast.AST | None) -> str | None:
    """An expression's source if it fits into a sentence."""
    if node is None or _is_none(node):
        return None
    text = ast.unparse(node)
    return text if len(text) <= MAX_CODE and "\n" not in text and "`" not in text else None


def _names(expression: str) -> set[str]:
    return {item.id for item in ast.walk(ast.parse(expression)) if isinstance(item, ast.Name)}


def _is_none(node: ast.AST | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)
