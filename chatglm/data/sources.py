"""Owns where data come from: what the entries of `train_data` name, and the files that it means.

An entry is a path (a file, a folder, a glob, a name in LLaMA-Factory's dataset_info.json), with a
weight or a number of rows behind it, or a mapping of its own keys. Does not read files of rows.
"""

import dataclasses
import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatglm.data.kinds import find_suffix, is_data, is_text

# "a.jsonl:0.5" and "a.jsonl#500", as ms-swift has it, or both.
_MARKED = re.compile(r"(?P<path>.+?)(#(?P<rows>\d+))?(:(?P<weight>\d*\.?\d+))?")
REGISTRY = "dataset_info.json"
# Files beside data that hold JSON or text and no rows.
STRANGERS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
STRANGER_STEMS = ("readme", "license", "licence", "requirements", "changelog", "notice")
SPLITS = re.compile(r"(train|dev|val|valid|validation|eval|test)(?![a-z])", re.IGNORECASE)
NAMED = 5


@dataclass(frozen=True)
class Source:
    """An entry of `train_data` or `eval_data`, and the files that it means.

    Attributes:
        path: as it was written.
        weight: how often its rows are seen in an epoch: 0.5 is a random half, 2 is twice.
        max_samples: rows that are taken, the first ones; 0 is all, or what the key says.
        columns: what is told of its rows alone, by names of `Columns`.
        encoding, field, header, sample_by: of its files, as of `FileOptions`.
        files: that it means.
        warnings: what is odd about them.
    """

    path: str
    weight: float = 1.0
    max_samples: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict)
    encoding: str = ""
    field: str = ""
    header: tuple[str, ...] = ()
    sample_by: str = ""
    files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()


KEYS = tuple(item.name for item in dataclasses.fields(Source))[:-2]


def list_sources(entries: Sequence[Any], wants_texts: bool = False) -> list[Source]:
    """Return what entries mean, each with its files.

    Args:
        entries: paths or mappings.
        wants_texts: whether plain texts in folders are data.

    Raises:
        ValueError: for an entry that cannot be read, a path that is not there, or a folder without
            data.
    """
    sources = [_find_files(s, wants_texts) for entry in entries for s in read_entry(entry)]
    if not sources:
        raise ValueError("no data is named: give files with train_data")
    return sources


def read_entry(entry: Any) -> list[Source]:
    """Return the sources that an entry names, their files not yet looked for.

    Raises:
        ValueError: for keys or values that an entry cannot have.
    """
    if isinstance(entry, Mapping):
        return [_read_mapping(entry)]
    path = str(entry)
    if _exists(path):
        return [Source(path)]
    parts = [part.strip() for part in path.split(",")]
    if len(parts) > 1:
        return [source for part in parts if part for source in read_entry(part)]
    found = _MARKED.fullmatch(path)
    if found is None or not (found["rows"] or found["weight"]):
        return [Source(path)]
    mapping = {"weight": float(found["weight"] or 1), "max_samples": int(found["rows"] or 0)}
    return [_read_mapping({"path": found["path"], **mapping})]


def _read_mapping(entry: Mapping[Any, Any]) -> Source:
    """Return the source that a mapping describes.

    Raises:
        ValueError: for a key that there is not, or a value of another type.
    """
    unknown = sorted(str(key) for key in entry if key not in KEYS)
    if unknown or "path" not in entry:
        wrong = f"has no key {unknown[0]}" if unknown else "needs the key path"
        raise ValueError(
            f"an entry of data {wrong}; its keys are {', '.join(KEYS)}: {dict(entry)!r}"
        )
    values = dict(entry)
    values["path"] = str(values["path"])
    if isinstance(values.get("header"), list):
        values["header"] = tuple(map(str, values["header"]))
    wanted = {"weight": (int, float), "max_samples": int, "columns": Mapping, "header": tuple}
    for key, value in values.items():
        kind: Any = wanted.get(key, str)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{key} of the data entry {values['path']} cannot be {value!r}")
    source = Source(**values)
    if source.weight <= 0 or source.max_samples < 0:
        raise ValueError(
            f"weight must be more than 0 and max_samples 0 or more, and the data entry "
            f"{source.path} has {source.weight} and {source.max_samples}"
        )
    return source


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()


def _find_files(source: Source, wants_texts: bool) -> Source:
    """Return a source with its files.

    Raises:
        ValueError: if there are none.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _list_folder(source, path, wants_texts)
    if path.exists():
        if path.name == REGISTRY:
            raise ValueError(
                f"{path} says what other files are: name one of its data sets, as "
                f"{path.with_name(next(iter(_read_registry(path)), 'NAME'))}"
            )
        return dataclasses.replace(source, files=(path,))
    if glob.has_magic(str(path)):
        files = tuple(sorted(Path(p) for p in glob.glob(str(path), recursive=True)))
        files = tuple(file for file in files if file.is_file())
        if not files:
            raise ValueError(f"no data file is called {source.path}")
        return dataclasses.replace(source, files=files)
    if (path.parent / REGISTRY).is_file():
        return _look_up(source, path)
    raise ValueError(f"there is no data file {source.path}{_name_near(path)}")


def _name_near(path: Path) -> str:
    """Return what else lies where a file is missing."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    found = sorted(p.name for p in path.parent.iterdir() if is_data(p) or is_text(p))
    return f"; {path.parent} has {', '.join(found[:NAMED])}" if found else ""


def _list_folder(source: Source, folder: Path, wants_texts: bool) -> Source:
    """Return a source with the data files of a folder and of those in it."""
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        is_stranger = path.name in STRANGERS or path.stem.lower() in STRANGER_STEMS
        is_wanted = is_data(path) or (wants_texts and is_text(path))
        (files if is_wanted and not is_stranger else others).append(path)
    if not files:
        raise ValueError(
            f"the folder {folder} has no .jsonl file nor another one of rows"
            + (f": only {_name_some(others, folder)}" if others else "")
        )
    warnings = []
    if others:
        warnings.append(f"{folder}: not read, as no data: {_name_some(others, folder)}")
    splits = {SPLITS.match(path.name)[1].lower() for path in files if SPLITS.match(path.name)}  # type: ignore[index]
    if len(splits) > 1:
        warnings.append(
            f"{folder}: all its files are read, those called {' and '.join(sorted(splits))} alike; "
            "name the files that are meant"
        )
    return dataclasses.replace(source, files=tuple(files), warnings=tuple(warnings))


def _name_some(paths: Sequence[Path], folder: Path) -> str:
    names = ", ".join(str(path.relative_to(folder)) for path in paths[:NAMED])
    return names + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")


def _read_registry(path: Path) -> dict[str, Any]:
    """Return the data sets of a dataset_info.json of LLaMA-Factory.

    Raises:
        ValueError: if it is none.
    """
    try:
        registry = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(registry, dict):
        raise ValueError(f"{path} holds no data sets by their names")
    return {name: entry for name, entry in registry.items() if isinstance(entry, dict)}


def _look_up(source: Source, path: Path) -> Source:
    """Return a source that is called as in the dataset_info.json beside it.

    Raises:
        ValueError: if it is not in there, or lies elsewhere.
    """
    registry = _read_registry(path.parent / REGISTRY)
    entry = registry.get(path.name)
    if entry is None:
        names = ", ".join(list(registry)[:NAMED])
        raise ValueError(
            f"there is no data file {source.path}, and {REGISTRY} beside it has no such name but "
            f"{names}"
        )
    if not isinstance(entry.get("file_name"), str):
        raise ValueError(
            f"{source.path} is no file but {sorted(entry)} in {REGISTRY}: download it, and name "
            "the file"
        )
    columns = {**entry.get("columns", {}), **entry.get("tags", {})}
    limit = source.max_samples or entry.get("num_samples") or 0
    found = dataclasses.replace(
        source,
        path=str(path.parent / entry["file_name"]),
        columns={**columns, **source.columns},
        max_samples=limit,
    )
    return dataclasses.replace(_find_files(found, False), path=source.path)


__all__ = ["Source", "find_suffix", "list_sources", "read_entry"]
