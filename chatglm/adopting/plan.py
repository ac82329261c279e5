"""Owns what a folder of the family gets when it is adopted, and what goes aside for it.

Everything is found out and made in memory, with what the package door completes too; no file is
changed (`journal`), no folder made (`copying`), no weight read (`weights`).
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from chatglm import door
from chatglm.adopting.describing import describe_adopted
from chatglm.adopting.journal import Record
from chatglm.adopting.kinds import Kind, read_kind
from chatglm.adopting.weights import choose_auto_class
from chatglm.cards import CARD_FILE
from chatglm.checkpoints.checksums import SUMS, format_sums, hash_bytes, hash_file, read_sums
from chatglm.checkpoints.complete import (
    CURRENT,
    GENERATION_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    complete_generation_fields,
    complete_tokenizer_fields,
    read_template,
)
from chatglm.checkpoints.recognize import (
    CONFIG_FILE,
    VOCABULARY_FILE,
    read_object,
)
from chatglm.model import FOLDER as CODE_FOLDER
from chatglm.model_files import find_model_files

LICENSE_FILE = "LICENSE"


class Changes(NamedTuple):
    """What adopting a folder changes in it.

    Attributes:
        written: the content of each file that is new or other than what is there, by name.
        moved: files there that go aside: those in whose place others come, and old code.
        remarks: what a person should know, a line each.
    """

    written: dict[str, bytes]
    moved: list[str]
    remarks: list[str]


def find_changes(folder: Path, record: Record | None = None) -> Changes:
    """Say what a folder needs to be loaded by its own files.

    Args:
        folder: of a model of the family, in any state.
        record: of an earlier adoption of it.

    Raises:
        ValueError: if it is something else, is not whole, has weights that are not those of its
            configuration, or lacks what cannot be made; the message names it and the remedy.
    """
    kind = read_kind(folder)
    wanted = _complete_settings(folder, kind) | kind.files | _find_code()
    wanted |= _find_documents(folder, kind, record)
    written = {name: text for name, text in wanted.items() if _differs(folder / name, text)}
    outdated = _find_old_code(folder, record) - wanted.keys()
    written |= _renew_sums(folder, written, outdated)
    _check_own_code(folder, written.keys() | outdated, record)
    moved = sorted(outdated | {name for name in written if (folder / name).exists()})
    is_read = kind.is_model and VOCABULARY_FILE not in written
    remarks = check_vocabulary(folder, kind.fields) if is_read else []
    return Changes(written, moved, remarks)


def dump_fields(fields: Mapping[str, Any]) -> bytes:
    """Return the text of a configuration."""
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def check_vocabulary(folder: Path, fields: Mapping[str, Any]) -> list[str]:
    """Read a folder's vocabulary, and say if it is one of another model.

    Raises:
        ValueError: if it cannot be read.
    """
    with door.package_code():
        tokenizer = door.load_from(folder, AutoTokenizer)
    for name, token in (("bos_token_id", "<sop>"), ("gmask_token_id", "[gMASK]")):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != fields[name]:
            return [
                f"{VOCABULARY_FILE} gives {token} the id {found}, and the model has {fields[name]}:"
                " it is the vocabulary of another model, and chat will refuse the two together"
            ]
    return []


def _complete_settings(folder: Path, kind: Kind) -> dict[str, bytes]:
    """Return the configurations that say less than they should, or other things.

    A prefix is read with the tokenizer and the defaults of its model; what it has of them is
    completed all the same.
    """
    told = {CONFIG_FILE: kind.own}
    for name in (GENERATION_FILE, TOKENIZER_FILE):
        told[name] = read_object(folder / name) if (folder / name).is_file() else {}
    wanted: dict[str, Mapping[str, Any]] = {CONFIG_FILE: kind.fields}
    if kind.is_model or told[TOKENIZER_FILE]:
        options = complete_tokenizer_fields(kind.fields["vocab_size"], told[TOKENIZER_FILE])
        wanted[TOKENIZER_FILE] = options
    if kind.is_model and choose_auto_class(kind.fields) == "AutoModel":
        wanted[GENERATION_FILE] = complete_generation_fields(told[GENERATION_FILE], kind.fields)
    return {name: dump_fields(wanted[name]) for name in wanted if wanted[name] != told[name]}


def _find_code() -> dict[str, bytes]:
    """Return the model's Python files."""
    names = find_model_files(CODE_FOLDER, CURRENT)
    return {name: (CODE_FOLDER / name).read_bytes() for name in names}


def _find_documents(folder: Path, kind: Kind, record: Record | None) -> dict[str, bytes]:
    """Return template, licence and card for a folder that has none of its own."""
    found: dict[str, bytes] = {}
    options = folder / TOKENIZER_FILE
    has_template = bool(options.is_file() and read_object(options).get("chat_template"))
    if kind.is_model and not has_template and _is_ours(folder, TEMPLATE_FILE, record):
        found[TEMPLATE_FILE] = read_template().encode()
    licence = CODE_FOLDER / LICENSE_FILE
    if licence.is_file() and not any(folder.glob(f"{LICENSE_FILE}*")):
        found[LICENSE_FILE] = licence.read_bytes()
    if not (folder / CARD_FILE).exists():
        found[CARD_FILE] = describe_adopted(folder, kind).encode()
    return found


def _is_ours(folder: Path, name: str, record: Record | None) -> bool:
    """Whether a file is not there, or is as an earlier adoption wrote it."""
    if not (folder / name).exists():
        return True
    return record is not None and record.written.get(name) == hash_file(folder / name)


def _differs(file: Path, text: bytes) -> bool:
    return not file.is_file() or file.read_bytes() != text


def _find_old_code(folder: Path, record: Record | None) -> set[str]:
    """Return the Python files that the folder's configurations lead to, or led to before."""
    names = {name for name in record.written if name.endswith(".py")} if record else set[str]()
    with suppress(ValueError):  # of code that is not whole only what has our names is in the way
        names |= set(find_model_files(folder))
    return {name for name in names if (folder / name).is_file()}


def _check_own_code(folder: Path, names: set[str], record: Record | None) -> None:
    """Refuse to replace code of ours that a person has changed since it was written."""
    changed = [
        name
        for name in sorted(names)
        if record is not None
        and name.endswith(".py")
        and name in record.written
        and not _is_ours(folder, name, record)
    ]
    if changed:
        raise ValueError(
            f"{folder} has model files that were changed since it was adopted, "
            f"{', '.join(changed)}: move them out of the folder, which gets new ones then"
        )


def _renew_sums(folder: Path, written: Mapping[str, bytes], gone: set[str]) -> dict[str, bytes]:
    """Return the folder's hashes, if it has any, with those of the files that become others."""
    if not (folder / SUMS).is_file():
        return {}
    sums = {name: digest for name, digest in read_sums(folder).items() if name not in gone}
    sums |= {name: hash_bytes(text) for name, text in written.items() if name in sums}
    text = format_sums(sums).encode()
    return {SUMS: text} if sums != read_sums(folder) else {}


__all__ = ["Changes", "check_vocabulary", "dump_fields", "find_changes"]
