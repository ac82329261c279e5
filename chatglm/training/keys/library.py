"""Owns the keys of a library: the fields of its dataclass, read from the source of the class.

The libraries take ten seconds to import, and their keys are wanted at once: what the source says is
as good. Where it is not there, the class is imported. Does not know what a key of ours is.
"""

import ast
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from chatglm.training.keys.meanings import read_meanings
from chatglm.training.keys.values import name_kinds

# Where classes are that are imported by the names of packages.
PLACES = {"transformers.TrainingArguments": "transformers.training_args:TrainingArguments"}


class LibraryKey(NamedTuple):
    """A field of a dataclass.

    Attributes:
        kinds: the names of the types that it can be of.
        kind: the same, as its source has it.
        default: its source; "" if there is none.
        meaning: what it is for; "" if the library does not say.
    """

    kinds: frozenset[str]
    kind: str
    default: str
    meaning: str


def read_library(place: str) -> dict[str, LibraryKey]:
    """Return the keys of a dataclass and of those it is built on, without importing it.

    Args:
        place: "module:Class".

    Raises:
        ImportError: if its package is not installed.
    """
    try:
        return dict(_read_class(place))
    except (OSError, SyntaxError, LookupError, UnicodeDecodeError) as error:
        module, _, name = place.partition(":")
        found = list_fields(getattr(importlib.import_module(module), name))
        sys.stderr.write(f"chatglm: {module} was imported for its keys ({error})\n")
        return found


def list_fields(arguments_class: type) -> dict[str, LibraryKey]:
    """Return the keys of a dataclass that is imported."""
    hints, meanings = get_type_hints(arguments_class), read_meanings(arguments_class.__doc__)
    return {
        item.name: LibraryKey(
            name_kinds(hints[item.name]),
            _name_hint(hints[item.name]),
            repr(find_default(item)),
            str(item.metadata.get("help", "")) or meanings.get(item.name, ""),
        )
        for item in dataclasses.fields(arguments_class)
        if item.init
    }


def _name_hint(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def find_default(item: "dataclasses.Field[Any]") -> Any:
    """Return the value of a field that nobody sets."""
    if item.default is not dataclasses.MISSING:
        return item.default
    return None if item.default_factory is dataclasses.MISSING else item.default_factory()


def _read_class(place: str) -> Iterator[tuple[str, LibraryKey]]:
    """Yield the fields of a class, those of its bases first; a later one replaces an earlier."""
    module, _, name = place.partition(":")
    tree = ast.parse(_find_source(module).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    if not found:
        raise LookupError(f"there is no class {name} in the source of {module}")
    imports = _list_imports(tree, module)
    for base in found[0].bases:
        where = imports.get(ast.unparse(base), f"{module}:{ast.unparse(base)}")
        yield from _read_class(PLACES.get(where.replace(":", "."), where))
    meanings = read_meanings(ast.get_docstring(found[0]))
    for node in found[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield from _read_field(node.target.id, node, meanings)


def _find_source(module: str) -> Path:
    """Return the file of a module, without importing the packages that it is in."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"there is no package {package}")
    if not spec.submodule_search_locations:
        raise LookupError(f"{package} is no package with a source")
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    return path.with_suffix(".py") if rest else path / "__init__.py"


def _list_imports(tree: ast.Module, module: str) -> dict[str, str]:
    """Return where the names come from that a module imports from others."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {(item.asname or item.name): f"{source}:{item.name}" for item in node.names}
    return found


def _read_field(
    name: str, node: ast.AnnAssign, meanings: dict[str, str]
) -> Iterator[tuple[str, LibraryKey]]:
    """Yield a field of a dataclass, if it is one that can be set."""
    kind, value = ast.unparse(node.annotation), node.value
    options: dict[str, ast.expr] = {} if value is None else {"default": value}
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field":
        options = {item.arg: item.value for item in value.keywords if item.arg}
    is_set = ast.unparse(options["init"]) != "False" if "init" in options else True
    if "ClassVar" in kind or not is_set:
        return
    default = ast.unparse(options["default"]) if "default" in options else ""
    if "default_factory" in options:
        default = _describe_factory(options["default_factory"])
    meaning = _read_help(options.get("metadata")) or meanings.get(name, "")
    yield name, LibraryKey(_split_kinds(node.annotation), kind, default, meaning)


def _describe_factory(node: ast.expr) -> str:
    return ast.unparse(node.body) if isinstance(node, ast.Lambda) else f"{ast.unparse(node)}()"


def _read_help(metadata: ast.expr | None) -> str:
    """Return the word `help` of a field's metadata, "" where it is no plain text."""
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values):
            if isinstance(key, ast.Constant) and key.value == "help":
                try:
                    return str(ast.literal_eval(value))
                except ValueError:
                    return ""
    return ""


def _split_kinds(node: ast.expr) -> frozenset[str]:
    """Return the names of the types of an annotation, `X | Y`, `Optional[X]` and `Union[X, Y]`."""
    if isinstance(node, ast.BinOp):
        return _split_kinds(node.left) | _split_kinds(node.right)
    if isinstance(node, ast.Subscript):
        outer = ast.unparse(node.value).split(".")[-1]
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer in ("Optional", "Union"):
            inner = frozenset().union(*map(_split_kinds, parts))
            return inner | ({"None"} if outer == "Optional" else frozenset())
        return frozenset({outer})
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _split_kinds(ast.parse(node.value, mode="eval").body)
    return frozenset({ast.unparse(node).split(".")[-1]})


__all__ = ["LibraryKey", "find_default", "list_fields", "read_library"]
