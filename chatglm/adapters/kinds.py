"""Owns which kinds of adapters there are, which of them go together, and onto which base.

LoRA adapters of peft go together, in order: each is for what those before it have made of the
base. A prefix and all other kinds stand alone. Reads configurations and tables of contents. Does
not know how adapters act (`acting`), nor how LoRA is merged (`converting.adapters`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chatglm.adapters.bases import check_base, find_base
from chatglm.checkpoints.place import find_folder
from chatglm.checkpoints.prefixes import PEFT_TYPE, is_prefix
from chatglm.checkpoints.reading import WEIGHT_FILES, open_folder
from chatglm.checkpoints.recognize import (
    ADAPTER_FILE,
    CONFIG_FILE,
    PREFIX_TENSORS,
    name_adapter,
    read_object,
)

LORA, PREFIX, PTUNING, OTHER = "LoRA", "prefix", "P-Tuning", "other"
SCORER_TASK = "SEQ_CLS"  # peft's name for what classes with scores do
TEXT_TASK = "CAUSAL_LM"
TASKS = (SCORER_TASK, TEXT_TASK)


class Kind(NamedTuple):
    """An adapter's folder.

    Attributes:
        folder: where it is, resolved.
        kind: one of the constants above.
        name: what people call it, with an article.
        task: as peft names it; "" if the folder does not say.
    """

    folder: Path
    kind: str
    name: str
    task: str = ""


class Stack(NamedTuple):
    """Adapters that go onto one base together.

    Attributes:
        base: the model's folder.
        kinds: the adapters, in order.
        notes: what is to be said of them.
    """

    base: Path
    kinds: tuple[Kind, ...]
    notes: tuple[str, ...]

    @property
    def folders(self) -> list[Path]:
        """The adapters' folders, in order."""
        return [kind.folder for kind in self.kinds]

    @property
    def prefix(self) -> Path | None:
        """The folder of the prefix, in either layout, if that is what there is."""
        found = [kind.folder for kind in self.kinds if kind.kind in (PREFIX, PTUNING)]
        return found[0] if found else None


def read_kind(path: str | Path) -> Kind:
    """Say of what kind an adapter is.

    Raises:
        ValueError: if there is no such folder, or none with an adapter.
    """
    folder = find_folder(path)
    if (folder / ADAPTER_FILE).is_file():
        return _read_peft(folder)
    if is_prefix(_open(folder)):
        return Kind(folder, PTUNING, "a P-Tuning prefix", TEXT_TASK)
    is_model = (folder / CONFIG_FILE).is_file()
    what = "is a model, which is named as such" if is_model else "is no model either"
    raise ValueError(
        f"adapter {path} has neither {ADAPTER_FILE} nor tensors {PREFIX_TENSORS}*, and {what}: "
        "name a folder of LoRA adapters or of a P-Tuning prefix"
    )


def _open(folder: Path) -> Any:
    if not any((folder / name).is_file() for pair in WEIGHT_FILES for name in pair):
        return {}
    try:
        return open_folder(folder)
    except OSError:
        return {}


def _read_peft(folder: Path) -> Kind:
    fields = read_object(folder / ADAPTER_FILE)
    peft_type, task = str(fields.get("peft_type") or ""), str(fields.get("task_type") or "")
    kind = {PEFT_TYPE: PREFIX, "LORA": LORA}.get(peft_type, OTHER)
    return Kind(folder, kind, name_adapter(fields), task)


def stack_adapters(
    paths: Sequence[str | Path],
    base: Path | None = None,
    any_base: bool = False,
    task: str = TEXT_TASK,
) -> Stack:
    """Say which adapters go onto which base, having checked that they do.

    Args:
        paths: folders of adapters, one or more, in order.
        base: the model's folder; None for the one that the first adapter was trained on.
        any_base: whether another base than that of an adapter is taken all the same.
        task: what the model is for, as peft names it.

    Raises:
        ValueError: for a folder without an adapter, adapters that do not go together, of another
            task or of another base.
    """
    kinds = tuple(read_kind(path) for path in paths)
    check_together(kinds)
    for kind in kinds:
        check_task(kind, task)
    place = base or find_base(kinds[0].folder)
    notes = [] if base else [f"{kinds[0].folder} is for {place}, which is taken"]
    for number, kind in enumerate(kinds):
        note = check_base(kind.folder, place, [k.folder for k in kinds[:number]], any_base)
        notes += [note] if note else []
    return Stack(place, kinds, tuple(notes))


def announce(stack: Stack) -> None:
    """Write what is to be said of adapters as lines of the command."""
    for note in stack.notes:
        sys.stderr.write(f"chatglm: {note}\n")


def check_together(kinds: Sequence[Kind]) -> None:
    """Refuse adapters that do not go together.

    Raises:
        ValueError: naming the one that stands alone.
    """
    alone = [kind for kind in kinds if kind.kind != LORA]
    if alone and len(kinds) > 1:
        others = [kind for kind in kinds if kind is not alone[0]]
        remedy = (
            "merge the LoRA adapters into their base first (chatglm merge), and name that model"
            if any(kind.kind == LORA for kind in others)
            else "name one of them"
        )
        raise ValueError(
            f"{alone[0].folder} is {alone[0].name}, which does not go together with "
            f"{others[0].name}, {others[0].folder}: {remedy}"
        )
    twice = [
        kind.folder for n, kind in enumerate(kinds) if kind.folder in [k.folder for k in kinds[:n]]
    ]
    if twice:
        raise ValueError(f"the adapter {twice[0]} is named twice: leave one out")


def check_task(kind: Kind, task: str) -> None:
    """Refuse an adapter of a model with another head.

    Raises:
        ValueError: naming both.
    """
    if kind.task in ("", task) or kind.task not in TASKS:
        return
    told = "a reward model's" if kind.task == SCORER_TASK else "a language model's"
    remedy = (
        "name it as reward_model, or an adapter that was trained for text"
        if kind.task == SCORER_TASK
        else "train one with chatglm train reward"
    )
    raise ValueError(
        f"adapter {kind.folder} was trained for {kind.task} and {task} is wanted here: it is "
        f"{told}; {remedy}"
    )


def require_mergeable(stack: Stack) -> None:
    """Refuse adapters that have no place in a model's weights.

    Raises:
        ValueError: naming the first one.
    """
    for kind in stack.kinds:
        if kind.kind in (PREFIX, PTUNING):
            raise ValueError(
                f"{kind.folder} is {kind.name}, which is no change of weights to be merged: "
                f"chatglm adopt {stack.base} --ptuning {kind.folder} --out NEW puts it into a "
                f"model, and chatglm chat {stack.base} --adapter {kind.folder} takes it as it is"
            )


__all__ = [
    "LORA",
    "OTHER",
    "PREFIX",
    "PTUNING",
    "Kind",
    "Stack",
    "announce",
    "check_task",
    "check_together",
    "read_kind",
    "require_mergeable",
    "stack_adapters",
]
