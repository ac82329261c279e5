"""Owns what keeps a folder from being published: files that are missing, broken, private or untrue.

All problems of a folder are found at once, one line each, before anything is sent. Does not know
which files are published (`contents`), nor how they are sent.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from chatglm.cards import CARD_FILE, OFFICIAL_VOCABULARIES, read_head
from chatglm.checking.quick import find_model_problems
from chatglm.checkpoints.checksums import SUMS, hash_file, read_sums
from chatglm.checkpoints.prefixes import holds_prefix
from chatglm.checkpoints.reading import check_weight_file, list_weight_files
from chatglm.checkpoints.recognize import (
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    describe_stranger,
    read_object,
    recognize_folder,
)
from chatglm.checkpoints.signatures import POINTER, identify_file
from chatglm.publishing.contents import PREFIX, Contents

MODEL_CONFIG = "config.json"
TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json")
WEIGHTS = (".bin", ".safetensors")
LINK = re.compile(r"\]\(([^)#\s]+)")
# Where the configurations say which model they came from.
ORIGINS = {
    MODEL_CONFIG: "_name_or_path",
    ADAPTER_FILE: "base_model_name_or_path",
    f"{PREFIX}/{ADAPTER_FILE}": "base_model_name_or_path",
}


def find_problems(contents: Contents) -> list[str]:
    """Return what is wrong with a folder that shall be published, a line for each thing."""
    links = list(_find_links(contents))
    pointers = list(_find_pointers(contents))
    problems = [*links, *pointers]
    if not links:  # what lies elsewhere is not read
        problems += _find_gaps(contents, is_fetched=not pointers)
        problems += _find_untruths(contents, is_fetched=not pointers)
    return problems or _find_misfits(contents)


def _find_misfits(contents: Contents) -> list[str]:
    """What keeps a model whose files are all there from being loaded."""
    if MODEL_CONFIG not in contents.kept:
        return []
    found = recognize_folder(contents.folder)
    if not found.is_first_family:
        return [describe_stranger(contents.folder, found)]
    if holds_prefix(contents.folder):
        return []
    return [str(problem) for problem in find_model_problems(contents.folder)]


def _find_links(contents: Contents) -> Iterator[str]:
    """Files that lie outside of the folder."""
    for name in contents.kept:
        place = (contents.folder / name).resolve()
        if contents.folder not in place.parents:
            yield (
                f"{name} is a link to {place}, outside of the folder: put a copy of the file in "
                "its place (cp --dereference)"
            )


def _find_pointers(contents: Contents) -> Iterator[str]:
    """Files that Git LFS would still have to fetch."""
    for name in contents.kept:
        if identify_file(contents.folder / name) == POINTER:
            yield f"{name} is {POINTER} and not the file: fetch it (git lfs pull)"


def _find_gaps(contents: Contents, is_fetched: bool) -> Iterator[str]:
    """What a folder of its kind must have."""
    folder, kept = contents.folder, set(contents.kept)
    if MODEL_CONFIG in kept:
        yield from _find_model_gaps(contents, is_fetched)
    elif ADAPTER_FILE not in kept:
        yield f"{folder} has neither {MODEL_CONFIG} nor {ADAPTER_FILE}: name a model or an adapter"
    if ADAPTER_FILE in kept and not kept & set(ADAPTER_WEIGHTS):
        weights = " nor ".join(ADAPTER_WEIGHTS)
        yield f"{folder} has {ADAPTER_FILE} and neither {weights}: save it again"
    if CARD_FILE not in kept:
        yield (
            f"{folder} has no {CARD_FILE}, the model card: write what it is, of what it was made "
            "and how, and its licence"
        )


def _find_model_gaps(contents: Contents, is_fetched: bool) -> Iterator[str]:
    """What a model lacks. A prefix of P-Tuning needs neither code nor vocabulary of its own."""
    folder = contents.folder
    if contents.index_problem:
        yield contents.index_problem
        return
    try:
        names = list_weight_files(folder)
    except ValueError as problem:
        yield str(problem)
        return
    missing = [name for name in names if not (folder / name).is_file()]
    yield from (f"the shard {name} is missing: download it again" for name in missing)
    broken = list(_find_broken(contents)) if is_fetched else []
    yield from broken
    if is_fetched and not missing and not broken and holds_prefix(folder):
        return
    if contents.code_problem:
        yield contents.code_problem
    for name in TOKENIZER_FILES:
        if name not in contents.kept:
            yield f"{folder} has no {name}: copy that of the model it was made from there"


def _find_broken(contents: Contents) -> Iterator[str]:
    """Weight files that end too early."""
    for name in contents.kept:
        if name.endswith(WEIGHTS):
            try:
                check_weight_file(contents.folder / name)
            except ValueError as problem:
                yield str(problem)


def _find_untruths(contents: Contents, is_fetched: bool) -> Iterator[str]:
    """What is in the files and is of this machine only, or not so."""
    for name, field in ORIGINS.items():
        if name in contents.kept:
            origin = str(read_object(contents.folder / name).get(field) or "")
            if is_place(origin):
                yield (
                    f"{name} names its origin by a place on this machine, {field}={origin!r}: "
                    "write the base model's name on the Hub there (OWNER/NAME)"
                )
    if CARD_FILE in contents.kept:
        yield from _check_card(contents.folder / CARD_FILE)
    if SUMS in contents.kept and is_fetched:
        yield from _check_sums(contents)


def is_place(origin: str) -> bool:
    """Whether the name of a model is a path on some machine, and none on the Hub."""
    is_absolute = PurePosixPath(origin).is_absolute() or PureWindowsPath(origin).drive != ""
    return is_absolute or origin[:1] in (".", "~") or "\\" in origin or origin.count("/") > 1


def _check_card(file: Path) -> Iterator[str]:
    try:
        head = read_head(file)
    except ValueError as problem:
        yield str(problem)
        return
    if not head.get("license"):
        yield (
            f"{file.name} says no licence in its head: begin it with three lines, ---, "
            "license: NAME, ---"
        )
    named: Any = head.get("base_model") or []
    for name in named if isinstance(named, list) else [named]:  # pyright: ignore[reportUnknownVariableType]
        if is_place(str(name)):  # pyright: ignore[reportUnknownArgumentType]
            yield f"{file.name} has the base_model {name!r}, which is no name on the Hub: mend it"


def _check_sums(contents: Contents) -> Iterator[str]:
    """Files that are not those whose hashes are published with them."""
    try:
        sums = read_sums(contents.folder)
    except ValueError as problem:
        yield str(problem)
        return
    for name, digest in sums.items():
        if name not in contents.kept:
            yield f"{SUMS} has {name}, which is not published: take its line out, or remove {SUMS}"
        elif hash_file(contents.folder / name) != digest:
            yield (
                f"{name} is not the file whose hash is in {SUMS}: fetch it again, or remove {SUMS} "
                "if you have changed it"
            )


def list_remarks(contents: Contents) -> list[str]:
    """Return what a person should know of a folder that may be published all the same."""
    remarks: list[str] = []
    config = contents.folder / MODEL_CONFIG
    fields = read_object(config) if config.is_file() else {}
    has_licence = any(name.startswith("MODEL_LICENSE") for name in contents.kept)
    if fields.get("vocab_size") in OFFICIAL_VOCABULARIES and not has_licence:
        remarks.append(
            "weights that come from the official ChatGLM-6B have a licence of their own: put its "
            "MODEL_LICENSE beside them"
        )
    card = contents.folder / CARD_FILE
    if read_head(card).get("license") == "unknown":
        remarks.append(f"{CARD_FILE} says that the licence is unknown: say it if you know it")
    links = LINK.findall(card.read_text(encoding="utf-8"))
    lost = sorted({link for link in links if link not in contents.kept and ":" not in link})
    if lost:
        remarks.append(f"{CARD_FILE} links to what stays here: {', '.join(lost)}")
    return remarks
