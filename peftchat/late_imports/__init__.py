"""Late imports: what libraries load while they are imported, and that a command may never need."""

import builtins
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.machinery import ModuleSpec, PathFinder
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

from peftchat.late_imports.compiler import LateCompiler
from peftchat.late_imports.model_scan import SCANS_MODELS, scan_once
from peftchat.late_imports.packages import LISTS_PACKAGES, looked_for_one_by_one
from peftchat.late_imports.patterns import HAS_PATTERNS, compile_late
from peftchat.late_imports.stand_ins import Importer, LateModule, real_value, stand_in
from peftchat.late_imports.symbols import ASKED, CHECKS_SIZES, SYMBOLIC, check_plain_conditions, for_plain_values
from peftchat.late_imports.table import COMPILER, DECORATORS, IMPORTERS, LARGE, NAMES, TORCH_OF_COMPILER
from peftchat.late_imports.uncollected import uncollected


def postpone_imports() -> None:
    """Let libraries import torch's compiler, sharded tensors, SymPy and DeepSpeed when they use them.

    What transformers does for all its models while it is imported is done in less time, with the same result. Only
    modules that the tables name, and that are not imported yet, are affected; the imports of all others, of peftchat
    and of a user's code, are what they are.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the modules of the tables, and executes them with other imports."""

    def __init__(self) -> None:
        compiler = LateCompiler()
        self._compiler = compiler
        self._after: Mapping[str, Callable[[ModuleType], None]] = MappingProxyType(
            {
                COMPILER: compiler.imported,
                CHECKS_SIZES: check_plain_conditions,
                SCANS_MODELS: scan_once,
                HAS_PATTERNS: compile_late,
                "torch.distributed": _name_late_submodules,
                "torch.distributed.tensor": _place_shards,
                "accelerate.utils.other": _ask_compiler_if_imported,
            }
        )
        self._names = {*TORCH_OF_COMPILER, LISTS_PACKAGES, *IMPORTERS, *DECORATORS, *LARGE, *self._after}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a module's own spec with another way to execute it."""
        if name not in self._names:
            return None
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return None
        execute = loader.exec_module

        loader.exec_module = functools.partial(self._execute, execute)
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        name = module.__name__
        importer = Importer()
        if name in IMPORTERS:
            _import_by(module, functools.partial(_import, importer, IMPORTERS[name]))
        elif name in TORCH_OF_COMPILER:
            _import_by(module, self._import_compiler)
        try:
            with ExitStack() as around:
                if name in LARGE:
                    around.enter_context(uncollected())
                if name in DECORATORS:
                    around.enter_context(self._compiler.postponed())
                if name == LISTS_PACKAGES:
                    around.enter_context(looked_for_one_by_one())
                execute(module)
        finally:
            importer.is_executing = False
        if name in self._after:
            self._after[name](module)

    def _import_compiler(self, name: str, *arguments: Any) -> Any:
        if name == COMPILER and name not in sys.modules:
            late = LateModule(of=COMPILER, disable=self._compiler.disable_later, graph_break=lambda: None)
            return LateModule(of="torch", _dynamo=late)
        return builtins.__import__(name, *arguments)


def _import_by(module: ModuleType, import_: Callable[..., Any]) -> None:
    """Let the import statements of one module, and of its functions, call a function."""
    # Python takes it from the module's builtins.
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}


def _import(
    importer: Importer,
    late: Sequence[str],
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """Import a module, or return stand-ins for its names if none has imported it."""
    if level == 0 and name in late and name not in sys.modules:
        if not fromlist:
            return _late_module(importer, name)
        if name == SYMBOLIC and ASKED.issuperset(fromlist):
            return SimpleNamespace(**{one: for_plain_values(one) for one in fromlist})
        if NAMES[name].issuperset(fromlist):
            return SimpleNamespace(**{one: stand_in(importer, name, one) for one in fromlist})
    return builtins.__import__(name, globals, locals, fromlist or (), level)


def _late_module(importer: Importer, name: str) -> LateModule:
    if name not in importer.late_modules:
        stand_ins = {one: stand_in(importer, name, one) for one in NAMES[name]}
        importer.late_modules[name] = LateModule(of=name, **stand_ins)
    return importer.late_modules[name]


def _name_late_submodules(module: ModuleType) -> None:
    """Name the submodules that some modules use without an import of their own; the import replaces the name."""
    for submodule in ("tensor", "fsdp"):
        name = f"{module.__name__}.{submodule}"
        if name not in sys.modules:
            setattr(module, submodule, _late_module(Importer(is_executing=False), name))


def _ask_compiler_if_imported(module: ModuleType) -> None:
    """Nothing is compiled while the compiler is not imported; accelerate imports it to ask whether a model is."""

    def unless_never_compiled(ask: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(ask)
        def asked(*args: Any, **kwargs: Any) -> bool:
            return COMPILER in sys.modules and ask(*args, **kwargs)

        return asked

    for name in ("is_compiled_module", "has_compiled_regions"):
        setattr(module, name, unless_never_compiled(getattr(module, name)))


def _place_shards(_: ModuleType) -> None:
    """Give transformers' styles of tensor parallelism the placements that they made while they were imported."""
    registry = sys.modules.get("transformers.distributed.parallel_utils")
    for style in registry.ALL_PARALLEL_STYLES.values() if registry is not None else ():
        for name, value in vars(style).items():
            setattr(style, name, real_value(value))
