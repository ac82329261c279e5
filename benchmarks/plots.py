"""Draws the plots of docs/benchmarks.md as SVG pictures.

Owns the pictures alone: axes, either linear from 0 or by powers of ten, lines and dots with a
legend. What they mean is said by their names.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from recipes.mini.curve import pick_ticks

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 740, 20, 370
COLORS = ("#c0392b", "#2471a3", "#229954", "#7d3c98", "#b9770e", "#566573", "#17a589", "#a04000")
MARGIN = 1.05  # of a linear axis beyond the largest value

Point = tuple[float, float]


class Axis(NamedTuple):
    """One direction of a plot.

    Attributes:
        label: what it shows, with the unit.
        begin, end: the values at its ends; `begin` is 0 unless it is logarithmic.
        is_log: whether equal ways are equal factors.
    """

    label: str
    begin: float
    end: float
    is_log: bool

    @classmethod
    def over(cls, label: str, values: Sequence[float], is_log: bool = False) -> "Axis":
        """Return an axis that holds some values; whole powers of ten if it is logarithmic."""
        if is_log:
            begin, end = math.log10(min(values)), math.log10(max(values))
            return cls(label, 10.0 ** math.floor(begin), 10.0 ** max(math.ceil(end), 1), True)
        return cls(label, 0.0, MARGIN * max(values), False)

    def share(self, value: float) -> float:
        """Return where a value lies, 0 at the beginning and 1 at the end."""
        if not self.is_log:
            return value / self.end
        return math.log10(value / self.begin) / math.log10(self.end / self.begin)

    def ticks(self) -> list[float]:
        """Return the values to be written at the axis."""
        if not self.is_log:
            return pick_ticks(self.end)
        first, last = round(math.log10(self.begin)), round(math.log10(self.end))
        return [10.0**power for power in range(first, last + 1)]


def draw_plot(
    labels: tuple[str, str],
    lines: Mapping[str, Sequence[Point]],
    dots: Mapping[str, Sequence[Point]] | None = None,
    is_log: bool = False,
) -> str:
    """Return an SVG of named lines, and of named dots in the next colors.

    Args:
        labels: of the two axes.
        lines: points by name, from left to right.
        dots: points by name.
        is_log: whether both axes go by powers of ten.
    """
    dots = dots or {}
    points = [point for part in (lines, dots) for line in part.values() for point in line]
    x, y = (Axis.over(label, values, is_log) for label, values in zip(labels, zip(*points)))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">']
    parts += [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *_draw_grid(x, y)]
    for index, (name, line) in enumerate([*lines.items(), *dots.items()]):
        color = COLORS[index % len(COLORS)]
        places = [_place(point, x, y) for point in line]
        is_line = index < len(lines)
        parts += [_draw_line(places, color)] if is_line else _draw_dots(places, color)
        parts.append(_draw_text((LEFT + 10, TOP + 16 + 17 * index), name, "start", color))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(point: Point, x: Axis, y: Axis) -> Point:
    across, up = x.share(point[0]), y.share(point[1])
    return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)


def _draw_grid(x: Axis, y: Axis) -> Iterator[str]:
    for value in y.ticks():
        height = _place((x.begin or 0.0, value), x, y)[1]
        yield f'<path d="M{LEFT} {height:.1f}H{RIGHT}" stroke="#dddddd"/>'
        yield _draw_text((LEFT - 6, height + 4), f"{value:g}", "end")
    for value in x.ticks():
        place = _place((value, y.begin or 0.0), x, y)[0]
        yield _draw_text((place, BOTTOM + 18), f"{value:g}", "middle")
    yield _draw_text(((LEFT + RIGHT) / 2, HEIGHT - 10), x.label, "middle")
    yield _draw_text((LEFT, TOP - 6), y.label, "start")


def _draw_line(places: Sequence[Point], color: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'


def _draw_dots(places: Sequence[Point], color: str) -> list[str]:
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in places]


def _draw_text(place: Point, text: str, anchor: str, color: str = "#333333") -> str:
    return (
        f'<text x="{place[0]:.1f}" y="{place[1]:.1f}" text-anchor="{anchor}" fill="{color}" '
        f'font-family="sans-serif" font-size="12">{escape(text)}</text>'
    )
