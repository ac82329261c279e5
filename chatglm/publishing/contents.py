"""Owns which files of a folder belong to a model and are published: a list of what is allowed.

A file that is not on the list stays here, whatever it is; so does every folder but those of presets
and of peft's prefix. Reads names, configurations and the model's imports. Does not know whether the
files are whole (`checks`), nor where they go.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from chatglm.adapters.bases import RECORD_FILE
from chatglm.checkpoints.checksums import SUMS
from chatglm.checkpoints.prefixes import PEFT_FOLDER
from chatglm.checkpoints.reading import WEIGHT_FILES, read_weight_map
from chatglm.checkpoints.recognize import ADAPTER_FILE, ADAPTER_WEIGHTS
from chatglm.model_files import find_model_files

PLAIN_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "ice_text.model",
    SUMS,
    ADAPTER_FILE,
    *ADAPTER_WEIGHTS,
}
DOCUMENTS = re.compile(r"README([._-][\w.-]+)?\.md|(MODEL_)?LICENSE([._-][\w.-]+)?|NOTICE(\.\w+)?")
PRESETS, PREFIX = "presets", PEFT_FOLDER
PRESET_FILES = re.compile(r"(generation_|tokenizer_)?config\.json|[\w.]+\.index\.json")
PLAIN_NAME = re.compile(r"\w[\w.-]*")  # no folder, nothing hidden, and no pattern for many names
HIDDEN = "hidden: an environment, a cache, a history or settings of a tool"
REASONS = {
    RECORD_FILE: "names places on this machine",
    ".py": "no file that the model imports (auto_map of config.json)",
    ".bin": "no weights that config.json or an index goes with",
    ".safetensors": "no weights that config.json or an index goes with",
}
OTHERWISE = "not on the list of what a model folder holds"


class Contents(NamedTuple):
    """What becomes of a folder's files.

    Attributes:
        folder: where they are, resolved.
        kept: the files to publish, by their paths in it with slashes, sorted.
        left_out: everything else and why, folders as a whole and with a slash at their end.
        code_problem: why the model's Python files cannot be told, or None.
        index_problem: why its weight files cannot be told, or None.
    """

    folder: Path
    kept: list[str]
    left_out: dict[str, str]
    code_problem: str | None
    index_problem: str | None


def list_contents(path: str | Path) -> Contents:
    """Say of all files of a folder whether they are published.

    Raises:
        ValueError: if there is no such folder.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder: name a model folder on this machine")
    code, code_problem = _list_code(folder)
    weights, index_problem = _list_weights(folder)
    allowed = PLAIN_FILES | code | weights
    kept: list[str] = []
    left_out: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            inside = _list_inside(file)
            kept += inside
            left_out |= _explain_folder(file, inside)
        elif file.name in allowed or DOCUMENTS.fullmatch(file.name):
            kept.append(file.name)
        else:
            left_out[file.name] = _explain_file(file)
    return Contents(folder, sorted(kept), left_out, code_problem, index_problem)


def _list_code(folder: Path) -> tuple[set[str], str | None]:
    """The Python files that the model imports, or why they cannot be told."""
    try:
        return set(find_model_files(folder)), None
    except ValueError as problem:
        return set(), str(problem)


def _list_weights(folder: Path) -> tuple[set[str], str | None]:
    """The weight files that transformers would find: one, or an index and what it names."""
    names: set[str] = set()
    for single, index in WEIGHT_FILES:
        if (folder / single).is_file():
            names.add(single)
        elif (folder / index).is_file():
            try:
                names |= {index, *read_weight_map(folder / index).values()}
            except ValueError as problem:
                return set(), str(problem)
    return names, None


def _list_inside(folder: Path) -> list[str]:
    """The files of a folder inside the model's that are published, mostly none."""
    if folder.name == PREFIX:
        names = (ADAPTER_FILE, *ADAPTER_WEIGHTS)
        return [f"{PREFIX}/{name}" for name in names if (folder / name).is_file()]
    if folder.name == PRESETS:
        return [file.relative_to(folder.parent).as_posix() for file in _list_presets(folder)]
    return []


def _list_presets(folder: Path) -> Iterator[Path]:
    for file in folder.glob("*/*.json"):
        if PLAIN_NAME.fullmatch(file.parent.name) and PRESET_FILES.fullmatch(file.name):
            yield file


def _explain_folder(folder: Path, inside: list[str]) -> dict[str, str]:
    """Why a folder, or all of it that is not published, stays here."""
    if folder.name.startswith("."):
        return {f"{folder.name}/": HIDDEN}
    if folder.is_symlink() or not inside:
        return {} if inside else {f"{folder.name}/": OTHERWISE}
    files = (file for file in folder.rglob("*") if file.is_file())
    paths = [file.relative_to(folder.parent).as_posix() for file in files]
    return {path: OTHERWISE for path in sorted(paths) if path not in inside}


def _explain_file(file: Path) -> str:
    if file.name.startswith("."):
        return HIDDEN
    return REASONS.get(file.name) or REASONS.get(file.suffix, OTHERWISE)
