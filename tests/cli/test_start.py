"""The start of a command: what is refused is refused at once, and nothing is imported that is not needed."""

import copy
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import re
import shutil
import sys
import weakref
from pathlib import Path

import pytest

from peftchat.late_imports.compiler import _compile_later
from peftchat.late_imports.model_scan import SCANS_MODELS, scan_once
from peftchat.late_imports.packages import Packages
from peftchat.late_imports.patterns import HAS_PATTERNS, LatePattern
from peftchat.late_imports.symbols import ASKED, for_plain_values
from peftchat.late_imports.table import DECORATORS, IMPORTERS, TORCH_OF_COMPILER
from peftchat.late_imports.uncollected import uncollected
from peftchat.library_setup import prepare_libraries
from tests.support.cli import PROJECT, start, true_peftchat
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe


@pytest.mark.parametrize("bad", ["data", "base"])
def test_bad_files_are_refused_before_torch_is_imported(bad: str, tmp_path: Path) -> None:
    said = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]} for text in "ab"]
    if bad == "data":
        said.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]})
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in said), encoding="utf-8")
    model = small_model()
    if bad == "base":
        model = Path(shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    recipe = write_training_recipe(tmp_path / "recipe.yaml", model, data, None, tmp_path / "run")
    done = true_peftchat("train", recipe, PYTHONPROFILEIMPORTTIME="1", PYTHONPATH=str(PROJECT))
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    said_lines = "".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert {"data": "train.jsonl:3", "base": "no safetensors weights"}[bad] in said_lines
    assert "peftchat.recipe" in imported
    assert not imported & {"torch", "transformers", "peft", "trl"}
    assert not (tmp_path / "run").exists()


NOT_FOR_ONE_STEP = (
    "deepspeed",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
)

TRAIN = """
import sys
import peftchat
# The server of the tests has imported some of them.
hidden = {name: sys.modules.pop(name) for name in sys.argv[2:] if name in sys.modules}
summary = peftchat.train(sys.argv[1])
assert summary.steps == 1
print(*(name for name in sys.argv[2:] if name in sys.modules))
sys.modules.update(hidden)
"""

USE_LATER = """
import torch
assert not isinstance(torch.ones(1), torch.distributed.tensor.DTensor)
assert "torch.distributed.tensor" not in sys.modules
import torch.distributed.tensor as sharded
assert torch.distributed.tensor is sharded and torch.distributed.fsdp.FSDPModule.__name__ == "FSDPModule"
import torch.optim.optimizer
from transformers.distributed import parallel_utils, tensor_parallel
made_while_imported = parallel_utils.ALL_PARALLEL_STYLES["colwise"].output_layouts
assert made_while_imported == sharded.Shard(-1), made_while_imported
assert isinstance(sharded.Shard(0), tensor_parallel.Shard) and not isinstance(0, tensor_parallel.Shard)
assert tensor_parallel.Replicate() == sharded.Replicate()
add_group = torch.optim.Optimizer.add_param_group.__wrapped__
assert add_group.__dynamo_disable is add_group
import torch._dynamo
assert not hasattr(add_group, "__dynamo_disable")
from transformers.integrations.finegrained_fp8 import _load_finegrained_fp8_kernel
assert id(_load_finegrained_fp8_kernel) in torch._dynamo.trace_rules._allowed_callable_ids.function_ids
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([parameter], lr=0.5)
torch.compile(lambda: (2 * parameter).sum(), backend="eager")().backward()
optimizer.step()
assert parameter.tolist() == [0, 0]
assert add_group.__dynamo_disable is not add_group
"""


def test_a_step_needs_no_compiler_no_sharded_tensors_and_no_sympy_which_work_when_they_are_imported_later(
    tmp_path: Path,
) -> None:
    data = tmp_path / "train.jsonl"
    said = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    data.write_text(json.dumps(said) + "\n", encoding="utf-8")
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", small_model(), data, None, tmp_path / "run", training={"max_steps": 1}
    )
    done = start("-c", TRAIN + USE_LATER, recipe, *NOT_FOR_ONE_STEP)
    status = done.wait(120)
    assert status == 0, done.stderr.read()
    assert done.stdout.read().split() == []


def _source(module: str) -> str:
    folder, *names = module.split(".")
    package = importlib.util.find_spec(folder)
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], *names)
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


@pytest.mark.parametrize("module", IMPORTERS)
def test_a_module_of_the_table_still_imports_what_it_needs_late(module: str) -> None:
    for imported in IMPORTERS[module]:
        assert re.search(rf"from {re.escape(imported)} import |    import {re.escape(imported)}\n", _source(module))


@pytest.mark.parametrize("module", sorted(DECORATORS - {"bitsandbytes"} | TORCH_OF_COMPILER))
def test_a_module_of_the_table_still_calls_the_compiler(module: str) -> None:
    assert re.search(r"@torch\.(compiler|_dynamo)\.|import torch\._dynamo|torch\.compile\(", _source(module))


def test_a_function_is_compiled_at_its_first_call_and_once() -> None:
    compiled: list[object] = []

    def compile_now(function, **options):
        compiled.append(options)
        return lambda value: function(value) + 100

    later = _compile_later(compile_now, lambda value: value + 1, dynamic=True)
    assert not compiled
    assert [later(1), later(2)] == [102, 103]
    assert compiled == [{"dynamic": True}]


def test_packages_are_looked_for_one_by_one_with_the_answers_of_the_list_of_all() -> None:
    everything = importlib.metadata.packages_distributions()
    packages = Packages(lambda: everything)
    assert dict(packages) == everything
    none = Packages(dict)
    assert [none[name] for name in ("peft", "transformers", "trl")] == [["peft"], ["transformers"], ["trl"]]
    with pytest.raises(KeyError):
        none["no_such_package"]


def test_a_scan_by_search_finds_the_models_names_that_a_scan_by_lines_finds() -> None:
    # A copy of the module is as transformers has it, whatever has been imported.
    spec = importlib.util.find_spec(SCANS_MODELS)
    assert spec is not None and spec.origin is not None
    spec = importlib.util.spec_from_file_location(f"{SCANS_MODELS}_copied", spec.origin)
    assert spec is not None and spec.loader is not None
    scanner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scanner)
    folder = Path(str(spec.origin)).parent.parent / "models"
    by_lines = scanner.create_import_structure_from_path(folder)
    assert "for index, line in enumerate(lines)" in inspect.getsource(scanner.fetch__all__)
    scanner.create_import_structure_from_path.cache_clear()
    scanned = scanner.create_import_structure_from_path
    scan_once(scanner)
    assert len(by_lines) > 400
    assert scanner.create_import_structure_from_path(folder) == by_lines
    before = scanned.cache_info().misses
    assert scanner.create_import_structure_from_path(str(folder / "__init__.py")) == by_lines
    assert scanned.cache_info().misses == before


def test_a_late_pattern_answers_as_a_compiled_one_and_is_compiled_when_it_is_asked() -> None:
    assert "self.compiled_sources = re.compile(" in _source(HAS_PATTERNS)
    never = LatePattern("(")
    late, compiled = LatePattern(r"(?P<g0>layers\.\d+)$", re.ASCII), re.compile(r"(?P<g0>layers\.\d+)$", re.ASCII)
    assert "_compiled" not in vars(late)
    for pattern in (late, copy.deepcopy(late)):
        assert (pattern.pattern, pattern.flags, pattern.groupindex) == (r"(?P<g0>layers\.\d+)$", 256, {"g0": 1})
        assert pattern.sub("x", "model.layers.12") == compiled.sub("x", "model.layers.12") == "model.x"
    with pytest.raises(re.error):
        never.search("")


@pytest.mark.parametrize("name", sorted(ASKED))
def test_plain_sizes_are_answered_as_torch_answers_and_symbolic_ones_by_torch(name: str) -> None:
    import torch
    from torch.fx.experimental import symbolic_shapes

    late, real = for_plain_values(name), getattr(symbolic_shapes, name)
    environment = symbolic_shapes.ShapeEnv()
    size = environment.create_unbacked_symint()
    shapes = [(torch.Size([2, 3]), [2, 3]), ((2, 3), (2,)), ((2, 3), (2, 4)), ((2, size), (2, size)), (2, 2), (2, (2,))]
    flags = [(True,), (False,), (size == 2,), (size == size,), (1.5,)]
    cases = {"sym_eq": shapes}
    for of_two in ("sym_and", "sym_or"):
        cases[of_two] = [*flags, (True, False), (False, False), (True, True), (True, size == 2)]
    for of_number in ("is_nested_int", "has_guarding_hint", "guarding_hint_or_throw"):
        cases[of_number] = [(0,), (7,), (True,), (size,)]
    for values in cases.get(name, flags):
        assert _said(late, values) == _said(real, values), values


def _said(function, values) -> str:
    try:
        return repr(function(*values))
    except Exception as error:
        return type(error).__name__


def test_nothing_is_collected_during_a_large_import_and_garbage_of_it_later() -> None:
    class Node:
        pass

    # A command that ran in this process has frozen what there was.
    gc.unfreeze()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            node = Node()
        assert not gc.isenabled()
        node.itself, gone = node, weakref.ref(node)
        del node
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect(1)
    assert gone() is not None
    gc.collect()
    assert gone() is None


def test_the_finder_is_there_once() -> None:
    prepare_libraries()
    prepare_libraries()
    assert sum(type(finder).__module__ == "peftchat.late_imports" for finder in sys.meta_path) == 1
