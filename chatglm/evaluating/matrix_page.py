"""Owns how a matrix of models and number formats is shown: tables, a picture, one JSON object.

Does not know how a cell is measured.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# What is shown of each task, with what is better; the first one is the task's main figure.
FIGURES = {
    "perplexity": {"perplexity": "lower", "token_accuracy": "higher"},
    "choices": {"accuracy": "higher", "mean_accuracy": "higher"},
    "generation": {
        "rouge-l": "higher",
        "bleu-4": "higher",
        "rouge-1": "higher",
        "rouge-2": "higher",
    },
}
MEMORY = "gigabytes"
NOT_MEASURED = "-"


class Cell(NamedTuple):
    """A model in a number format.

    Attributes:
        model: its name.
        number_format: the name of the format.
        figures: what was measured; None if nothing was.
        problem: why not, if it should have been.
        note: what else is to be said of it.
    """

    model: str
    number_format: str
    figures: dict[str, Any] | None = None
    problem: str = ""
    note: str = ""

    def describe(self) -> str:
        """Return one line for people."""
        name, figures = f"{self.model} {self.number_format}", self.figures
        if figures is None:
            return f"{name}: {'failed: ' if self.problem else ''}{self.problem or self.note}"
        key = next(iter(figures))
        told = f"{name}: {key} {format_figure(figures[key])}"
        return f"{told}, {self.note}" if self.note else told


@dataclass
class Matrix:
    """Models by number formats.

    Attributes:
        task: that was measured.
        models, formats: the names of rows and columns.
        cells: row by row.
    """

    task: str
    models: list[str]
    formats: list[str]
    cells: list[Cell] = field(default_factory=list)

    def find(self, model: str, number_format: str) -> Cell:
        """Return the cell of a row and a column."""
        return next(c for c in self.cells if (c.model, c.number_format) == (model, number_format))

    @property
    def problems(self) -> list[str]:
        """What went wrong, a sentence each; rows that differ between cells among it."""
        failed = [f"{c.model} {c.number_format}: {c.problem}" for c in self.cells if c.problem]
        rows = {c.figures.get("rows", c.figures.get("questions")) for c in self.cells if c.figures}
        differ = f"the cells did not measure the same rows ({sorted(map(str, rows))})"
        return [*failed, *([differ] if len(rows) > 1 else [])]

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        told = [f"{c.model} {c.number_format}: {c.note}" for c in self.cells if not c.figures]
        notes = [line for line in told if not line.endswith(": ")]
        plain = [name for name in self.formats if not name.startswith("INT")]
        if plain and len(self.formats) > 1:
            notes.append(f"What is not packed of INT8 and INT4 is {plain[0]}.")
        if plain and plain[0] == "float32":
            notes.append(
                "float32 stands where a GPU would have float16, which CPUs compute slowly."
            )
        counted = {c.figures["tokens"] for c in self.cells if c.figures and "tokens" in c.figures}
        if len(counted) > 1:
            notes.append("The models have other vocabularies: perplexities cannot be compared.")
        return notes


def write_matrix(matrix: Matrix, folder: Path) -> dict[str, Any]:
    """Write `matrix.json`, `matrix.md` and `matrix.png`, and return what is in the first.

    Args:
        matrix: with all its cells.
        folder: to write to.
    """
    fields = {
        "task": matrix.task,
        "models": matrix.models,
        "formats": matrix.formats,
        "cells": [describe_cell(cell) for cell in matrix.cells],
        "problems": matrix.problems,
        "notes": matrix.notes,
    }
    text = json.dumps(fields, ensure_ascii=False, indent=2)
    (folder / "matrix.json").write_text(text + "\n", encoding="utf-8")
    (folder / "matrix.md").write_text(format_page(matrix), encoding="utf-8")
    draw_matrix(matrix, folder / "matrix.png")
    return fields


def describe_cell(cell: Cell) -> dict[str, Any]:
    """Return a cell as one JSON object."""
    told = {"problem": cell.problem, "note": "" if cell.figures else cell.note}
    names = {"model": cell.model, "format": cell.number_format}
    return {**names, **(cell.figures or {}), **{k: v for k, v in told.items() if v}}


def format_page(matrix: Matrix) -> str:
    """Return the tables in Markdown: one for each figure of the task, and one of memory."""
    better = {**FIGURES[matrix.task], MEMORY: "lower"}
    shown = [key for key in better if any(key in (c.figures or {}) for c in matrix.cells)]
    parts = [f"# {matrix.task.capitalize()}", *(f"{note}" for note in matrix.notes)]
    for key in shown:
        parts += [f"## {key} ({better[key]} is better)", format_table(matrix, key)]
    if matrix.problems:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in matrix.problems)]
    return "\n\n".join(parts) + "\n"


def format_table(matrix: Matrix, key: str) -> str:
    """Return the table of a figure; behind the first column's format each has what it changed."""
    lines = [["model", *matrix.formats], ["---", *("---:" for _ in matrix.formats)]]
    for model in matrix.models:
        cells = [matrix.find(model, name) for name in matrix.formats]
        values = [(cell.figures or {}).get(key) for cell in cells]
        texts = [format_change(value, values[0], bool(i)) for i, value in enumerate(values)]
        failed = ["failed" if cell.problem else text for cell, text in zip(cells, texts)]
        lines.append([model.replace("|", "\\|"), *failed])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_change(value: float | None, first: float | None, is_later: bool) -> str:
    """Return a figure, with how far it is from the first one of its row."""
    if value is None:
        return NOT_MEASURED
    if not is_later or not first:
        return format_figure(value)
    return f"{format_figure(value)} ({100 * (value / first - 1):+.1f} %)"


def format_figure(value: float) -> str:
    """Return a figure in four digits."""
    return f"{value:.4g}"


def draw_matrix(matrix: Matrix, path: Path) -> None:
    """Draw the task's figures side by side: a group of bars for each format, a bar a model.

    Args:
        matrix: with all its cells.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    better = FIGURES[matrix.task]
    shown = [key for key in better if any(key in (c.figures or {}) for c in matrix.cells)][:2]
    width = max(4.5, 0.55 * len(matrix.models) * len(matrix.formats) + 1.5)
    figure = Figure(figsize=(width * max(1, len(shown)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, key in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), number)
        _draw_bars(axes, matrix, key)
        axes.set_title(f"{key} ({better[key]} is better)", fontsize=9)
    figure.savefig(path, dpi=110)


def _draw_bars(axes: Any, matrix: Matrix, key: str) -> None:
    """Draw the bars of a figure, each with its number on top."""
    share = 0.8 / len(matrix.models)
    for row, model in enumerate(matrix.models):
        places, heights = _list_bars(matrix, model, key)
        bars = [place + (row - (len(matrix.models) - 1) / 2) * share for place in places]
        drawn = axes.bar(bars, heights, 0.9 * share, label=_label(model, row))
        axes.bar_label(drawn, [format_figure(height) for height in heights], fontsize=6)
    axes.set_xticks(range(len(matrix.formats)), matrix.formats, fontsize=8)
    axes.set_xlim(-0.6, len(matrix.formats) - 0.4)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")


def _list_bars(matrix: Matrix, model: str, key: str) -> tuple[Sequence[int], Sequence[float]]:
    """Return the columns in which a model was measured, and its figures there."""
    found = {}
    for column, name in enumerate(matrix.formats):
        value = (matrix.find(model, name).figures or {}).get(key)
        if value is not None:
            found[column] = value
    return list(found), list(found.values())


def _label(model: str, row: int) -> str:
    """Return a name that matplotlib's own font can draw: others are told by their row."""
    return model if model.isascii() else f"model {row + 1}"


__all__ = ["FIGURES", "Cell", "Matrix", "format_page", "write_matrix"]
