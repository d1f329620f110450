"""Plots as SVG, by hand: ratios beside one another, and curves. They are readable on light and on dark."""

import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Ink and paper change places with the reader's colour scheme; the colours of the series can be seen on both.
FRAME = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>{title}</title>
<style>
text {{ font: 13px system-ui, sans-serif; fill: #1f2328; }}
.title {{ font-size: 16px; font-weight: 600; }}
.small {{ font-size: 12px; }}
.paper {{ fill: #ffffff; }}
.grid {{ stroke: #d8dee4; }}
.axis {{ stroke: #59636e; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3; }}
.paper {{ fill: #0d1117; }}
.grid {{ stroke: #30363d; }}
.axis {{ stroke: #9198a1; }}
}}
</style>
<rect class="paper" width="100%" height="100%"/>
{body}
</svg>
"""
COLOURS = ("#3b82c4", "#d9722e", "#2f9e6e", "#a855b5", "#8a8f98")
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 68, 52
LETTER = 7.2  # as wide as most are
ROW = 30
WIDTH, HEIGHT = 760, 400


class Point(NamedTuple):
    """Hold a value, and the quartiles around it."""

    value: float
    low: float
    high: float


class Axis(NamedTuple):
    """Turn values from `low` to `high` into pixels, on a linear or a logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """Return where a value stands; what lies outside stands at the border."""
        value = min(max(value, self.low), self.high)
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values between the ends."""
        return [tick for tick in self._round_values() if self.low * 0.999 <= tick <= self.high * 1.001]

    def _round_values(self) -> list[float]:
        if not self.log:
            step = round_up((self.high - self.low) / 6)
            return [number * step for number in range(math.ceil(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high < self.low * 1000 else (1,)
        return [step * 10.0**decade for decade in decades for step in steps]


def ratio_plot(title: str, unit: str, names: Sequence[str], rows: Mapping[str, Mapping[str, Point]]) -> str:
    """Draw a row of points, each a ratio, for each label, on a logarithmic scale, with a line at 1.

    `names` are all that may have points: each keeps its mark from plot to plot.
    """
    values = [value for points in rows.values() for point in points.values() for value in point if value > 0]
    left, bottom = 32 + LETTER * max(map(len, rows)), TOP + ROW * len(rows)
    across = log_axis([*values, 0.8, 1.25], left, WIDTH - RIGHT)
    parts = [_text(16, 26, title, "title")]
    parts += _legend([name if any(name in points for points in rows.values()) else "" for name in names])
    parts += [_tick_across(across, tick, bottom) for tick in across.ticks()]
    parts.append(_line(across.at(1), TOP - 6, across.at(1), bottom, "axis", 2))
    for number, (row, points) in enumerate(rows.items()):
        middle = TOP + ROW * (number + 0.5)
        parts += [_text(left - 12, middle + 4, row, anchor="end"), _line(left, middle, WIDTH - RIGHT, middle, "grid")]
        shown_here = [name for name in names if name in points and points[name].value > 0]  # 0 has no place here
        for place, name in enumerate(shown_here):
            y = middle + (place - (len(shown_here) - 1) / 2) * 8
            parts += _whisker(across, points[name], y, names.index(name))
    parts.append(_text((left + WIDTH - RIGHT) / 2, bottom + 40, unit, anchor="middle"))
    return _drawn(title, bottom + BOTTOM, parts)


def curve_plot(
    title: str, across: str, up: str, series: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = True
) -> str:
    """Draw curves over a logarithmic axis; the upright one is logarithmic too, or begins at 0."""
    points = [point for line in series.values() for point in line]
    horizontal = log_axis([x for x, _ in points], LEFT + 8, WIDTH - RIGHT - 8)
    heights, ends = [y for _, y in points], (HEIGHT - BOTTOM, TOP)
    is_log = log and any(y > 0 for y in heights)
    vertical = (
        log_axis([y for y in heights if y > 0], *ends) if is_log else Axis(0, round_up(max(heights)), *ends, False)
    )
    parts = [_text(16, 26, title, "title"), *_legend(series)]
    parts += [_tick_across(horizontal, x, HEIGHT - BOTTOM) for x in sorted({x for x, _ in points})]
    for tick in vertical.ticks():
        y = vertical.at(tick)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(LEFT - 8, y + 4, shown(tick), "small", "end")]
    for number, line in enumerate(series.values()):
        places = [(horizontal.at(x), vertical.at(y)) for x, y in line]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{_colour(number)}" stroke-width="2"/>')
        parts += [_mark(x, y, number) for x, y in places]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, across, anchor="middle"))
    parts.append(
        f'<g transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{_text(0, 0, up, "", "middle")}</g>'
    )
    return _drawn(title, HEIGHT, parts)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Return a logarithmic axis with some room around all values."""
    low, high = min(values), max(values)
    return Axis(low / 1.15, high * 1.15, start, end, True)


def round_up(value: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999)


def shown(value: float) -> str:
    """Return a number as it stands at an axis."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.6g}"


def _drawn(title: str, height: float, parts: Iterable[str]) -> str:
    return FRAME.format(width=WIDTH, height=round(height), title=escape(title), body="\n".join(parts))


def _legend(names: Iterable[str]) -> list[str]:
    """Draw the marks with their names; an empty one is left out."""
    parts, x = [], 16.0
    for number, name in enumerate(names):
        if name:
            parts += [_mark(x + 6, 46, number), _text(x + 18, 50, name)]
            x += 40 + LETTER * len(name)
    return parts


def _tick_across(axis: Axis, value: float, bottom: float) -> str:
    x = axis.at(value)
    return _line(x, TOP, x, bottom, "grid") + _text(x, bottom + 18, shown(value), "small", "middle")


def _whisker(axis: Axis, point: Point, y: float, number: int) -> list[str]:
    low, high = axis.at(point.low), axis.at(point.high)
    colour = f'stroke="{_colour(number)}" stroke-width="2"'
    return [f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" {colour}/>', _mark(axis.at(point.value), y, number)]


def _mark(x: float, y: float, number: int) -> str:
    """Draw a mark; its shape tells the series apart where its colour does not."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"',
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"',
        f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z"',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z"',
    )
    return f'{shapes[number % len(shapes)]} fill="{_colour(number)}"/>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, width: int = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    classes = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{classes}>{escape(text)}</text>'
