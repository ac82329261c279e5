"""Owns what is odd about a model folder that loads all the same, and what it means for its owner.

Asks configurations, names and sizes of files, never values. Does not know what keeps a folder from
loading, but for two generations in one folder, which load and answer wrongly.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from chatglm.checking.problems import ODD, PROBLEM, Problem
from chatglm.checking.tensors import count_dtypes
from chatglm.checkpoints.checksums import SUMS, read_sums
from chatglm.checkpoints.complete import (
    CURRENT,
    DTYPE_FIELDS,
    GENERATION_FILE,
    ID_SUFFIX,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    find_auto_map,
    list_settings,
)
from chatglm.checkpoints.reading import WEIGHT_FILES, StoredTensor, read_weight_map
from chatglm.checkpoints.recognize import CONFIG_FILE, read_object
from chatglm.model import FOLDER as CODE_FOLDER
from chatglm.model_files import find_model_files

Fields = Mapping[str, Any]
LARGE_BYTES = 8e9  # of float32 weights, from which on it matters that half would do
ADOPT = "`chatglm adopt` writes it; the commands and chatglm.register() do without"
IMAGE_FIELD = "num_image_tokens"
COMPLETED = (GENERATION_FILE, TOKENIZER_FILE, TEMPLATE_FILE)
LEFTOVERS = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "training_args.bin")
LEFTOVER_PATTERNS = ("rng_state*.pth", "global_step*", "*.incomplete", "*.tmp", "*.part", "*.aria2")
MOST_NAMED = 4


class Subject(NamedTuple):
    """A model folder, as far as it could be read.

    Attributes:
        folder: where it is.
        fields: its config.json.
        names: of the weight files that are read.
        tensors: of these.
    """

    folder: Path
    fields: Fields
    names: list[str]
    tensors: Mapping[str, StoredTensor]


def find_mixed_generations(folder: Path, fields: Fields) -> list[Problem]:
    """Return where the tokenizer's options are those of another generation than the embedding.

    Args:
        folder: of the model.
        fields: its config.json.
    """
    rows = fields.get("vocab_size")
    settings = list_settings().get(rows) if isinstance(rows, int) else None
    if settings is None or not (folder / TOKENIZER_FILE).is_file():
        return []
    wanted = read_object(settings / TOKENIZER_FILE)[IMAGE_FIELD]
    found = read_object(folder / TOKENIZER_FILE).get(IMAGE_FIELD, wanted)
    if found == wanted:
        return []
    what = (
        f"{folder / TOKENIZER_FILE} has {IMAGE_FIELD} {found!r}, and the {rows} rows of "
        f"{CONFIG_FILE} need {wanted}: every token would be read as another"
    )
    remedy = f"take {TOKENIZER_FILE} and {CONFIG_FILE} of one generation"
    return [Problem("generations-mixed", PROBLEM, TOKENIZER_FILE, what, remedy)]


def find_oddities(subject: Subject) -> Iterator[Problem]:
    """Yield what is odd about a model folder."""
    yield from _find_code_oddities(subject.folder, subject.fields)
    yield from _find_missing_settings(subject.folder)
    yield from _find_id_oddities(subject.fields)
    yield from _find_format_oddities(subject)
    yield from _find_index_oddities(subject)
    yield from _find_two_kinds(subject)
    yield from _find_leftovers(subject)
    yield from _find_lost_files(subject)


def _odd(code: str, file: str, what: str, remedy: str) -> Problem:
    return Problem(code, ODD, file, what, remedy)


def _find_code_oddities(folder: Path, fields: Fields) -> Iterator[Problem]:
    """What `trust_remote_code=True` would do with the folder."""
    if not fields.get("auto_map"):
        what = f"{folder / CONFIG_FILE} has no auto_map, and trust_remote_code=True finds no code"
        yield _odd("no-auto-map", CONFIG_FILE, what, ADOPT)
        return
    files = find_model_files(CODE_FOLDER, CURRENT)
    lacking = [name for name in files if not (folder / name).is_file()]
    if lacking or fields["auto_map"] != find_auto_map():
        what = (
            f"the Python files of {folder} are not this model's, and those of 2023 fail on "
            "transformers 4.34 and later"
        )
        remedy = "`chatglm adopt` replaces them; commands and chatglm.register() run none"
        yield _odd("old-code", "", what, remedy)
        return
    others = [n for n in files if (folder / n).read_bytes() != (CODE_FOLDER / n).read_bytes()]
    if others:
        what = f"{', '.join(others[:MOST_NAMED])} in {folder} are of another release than installed"
        yield _odd("other-release", others[0], what, "`chatglm adopt` replaces them")


def _find_missing_settings(folder: Path) -> Iterator[Problem]:
    for name in COMPLETED:
        if not (folder / name).is_file():
            what = f"{folder} has no {name}, and gets that of its generation in memory"
            yield _odd("missing-settings", name, what, ADOPT)


def _find_id_oddities(fields: Fields) -> Iterator[Problem]:
    """Ids that old configurations have wrong; they are replaced in memory."""
    settings = list_settings().get(fields.get("vocab_size") or 0)
    if settings is None or fields.get("auto_map") == find_auto_map():
        return
    known = read_object(settings / CONFIG_FILE)
    wrong = {
        name: (fields[name], known[name])
        for name in known
        if name.endswith(ID_SUFFIX) and name in fields and fields[name] != known[name]
    }
    if wrong:
        told = ", ".join(f"{name} {own} and not {right}" for name, (own, right) in wrong.items())
        what = f"{CONFIG_FILE} has {told}; the generation's ids are taken"
        yield _odd("wrong-ids", CONFIG_FILE, what, "`chatglm adopt` mends it")


def _find_format_oddities(subject: Subject) -> Iterator[Problem]:
    """Number formats that the configuration does not say, or that take needless room."""
    dtypes = count_dtypes(subject.tensors)
    floats = [name for name in dtypes if "float" in name]
    if not floats:
        return
    size = sum(dtypes.values())
    if next(iter(dtypes)) == "float32" and size > LARGE_BYTES:
        what = f"the weights are float32 and take {size / 1e9:.1f} GB, where float16 takes half"
        remedy = "`chatglm merge` or `chatglm quantize` write smaller ones"
        yield _odd("float32", "", what, remedy)
    named = next((fields for f in DTYPE_FIELDS if (fields := subject.fields.get(f))), floats[0])
    if str(named).removeprefix("torch.") not in dtypes:
        what = f"{CONFIG_FILE} says {named}, and the weights are {', '.join(dtypes)}"
        yield _odd("dtype", CONFIG_FILE, what, "name the dtype where you load it, or mend it")
    if subject.fields.get("quantization_bit") and next(iter(dtypes)) != "int8":
        what = f"{CONFIG_FILE} has quantization_bit, and plain weights are packed at every load"
        yield _odd("packed-while-loading", CONFIG_FILE, what, "`chatglm quantize` packs them once")


def _find_index_oddities(subject: Subject) -> Iterator[Problem]:
    """What an index says that its shards, all of them whole, do not hold."""
    opened = {stored.file.name for stored in subject.tensors.values() if stored.file}
    used = next((pair for pair in WEIGHT_FILES if _is_used(pair, subject)), None)
    if used is not None and opened == set(subject.names):
        file = subject.folder / used[1]
        metadata: Any = read_object(file).get("metadata")
        told = cast(Fields, metadata).get("total_size") if isinstance(metadata, dict) else None
        size = sum(stored.tensor.nbytes for stored in subject.tensors.values())
        if told is not None and told != size:
            what = f"{file} says {told} bytes, and the tensors are {size}"
            yield _odd("total-size", used[1], what, "nothing depends on it")
        yield from _find_misplaced(file, subject.tensors)


def _is_used(pair: tuple[str, str], subject: Subject) -> bool:
    """Whether transformers reads the index of a kind of weight files: not beside a single one."""
    single, index = pair
    ending = single.rpartition(".")[2]
    is_read = any(name.endswith(ending) for name in subject.names)
    return is_read and single not in subject.names and (subject.folder / index).is_file()


def _find_misplaced(index: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[Problem]:
    weight_map = read_weight_map(index)
    places = {name: stored.file.name for name, stored in tensors.items() if stored.file}
    wrong = sorted(n for n, place in places.items() if weight_map.get(n, place) != place)
    unknown = sorted(places.keys() - weight_map.keys())
    absent = sorted(weight_map.keys() - places.keys())
    for kind, names in (
        ("puts elsewhere than they are", wrong),
        ("does not name", unknown),
        ("names, and no shard holds,", absent),
    ):
        if names:
            what = f"{index} {kind} {len(names)} tensors, {names[0]} for one"
            yield _odd("index", index.name, what, "take the index that came with the shards")


def _find_two_kinds(subject: Subject) -> Iterator[Problem]:
    """Weights of the kind that is not read, because one of the other is there."""
    folder = subject.folder
    unread: list[str] = []
    for file in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.safetensors")):
        if file.name.startswith(("pytorch_model", "model")) and file.name not in subject.names:
            unread.append(file.name)
    if unread and subject.names:
        what = f"{folder} has weights that are not read, {', '.join(unread[:MOST_NAMED])}"
        remedy = (
            f"only {subject.names[0]}{' and on' if subject.names[1:] else ''} count, remove these"
        )
        yield _odd("unread-weights", unread[0], what, remedy)


def _find_leftovers(subject: Subject) -> Iterator[Problem]:
    folder = subject.folder
    found = [folder / name for name in LEFTOVERS if (folder / name).exists()]
    found += [path for pattern in LEFTOVER_PATTERNS for path in sorted(folder.glob(pattern))]
    if found:
        size = sum(path.stat().st_size for path in found if path.is_file())
        names = ", ".join(path.name for path in found[:MOST_NAMED])
        what = f"{folder} has leftovers of a training or a download, {names} ({size / 1e6:,.1f} MB)"
        yield _odd("leftovers", found[0].name, what, "the model does not need them")


def _find_lost_files(subject: Subject) -> Iterator[Problem]:
    """Files that SHA256SUMS names and that are not there, or a hash file that is none."""
    if not (subject.folder / SUMS).is_file():
        return
    try:
        sums = read_sums(subject.folder)
    except ValueError as error:
        yield Problem.of_error("sums", SUMS, error)
        return
    for name in (name for name in sums if not (subject.folder / name).is_file()):
        what = f"{subject.folder / SUMS} names {name}, which is not there"
        yield _odd("sums", name, what, "fetch it, or take its line out")
    unnamed = sorted(set(subject.names) - sums.keys())
    if unnamed:
        what = f"{subject.folder / SUMS} does not name {', '.join(unnamed[:MOST_NAMED])}"
        yield _odd("sums", SUMS, what, f"take the {SUMS} that was published with these weights")


__all__ = ["Subject", "find_mixed_generations", "find_oddities"]
