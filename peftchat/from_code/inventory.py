"""What a Python file defines, read from its syntax tree: functions, methods, properties, classes, the module."""

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["function", "method", "property", "class", "module"]
Binding = Literal["instance", "class", "static"]
ParameterKind = Literal["positional-only", "ordinary", "by-name", "more-positional", "more-by-name"]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_HIDDEN_DECORATORS = frozenset({"overload", "setter", "deleter", "register"})
_CONSTRUCTORS = ("__init__", "__new__")
_PROPERTIES = frozenset({"property", "cached_property", "abstractproperty"})


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a signature; `default` and `annotation` are source text."""

    name: str
    kind: ParameterKind
    default: str | None = None
    annotation: str | None = None

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return self.default is None and self.kind in {"positional-only", "ordinary", "by-name"}


@dataclass(frozen=True, slots=True)
class CodeObject:
    """Something a user can ask about.

    Attributes:
        kind: what it is.
        module: where users import it from, such as `collections`.
        name: its name inside that module, such as `Counter.most_common`; empty for the module itself.
        line: where it starts in its file, from 1.
        docstring: as written, or None.
        parameters: of a call, without `self` or `cls`; None where the source does not settle them.
        source: its definition, dedented, decorators included; empty for modules.
        node: its syntax tree.
        binding: how a method gets its first argument.
        members: public names inside a class or module that have a docstring, by kind.
    """

    kind: Kind
    module: str
    name: str
    line: int
    docstring: str | None
    parameters: tuple[Parameter, ...] | None
    source: str
    node: ast.AST
    binding: Binding = "instance"
    members: tuple[tuple[Kind, str], ...] = ()

    @property
    def full_name(self) -> str:
        """Module and name: `collections.Counter.most_common`."""
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def options(self) -> tuple[Parameter, ...]:
        """The parameters that a call may leave out, private ones aside."""
        return tuple(p for p in self.parameters or () if p.default is not None and not is_private(p.name))

    @property
    def quotable(self) -> str:
        """The source text that conversations about it may quote: of a class, all but methods."""
        if not isinstance(self.node, ast.ClassDef):
            return self.source
        apart = [
            item
            for item in self.node.body
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and item.name not in _CONSTRUCTORS
        ]
        first = self.line
        lines = self.source.splitlines()
        for item in apart:
            for line in range(item.lineno, (item.end_lineno or item.lineno) + 1):
                lines[line - first] = ""
        return "\n".join(lines)

    @property
    def top(self) -> str:
        """The outermost object it belongs to, so that a class and its methods stay together."""
        return f"{self.module}.{self.name.split('.')[0]}" if self.name else self.module


def is_private(name: str) -> bool:
    """Whether a bare name starts with an underscore."""
    return name.startswith("_")


def exported(tree: ast.Module) -> tuple[str, ...] | None:
    """The names in a literal `__all__`, or None where there is none."""
    for node in tree.body:
        if not (isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.List | ast.Tuple)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            elements = node.value.elts
            return tuple(
                item.value for item in elements if isinstance(item, ast.Constant) and isinstance(item.value, str)
            )
    return None


def top_level(tree: ast.Module) -> dict[str, FunctionNode | ast.ClassDef]:
    """A module's functions and classes by name; the first of several alternatives (if/else, try/except) counts."""
    return _definitions(tree.body)


def build(node: FunctionNode | ast.ClassDef, text: str, module: str, *, private: bool) -> Iterator[CodeObject]:
    """The object a top-level definition makes, then those inside it.

    Args:
        node: the definition.
        text: its file's text.
        module: where users import it from.
        private: include names that start with an underscore.
    """
    yield from _build(node, text, module, "", private=private)


def parameters_of(node: FunctionNode, *, drop_first: bool = False) -> tuple[Parameter, ...]:
    """A function's parameters in order; `drop_first` leaves out `self` or `cls`."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = [
        _parameter(item, "positional-only" if index < len(arguments.posonlyargs) else "ordinary", default)
        for index, (item, default) in enumerate(zip(positional, defaults, strict=True))
    ]
    found = found[1:] if drop_first else found
    if arguments.vararg:
        found.append(_parameter(arguments.vararg, "more-positional", None))
    found += [
        _parameter(item, "by-name", default)
        for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append(_parameter(arguments.kwarg, "more-by-name", None))
    return tuple(found)


def _parameter(item: ast.arg, kind: ParameterKind, default: ast.expr | None) -> Parameter:
    return Parameter(
        item.arg,
        kind,
        ast.unparse(default) if default is not None else None,
        ast.unparse(item.annotation) if item.annotation is not None else None,
    )


def _build(
    node: FunctionNode | ast.ClassDef, text: str, module: str, prefix: str, *, private: bool
) -> Iterator[CodeObject]:
    name = f"{prefix}.{node.name}" if prefix else node.name
    start = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    source = textwrap.dedent("\n".join(text.splitlines()[start - 1 : node.end_lineno]))
    docstring = ast.get_docstring(node)
    if isinstance(node, ast.ClassDef):
        inner = [item for item in _definitions(node.body).values() if private or not is_private(item.name)]
        members = tuple((_kind(item, inside_class=True), item.name) for item in inner if ast.get_docstring(item))
        yield CodeObject("class", module, name, start, docstring, _constructor(node), source, node, members=members)
        for item in inner:
            yield from _build(item, text, module, name, private=private)
        return
    decorators = _decorators(node)
    binding: Binding = (
        "static" if "staticmethod" in decorators else "class" if "classmethod" in decorators else "instance"
    )
    drop_first = bool(prefix) and binding != "static"
    parameters = parameters_of(node, drop_first=drop_first)
    kind = _kind(node, inside_class=bool(prefix))
    yield CodeObject(kind, module, name, start, docstring, parameters, source, node, binding)


def _definitions(body: list[ast.stmt]) -> dict[str, FunctionNode | ast.ClassDef]:
    found: dict[str, FunctionNode | ast.ClassDef] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not _HIDDEN_DECORATORS & _decorators(node):
                found.setdefault(node.name, node)
        elif isinstance(node, ast.ClassDef):
            found.setdefault(node.name, node)
        elif isinstance(node, ast.If):
            found = _definitions(node.orelse) | _definitions(node.body) | found
        elif isinstance(node, ast.Try):
            handlers = [item for handler in node.handlers for item in handler.body]
            found = _definitions(handlers) | _definitions(node.orelse) | _definitions(node.body) | found
    return found


def _decorators(node: FunctionNode | ast.ClassDef) -> set[str]:
    """The last part of each decorator's name: `functools.wraps(f)` gives `wraps`."""
    names = set()
    for item in node.decorator_list:
        target = item.func if isinstance(item, ast.Call) else item
        names.add(target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", ""))
    return names


def _kind(node: FunctionNode | ast.ClassDef, *, inside_class: bool) -> Kind:
    if isinstance(node, ast.ClassDef):
        return "class"
    if not inside_class:
        return "function"
    return "property" if _PROPERTIES & _decorators(node) else "method"


def _constructor(node: ast.ClassDef) -> tuple[Parameter, ...] | None:
    """What a call of the class takes, where its own source says so; inherited constructors are not guessed."""
    methods = _definitions(node.body)
    for name in _CONSTRUCTORS:
        method = methods.get(name)
        if isinstance(method, ast.FunctionDef):
            return parameters_of(method, drop_first=True)
    if "dataclass" in _decorators(node) and not node.bases:
        return _dataclass_fields(node)
    return () if not node.bases and not node.decorator_list and not node.keywords else None


def _dataclass_fields(node: ast.ClassDef) -> tuple[Parameter, ...] | None:
    found = []
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        annotation = ast.unparse(item.annotation)
        if "ClassVar" in annotation:
            continue
        if isinstance(item.value, ast.Call) or "KW_ONLY" in annotation or "InitVar" in annotation:
            return None  # field(...) may take the attribute out of the constructor
        default = ast.unparse(item.value) if item.value is not None else None
        found.append(Parameter(item.target.id, "ordinary", default, annotation))
    return tuple(found)
