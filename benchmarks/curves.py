"""Line charts as SVG, in a few lines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

COLORS = ("#1f77b4", "#d62728", "#ff7f0e", "#9467bd", "#8c564b", "#2ca02c", "#7f7f7f")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 360, 60, 40, 50
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - 20, HEIGHT - TOP - BOTTOM


@dataclass(frozen=True)
class Curve:
    """A named line through points `(x, y)`."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart: title, what its axes show, its curves."""

    title: str
    x_label: str
    y_label: str
    curves: list[Curve]


def draw(panels: list[Panel]) -> str:
    """The panels side by side, each with its legend below."""
    rows = max(len(panel.curves) for panel in panels)
    height = HEIGHT + 18 * rows + 10
    body = "".join(
        f'<g transform="translate({index * (WIDTH + 20)} 0)">{_panel(panel)}</g>' for index, panel in enumerate(panels)
    )
    width = len(panels) * (WIDTH + 20)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{body}</svg>\n'
    )


def _panel(panel: Panel) -> str:
    xs = [x for curve in panel.curves for x, _ in curve.points]
    ys = [y for curve in panel.curves for _, y in curve.points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(0.0, *ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * PLOT_WIDTH
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * PLOT_HEIGHT
        return LEFT + right, TOP + PLOT_HEIGHT - up

    parts = [_text(LEFT + PLOT_WIDTH / 2, 20, panel.title, "middle", 'font-weight="bold"')]
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<path d="M{x:.1f} {TOP}v{PLOT_HEIGHT}" stroke="#eee"/>')
        parts.append(_text(x, TOP + PLOT_HEIGHT + 18, f"{tick:g}", "middle"))
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{PLOT_WIDTH}" stroke="#eee"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    middle = TOP + PLOT_HEIGHT / 2
    parts.append(_text(LEFT + PLOT_WIDTH / 2, HEIGHT - 10, panel.x_label, "middle"))
    parts.append(_text(14, middle, panel.y_label, "middle", f'transform="rotate(-90 14 {middle})"'))
    for index, (curve, color) in enumerate(zip(panel.curves, COLORS, strict=False)):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in curve.points))
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        y = HEIGHT + 18 * index + 8
        parts.append(f'<path d="M{LEFT} {y - 4}h24" stroke="{color}" stroke-width="1.8"/>')
        parts.append(_text(LEFT + 32, y, curve.name, "start"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]
