"""A line chart as SVG that follows the page's colours: no script, no library, a few kilobytes."""

from __future__ import annotations

import math
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 220, 56, 12, 12, 34


class Series(NamedTuple):
    """A named line."""

    name: str
    points: list[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values covering [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(series: list[Series], x_name: str, title: str) -> Markup:
    """The chart; points that are not finite are left out."""
    clean = [Series(s.name, [(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)]) for s in series]
    xs = [x for s in clean for x, _ in s.points]
    ys = [y for s in clean for _, y in s.points]
    if not xs:
        return Markup("")
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, *ys), max(ys)
    y1 = y1 if y1 > y0 else y0 + 1.0
    at_x = lambda x: LEFT + (x - x0) / ((x1 - x0) or 1.0) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    at_y = lambda y: HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by {escape(x_name)}">']
    for y in ticks(y0, y1):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x0, x1):
        out.append(f'<text x="{at_x(x):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{x:g}</text>')
    for i, s in enumerate(clean):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in s.points)
        out.append(f'<polyline class="line{i}" points="{path}"/>')
        if len(clean) > 1:
            out.append(
                f'<text class="name{i}" x="{WIDTH - RIGHT}" y="{TOP + 12 + 16 * i}" text-anchor="end">{escape(s.name)}</text>'
            )
    return Markup("".join([*out, "</svg>"]))
