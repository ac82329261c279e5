"""Draws the plots of docs/benchmarks.md as SVG pictures: small multiples.

Owns the pictures alone. Every series has a panel of its own, in which it is coloured and all others
are grey behind it: nothing has to be told apart by colours, and no legend lies on the lines. The
panels share their axes, either linear from 0 or by powers of ten. What the series mean is said by
their names.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from recipes.mini.curve import pick_ticks

COLUMNS = 3  # panels side by side at most
# A panel's place for its plot, and what is left around it, in pixels.
WIDTH, HEIGHT = 230, 140
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 40, 34
COLOR, GREY, INK = "#c0392b", "#c9ced3", "#333333"
MARGIN = 1.08  # of a linear axis beyond the largest value
NAME_LENGTH = 36  # letters of a panel's title

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
        """Return the values to be written at the axis: a few, since a panel is narrow."""
        if self.is_log:
            first, last = round(math.log10(self.begin)), round(math.log10(self.end))
            return [10.0**power for power in range(first, last + 1)]
        ticks = pick_ticks(self.end)
        return ticks[:: 2 if len(ticks) > 4 else 1]


class Panel(NamedTuple):
    """The place of one series.

    Attributes:
        x, y: the axes.
        left, top: the corner of its plot, in pixels.
    """

    x: Axis
    y: Axis
    left: float
    top: float

    def place(self, point: Point) -> Point:
        """Return where a point lies, in pixels."""
        across, up = self.x.share(point[0]), self.y.share(point[1])
        return self.left + across * WIDTH, self.top + (1 - up) * HEIGHT


def draw_panels(
    labels: tuple[str, str],
    series: Mapping[str, Sequence[Point]],
    roof: Sequence[Point] = (),
    *,
    is_log: bool = False,
    has_lines: bool = True,
) -> str:
    """Return an SVG with a panel for each series.

    Args:
        labels: of the two axes.
        series: points by name, from left to right.
        roof: a line that every panel shows; none if empty.
        is_log: whether both axes go by powers of ten.
        has_lines: whether the points of a series are joined, and its last value is written.
    """
    points = [*roof, *(point for line in series.values() for point in line)]
    x, y = (Axis.over(label, values, is_log) for label, values in zip(labels, zip(*points)))
    size = (LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM)
    columns = min(COLUMNS, len(series))
    width, height = columns * size[0], -(-len(series) // columns) * size[1]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for number, name in enumerate(series):
        row, column = divmod(number, columns)
        panel = Panel(x, y, column * size[0] + LEFT, row * size[1] + TOP)
        parts += _draw_grid(panel, name)
        for other in series:
            if other != name:
                parts += _draw_series(panel, series[other], GREY, has_lines)
        if roof:
            parts.append(_draw_line([panel.place(point) for point in roof], INK, "4 3"))
        parts += _draw_series(panel, series[name], COLOR, has_lines)
        if has_lines:
            parts.append(_draw_last(panel, series[name][-1]))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_grid(panel: Panel, name: str) -> Iterator[str]:
    """Yield the title of a panel, its axes, and lines at the values that are written there."""
    left, top, bottom = panel.left, panel.top, panel.top + HEIGHT
    title = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
    yield _draw_text((left, top - 22), title, "start", COLOR, is_bold=True)
    yield _draw_text((left, top - 7), panel.y.label, "start", size=10)
    for value in panel.y.ticks():
        height = panel.place((panel.x.begin or 0.0, value))[1]
        yield f'<path d="M{left:.1f} {height:.1f}h{WIDTH}" stroke="#eeeeee"/>'
        yield _draw_text((left - 5, height + 3.5), f"{value:g}", "end", size=10)
    yield f'<path d="M{left:.1f} {bottom:.1f}h{WIDTH}" stroke="#999999"/>'
    for value in panel.x.ticks():
        place = panel.place((value, panel.y.begin or 0.0))[0]
        yield _draw_text((place, bottom + 13), f"{value:g}", "middle", size=10)
    yield _draw_text((left + WIDTH / 2, bottom + 26), panel.x.label, "middle", size=10)


def _draw_series(
    panel: Panel, points: Sequence[Point], color: str, has_lines: bool
) -> Iterator[str]:
    """Yield the points of a series, joined or not; one alone is always a dot."""
    places = [panel.place(point) for point in points]
    if has_lines and len(places) > 1:
        yield _draw_line(places, color)
    else:
        for x, y in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>'


def _draw_last(panel: Panel, point: Point) -> str:
    """Return the value of a series at its end, beside it."""
    x, y = panel.place(point)
    return _draw_text((x, y - 5), f"{point[1]:.3g}", "end", COLOR, size=10)


def _draw_line(places: Sequence[Point], color: str, dashes: str = "none") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = f'fill="none" stroke="{color}" stroke-width="1.5" stroke-dasharray="{dashes}"'
    return f'<polyline points="{path}" {style}/>'


def _draw_text(
    place: Point, text: str, anchor: str, color: str = INK, *, size: int = 12, is_bold: bool = False
) -> str:
    weight = "bold" if is_bold else "normal"
    return (
        f'<text x="{place[0]:.1f}" y="{place[1]:.1f}" text-anchor="{anchor}" fill="{color}" '
        f'font-family="sans-serif" font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )
