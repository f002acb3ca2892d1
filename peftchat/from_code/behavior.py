"""Behavior of a function, read from its statements: result and exceptions."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

MAX_CODE = 60
"""Most characters of an expression that a sentence quotes."""


class ResultKind(Enum):
    """How a call returns its result."""

    NOTHING = auto()
    VALUE = auto()
    GENERATOR = auto()
    COROUTINE = auto()
    ASYNC_GENERATOR = auto()
    CONTEXT_MANAGER = auto()
    ASYNC_CONTEXT_MANAGER = auto()


@dataclass(frozen=True, slots=True)
class RaisedException:
    """A `raise` statement with a named exception.

    Attributes:
        name: the exception.
        condition: the test of the `if` around the statement; None if there is none, or if it is not the only one.
        message: the literal message; None for any other.
    """

    name: str
    condition: str | None
    message: str | None


def result_kind(node: ast.AST) -> ResultKind:
    """Return how a call of a function returns its result.

    Classes and modules count as `NOTHING`.
    """
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ResultKind.NOTHING
    decorators = {ast.unparse(item).rpartition(".")[2] for item in node.decorator_list}
    if "contextmanager" in decorators:
        return ResultKind.CONTEXT_MANAGER
    if "asynccontextmanager" in decorators:
        return ResultKind.ASYNC_CONTEXT_MANAGER
    own = list(own_nodes(node))
    yields = any(isinstance(item, ast.Yield | ast.YieldFrom) for item in own)
    if isinstance(node, ast.AsyncFunctionDef):
        return ResultKind.ASYNC_GENERATOR if yields else ResultKind.COROUTINE
    if yields:
        return ResultKind.GENERATOR
    returns = any(isinstance(item, ast.Return) and not _is_none(item.value) for item in own)
    return ResultKind.VALUE if returns else ResultKind.NOTHING


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function in source order.

    The nodes of functions and classes inside it are left out.
    """
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from own_nodes(child)


def body_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """Return the statements after the docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def is_stub(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function has no implementation.

    Its body is empty, `pass`, `...`, `return None` or a bare `raise NotImplementedError`.
    """
    body = body_of(node)
    if len(body) != 1:
        return not body
    (only,) = body
    if isinstance(only, ast.Raise):
        return only.exc is not None and "NotImplemented" in ast.unparse(only.exc)
    if isinstance(only, ast.Return):
        return _is_none(only.value)
    return isinstance(only, ast.Pass) or (isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant))


def raised_exceptions(node: ast.AST) -> tuple[RaisedException, ...]:
    """Return the exceptions that a function's own statements raise by name.

    Each name occurs once, in source order.
    """
    found: dict[str, RaisedException] = {}
    parameters = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
    for item in _find_raises(node, None):
        # A test of local names alone means nothing to a caller.
        if item.condition and not parameters & _names(item.condition):
            item = replace(item, condition=None)
        found.setdefault(item.name, item)
    return tuple(found.values())


def behavior(node: ast.AST) -> list[str]:
    """Describe how a function works in short sentences, the most useful first."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    sentences = list(_result_sentences(node))
    body = body_of(node)
    if len(body) == 1 and isinstance(body[0], ast.Return) and (value := _short_source(body[0].value)):
        sentences.append(f"Its whole body is `return {value}`.")
        return sentences
    loops = [item for item in body if isinstance(item, ast.For | ast.AsyncFor)]
    if len(loops) == 1 and (over := _short_source(loops[0].iter)) and (target := _short_source(loops[0].target)):
        sentences.append(f"It loops over `{over}`, calling each element `{target}`.")
    managers = [item for item in body if isinstance(item, ast.With | ast.AsyncWith)]
    if len(managers) == 1 and (entered := _short_source(managers[0].items[0].context_expr)):
        sentences.append(f"Its work happens inside `with {entered}`.")
    sentences += [sentence for item in raised_exceptions(node)[:2] if (sentence := describe_raise(item))]
    if len(body) > 1 and isinstance(body[-1], ast.Return) and (value := _short_source(body[-1].value)):
        sentences.append(f"At the end it returns `{value}`.")
    return sentences


def describe_raise(item: RaisedException) -> str:
    """Describe in one sentence when an exception is raised and its message."""
    when = f" when `{item.condition}` holds" if item.condition else ""
    message = f", with the message “{item.message}”" if item.message else ""
    return f"It {'raises' if when else 'can raise'} `{item.name}`{when}{message}."


def _result_sentences(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    match result_kind(node):
        case ResultKind.GENERATOR:
            yield "It is a generator, so the values come one at a time as you loop over it."
        case ResultKind.COROUTINE:
            yield "It is a coroutine, so call it with `await`."
        case ResultKind.ASYNC_GENERATOR:
            yield "It is an asynchronous generator, so loop over it with `async for`."
        case ResultKind.CONTEXT_MANAGER:
            yield "It is a context manager, so use it in a `with` statement."
        case ResultKind.ASYNC_CONTEXT_MANAGER:
            yield "It is an asynchronous context manager, so use it with `async with`."
        case _:
            return


def _find_raises(node: ast.AST, condition: str | None, *, outermost: bool = True) -> Iterator[RaisedException]:
    """Yield every exception that is raised by name below `node`.

    An exception has a condition only if its `if` is at the function's outermost level and before any return. Elsewhere
    the exception depends on more than that one test.
    """
    for child in ast.iter_child_nodes(node):
        outermost = outermost and not _returned_before(node, child)
        if isinstance(child, ast.Raise):
            if found := _read_raise(child, condition):
                yield found
        elif isinstance(child, ast.If) and outermost and child in getattr(node, "body", ()):
            test = _short_source(child.test)
            yield from _find_raises(ast.Module(child.body, []), test, outermost=False)
            yield from _find_raises(ast.Module(child.orelse, []), None, outermost=False)
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _find_raises(child, None, outermost=False)


def _returned_before(node: ast.AST, child: ast.AST) -> bool:
    body = getattr(node, "body", [])
    earlier = body[: body.index(child)] if isinstance(body, list) and child in body else []
    return any(isinstance(item, ast.Return) for statement in earlier for item in ast.walk(statement))


def _read_raise(node: ast.Raise, condition: str | None) -> RaisedException | None:
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
    return RaisedException(name, condition, " ".join(message.split()).rstrip(".") if message else None)


def _short_source(node: ast.AST | None) -> str | None:
    """Return an expression's source if it fits into a sentence."""
    if node is None or _is_none(node):
        return None
    text = ast.unparse(node)
    return text if len(text) <= MAX_CODE and "\n" not in text and "`" not in text else None


def _names(expression: str) -> set[str]:
    return {item.id for item in ast.walk(ast.parse(expression)) if isinstance(item, ast.Name)}


def _is_none(node: ast.AST | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)
