"""Draws the small model's loss curve as an SVG picture.

Owns the picture alone: what the lines mean is said by their names.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 40, 740, 20, 340
COLORS = ("#7f9db9", "#c0392b")
MAX_TICKS = 9

Point = tuple[float, float]


def pick_ticks(end: float) -> list[float]:
    """Return round numbers from 0 to `end`, about `MAX_TICKS` of them at most."""
    spacings = (digit * 10.0**power for power in range(-3, 9) for digit in (1, 2, 5))
    spacing = next(spacing for spacing in spacings if end / spacing <= MAX_TICKS)
    return [index * spacing for index in range(int(end / spacing) + 1)]


def draw_curves(curves: Mapping[str, Sequence[Point]]) -> str:
    """Return an SVG of named curves of one or more `(step, loss)`; both axes begin at 0."""
    points = [point for curve in curves.values() for point in curve]
    end = (max(step for step, _ in points), max(loss for _, loss in points))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">']
    parts += [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *_draw_grid(end)]
    for row, ((name, curve), color) in enumerate(zip(curves.items(), COLORS)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_place(point, end) for point in curve))
        parts += [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>']
        parts += [_draw_text((RIGHT - 8, TOP + 16 + 18 * row), name, "end", color)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(point: Point, end: Point) -> Point:
    """Return where a point lies in the picture if `end` is its upper right corner."""
    x = LEFT + point[0] / end[0] * (RIGHT - LEFT)
    return x, BOTTOM - point[1] / end[1] * (BOTTOM - TOP)


def _draw_grid(end: Point) -> Iterator[str]:
    for loss in pick_ticks(end[1]):
        y = _place((0, loss), end)[1]
        yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#dddddd"/>'
        yield _draw_text((LEFT - 6, y + 4), f"{loss:g}", "end")
    for step in pick_ticks(end[0]):
        yield _draw_text((_place((step, 0), end)[0], BOTTOM + 18), f"{step:g}", "middle")
    yield _draw_text(((LEFT + RIGHT) / 2, HEIGHT - 4), "step", "middle")


def _draw_text(place: Point, text: str, anchor: str, color: str = "#333333") -> str:
    return (
        f'<text x="{place[0]:.1f}" y="{place[1]:.1f}" text-anchor="{anchor}" fill="{color}" '
        f'font-family="sans-serif" font-size="12">{escape(text)}</text>'
    )
