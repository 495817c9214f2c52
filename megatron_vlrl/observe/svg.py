"""Curves as SVG: series of points in, one <figure> or one file out. Needs no script, no font and no network.

Colours come from the page's CSS variables --c0 to --c7, so that a chart follows the light or dark theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlrl.observe.style import CHART_STYLE

COLOURS = 8
_WIDTH, _HEIGHT = 380, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 22
_LINE = 20  # height of a line of text in a chart file
_MOST_POINTS = 400
_SMOOTH_FROM = 30  # points; shorter curves are drawn as they are
_LARGEST = 1e100  # beyond it the arithmetic of the scales could overflow; left out like NaN

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One curve: (x, y) in rising x; a y of None is left out. dots: separate measurements, not a curve."""

    name: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False

    def known(self) -> list[Point]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if y is not None and abs(y) < _LARGEST]


def short_number(value: float) -> str:
    """Four significant digits; an exponent for what is small or large."""
    text = f"{value:.4g}"
    if 0 < abs(value) < 1e-3:
        text = f"{value:.3e}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return text


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most about `most` round numbers (1, 2, 5 times a power of ten) from low to high, low < high."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: means of equal runs of neighbours."""
    size = math.ceil(len(points) / most) or 1
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
    """Each y becomes the mean over `reach` neighbours on either side, fewer at the ends."""
    ys = [y for _, y in points]
    windows = [ys[max(0, i - reach) : i + reach + 1] for i in range(len(ys))]
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def line_chart(title: str, series: Sequence[Series], *, limits: tuple[float, float] | None = None) -> str:
    """Draw a figure with a legend that gives each last value; a long curve is faint under its running mean.

    limits: the y axis at least spans these. Names are escaped here.
    """
    heading = f"<figcaption>{html.escape(title)}</figcaption>"
    points = [point for one in series for point in one.known()]
    if not points:
        return f'<figure class="chart">{heading}<p class="muted">nothing recorded</p></figure>'
    label = html.escape(f"{title}, by step", quote=True)
    inside = _inside(series, points, limits)
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{inside}</svg>'
    return f'<figure class="chart">{heading}{picture}{_legend(series)}</figure>'


def chart_file(title: str, series: Sequence[Series], *, limits: tuple[float, float] | None = None) -> str:
    """The same drawing as an SVG document of its own, with its colours; the legend names the curves alone.

    Raises ValueError when there is no point to draw.
    """
    points = [point for one in series for point in one.known()]
    if not points:
        raise ValueError(f"nothing to draw under {title!r}")
    height = _HEIGHT + 2 * _LINE
    legend = []
    for index, one in enumerate(series):
        x = _LEFT + index * (_WIDTH - _LEFT - _RIGHT) / len(series)
        style = f'style="fill:var(--c{index % COLOURS})"'
        legend.append(f'<text x="{x:.1f}" y="{height - 6}" {style}>{html.escape(one.name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{2 * _WIDTH}" '
        'style="font-family:system-ui,sans-serif">'
        f"<style>{CHART_STYLE}</style>"
        f'<text x="{_LEFT}" y="14">{html.escape(title)}</text>'
        f'<g transform="translate(0,{_LINE})">{_inside(series, points, limits)}</g>{"".join(legend)}</svg>\n'
    )


def _inside(series: Sequence[Series], points: Sequence[Point], limits: tuple[float, float] | None) -> str:
    """Axes and curves."""
    x_span = _span([x for x, _ in points])
    y_span = _span([*(y for _, y in points), *(limits or ())])
    return _axes(x_span, y_span) + "".join(_draw(one, index, x_span, y_span) for index, one in enumerate(series))


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) / 2 or 0.5
        return low - pad, high + pad
    return low, high


def _place(x: float, y: float, x_span: Point, y_span: Point) -> Point:
    across = (x - x_span[0]) / (x_span[1] - x_span[0])
    up = (y - y_span[0]) / (y_span[1] - y_span[0])
    return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def _axes(x_span: Point, y_span: Point) -> str:
    parts = []
    for value in ticks(*y_span):
        _, y = _place(x_span[0], value, x_span, y_span)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{short_number(value)}</text>')
    for value in (tick for tick in ticks(*x_span) if tick == int(tick)):
        x, _ = _place(value, y_span[0], x_span, y_span)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{value:.0f}</text>')
    return "".join(parts)


def _draw(series: Series, index: int, x_span: Point, y_span: Point) -> str:
    colour = f'style="--c:var(--c{index % COLOURS})"'
    known = series.known()
    if series.dots or len(known) == 1:
        places = (_place(x, y, x_span, y_span) for x, y in known)
        return "".join(f'<circle class="dot" {colour} cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places)
    known = thin(known, _MOST_POINTS)
    curves = [("line", known)]
    if len(known) >= _SMOOTH_FROM:
        curves = [("raw", known), ("line", smooth(known, len(known) // _SMOOTH_FROM))]
    dashed = " dashed" if index >= COLOURS else ""
    return "".join(
        f'<polyline class="{kind}{dashed}" {colour} points="{_path(points, x_span, y_span)}"/>'
        for kind, points in curves
    )


def _path(points: Sequence[Point], x_span: Point, y_span: Point) -> str:
    places = (_place(x, y, x_span, y_span) for x, y in points)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _legend(series: Sequence[Series]) -> str:
    items = []
    for index, one in enumerate(series):
        known = one.known()
        last = short_number(known[-1][1]) if known else "none"
        mark = "dot-mark" if one.dots else "line-mark"
        colour = f'style="--c:var(--c{index % COLOURS})"'
        items.append(f'<li><i class="{mark}" {colour}></i>{html.escape(one.name)} <b>{last}</b></li>')
    return f'<ul class="legend">{"".join(items)}</ul>'
