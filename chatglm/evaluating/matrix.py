"""Owns the matrix: base and tuned models, each in several number formats, measured on one task.

    chatglm train eval chatglm-6b --matrix --models out/sft out/sft_lora --eval_data dev.jsonl ...

A cell is a model in a format. One is in memory at a time; what a cell gave is kept in its folder
under `cells`, so that a matrix that was broken off goes on, or grows by a model. A cell that fails
is told, and the others go on. Does not know how figures are shown (`matrix_page`).
"""

import dataclasses
import gc
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from chatglm.checkpoints.prefixes import is_prefix
from chatglm.checkpoints.reading import open_folder
from chatglm.checkpoints.recognize import ADAPTER_FILE, CONFIG_FILE, read_object
from chatglm.evaluating.evaluation import MEASURES, RESULT_FILE, EvaluatedModel, write_json
from chatglm.evaluating.matrix_page import FIGURES, Cell, Matrix, write_matrix
from chatglm.evaluating.settings import EvalSettings
from chatglm.loading import check_model_folder, choose_device, choose_dtype
from chatglm.training.models import find_base
from chatglm.training.resuming import open_output
from chatglm.training.settings import KeyProblem

CELLS_FOLDER = "cells"
CELL_FILE = "cell.json"
# What a cell's figures do not depend on: where they go, and what else is measured.
FREE_KEYS = ("output", "resume", "verify", "matrix", "models", "matrix_bits")
# What goes wrong with one model and not with the next; RuntimeError: torch, memory that is full.
FAILURES = (ValueError, OSError, ImportError, RuntimeError)


class Variant(NamedTuple):
    """A model of the matrix.

    Attributes:
        name: what tables call it.
        model: its folder.
        adapter: folders of what is put onto it, in order; none for nothing.
    """

    name: str
    model: str
    adapter: Sequence[str] = ()


def list_variants(settings: EvalSettings) -> list[Variant]:
    """Return the base, the base with the adapters of `adapter`, and what `models` names.

    A folder of adapters or of a prefix among `models` goes onto the base.

    Raises:
        ValueError: for a folder that is none, or one that is named twice.
    """
    base = str(find_base(settings))
    found = [Variant(base, base)]
    if settings.adapter:
        found.append(Variant(" + ".join(settings.adapter), base, settings.adapter))
    for folder in settings.models:
        if not Path(folder).is_dir():
            raise KeyProblem(f"models names {folder}, which is no folder")
        goes_on_top = is_adapter(Path(folder))
        found.append(Variant(folder, base, [folder]) if goes_on_top else Variant(folder, folder))
    asked = [(Path(v.model).resolve(), tuple(v.adapter)) for v in found]
    for variant, place in zip(found, asked):
        if asked.count(place) > 1:
            raise KeyProblem(f"models names {variant.name} a second time: leave it out")
    return shorten_names(found)


def shorten_names(variants: Sequence[Variant]) -> list[Variant]:
    """Return variants under the last parts of their folders, where these differ."""
    short = [" + ".join(Path(p).name for p in v.name.split(" + ")) for v in variants]
    names = [s if s and short.count(s) == 1 else v.name for s, v in zip(short, variants)]
    return [variant._replace(name=name) for variant, name in zip(variants, names)]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters or a prefix, and no model."""
    if (folder / ADAPTER_FILE).is_file():
        return True
    try:
        return is_prefix(open_folder(folder))
    except (ValueError, OSError):
        return False  # what is wrong with it is told where it is loaded


def measure_matrix(settings: EvalSettings, given: dict[str, Any]) -> dict[str, Any]:
    """Measure every cell, write tables and a picture, and return the figures.

    Args:
        settings: ours.
        given: nothing.

    Raises:
        ValueError: for settings, data or folders that cannot be used, before anything is measured;
            and at the end, if a cell failed, naming it.
    """
    variants = list_variants(settings)
    for folder in dict.fromkeys(variant.model for variant in variants):
        check_model_folder(folder, settings.verify)
    task = MEASURES[settings.task](settings)
    with open_output(dataclasses.replace(settings, verify=False), given):
        matrix = Matrix(settings.task, [v.name for v in variants], name_formats(settings))
        for variant, bits in ((v, bits) for v in variants for bits in settings.matrix_bits):
            matrix.cells.append(fill_cell(settings, variant, bits, task))
            told = f"{len(matrix.cells)} of {len(variants) * len(settings.matrix_bits)}"
            sys.stderr.write(f"chatglm: {matrix.cells[-1].describe()} ({told})\n")
        found = write_matrix(matrix, Path(settings.output))
    if matrix.problems:
        raise ValueError(
            f"{settings.output}/matrix.md is written, but: {'; '.join(matrix.problems)}. What was "
            "measured is kept: mend it, and go on with resume: true"
        )
    return found


def name_formats(settings: EvalSettings) -> list[str]:
    """Return what the columns are called: the plain number format by its own name."""
    device = choose_device(settings.device or None)
    plain = str(choose_dtype(settings.dtype or None, device)).removeprefix("torch.")
    return [f"INT{bits}" if bits else plain for bits in settings.matrix_bits]


def fill_cell(settings: EvalSettings, variant: Variant, bits: int, task: Any) -> Cell:
    """Return a cell: as it was measured before, as it is measured now, or what kept it from it."""
    number_format = name_formats(dataclasses.replace(settings, matrix_bits=[bits]))[0]
    cell = Cell(variant.name, number_format)
    packed = read_object(Path(variant.model) / CONFIG_FILE).get("quantization_bit") or 0
    if packed and packed != bits:
        return cell._replace(note=f"its weights are stored in {packed} bits")
    own = dataclasses.replace(
        settings,
        model=variant.model,
        adapter=list(variant.adapter),
        bits=0 if packed else bits,
        output=str(place_cell(settings, variant, bits)),
    )
    asked = describe_asked(own)
    kept = read_cell(Path(own.output), asked)
    if kept is not None:
        return cell._replace(figures=kept, note="measured before")
    try:
        return cell._replace(figures=measure_cell(own, asked, task))
    except FAILURES as error:
        return cell._replace(problem=" ".join(f"{error}".split()) or type(error).__name__)
    finally:
        free_memory()


def place_cell(settings: EvalSettings, variant: Variant, bits: int) -> Path:
    """Return a cell's folder, whose name people can read and no other cell has."""
    told = f"{Path(variant.model).resolve()}\n{list(variant.adapter)}\n{bits}"
    short = hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in variant.name)[-60:]
    return Path(settings.output) / CELLS_FOLDER / f"{name}-{bits or 'plain'}-{short}"


def describe_asked(settings: EvalSettings) -> dict[str, Any]:
    """Return what a cell's figures follow from: its keys, and the files of model and data.

    Files are told by size and time. The number format stands for a device that follows from the
    machine.
    """
    fields = dataclasses.asdict(settings)
    keys = {key: value for key, value in fields.items() if key not in FREE_KEYS}
    device = choose_device(settings.device or None)
    places = [settings.model, *settings.adapter, *settings.eval_data]
    keys["dtype"] = str(choose_dtype(settings.dtype or None, device))
    keys["files"] = [entry for place in places for entry in list_states(Path(place))]
    return json.loads(json.dumps(keys))


def list_states(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of a file, or of all files of a folder and those in it."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            state = file.stat()
            yield str(file), state.st_size, state.st_mtime_ns


def read_cell(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the figures of a cell that was measured in the same way; None if there are none."""
    try:
        kept = json.loads((folder / CELL_FILE).read_text(encoding="utf-8"))
        return kept["figures"] if kept["asked"] == asked else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or half of one: it is measured again


def measure_cell(settings: EvalSettings, asked: dict[str, Any], task: Any) -> dict[str, Any]:
    """Measure a model, keep all its figures in its folder, and return those of the tables."""
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    set_seed(settings.seed)
    evaluated = EvaluatedModel(settings)
    held = measure_weights(evaluated.model.model)
    measured = task.measure(evaluated, folder)
    write_json({"task": settings.task, **measured}, folder / RESULT_FILE)
    shown = {key: measured[key] for key in FIGURES[settings.task] if key in measured}
    counts = {key: measured[key] for key in ("rows", "questions", "tokens") if key in measured}
    spent = round(time.monotonic() - begun, 2)
    figures = {**shown, **counts, "gigabytes": held, "seconds": spent}
    part = folder / f"{CELL_FILE}.part"
    write_json({"asked": asked, "figures": figures}, part)
    part.replace(folder / CELL_FILE)
    return figures


def measure_weights(model: Any) -> float:
    """Return the GB of a model's tensors, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return round(sum(tensors.values()) / 1e9, 6)


def free_memory() -> None:
    """Give back what the last model took, before the next one is read."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


__all__ = ["Variant", "is_adapter", "list_variants", "measure_matrix"]
