"""The phases of a run as figures: when they ran, and how they differ in the accuracy of classes and in sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from temper.plan.metric_names import CLASS_ACCURACY
from temper.tracking.report.figure import WIDTH, ReportFigure, colour, plain
from temper.tracking.report.panels import Band, band_layout, draw_bands
from temper.tracking.report.run_data import PhaseData, RunData, recorded, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLASSES = 40


def bands_of(phases: Sequence[PhaseData]) -> list[Band]:
    return [Band(phase.name, phase.first_step, phase.last_step, f"--{phase.kind}") for phase in phases]


# ------------------------------------------------------------------------------------------------------ phases in time


@dataclass(frozen=True)
class _Bar:
    """A phase in time, in seconds."""

    phase: PhaseData
    begin: float
    length: float
    is_reused: bool
    text: str


def timeline_figure(run: RunData) -> ReportFigure | None:
    """When each phase ran, in seconds from the start of the run; what it reused stands before that."""
    bars = _bars(run)
    if not bars:
        return None
    caption = "Seconds from the start of the run, by the clock; training time leaves out start-up and the first step."
    if any(bar.is_reused for bar in bars):
        caption += " Hatched, left of zero: phases that were reused, as long as their training took."
    return ReportFigure(
        "timeline", "Phases in time", caption, lambda: _draw_timeline(run, bars), _plotly_timeline(run, bars)
    )


def begin_ms(run: RunData) -> int:
    """When the run began, Unix time; 0 where it has done nothing itself."""
    own = [state.started_ms for state in run.began if not state.is_reused]
    return min([*own, *(stage["time_ms"] for stage in run.stages)], default=0) if own else 0


def _bars(run: RunData) -> list[_Bar]:
    begin = begin_ms(run)
    reused = [phase for phase in run.phases if phase.state is not None and phase.state.is_reused]
    before = -sum(phase.state.seconds for phase in reused if phase.state is not None)
    bars: list[_Bar] = []
    for phase in run.phases:
        state = phase.state
        if state is not None and state.is_reused:
            text = f"reused, training time {state.seconds:,.2f} s"
            bars.append(_Bar(phase, before, state.seconds, True, text))
            before += state.seconds
        elif state is not None:
            length = (state.ended_ms - state.started_ms) / 1000
            text = f"{length:,.2f} s by the clock, training time {state.seconds:,.2f} s"
            bars.append(_Bar(phase, (state.started_ms - begin) / 1000, length, False, text))
    return bars


def _failure_times(run: RunData) -> list[float]:
    begin = begin_ms(run)
    return [(failure["time_ms"] - begin) / 1000 for failure in run.failures] if begin else []


def _draw_timeline(run: RunData, bars: Sequence[_Bar]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, max(1.4, 0.75 + 0.3 * len(bars))))
    axes = figure.subplots()
    for row, bar in enumerate(bars):
        shade = colour(f"--{bar.phase.kind}")
        hatched = {"facecolor": "none", "hatch": "////", "edgecolor": shade}
        look: dict[str, Any] = hatched if bar.is_reused else {"color": shade}
        axes.barh(row, bar.length, left=bar.begin, height=0.62, linewidth=0.8, **look)
    for seconds in _failure_times(run):
        axes.axvline(seconds, color=colour("--bad"), linewidth=1.0, linestyle="--")
    if any(bar.is_reused for bar in bars):
        axes.axvline(0, color=colour("--quiet"), linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar.phase.name for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(left=min(0.0, *(bar.begin for bar in bars)))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("seconds")
    return figure


def _plotly_timeline(run: RunData, bars: Sequence[_Bar]) -> dict[str, Any]:
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [plain(bar.phase.name)],
            "x": [bar.length],
            "base": [bar.begin],
            "width": 0.62,
            "showlegend": False,
            "hovertemplate": f"%{{y}}: {bar.text}<extra></extra>",
            "marker": {
                "color": f"--{bar.phase.kind}",
                "line": {"color": f"--{bar.phase.kind}", "width": 1},
                **({"pattern": {"shape": "/", "fillmode": "overlay", "fgcolor": "--paper"}} if bar.is_reused else {}),
            },
        }
        for bar in bars
    ]
    across = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1}
    lines = [{**across, "x0": at, "x1": at, "line": {"color": "--bad", "dash": "dash"}} for at in _failure_times(run)]
    if any(bar.is_reused for bar in bars):
        lines.append({**across, "x0": 0, "x1": 0, "line": {"color": "--quiet", "width": 1}})
    return {
        "data": traces,
        "layout": {
            "height": 80 + 34 * len(bars),
            "margin": {"t": 10},
            "barmode": "overlay",
            "shapes": lines,
            "xaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"},
            "yaxis": {"autorange": "reversed", "showgrid": False, "tickfont": {"color": "--ink"}},
        },
    }


# ----------------------------------------------------------------------------------------------------- class by class


def classes_figure(phases: Sequence[PhaseData]) -> ReportFigure | None:
    """The accuracy of each class on the test split at the end of each phase; of many classes those with the lowest."""
    prefix = f"test/{CLASS_ACCURACY}/"
    tested = [phase for phase in phases if any(name.startswith(prefix) for name in phase.metrics)]
    if not tested:
        return None
    last = {name.removeprefix(prefix): value for name, value in tested[-1].metrics.items() if name.startswith(prefix)}
    lowest = set(sorted(last, key=lambda label: last[label])[:_CLASSES])
    labels = [label for label in last if label in lowest]
    shares = [(phase, [phase.metrics.get(f"{prefix}{label}", math.nan) for label in labels]) for phase in tested]
    caption = "Share of the examples of each class in the test split that are taken for it, at the end of each phase."
    floor = _floor(shares)
    if floor:
        caption += f" The axis begins at {floor:g}."
    if len(labels) < len(last):
        caption += f" Of {len(last)} classes the {len(labels)} with the lowest."
    return ReportFigure(
        "classes",
        "Accuracy by class",
        caption,
        lambda: _draw_classes(labels, shares, floor),
        {
            "data": [
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": plain(phase.name),
                    "x": [plain(label) for label in labels],
                    "y": values,
                    "offsetgroup": plain(phase.name),
                    "marker": {"color": f"--{phase.kind}", "size": 8},
                    "cliponaxis": False,
                    "hovertemplate": "%{y:.4f}",
                }
                for phase, values in shares
            ],
            "layout": {
                "height": 320,
                "scattermode": "group",
                "hovermode": "x unified",
                "xaxis": {"type": "category", "title": {"text": "class"}, "showgrid": False},
                "yaxis": {"title": {"text": "accuracy"}, "range": [floor, 1.0]},
            },
        },
    )


def _floor(shares: Sequence[tuple[PhaseData, list[float]]]) -> float:
    """Where the axis of accuracies begins: at zero, or at a half or more where all lie close to one."""
    lowest = min(value for _, values in shares for value in values if math.isfinite(value))
    return next(floor for floor in (0.9, 0.8, 0.5, 0.0) if floor == 0.0 or lowest > floor + 0.02)


def _draw_classes(labels: Sequence[str], shares: Sequence[tuple[PhaseData, list[float]]], floor: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.4))
    axes = figure.subplots()
    width = 0.8 / len(shares)
    for index, (phase, values) in enumerate(shares):
        places = [place + width * (index + 0.5) - 0.4 for place in range(len(labels))]
        shade = colour(f"--{phase.kind}")
        axes.plot(places, values, "o", color=shade, markersize=4, clip_on=False, label=phase.name)
    long = max(map(len, labels)) * len(labels) > 90
    axes.set_xticks(range(len(labels)), [short_name(label, 15) for label in labels], rotation=60 if long else 0)
    axes.set_ylim(floor, 1)
    axes.set_ylabel("accuracy")
    axes.set_xlabel("class")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=6)
    return figure


# ----------------------------------------------------------------------------------------------------------- sparsity


def sparsity_figure(phases: Sequence[PhaseData]) -> ReportFigure | None:
    """Share of weights that are exactly zero, as evaluations found it: over all pruned layers, and layer by layer."""
    layers = recorded([record for phase in phases for record in phase.records], "sparsity/")
    found = [(phase, *_sparsities(phase, ["sparsity", *layers])) for phase in phases]
    measured = [(phase, edges, columns) for phase, edges, columns in found if columns]
    if not layers or not measured:
        return None
    return ReportFigure(
        "sparsity",
        "Sparsity by layer",
        "Share of the weights that are exactly zero, as each evaluation found it.",
        lambda: _draw_sparsity(phases, layers, measured),
        _plotly_sparsity(phases, layers, measured),
    )


_Measured = Sequence[tuple[PhaseData, list[int], list[list[float]]]]


def _sparsities(phase: PhaseData, keys: Sequence[str]) -> tuple[list[int], list[list[float]]]:
    """Edges, one more than columns, and the shares of `keys` in percent at each evaluation, which hold since the one
    before."""
    found = [record for record in phase.records if "sparsity" in record["metrics"]]
    columns = [[100 * record["metrics"].get(key, math.nan) for key in keys] for record in found]
    return [phase.first_step, *(record["step"] for record in found)], columns


def _draw_sparsity(phases: Sequence[PhaseData], layers: Sequence[str], measured: _Measured) -> Figure:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgba
    from matplotlib.figure import Figure

    heights = [1.1, max(1.0, min(8.5, 0.5 + 0.17 * len(layers)))]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6))
    total, each = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    shade = to_rgba(colour("--sparse"))
    shades = LinearSegmentedColormap.from_list("sparsity", [(*shade[:3], 0.0), shade])  # on whatever ground there is
    for phase, edges, columns in measured:
        values = np.array(columns).T
        total.stairs(values[0], edges, baseline=None, color=colour(f"--{phase.kind}"), linewidth=1.6)
        rows = np.arange(len(layers) + 1)
        mesh = each.pcolormesh(edges, rows, values[1:], cmap=shades, vmin=0, vmax=100, rasterized=True)
    total.set_ylabel("all, zero (%)")
    total.set_ylim(0, 100)
    total.grid(axis="y")
    _name_layers(each, layers)
    figure.colorbar(mesh, ax=each, label="zero (%)", fraction=0.03, pad=0.01)
    draw_bands([total], bands_of(phases))
    each.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    each.set_xlabel("optimizer step")
    return figure


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
    every = math.ceil(len(layers) / 50)
    names = [short_name(name.removeprefix("sparsity/")) for name in layers[::every]]
    axes.set_yticks([place + 0.5 for place in range(0, len(layers), every)], names)
    axes.invert_yaxis()


def _plotly_sparsity(phases: Sequence[PhaseData], layers: Sequence[str], measured: _Measured) -> dict[str, Any]:
    names = [plain(short_name(name.removeprefix("sparsity/"))) for name in layers]
    top, rows = 110, max(60, min(700, 22 * len(layers)))
    border = rows / (rows + top + 26)
    lines = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": plain(phase.name),
            "showlegend": False,
            "x": edges,
            "y": [*(column[0] for column in columns), columns[-1][0]],
            "yaxis": "y2",
            "line": {"shape": "hv", "color": f"--{phase.kind}", "width": 2},
            "hovertemplate": "step %{x:,d}: %{y:.2f} %<extra></extra>",
        }
        for phase, edges, columns in measured
    ]
    maps = [
        {
            "type": "heatmap",
            "x": edges,
            "y": names,
            "z": [[column[row + 1] for column in columns] for row in range(len(layers))],
            "coloraxis": "coloraxis",
            "hovertemplate": "%{y}: %{z:.2f} %<extra></extra>",
        }
        for _, edges, columns in measured
    ]
    bands = bands_of(phases) if len(phases) > 1 else []
    return {
        "data": [*lines, *maps],
        "layout": {
            "height": top + rows + 26 + 90,
            "xaxis": {
                "title": {"text": "optimizer step"},
                "range": [phases[0].first_step, phases[-1].last_step],
                "showgrid": False,
                "tickformat": ",d",
            },
            "yaxis": {"domain": [0, border], "autorange": "reversed", "showgrid": False, "type": "category"},
            "yaxis2": {
                "domain": [(rows + 26) / (rows + top + 26), 1],
                "range": [0, 100],
                "title": {"text": "all, zero (%)"},
            },
            "coloraxis": {
                "cmin": 0,
                "cmax": 100,
                "colorscale": [[0, "--panel"], [1, "--sparse"]],
                "colorbar": {
                    "thickness": 10,
                    "outlinewidth": 0,
                    "title": {"text": "zero (%)", "side": "right", "font": {"size": 12}},
                    "tickfont": {"color": "--quiet"},
                },
            },
            **band_layout(bands, ["y2"]),
        },
    }
