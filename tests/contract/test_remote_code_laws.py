"""The laws of remote code (docs/architecture.md), read off the flat model files.

What transformers can follow was measured on 4.26 to 5.23; these tests are the narrowest of that.
"""

import ast
import importlib.util
import json
import logging
import os
import random
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from conftest import ROOT, import_from_package
from transformers.dynamic_module_utils import get_imports, get_relative_imports

REQUIRED = {"torch", "transformers", "sentencepiece", "packaging"}
FLAT_FILES = sorted(ROOT.glob("*.py"))
MODULES = {path.stem: path.read_text(encoding="utf-8") for path in FLAT_FILES}
TREES = {name: ast.parse(text) for name, text in MODULES.items()}
CALLS_WHILE_IMPORTING = {"check_transformers(transformers.__version__)"}
# Functions of other modules that change something, by what their names look like.
SWITCHES = re.compile(r"\.(_\w+|set_\w+|\w*seed\w*|\w*filter\w*|(en|dis)able\w*|environ\.\w+)$")

each_module = pytest.mark.parametrize("module", MODULES)


def entry_modules() -> set[str]:
    """The files that transformers starts from."""
    classes = []
    for name in ("config.json", "tokenizer_config.json"):
        for target in json.loads((ROOT / name).read_text(encoding="utf-8"))["auto_map"].values():
            classes += [target] if isinstance(target, str) else [name for name in target if name]
    return {name.partition(".")[0] for name in classes}


def imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def siblings(module: str) -> set[str]:
    """The flat files that a file imports itself."""
    nodes = [node for node in imports(TREES[module]) if isinstance(node, ast.ImportFrom)]
    return {str(node.module) for node in nodes if node.level}


def all_siblings(module: str) -> set[str]:
    """The flat files that a file needs, directly or not."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = siblings(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def test_the_entry_files_are_the_known_ones() -> None:
    assert entry_modules() == {"configuration_chatglm", "tokenization_chatglm", "modeling_chatglm"}
    needed = set().union(*(all_siblings(module) | {module} for module in entry_modules()))
    assert needed == set(MODULES), "a flat file that nobody loads"


def test_the_package_finds_the_same_files() -> None:
    model_files = import_from_package("chatglm.model_files")
    assert [path.name for path in FLAT_FILES] == model_files.find_model_files(ROOT)


@each_module
def test_flat_files_import_each_other_flatly(module: str) -> None:
    for node in imports(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in MODULES, ast.unparse(node)
            assert all(name.name != "*" for name in node.names), ast.unparse(node)
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else node.names
            tops = {str(getattr(name, "name", name)).partition(".")[0] for name in names}
            assert not tops & {*MODULES, "chatglm", "recipes"}, ast.unparse(node)


@pytest.mark.parametrize("module", sorted(entry_modules()))
def test_entry_files_import_all_they_need_themselves(module: str) -> None:
    assert siblings(module) == all_siblings(module)


def test_flat_files_do_not_import_in_a_circle() -> None:
    for module in MODULES:
        assert module not in all_siblings(module)


@each_module
def test_imports_stand_at_the_top_and_exist_everywhere(module: str) -> None:
    tree = TREES[module]
    assert imports(tree) == [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    allowed = REQUIRED | set(sys.stdlib_module_names)
    for node in imports(tree):
        if isinstance(node, ast.Import):
            assert {name.name.partition(".")[0] for name in node.names} <= allowed
        elif not node.level:
            assert str(node.module).partition(".")[0] in allowed


@each_module
def test_no_line_of_text_looks_like_an_import(module: str) -> None:
    """transformers finds imports by lines of text; what it finds must be what the code imports."""
    assert set(get_relative_imports(ROOT / f"{module}.py")) == siblings(module)
    found = set(get_imports(ROOT / f"{module}.py"))
    assert found <= REQUIRED | set(sys.stdlib_module_names)
    texts = [node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant)]
    for text in (text for text in texts if isinstance(text, str)):
        assert not re.search(r"^\s*(from\s+\S+\s+import\b|import\s+[\w.]+\s*$)", text, re.MULTILINE)


def is_own(target: ast.expr, module: str) -> bool:
    """Whether an assignment sets a name of the module, or an entry of a table it made itself."""
    if isinstance(target, ast.Tuple):
        return all(is_own(element, module) for element in target.elts)
    if isinstance(target, ast.Subscript):
        imported = {name.asname or name.name for n in imports(TREES[module]) for name in n.names}
        return isinstance(target.value, ast.Name) and target.value.id not in imported
    return isinstance(target, ast.Name)


@each_module
def test_importing_only_defines_names(module: str) -> None:
    """A module's body, and those of its classes, hold definitions and no other statement."""
    definition = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    bodies = [TREES[module].body]
    bodies += [node.body for node in ast.walk(TREES[module]) if isinstance(node, ast.ClassDef)]
    for statement in (statement for body in bodies for statement in body):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            assert all(is_own(target, module) for target in targets), ast.unparse(statement)
            calls = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
            assert not [call for call in map(ast.unparse, calls) if SWITCHES.search(call)]
        elif isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant):
            assert ast.unparse(statement) in CALLS_WHILE_IMPORTING
        else:
            assert isinstance(statement, (*definition, ast.Expr)), ast.unparse(statement)


def global_state() -> dict[str, Any]:
    """What an import might change and must not."""
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "log handlers": (list(logging.root.handlers), logging.root.level),
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        # The original's own switches
        "fuser": (torch._C._jit_can_fuse_on_cpu(), torch._C._jit_can_fuse_on_gpu()),
    }


@pytest.fixture
def fresh_package() -> Iterator[str]:
    """A package whose modules are the flat files, imported by nobody yet."""
    name = "chatglm_fresh"
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    yield name
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def test_importing_changes_nothing_global(fresh_package: str) -> None:
    for module in MODULES:  # what torch and transformers do when they are imported is not ours
        importlib.import_module(f"chatglm_6b.{module}")
    before = global_state()
    for module in MODULES:
        importlib.import_module(f"{fresh_package}.{module}")
    after = global_state()
    assert {key: value for key, value in after.items() if value != before[key]} == {}
