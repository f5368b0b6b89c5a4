"""Charts as SVG in the page's colours: lines, intervals and points, without scripts or libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, PLOT, LEFT, RIGHT, LINE = 440, 160, 60, 20, 18  # LINE: height of a line of text
LETTER = 8.5  # width of a letter on a phone, where letters are larger: a guess on the safe side
COLOURS = 8  # series with different looks
DOTS = 60  # points of a line that show their values, at most
FEW = 12  # points of a line that are drawn as dots, at most: the line between them was not measured
NAMED = 22  # letters of a name that are shown


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


class _Box(NamedTuple):
    """The place of the plot within a chart: names and legend are above it, tick labels and the name of x below."""

    top: float
    height: float = PLOT

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def whole(self) -> float:
        return self.bottom + 2 * LINE + 6


def _opened(title: str, height: float) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'


def _frame(
    at_x: Callable[[float], float], at_y: Callable[[float], float], xs: list[float], ys: list[float], box: _Box,
    names: tuple[str, str], title: str,
) -> list[str]:  # fmt: skip
    """The beginning of a chart: a grid line and a label for each y, a label for each x, the names of both axes."""
    out = [_opened(title, box.whole)]
    for y, said in labelled(ys):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{said}</text>')
    for x, said in labelled(xs):
        out.append(f'<text x="{at_x(x):.1f}" y="{box.bottom + LINE:.1f}" text-anchor="middle">{said}</text>')
    x_name, y_name = names
    out.append(_x_name(x_name, (LEFT + WIDTH - RIGHT) / 2, box))
    return [*out, f'<text x="4" y="{LINE - 4}" text-anchor="start">{escape(y_name)}</text>']


def _x_name(name: str, middle: float, box: _Box) -> str:
    return f'<text x="{middle:.1f}" y="{box.bottom + 2 * LINE:.1f}" text-anchor="middle">{escape(name)}</text>'


def _legend(names: list[str], top: float) -> tuple[list[str], float]:
    """(a sample and a name for each line, in rows that fit; the height below them). One line needs no legend."""
    if len(names) < 2:
        return [], top
    out, x, y = [], 4.0, top
    for i, name in enumerate(names):
        width = 30 + LETTER * min(len(name), NAMED) + 14
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + LINE
        out.append(
            f'<line class="line{i % COLOURS}" x1="{x:.0f}" x2="{x + 22:.0f}" y1="{y + 9:.0f}" y2="{y + 9:.0f}"/>'
        )
        out.append(f'<text class="name{i % COLOURS}" x="{x + 28:.0f}" y="{y + 13:.0f}">{escape(name[:NAMED])}</text>')
        x += width
    return out, y + LINE


def _told(text: str) -> str:
    """What a part of a chart says under the pointer."""
    return f"<title>{escape(text)}</title>"


def line_chart(series: list[Series], x_name: str, y_name: str, title: str, from_zero: bool = True) -> Markup:
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
    legend, top = _legend([s.name for s in clean], LINE)
    box = _Box(top + 8)
    at_x = _axis(x0, x1, LEFT, WIDTH - RIGHT)
    at_y = _axis(y0, y1, box.bottom, box.top)
    out = _frame(at_x, at_y, ticks(x0, x1), ticks(y0, y1), box, (x_name, y_name), title) + legend
    for i, s in enumerate(clean):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in s.points)
        out.append(f'<polyline class="line{i % COLOURS}" points="{path}"/>')
        for x, y in s.points[:: math.ceil(len(s.points) / DOTS) or 1]:
            place, said = f'cx="{at_x(x):.1f}" cy="{at_y(y):.1f}"', _told(f"{s.name}, {x_name} {x:g}: {y:.4g}")
            if len(s.points) <= FEW:
                out.append(f'<circle class="name{i % COLOURS}" {place} r="3"/>')
            out.append(f'<circle class="dot name{i % COLOURS}" {place} r="6">{said}</circle>')
    return Markup("".join([*out, "</svg>"]))


class Range(NamedTuple):
    """A named value with its interval, and the number of its colour."""

    name: str
    value: float
    low: float
    high: float
    colour: int


def interval_chart(ranges: list[Range], x_name: str, title: str, mark: float = 0.0) -> Markup:
    """A line for each arm: its value as a dot on its interval. The dashed line at `mark` means no difference, or a bound."""
    ends = [x for r in ranges for x in (r.low, r.high, r.value) if math.isfinite(x)]
    if not ends:
        return Markup("")
    longest = max(len(r.name[:NAMED]) for r in ranges)
    left, row = 16 + (LETTER * longest + 10 if longest else 0), 34
    low, high = min(*ends, mark), max(*ends, mark)
    pad = 0.06 * ((high - low) or 1.0)
    low, high, box = low - pad, high + pad, _Box(8, row * len(ranges))
    at = _axis(low, high, left, WIDTH - RIGHT)
    out = [_opened(title, box.whole)]
    for x, said in labelled(ticks(low, high)):
        out.append(f'<line class="grid" x1="{at(x):.1f}" x2="{at(x):.1f}" y1="{box.top}" y2="{box.bottom}"/>')
        out.append(f'<text x="{at(x):.1f}" y="{box.bottom + LINE}" text-anchor="middle">{said}</text>')
    out.append(f'<line class="zero" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="{box.top}" y2="{box.bottom}"/>')
    for i, r in enumerate(ranges):
        y, c = box.top + row * i + row / 2, r.colour % COLOURS
        a, b = (at(min(max(e, low), high)) for e in (r.low, r.high))
        name = escape(r.name[:NAMED])
        said = _told(f"{r.name}{': ' if r.name else ''}{r.value:.4g} ({r.low:.4g} to {r.high:.4g})")
        out.append(f'<text class="name{c}" x="{left - 10:.0f}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        out.append(
            f'<g>{said}<rect class="hit" x="{a - 8:.1f}" y="{y - 12:.1f}" width="{b - a + 16:.1f}" height="24"/>'
            f'<line class="bar line{c}" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="name{c}" cx="{at(r.value):.1f}" cy="{y:.1f}" r="5"/></g>'
        )
    return Markup("".join([*out, _x_name(x_name, (left + WIDTH - RIGHT) / 2, box), "</svg>"]))


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
    box = _Box(LINE + 8)
    at_x = _axis(x0, x1, LEFT, WIDTH - RIGHT)
    at_y = _axis(y0, y1, box.bottom, box.top)
    out = _frame(at_x, at_y, ticks(x0, x1, 4), ticks(y0, y1, 4), box, (x_name, y_name), title)
    best = sorted((p for p in clean if p.marked), key=lambda p: p.x)
    path = " ".join(f"{at_x(p.x):.1f},{at_y(p.y):.1f}" for p in best)
    out.append(f'<polyline class="edge" points="{path}"/>')
    for p in clean:
        c, right = p.colour % COLOURS, at_x(p.x) > WIDTH / 2
        said = _told(f"{p.name}: {y_name} {p.y:.4g}, {x_name} {p.x:.4g}")
        place = f'cx="{at_x(p.x):.1f}" cy="{at_y(p.y):.1f}" r="{7 if p.marked else 5}"'
        out.append(f'<circle class="name{c}" {place}>{said}</circle>')
        place = f'x="{at_x(p.x) + (-11 if right else 11):.1f}" text-anchor="{"end" if right else "start"}"'
        name = escape(p.name[:NAMED]) + (" ★" if p.marked else "")
        out.append(f'<text class="name{c}" {place} y="{at_y(p.y) - 8:.1f}">{name}</text>')
    return Markup("".join([*out, "</svg>"]))


def plane_chart(points: list[tuple[float, float, bool]], x_name: str, y_name: str, title: str) -> Markup:
    """Rows in a plane. Rows that stayed are filled."""
    (x0, x1), (y0, y1) = _span([p[0] for p in points]), _span([p[1] for p in points])
    box = _Box(LINE + 8, 1.6 * PLOT)
    at_x = _axis(x0, x1, LEFT, WIDTH - RIGHT)
    at_y = _axis(y0, y1, box.bottom, box.top)
    out = _frame(at_x, at_y, ticks(x0, x1), ticks(y0, y1, 4), box, (x_name, y_name), title)
    for x, y, stayed in sorted(points, key=lambda p: p[2]):
        said = _told(f"{'stayed' if stayed else 'left out'}: {x_name} {x:.4g}, {y_name} {y:.4g}")
        place = f'cx="{at_x(x):.1f}" cy="{at_y(y):.1f}"'
        out.append(f'<circle class="{"stayed" if stayed else "gone"}" {place} r="3">{said}</circle>')
    return Markup("".join([*out, "</svg>"]))
