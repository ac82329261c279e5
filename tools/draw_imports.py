"""Draws docs/imports.svg: which part of the repository imports which, from the imports themselves.

    python tools/draw_imports.py            # write the picture
    python tools/draw_imports.py --check    # exit with 1 if it is out of date

A box is a flat file of the model, or a folder or file of the package; it stands above all that it
imports. Owns the drawing. Runs nothing of what it reads, and needs nothing but Python.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from generated import write_or_check

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "imports.svg"
PACKAGE = "chatglm"
WINGED = "training"  # a folder whose own files and wings have boxes of their own
SEAM = ("environment_chatglm", "chatglm.cpu")  # by name, where the package is installed
BOX, HIGH, GAP, ROW = 168, 30, 14, 78  # pixels
MARGIN, PER_ROW = 20, 6
MODEL_COLOR, PACKAGE_COLOR = "#dbe9f6", "#eee6d8"

Graph = dict[str, set[str]]


def name_part(path: Path) -> str:
    """Return the part of the repository that a Python file belongs to."""
    words = path.relative_to(ROOT).with_suffix("").parts
    if words[0] != PACKAGE:
        return words[0]
    kept = words[: 3 if words[1] == WINGED else 2]
    return ".".join(kept).removesuffix(".__init__")


def read_imports(path: Path) -> Iterator[str]:
    """Yield the names of the modules of this repository that a file imports, in any function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_graph() -> Graph:
    """Return what each part imports of the others."""
    files = [*ROOT.glob("*.py"), *(ROOT / PACKAGE).rglob("*.py")]
    parts = {".".join(f.relative_to(ROOT).with_suffix("").parts): name_part(f) for f in files}
    graph: Graph = {part: set() for part in parts.values()}
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for name in read_imports(file):
            target = parts.get(name) or parts.get(f"{name}.__init__")
            if target is not None and target != parts[module]:
                graph[parts[module]].add(target)
    graph.pop(PACKAGE, None)  # its own first file says nothing of the rest
    graph.pop(f"{PACKAGE}.__main__", None)
    graph.pop(f"{PACKAGE}.{WINGED}", None)
    return {part: found & graph.keys() for part, found in graph.items()}


def find_levels(graph: Graph) -> dict[str, int]:
    """Return each part's height above those that import nothing; a circle ends at its second turn.

    Raises:
        ValueError: for parts that import each other, by their names.
    """
    levels: dict[str, int] = {}

    def climb(part: str, above: tuple[str, ...]) -> int:
        if part in above:
            circle = " -> ".join((*above[above.index(part) :], part))
            raise ValueError(f"these import each other: {circle}")
        if part not in levels:
            below = [climb(target, (*above, part)) for target in sorted(graph[part])]
            levels[part] = 1 + max(below, default=-1)
        return levels[part]

    for part in sorted(graph):
        climb(part, ())
    return levels


def lay_out(graph: Graph) -> dict[str, tuple[int, int]]:
    """Return the left upper corner of every box; a level with many boxes takes several rows."""
    levels = find_levels(graph)
    places, y = {}, MARGIN
    for level in sorted(set(levels.values()), reverse=True):
        parts = sorted(part for part in graph if levels[part] == level)
        for start in range(0, len(parts), PER_ROW):
            for column, part in enumerate(parts[start : start + PER_ROW]):
                places[part] = (MARGIN + column * (BOX + GAP), y)
            y += ROW
    return places


def draw(graph: Graph) -> str:
    """Return the picture."""
    places = lay_out(graph)
    width = max(x for x, _ in places.values()) + BOX + MARGIN
    height = max(y for _, y in places.values()) + HIGH + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for part in sorted(graph):
        lines += [_draw_line(places[part], places[target]) for target in sorted(graph[part])]
    if all(part in places for part in SEAM):
        lines.append(_draw_line(*(places[part] for part in SEAM), is_seam=True))
    lines += [_draw_box(part, places[part]) for part in sorted(graph)]
    return "\n".join([*lines, "</svg>", ""])


def _draw_line(start: tuple[int, int], end: tuple[int, int], is_seam: bool = False) -> str:
    half = BOX // 2
    style = 'stroke="#c33" stroke-dasharray="5 4"' if is_seam else 'stroke="#999"'
    return (
        f'<line x1="{start[0] + half}" y1="{start[1] + HIGH // 2}" x2="{end[0] + half}" '
        f'y2="{end[1] + HIGH // 2}" {style} stroke-opacity="0.6"/>'
    )


def _draw_box(part: str, place: tuple[int, int]) -> str:
    x, y = place
    color = PACKAGE_COLOR if part.startswith(PACKAGE + ".") else MODEL_COLOR
    return (
        f'<rect x="{x}" y="{y}" width="{BOX}" height="{HIGH}" rx="4" fill="{color}" '
        f'stroke="#666"/><text x="{x + BOX // 2}" y="{y + 19}" text-anchor="middle">'
        f"{escape(part)}</text>"
    )


def main(argv: list[str] | None = None) -> int:
    """Write or check the picture; return the exit code."""
    parser = argparse.ArgumentParser(description="Draw which part imports which.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    args = parser.parse_args(argv)
    return write_or_check(PICTURE, draw(read_graph()), args.check, "python tools/draw_imports.py")


if __name__ == "__main__":
    sys.exit(main())
