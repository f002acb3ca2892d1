"""Inventory of a Python file: its functions, methods, properties and classes.

They are read from the syntax tree; nothing is imported.
"""

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What `ast.parse` raises for text that is no Python, of an unknown encoding, or nested too deep for the parser."""
Kind = Literal["function", "method", "property", "class", "module"]
Binding = Literal["instance", "class", "static"]
ParameterKind = Literal["positional-only", "positional-or-keyword", "keyword-only", "var-positional", "var-keyword"]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_HIDDEN_DECORATORS = frozenset({"overload", "setter", "deleter", "register"})
_CONSTRUCTORS = ("__init__", "__new__")
_PROPERTIES = frozenset({"property", "cached_property", "abstractproperty"})


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a signature.

    Attributes:
        name: its name.
        kind: as in `inspect.Parameter`.
        default: source text; None if there is none.
        annotation: source text; None if there is none.
    """

    name: str
    kind: ParameterKind
    default: str | None = None
    annotation: str | None = None

    @property
    def required(self) -> bool:
        """Whether a call must pass it."""
        return self.default is None and self.kind in {"positional-only", "positional-or-keyword", "keyword-only"}


@dataclass(frozen=True, slots=True)
class CodeObject:
    """A function, method, property, class or module.

    Attributes:
        kind: its kind.
        module: the module from which users import it, such as `collections`.
        name: its name inside that module, such as `Counter.most_common`; empty for the module itself.
        line: its first line in the file, from 1.
        docstring: its docstring; None if there is none.
        parameters: of a call, without `self` or `cls`; None if the source does not determine them.
        source: its dedented definition with decorators; empty for modules.
        node: its syntax tree.
        binding: how a method gets its first argument.
        members: kind and name of each documented public name inside a class or module.
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
    def optional_parameters(self) -> tuple[Parameter, ...]:
        """The optional parameters, without private ones."""
        return tuple(p for p in self.parameters or () if p.default is not None and not is_private(p.name))

    @property
    def quotable(self) -> str:
        """The source that a conversation may quote; of methods, only the constructor."""
        if not isinstance(self.node, ast.ClassDef):
            return self.source
        excluded = [
            item
            for item in self.node.body
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and item.name not in _CONSTRUCTORS
        ]
        first = self.line
        lines = self.source.splitlines()
        for item in excluded:
            for line in range(item.lineno, (item.end_lineno or item.lineno) + 1):
                lines[line - first] = ""
        return "\n".join(lines)

    @property
    def outermost_name(self) -> str:
        """The full name of the outermost class or function that contains it."""
        return f"{self.module}.{self.name.split('.')[0]}" if self.name else self.module


def is_private(name: str) -> bool:
    """Return whether a bare name starts with an underscore."""
    return name.startswith("_")


def exported(tree: ast.Module) -> tuple[str, ...] | None:
    """Return the names in a literal `__all__`; None if there is none."""
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
    """Return a module's functions and classes by name.

    If a name has several definitions (`if`/`else`, `try`/`except`), the first one counts.
    """
    return _definitions(tree.body)


def code_objects(node: FunctionNode | ast.ClassDef, text: str, module: str, *, private: bool) -> Iterator[CodeObject]:
    """Yield the object of a top-level definition and the objects inside it.

    Args:
        node: the definition.
        text: its file's text.
        module: the module from which users import it.
        private: whether to include names that start with an underscore.
    """
    yield from _code_objects(node, text, module, "", private=private)


def parameters_of(node: FunctionNode, *, drop_first: bool = False) -> tuple[Parameter, ...]:
    """Return a function's parameters in order.

    Args:
        node: the function.
        drop_first: whether to leave out `self` or `cls`.
    """
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = [
        _parameter(item, "positional-only" if index < len(arguments.posonlyargs) else "positional-or-keyword", default)
        for index, (item, default) in enumerate(zip(positional, defaults, strict=True))
    ]
    found = found[1:] if drop_first else found
    if arguments.vararg:
        found.append(_parameter(arguments.vararg, "var-positional", None))
    found += [
        _parameter(item, "keyword-only", default)
        for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append(_parameter(arguments.kwarg, "var-keyword", None))
    return tuple(found)


def _parameter(item: ast.arg, kind: ParameterKind, default: ast.expr | None) -> Parameter:
    return Parameter(
        item.arg,
        kind,
        ast.unparse(default) if default is not None else None,
        ast.unparse(item.annotation) if item.annotation is not None else None,
    )


def _code_objects(
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
            yield from _code_objects(item, text, module, name, private=private)
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
    """Return the last part of each decorator's name: `wraps` of `functools.wraps`."""
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
    """Return the parameters of a class's constructor.

    It is None if the class inherits the constructor or a decorator may change it.
    """
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
            return None  # field(...) may remove the attribute from the constructor
        default = ast.unparse(item.value) if item.value is not None else None
        found.append(Parameter(item.target.id, "positional-or-keyword", default, annotation))
    return tuple(found)
