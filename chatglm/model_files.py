"""Owns which Python files of a folder are its model: what `trust_remote_code=True` would run.

    python -m chatglm.model_files            # those of this repository, by name
    python -m chatglm.model_files FOLDER     # those of another folder, with its path

Follows what transformers follows: from the classes that `auto_map` names, along the relative
imports. Reads the files as text and runs none of them; needs the standard library alone. Does not
know what a file does, nor which other files belong to a model.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CONFIGURATIONS = ("config.json", "tokenizer_config.json")
ELSEWHERE = "--"  # stands between another repository and the class that is taken from it


def find_model_files(folder: Path, settings: Path | None = None) -> list[str]:
    """Return the names of the model's Python files, sorted; none for a folder without `auto_map`.

    Args:
        folder: with the files.
        settings: the folder whose configurations name the classes, where it is another one.

    Raises:
        ValueError: as `read_entry_points` and `find_modules`.
    """
    found: set[str] = set()
    for module in read_entry_points(settings or folder):
        found |= find_modules(folder, module)
    return sorted(f"{module}.py" for module in found)


def read_entry_points(folder: Path) -> dict[str, list[str]]:
    """Return the modules of the classes that `auto_map` names, with the `Auto*` names they serve.

    Raises:
        ValueError: if a configuration is no JSON object, or a class is no `module.Class`.
    """
    entry_points: dict[str, list[str]] = {}
    for file in (folder / name for name in CONFIGURATIONS):
        for auto_class, reference in _read_references(file):
            module, _, name = reference.partition(".")
            if not module.isidentifier() or not name.isidentifier():
                raise ValueError(
                    f"{file} maps {auto_class} to {reference!r}: write the name of a file beside "
                    "it, without .py, a dot, and the name of a class"
                )
            entry_points.setdefault(module, []).append(auto_class)
    return entry_points


def _read_references(file: Path) -> Iterator[tuple[str, str]]:
    """The pairs of `auto_map`, but not those whose code is in another repository."""
    if not file.is_file():
        return
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
        auto_map: dict[str, Any] = fields.get("auto_map") or {}
        pairs = list(auto_map.items())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no JSON file with fields by name: {error}") from error
    for auto_class, target in pairs:
        # A tokenizer has two classes, a slow and a fast one, and mostly lacks one.
        for reference in [target] if isinstance(target, str) else target or ():
            if reference and ELSEWHERE not in reference:
                yield auto_class, reference


def find_modules(folder: Path, module: str) -> set[str]:
    """Return a module and all that it imports from the folder, directly or not.

    Raises:
        ValueError: if a file is missing or is no Python, or an import leads out of the folder.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting += read_relative_imports(folder / f"{module}.py")
    return found


def read_relative_imports(file: Path) -> list[str]:
    """Return the modules beside a file that it imports, wherever in it.

    Raises:
        ValueError: if there is no such file, it is no Python, or an import leads out of its folder.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{file} is not there, and auto_map or an import names it: copy it from where the "
            "model's other files are from"
        ) from error
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is no Python file that can be read: {error}") from error
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            named = [node.module] if node.module else [alias.name for alias in node.names]
            if node.level > 1 or not all(name.isidentifier() for name in named):
                raise ValueError(
                    f"{file} has `{ast.unparse(node)}`, and transformers takes along only files "
                    "that lie beside it: import from .name"
                )
            modules += named
    return modules


def main(argv: Sequence[str] | None = None) -> int:
    """Print the files, one a line, for `cp $(python -m chatglm.model_files) FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="python -m chatglm.model_files", description="List the Python files of a model folder."
    )
    parser.add_argument("folder", nargs="?", help="another one than this repository")
    folder = parser.parse_args(argv).folder
    own = Path(__file__).resolve().parent.parent
    start = own if folder is None else Path(folder)
    try:
        names = find_model_files(start)
    except ValueError as error:
        sys.stderr.write(f"chatglm: {error}\n")
        return 2
    if not names:
        sys.stderr.write(f"chatglm: {start} has no auto_map, and no Python file of it is a model\n")
        return 2
    is_here = start.resolve() == Path.cwd()
    sys.stdout.write("".join(f"{name if is_here else start / name}\n" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
