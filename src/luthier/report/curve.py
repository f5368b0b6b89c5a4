"""Charts as SVG in the page's colours: lines, intervals and points, without scripts or libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 220, 56, 12, 12, 34
COLOURS = 8  # series with different looks
DOTS = 60  # points of a line that show their values, at most


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


def labelled(values: list[float]) -> list[tuple[float, str]]:
    """Ticks with labels. They have as many digits as are needed to tell them apart; thousands are written as k, M, G, ..."""
    step = min((b - a for a, b in pairwise(values)), default=abs(values[0]) or 1.0)
    power = min(6, int(math.log10(max(map(abs, values))) // 3)) if max(map(abs, values)) >= 1e4 else 0
    unit = 1000.0**power
    digits = min(8, max(0, -math.floor(math.log10(step / unit) + 1e-9)))
    return [(v, f"{v / unit:.{digits}f}{' kMGTPE'[power].strip()}") for v in values]


def _axis(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """The function from a value to its place: `low` is at `start`, `high` at `stop`."""
    return lambda x: start + (x - low) / ((high - low) or 1.0) * (stop - start)


def _frame(at_x: Callable[[float], float], at_y: Callable[[float], float], xs: list[float], ys: list[float], height: int,
           title: str) -> list[str]:  # fmt: skip
    """The beginning of a chart: a grid line and a label for each y, a label for each x."""
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for y, said in labelled(ys):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{said}</text>')
    for x, said in labelled(xs):
        out.append(f'<text x="{at_x(x):.1f}" y="{height - 14}" text-anchor="middle">{said}</text>')
    return out


def _axis_names(x_name: str, y_name: str, height: int) -> list[str]:
    """The names at the ends of the axes. A chart whose title names its values needs no y_name."""
    out = [f'<text x="{WIDTH - RIGHT}" y="{height - 2}" text-anchor="end">{escape(x_name)}</text>']
    return [*out, f'<text x="{LEFT}" y="{TOP - 1}" text-anchor="start">{escape(y_name)}</text>'] if y_name else out


def line_chart(series: list[Series], x_name: str, title: str, from_zero: bool = True) -> Markup:
    """A line chart. Points that are not finite are left out.

    from_zero  the axis starts at zero; use False to show small differences of large values
    """
    clean = [Series(s.name, [(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)]) for s in series]
    xs = [x for s in clean for x, _ in s.points]
    ys = [y for s in clean for _, y in s.points]
    if not xs:
        return Markup("")
    x0, x1 = min(xs), max(xs)
    y0, y1 = (min(0.0, *ys), max(ys)) if from_zero else _span(ys)
    y1 = y1 if y1 > y0 else y0 + 1.0
    at_x = _axis(x0, x1, LEFT, WIDTH - RIGHT)
    at_y = _axis(y0, y1, HEIGHT - BOTTOM, TOP)
    out = _frame(at_x, at_y, ticks(x0, x1), ticks(y0, y1), HEIGHT, f"{title} by {x_name}")
    for i, s in enumerate(clean):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in s.points)
        out.append(f'<polyline class="line{i % COLOURS}" points="{path}"/>')
        for x, y in s.points[:: math.ceil(len(s.points) / DOTS) or 1]:
            place = f'cx="{at_x(x):.1f}" cy="{at_y(y):.1f}"'
            said = escape(f"{s.name}, {x_name} {x:g}: {y:.4g}")
            out.append(f'<circle class="dot name{i % COLOURS}" {place} r="6"><title>{said}</title></circle>')
        if len(clean) > 1:
            place = f'x="{WIDTH - RIGHT}" y="{TOP + 12 + 16 * i}" text-anchor="end"'
            out.append(f'<text class="name{i % COLOURS}" {place}>{escape(s.name)}</text>')
    return Markup("".join([*out, *_axis_names(x_name, "", HEIGHT), "</svg>"]))


class Range(NamedTuple):
    """A named value with its interval, and the number of its colour."""

    name: str
    value: float
    low: float
    high: float
    colour: int


def interval_chart(ranges: list[Range], title: str, mark: float = 0.0) -> Markup:
    """A line for each arm: its value as a dot on its interval. The dashed line at `mark` means no difference, or a bound."""
    ends = [x for r in ranges for x in (r.low, r.high, r.value) if math.isfinite(x)]
    if not ends:
        return Markup("")
    left, row = 150 if any(r.name for r in ranges) else LEFT, 34
    low, high = min(*ends, mark), max(*ends, mark)
    pad = 0.06 * ((high - low) or 1.0)
    low, high, height = low - pad, high + pad, TOP + row * len(ranges) + BOTTOM
    at = _axis(low, high, left, WIDTH - RIGHT)
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for x, said in labelled(ticks(low, high)):
        out.append(f'<line class="grid" x1="{at(x):.1f}" x2="{at(x):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        out.append(f'<text x="{at(x):.1f}" y="{height - 14}" text-anchor="middle">{said}</text>')
    out.append(f'<line class="zero" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    for i, r in enumerate(ranges):
        y, c = TOP + row * i + row / 2, r.colour % COLOURS
        a, b = (at(min(max(e, low), high)) for e in (r.low, r.high))
        out.append(
            f'<text class="name{c}" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(r.name[:20])}</text>'
        )
        out.append(f'<line class="bar line{c}" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<circle class="name{c}" cx="{at(r.value):.1f}" cy="{y:.1f}" r="5"/>')
    return Markup("".join([*out, "</svg>"]))


class Point(NamedTuple):
    """A named point, whether it is on the frontier, and the number of its colour."""

    name: str
    x: float
    y: float
    marked: bool
    colour: int


def _span(values: list[float]) -> tuple[float, float]:
    """A range slightly larger than the values."""
    low, high = min(values), max(values)
    pad = 0.12 * ((high - low) or abs(high) or 1.0)
    return low - pad, high + pad


def point_chart(points: list[Point], x_name: str, y_name: str, title: str) -> Markup:
    """Quality against cost. Points that no other point beats in both are joined."""
    clean = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not clean:
        return Markup("")
    (x0, x1), (y0, y1) = _span([p.x for p in clean]), _span([p.y for p in clean])
    at_x = _axis(x0, x1, LEFT, WIDTH - RIGHT)
    at_y = _axis(y0, y1, HEIGHT - BOTTOM, TOP)
    out = _frame(at_x, at_y, ticks(x0, x1, 4), ticks(y0, y1, 4), HEIGHT, title)
    best = sorted((p for p in clean if p.marked), key=lambda p: p.x)
    path = " ".join(f"{at_x(p.x):.1f},{at_y(p.y):.1f}" for p in best)
    out.append(f'<polyline class="edge" points="{path}"/>')
    for p in clean:
        c, right = p.colour % COLOURS, at_x(p.x) > WIDTH - 140
        out.append(f'<circle class="name{c}" cx="{at_x(p.x):.1f}" cy="{at_y(p.y):.1f}" r="{7 if p.marked else 5}"/>')
        place = f'x="{at_x(p.x) + (-11 if right else 11):.1f}" text-anchor="{"end" if right else "start"}"'
        name = escape(p.name[:24]) + (" ★" if p.marked else "")
        out.append(f'<text class="name{c}" {place} y="{at_y(p.y) - 8:.1f}">{name}</text>')
    return Markup("".join([*out, *_axis_names(x_name, y_name, HEIGHT), "</svg>"]))


def plane_chart(points: list[tuple[float, float, bool]], x_name: str, y_name: str, title: str) -> Markup:
    """Rows in a plane. Rows that stayed are filled."""
    height = 320
    (x0, x1), (y0, y1) = _span([p[0] for p in points]), _span([p[1] for p in points])
    at_x = _axis(x0, x1, LEFT, WIDTH - RIGHT)
    at_y = _axis(y0, y1, height - BOTTOM, TOP)
    out = _frame(at_x, at_y, ticks(x0, x1, 6), ticks(y0, y1, 4), height, f"{title}: {x_name}, {y_name}")
    for x, y, stayed in sorted(points, key=lambda p: p[2]):
        out.append(f'<circle class="{"stayed" if stayed else "gone"}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3"/>')
    return Markup("".join([*out, *_axis_names(x_name, y_name, height), "</svg>"]))
