"""Owns what an adapter knows of the model that it was trained on, and whether a model is that one.

Beside an adapter lies `origin.json`, of which peft takes no notice: name, place and digest of
the base, and the adapters that it was trained on top of. A model folder that was made of another
one, by merging or packing, has such a file too: what it was made of, and its own digest, by which
it is known whether that is still so. So an adapter that was trained on a merged folder also goes
onto the base with the merged adapter named before it, and the other way round. Does not know how
adapters act.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chatglm.adapters.digest import (
    Difference,
    Digest,
    compare_digests,
    digest_folder,
    digest_tensors,
    name_digest,
    pack_digest,
    read_digest,
)
from chatglm.cards import read_base
from chatglm.checkpoints.durable import write_whole
from chatglm.checkpoints.reading import list_weight_files, open_shards
from chatglm.checkpoints.recognize import (
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    read_object,
)

RECORD_FILE = "origin.json"
FORMAT = 1
OVERRIDE = "any_base"  # the key, and the flag, that takes an adapter onto another base
BASE_FIELD = "base_model_name_or_path"
# What of adapter_config.json decides, beside the tensors, what an adapter does.
DECIDING_FIELDS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")


class Mark(NamedTuple):
    """An adapter that others were trained on top of.

    Attributes:
        name: of its folder.
        path: of its folder, when it was looked at.
        digest: of its tensors, in one word.
    """

    name: str
    path: str
    digest: str


class Foundation(NamedTuple):
    """Weights that an adapter can be for: a model's, with adapters merged into them in order.

    Attributes:
        name: of the model's folder.
        path: of the model's folder, when it was looked at.
        digest: of the model's weights.
        adapters: that are merged into them, or stand on top of them.
    """

    name: str
    path: str
    digest: Digest
    adapters: tuple[Mark, ...] = ()

    def __str__(self) -> str:
        top = "".join(f" with {mark.name} on top" for mark in self.adapters)
        return f"{self.path} (digest {name_digest(self.digest)}){top}"


def mark_adapter(folder: Path) -> Mark:
    """Return what tells an adapter from others.

    Raises:
        ValueError: if its weights are not there, or cannot be read.
    """
    fields = read_object(folder / ADAPTER_FILE)
    digest = digest_tensors(open_shards([find_adapter_weights(folder)]))
    told = {name: fields[name] for name in DECIDING_FIELDS if fields.get(name)}
    return Mark(folder.name, str(folder), f"{name_digest(digest)} {json.dumps(told)}")


def find_adapter_weights(folder: Path) -> Path:
    """Return the weight file of an adapter of peft.

    Raises:
        ValueError: if there is none.
    """
    for name in ADAPTER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no weights: put {' or '.join(ADAPTER_WEIGHTS)} there")


def describe_foundations(base: Path, below: Sequence[Path] = ()) -> list[Foundation]:
    """Return what an adapter on a model is for: the model, and what that says it was made of.

    Args:
        base: the model's folder.
        below: folders of adapters that come before, in order.

    Raises:
        ValueError: if weights cannot be read.
    """
    marks = tuple(mark_adapter(folder) for folder in below)
    own = Foundation(read_base(base).name, str(base), digest_folder(base), marks)
    return [own, *(f._replace(adapters=f.adapters + marks) for f in read_origin(base))]


def read_origin(base: Path) -> list[Foundation]:
    """Return what a model folder says it was made of; nothing if its weights are others by now."""
    if not (base / RECORD_FILE).is_file():
        return []
    fields = read_object(base / RECORD_FILE)
    if "result" not in fields:
        return []
    result = read_digest(fields["result"], str(base / RECORD_FILE))
    is_same = not compare_digests(result, digest_folder(base)).parts
    return read_foundations(base) or [] if is_same else []


def read_foundations(folder: Path) -> list[Foundation] | None:
    """Return what an adapter was trained on, as it is written beside it; None if nothing is.

    Raises:
        ValueError: if the file holds something else.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    listed: Any = read_object(file).get("bases")
    try:
        return [_read_foundation(fields, str(file)) for fields in listed]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is no record of a base ({type(error).__name__}: {error}): remove it, and "
            "nothing is known"
        ) from error


def _read_foundation(fields: Any, place: str) -> Foundation:
    marks = (Mark(m["name"], m["path"], m["digest"]) for m in fields["adapters"])
    digest = read_digest(fields["digest"], place)
    return Foundation(fields["name"], fields["path"], digest, tuple(marks))


def write_record(folder: Path, bases: Sequence[Foundation], result: Digest | None = None) -> None:
    """Write beside an adapter what it was trained on, or into a model what it was made of.

    Args:
        folder: of the adapter, or of the model.
        bases: as `describe_foundations` gives them.
        result: of the model's own weights; None for an adapter.
    """
    write_whole(folder / RECORD_FILE, format_record(bases, result).encode())


def format_record(bases: Sequence[Foundation], result: Digest | None = None) -> str:
    """Return the content of the file."""
    listed = [
        {
            "name": base.name,
            "path": base.path,
            "digest": pack_digest(base.digest),
            "adapters": [mark._asdict() for mark in base.adapters],
        }
        for base in bases
    ]
    fields: dict[str, Any] = {"format": FORMAT, "bases": listed}
    if result is not None:
        fields["result"] = pack_digest(result)
    return json.dumps(fields, indent=2) + "\n"


def check_base(
    adapter: Path, base: Path, below: Sequence[Path] = (), any_base: bool = False
) -> str | None:
    """Refuse a base that an adapter was not trained on.

    Args:
        adapter: its folder.
        base: the model's folder.
        below: folders of the adapters that come before it, in order.
        any_base: whether another base is taken all the same.

    Returns:
        What is to be said: that nothing, or not all, is known, or that the base is another one;
        None if it is the right one.

    Raises:
        ValueError: naming both, where they differ, and the remedy.
    """
    known = read_foundations(adapter)
    if not known:
        return _check_by_name(adapter, base, below, any_base)
    found = describe_foundations(base, below)
    pairs = [(mine, theirs) for mine in known for theirs in found if is_same_chain(mine, theirs)]
    differences = [compare_digests(mine.digest, theirs.digest) for mine, theirs in pairs]
    alike = [difference for difference in differences if not difference.parts]
    if any(not difference.unknown for difference in alike):
        return None
    if alike:
        return (
            f"{adapter} was trained on {known[0].path}, and of {base} only what is not packed can "
            "be compared with it, which is the same"
        )
    told = _explain(adapter, base, below, known, differences)
    if any_base:
        return f"{told}; taken all the same ({OVERRIDE})"
    raise ValueError(f"{told}; name what it was trained on, or take it all the same: {OVERRIDE}")


def is_same_chain(mine: Foundation, theirs: Foundation) -> bool:
    """Whether two foundations have the same adapters, in the same order."""
    return [m.digest for m in mine.adapters] == [m.digest for m in theirs.adapters]


def _explain(
    adapter: Path,
    base: Path,
    below: Sequence[Path],
    known: Sequence[Foundation],
    differences: Sequence[Difference],
) -> str:
    """Return how a base differs from that of an adapter."""
    first = known[0]
    told = f"{adapter} was trained on {first}"
    if differences:
        return f"{told}, and {base} differs from that in {differences[0]}"
    names = [mark.path for mark in first.adapters]
    given = " ".join(map(str, below))
    found = f"{base} with {given} before it" if below else f"{base} alone"
    if names:
        order = " ".join([*names, str(adapter)])
        return f"{told}, and here it would stand on {found}: name {order} in this order"
    return f"{told}, and here it would stand on {found} (digest {name_digest(digest_folder(base))})"


def _check_by_name(adapter: Path, base: Path, below: Sequence[Path], any_base: bool) -> str | None:
    """Compare a base with the folder that an adapter without a record names, if it is there."""
    named = next(iter(_list_places(adapter, read_base_names(adapter))), None)
    unknown = f"{adapter} has no {RECORD_FILE}: whether {base} is the base of it is not known"
    if named is None or below:
        return unknown
    if named == base:
        return None
    difference = compare_digests(digest_folder(named), digest_folder(base))
    if not difference.parts:
        return unknown if difference.unknown else None
    told = f"{adapter} names {named} as its base, and {base} differs from that in {difference}"
    if any_base:
        return f"{told}; taken all the same ({OVERRIDE})"
    raise ValueError(f"{told}; name that folder, or take this one all the same: {OVERRIDE}")


def read_base_names(adapter: Path) -> list[str]:
    """Return what an adapter calls its base, the surest first: a path, or a name on the Hub."""
    known = read_foundations(adapter) or []
    names = [foundation.path for foundation in known]
    if (adapter / ADAPTER_FILE).is_file():
        names.append(str(read_object(adapter / ADAPTER_FILE).get(BASE_FIELD) or ""))
    elif (adapter / CONFIG_FILE).is_file():
        names.append(str(read_object(adapter / CONFIG_FILE).get("_name_or_path") or ""))
    return [name for name in dict.fromkeys(names) if name]


def _list_places(adapter: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield the folders with a model that an adapter's base may be, where it was and moved."""
    for name in names:
        path = Path(name).expanduser()
        beside = [adapter.parent, *adapter.parent.parents[:1], Path.cwd()]
        places = [path, adapter / path, *(place / path for place in beside)]
        places += [place / path.name for place in beside]
        for place in places:
            if _holds_model(place) and place.resolve() != adapter:
                yield place.resolve()


def _holds_model(folder: Path) -> bool:
    try:
        return (folder / CONFIG_FILE).is_file() and bool(list_weight_files(folder))
    except (ValueError, OSError):
        return False


def look_for_base(adapter: Path) -> Path | None:
    """Return the folder of an adapter's base, where it is now; None if none is found.

    Args:
        adapter: its folder, resolved.

    Returns:
        A folder with the right weights, if it is known which those are, before one with others.

    Raises:
        ValueError: if a record or weights cannot be read.
    """
    places = list(dict.fromkeys(_list_places(adapter, read_base_names(adapter))))
    return next((place for place in places if _is_known(adapter, place)), next(iter(places), None))


def _is_known(adapter: Path, place: Path) -> bool:
    """Whether a folder has the weights below all adapters that an adapter was trained on."""
    known = read_foundations(adapter)
    if not known:
        return True
    found = describe_foundations(place)
    return any(not compare_digests(a.digest, b.digest).parts for a in known for b in found)


def find_base(adapter: Path) -> Path:
    """Return the folder of the model that an adapter was trained on, where it is now.

    Args:
        adapter: its folder, resolved.

    Raises:
        ValueError: if it is not found, or if what is found holds other weights.
    """
    names, place = read_base_names(adapter), look_for_base(adapter)
    if place is not None and _is_known(adapter, place):
        return place
    if place is not None:
        known = read_foundations(adapter) or []
        raise ValueError(
            f"{adapter} was trained on {known[0]}, and {place} holds other weights: name the "
            "folder of the right ones"
        )
    told = f", {names[0]}, is not there any more" if names else " is not named in it"
    remedy = f", or put its place into {adapter / ADAPTER_FILE}, under {BASE_FIELD}"
    remedy = remedy if (adapter / ADAPTER_FILE).is_file() else ""
    raise ValueError(f"the base of {adapter}{told}: name the model's folder{remedy}")


def find_below(adapter: Path) -> list[Path]:
    """Return the folders of the adapters that an adapter was trained on top of, where they were.

    Raises:
        ValueError: if one is not there any more.
    """
    bases = read_foundations(adapter) or []
    folders = [Path(mark.path) for mark in bases[0].adapters] if bases else []
    for folder in folders:
        if not (folder / ADAPTER_FILE).is_file():
            raise ValueError(
                f"{adapter} was trained on top of {folder}, which is not there any more: put it "
                "back there"
            )
    return folders


__all__ = [
    "OVERRIDE",
    "RECORD_FILE",
    "Foundation",
    "check_base",
    "describe_foundations",
    "find_adapter_weights",
    "find_base",
    "find_below",
    "format_record",
    "look_for_base",
    "read_base_names",
    "read_foundations",
    "write_record",
]
