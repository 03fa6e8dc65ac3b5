"""Curves over the steps of all phases, in panels one below the other with one axis of steps: described once, drawn by
matplotlib and by plotly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from temper.tracking.report.figure import WIDTH, ReportFigure, colour, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = Literal["thin", "dotted", "diamonds", "stairs"]

_LETTERS = 85  # of the bands' names that fit in above the static form
_LETTERS_AN_INCH = 14  # of the name beside a panel; a name longer than the panel would leave it no height
_LEAST_HEIGHT = 1.0  # inches of a panel, below which ticks and margins leave nothing of it
_PIXELS = 118  # of the interactive form, to an inch of the static one
_GAP = 26  # pixels between panels
_TOP, _LEGEND, _BOTTOM = 28, 30, 46  # pixels for the bands' names, the legend, and the axis of steps


@dataclass(frozen=True)
class Band:
    """A range of steps with a name and a colour of the palette: a phase."""

    name: str
    first: float
    last: float
    colour: str


@dataclass(frozen=True)
class Line:
    """One series: `parts` are the (steps, values) between which the line is broken. `thin` is for many noisy values,
    `dotted` for a few that matter, `diamonds` for single ones and `stairs` for what holds until it changes."""

    label: str
    colour: str
    parts: Sequence[tuple[Sequence[float], Sequence[float]]]
    style: Style = "thin"

    @property
    def values(self) -> list[float]:
        return [value for _, values in self.parts for value in values if math.isfinite(value)]


@dataclass(frozen=True)
class Panel:
    """Axes with a name, `height` inches high. `from_zero` begins the axis there; `log` makes it logarithmic where the
    values span more than a factor of twenty and none is below zero."""

    label: str
    lines: Sequence[Line]
    height: float = 1.4
    from_zero: bool = False
    log: bool = False

    @property
    def _values(self) -> list[float]:
        return [value for line in self.lines for value in line.values]

    @property
    def least(self) -> float:
        """The smallest value above zero; 0 where there is none."""
        return min((value for value in self._values if value > 0), default=0.0)

    @property
    def most(self) -> float:
        return max(self._values)

    @property
    def is_log(self) -> bool:
        return self.log and min(self._values) >= 0 and self.most > 20 * self.least > 0

    @property
    def limits(self) -> tuple[float, float] | None:
        """Of an axis on which all values are one, which by itself would show the noise of its last digits."""
        (only, *others) = set(self._values)
        room = abs(only) / 2 or 1.0
        return None if others else (only - room if only < 0 else 0.0, only + room / 4)


def panel_figure(
    name: str,
    title: str,
    caption: str,
    panels: Sequence[Panel],
    bands: Sequence[Band] = (),
    axis: str = "optimizer step",
) -> ReportFigure:
    """The figure of these panels; a single band is not shown."""
    shown = [panel for panel in panels if any(line.values for line in panel.lines)]
    shaded = bands if len(bands) > 1 else ()
    return ReportFigure(
        name,
        title,
        caption,
        lambda: _draw(shown, shaded, axis),
        {"data": _traces(shown), "layout": _layout(shown, shaded, axis)},
    )


# --------------------------------------------------------------------------------------------------------- matplotlib


def _draw(panels: Sequence[Panel], bands: Sequence[Band], axis: str) -> Figure:
    from matplotlib.figure import Figure

    heights = [max(panel.height, _LEAST_HEIGHT) for panel in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.75))
    axes = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for place, panel in zip(axes, panels, strict=True):
        _draw_panel(place, panel)
    draw_bands(axes, bands)
    axes[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes[-1].set_xlabel(axis)
    _draw_legend(figure, panels)
    return figure


def _draw_panel(place: Axes, panel: Panel) -> None:
    for line in panel.lines:
        for steps, values in line.parts:
            place.plot(steps, values, color=colour(line.colour), **_MATPLOTLIB[line.style])
    place.set_ylabel(fill(panel.label, round(_LETTERS_AN_INCH * max(panel.height, _LEAST_HEIGHT))))
    place.yaxis.set_label_coords(-0.085, 0.5)  # one below the other; to align them takes as long as to draw them
    place.grid(axis="y")
    place.set_axisbelow(True)
    if panel.is_log:
        place.set_yscale("log")
        place.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        place.yaxis.set_minor_formatter(lambda value, _: "")
    elif panel.limits is not None:
        place.set_ylim(panel.limits)
    elif panel.from_zero:
        place.set_ylim(bottom=0)


def draw_bands(axes: Sequence[Axes], bands: Sequence[Band]) -> None:
    """Shades the bands in all axes, and writes their names above the first."""
    for place in axes if bands else ():
        place.set_xlim(bands[0].first, bands[-1].last)
        for band in bands:
            place.axvspan(band.first, band.last, color=colour(band.colour), alpha=0.07, linewidth=0)
    for band in bands:
        if _LETTERS * (band.last - band.first) / (bands[-1].last - bands[0].first) > len(band.name):
            place = axes[0]
            middle, where = ((band.first + band.last) / 2, 1.02), place.get_xaxis_transform()
            place.text(*middle, band.name, transform=where, ha="center", va="bottom", color=colour(band.colour))


def _told_apart(panel: Panel) -> list[Line]:
    """The lines that a legend has to name: a panel's only one is what the axis says."""
    shown = [line for line in panel.lines if line.values]
    return shown if len(shown) > 1 else []


def _draw_legend(figure: Figure, panels: Sequence[Panel]) -> None:
    from matplotlib.lines import Line2D

    lines = {line.label: line for panel in panels for line in _told_apart(panel)}
    if lines:
        marks = [
            Line2D([], [], label=label, color=colour(line.colour), **_MATPLOTLIB[line.style])
            for label, line in lines.items()
        ]
        figure.legend(handles=marks, loc="outside upper left", ncols=min(6, len(marks)))


_MATPLOTLIB: dict[str, dict[str, Any]] = {
    "thin": {"linewidth": 0.9, "alpha": 0.75},
    "dotted": {"linewidth": 1.4, "marker": "o", "markersize": 2.6},
    "diamonds": {"linestyle": "", "marker": "D", "markersize": 4.5, "clip_on": False, "zorder": 3},
    "stairs": {"linewidth": 1.3, "drawstyle": "steps-post"},
}

# -------------------------------------------------------------------------------------------------------------- plotly


def _traces(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    named: set[str] = set()
    for index, panel in enumerate(panels):
        told_apart = {line.label for line in _told_apart(panel)}
        for line in panel.lines:
            if line.values:
                traces.append(_trace(line, panel, f"y{index + 1}", line.label in told_apart - named))
        named |= told_apart
    return traces


def _trace(line: Line, panel: Panel, axis: str, in_legend: bool) -> dict[str, Any]:
    steps: list[float | None] = []
    values: list[float | None] = []
    unit, is_log = f" {plain(panel.label)}" if _told_apart(panel) else "", panel.is_log
    for part_steps, part_values in line.parts:
        # Nothing between two parts breaks the line.
        steps += [*part_steps, None]
        values += [*(None if is_log and value <= 0 else value for value in part_values), None]
    return {
        "type": "scatter",
        "name": plain(line.label),
        "legendgroup": line.label,
        "showlegend": in_legend,
        "x": steps[:-1],
        "y": values[:-1],
        "xaxis": "x",
        "yaxis": axis,
        "hovertemplate": f"%{{y:.5~g}}{unit}",
        **_plotly_style(line),
    }


def _plotly_style(line: Line) -> dict[str, Any]:
    shown: dict[Style, dict[str, Any]] = {
        "thin": {"mode": "lines", "line": {"color": line.colour, "width": 1.2}, "opacity": 0.8},
        "dotted": {"mode": "lines+markers", "line": {"color": line.colour, "width": 2}, "marker": {"size": 5}},
        "diamonds": {"mode": "markers", "marker": {"color": line.colour, "symbol": "diamond", "size": 9}},
        "stairs": {"mode": "lines", "line": {"color": line.colour, "width": 1.8, "shape": "hv"}},
    }
    return {"cliponaxis": False, **shown[line.style]} if line.style == "diamonds" else shown[line.style]


def _layout(panels: Sequence[Panel], bands: Sequence[Band], axis: str) -> dict[str, Any]:
    heights = [_PIXELS * panel.height for panel in panels]
    inner = sum(heights) + _GAP * (len(panels) - 1)
    top = _TOP + _LEGEND if any(map(_told_apart, panels)) else _TOP
    layout: dict[str, Any] = {
        "height": round(inner) + top + _BOTTOM,
        "margin": {"t": top, "b": _BOTTOM},
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "legend": {"y": 1 + 22 / inner},
        "xaxis": {
            "title": {"text": axis},
            "unifiedhovertitle": {"text": f"{axis} %{{x:,.6~g}}"},
            "anchor": f"y{len(panels)}",
            "showgrid": False,
            "tickformat": ",d",
        },
        **band_layout(bands, [f"y{index + 1}" if index else "y" for index in range(len(panels))]),
    }
    if bands:
        layout["xaxis"]["range"] = [bands[0].first, bands[-1].last]
    high = float(inner)
    for index, (panel, height) in enumerate(zip(panels, heights, strict=True)):
        layout[f"yaxis{index + 1}" if index else "yaxis"] = {
            "title": {"text": plain(panel.label)},
            "domain": [max(0.0, (high - height) / inner), min(1.0, high / inner)],
            "tickformat": ",.6~g",
            **_scale(panel),
        }
        high -= height + _GAP
    return layout


def _scale(panel: Panel) -> dict[str, Any]:
    if panel.is_log:
        return {"type": "log", "dtick": "D2" if panel.most < 300 * panel.least else 1}
    if panel.limits is not None:
        return {"range": panel.limits}
    return {"rangemode": "tozero"} if panel.from_zero else {}


def band_layout(bands: Sequence[Band], axes: Sequence[str] = ("y",)) -> dict[str, Any]:
    """Plotly's shapes and texts of the bands in figures with these y axes, the highest first. The page leaves out the
    texts for which there is no room."""
    across = {"y0": 0, "y1": 1, "layer": "below", "line": {"width": 0}, "opacity": 0.08}
    above = {"yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
    return {
        "shapes": [
            {
                "type": "rect",
                "xref": "x",
                "x0": band.first,
                "x1": band.last,
                "yref": f"{axis} domain",
                "fillcolor": band.colour,
                **across,
            }
            for axis in axes
            for band in bands
        ],
        "annotations": [
            {
                "x": (band.first + band.last) / 2,
                "text": plain(band.name),
                "font": {"color": band.colour, "size": 11},
                **above,
            }
            for band in bands
        ],
    }
