"""The page of hooks, its tests and the code name the same things, so that none can be forgotten.

What a hook does is tested in `test_model_hooks`, `test_generation_hooks` and, for the training, in
`test_training_hooks`. Here the three are held together: a row for each test and a test for each
row, and no private name of another library that the code overrides or reads without a row.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import MODEL_FILES, ROOT

HOOK_TESTS = (
    "tests/contract/test_model_hooks.py",
    "tests/contract/test_generation_hooks.py",
    "tests/training/test_training_hooks.py",
)
LOSSES = ("wrong", "poorer", "warning", "error")
# What metaclasses write into every class, and what Python documents with an underscore in front.
NOT_OURS = {"_abc_impl", "_backward_cls", "_is_protocol"}
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}


class Row(NamedTuple):
    """A row of the table."""

    hook: str
    library: str
    file: str
    releases: str
    loss: str
    without: str
    test: str

    @property
    def name(self) -> str:
        """The last name of the hook, or what is in brackets behind it: that is in our file."""
        plain, _, more = self.hook.partition("(")
        return more.rstrip(")") or plain.rpartition(".")[2]


@cache
def read_rows() -> tuple[Row, ...]:
    lines = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
    return tuple(Row(*(cell.strip().strip("`") for cell in row)) for row in cells)


@cache
def read_tests() -> dict[str, str]:
    """Return for each hook the test that has it as its parameter."""
    found: dict[str, str] = {}
    for path in HOOK_TESTS:
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            for hook in list_hooks(node):
                assert hook not in found, f"{hook} has two tests"
                found[hook] = getattr(node, "name", "")
    return found


def list_hooks(node: ast.stmt) -> Iterator[str]:
    for decorator in getattr(node, "decorator_list", ()):
        arguments = decorator.args if isinstance(decorator, ast.Call) else ()
        if len(arguments) == 2 and ast.unparse(arguments[0]) == "'hook'":
            yield from ast.literal_eval(arguments[1])


@cache
def list_parts() -> frozenset[str]:
    """Return every name that a row's hook is put together from."""
    return frozenset(part for row in read_rows() for part in re.split(r"[.()]", row.hook))


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    assert {row.hook: row.test for row in read_rows()} == read_tests()
    assert len({row.hook for row in read_rows()}) == len(read_rows())


def test_what_is_lost_in_silence_comes_first() -> None:
    order = [LOSSES.index(row.loss) for row in read_rows()]
    assert order == sorted(order) and set(order) == set(range(len(LOSSES)))


@pytest.mark.parametrize("row", read_rows(), ids=lambda row: row.hook)
def test_a_row_names_a_file_that_uses_the_hook(row: Row) -> None:
    spoken = {
        # What leans on them has another name: a flag of the model, or an argument of `forward`.
        "_can_set_attn_implementation": "ALL_ATTENTION_FUNCTIONS",
        "_supports_logits_to_keep": "logits_to_keep",
        "_validate_model_kwargs": "prompt_position_ids",
        "model_accepts_loss_kwargs": "**kwargs",
        "num_items_in_batch": "loss_function",
        "add_hook_to_module": '"forward" in module.__dict__',
        "prepare_inputs_for_generation": "peft",
        "set_epoch": "def set_epoch",
        "from_dict": "AUTO_QUANTIZATION_CONFIG_MAPPING",
        "compute_loss": "count_tokens" if row.file.endswith("grpo.py") else "compute_loss",
        "PointerType": "pointee",
        "TRAINER_STATE_NAME": '"trainer_state.json"',
        "DynamicCache": "virtual",
        "pooled_logits": "pooled_logits=",
        "past_key_values": "OLD_CACHE_NAME",
    }
    text = (ROOT / row.file).read_text(encoding="utf-8")
    assert spoken.get(row.name, row.name) in text


def our_classes() -> Iterator[type]:
    """Every class of the model's files and of the package that can be imported here."""
    names = [f"chatglm_6b.{Path(file).stem}" for file in MODEL_FILES]
    paths = [path.relative_to(ROOT) for path in (ROOT / "chatglm").rglob("*.py")]
    names += [".".join(path.with_suffix("").parts) for path in paths if path.stem[0] != "_"]
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError:  # the stages on trl, where there is none
            continue
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == name:
                yield value


def is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("chatglm_6b", "chatglm")


def knows(base: type, name: str) -> bool:
    return name in vars(base) or name in getattr(base, "__annotations__", {})


def test_no_private_name_of_another_library_is_overridden_unlisted() -> None:
    """Whoever overrides a base's private name leans on that it is called."""
    unlisted = {
        f"{kind.__name__}.{name} overrides that of {base.__name__}"
        for kind in our_classes()
        for own in filter(is_ours, kind.__mro__)
        for name in vars(own)
        if re.match("_[^_]", name) and name not in NOT_OURS | list_parts()
        for base in kind.__mro__
        if not is_ours(base) and knows(base, name)
    }
    assert not unlisted, "docs/hooks.md has no row for it"


def test_the_mirror_sees_what_is_overridden() -> None:
    """The law above is empty only because of the table: without it it finds these and more."""
    found = {
        name
        for kind in our_classes()
        for own in filter(is_ours, kind.__mro__)
        for name in vars(own)
        if any(knows(base, name) for base in kind.__mro__ if not is_ours(base))
    }
    assert {"_init_weights", "_load_pretrained_model", "_apply", "_get_train_sampler"} <= found


def parse_code() -> Iterator[tuple[str, ast.AST]]:
    for path in [*(ROOT / file for file in MODEL_FILES), *(ROOT / "chatglm").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path.name, node


def defined_name(node: ast.AST) -> str:
    """Return the name that a node of our code gives something, or an empty one."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    is_stored = isinstance(getattr(node, "ctx", None), ast.Store)
    return str(getattr(node, "id", getattr(node, "attr", ""))) if is_stored else ""


def read_name(node: ast.AST) -> str:
    """Return the name that a node reads from, or hands to, something; or an empty one."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return node.attr
    if isinstance(node, ast.keyword):
        return node.arg or ""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
        name: Any = node.args[1]
        return str(getattr(name, "value", ""))
    return ""


def test_no_private_name_of_another_library_is_read_unlisted() -> None:
    ours = {defined_name(node) for _, node in parse_code()}
    known = ours | DOCUMENTED | list_parts()
    names = {(file, read_name(node)) for file, node in parse_code()}
    unlisted = {name for name in names if re.match("_[^_]", name[1]) and name[1] not in known}
    assert not unlisted, "docs/hooks.md has no row for it"


def test_one_file_of_the_model_knows_releases_of_transformers() -> None:
    """Elsewhere a version is for a sentence, or llvmlite's."""
    for file in MODEL_FILES:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        modules = {getattr(node, "module", None) for node in ast.walk(tree)}
        assert ("packaging" in modules) == (file == "environment_chatglm.py"), file
        compared = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Compare)]
        assert not [text for text in compared if "transformers.__version__" in text], file
