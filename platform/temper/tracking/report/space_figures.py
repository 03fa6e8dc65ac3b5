"""Figures of a sweep's results over its space: heat maps of two variables with means and intervals, and parallel
coordinates of all variables and objectives. Only trials that were trained to their end are in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from temper.config.space import Objective
from temper.tracking.report.figure import WIDTH, ReportFigure, colour, plain
from temper.tracking.report.sweep_figures import best_first, measured, named, trial_text
from temper.tracking.results import RunRow, Sweep
from temper.tracking.sweep_progress import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVEL = 0.95
"""Of the intervals."""

_CELLS = 12  # most different values of a variable that have a row or column each
_BINS = 6  # rows or columns of a variable that has more
_TICKS = 8  # most values of a variable that are written beside its axis
_LOG_SPAN = 30  # a variable whose values span more is drawn on a logarithmic axis
_BEST_SHARE = 0.1  # of the trials, which stand out among the parallel coordinates
_SCALE = "Cividis"
_PREFERRED = ("temperature", "sparsity")


# ----------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Cell:
    """The measurements in a cell: their mean, the smallest and largest, and how many; `half` the width of the interval
    of the mean, None where there is none."""

    mean: float
    least: float
    most: float
    count: int
    half: float | None = None


def summarize(values: Sequence[float], *, are_repetitions: bool) -> Cell:
    """Mean ± t s/√n at level LEVEL, where t is the quantile of Student's distribution with n - 1 degrees of freedom.

    Only repetitions, which differ in seeds alone, are draws from one distribution and have an interval."""
    count, mean = len(values), float(np.mean(values))
    cell = Cell(mean, min(values), max(values), count)
    if count == 1 or not are_repetitions:
        return cell
    # Its parent, scipy.stats, takes a second to import.
    from scipy.special import stdtrit

    half = stdtrit(count - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / math.sqrt(count)
    return replace(cell, half=float(half))


# ------------------------------------------------------------------------------------------------------------- the axes


@dataclass(frozen=True)
class Axis:
    """The rows or columns that a variable has in a heat map: their labels, and the place of each value. `is_binned`:
    a place is for a range of values."""

    variable: str
    labels: tuple[str, ...]
    place: Callable[[Any], int]
    is_binned: bool = False


def build_axis(variable: str, values: Sequence[Any]) -> Axis:
    """A place for each different value; of numbers that are too many, ranges with about as many values each."""
    distinct = _ordered(values)
    if len(distinct) <= _CELLS or not _is_numeric(values):
        return Axis(variable, tuple(map(_text, distinct)), distinct.index)
    edges = np.quantile(distinct, np.linspace(0, 1, _BINS + 1))
    labels = tuple(f"{_text(low)} – {_text(high)}" for low, high in pairwise(edges.tolist()))
    return Axis(variable, labels, lambda value: int(np.searchsorted(edges[1:-1], value, side="right")), is_binned=True)


def axis_variables(sweep: Sweep) -> tuple[str, str] | None:
    """The two variables of the heat maps: temperature and sparsity first, then others that are numbers, then the rest;
    None where fewer than two are varied."""
    values = {name: _values(sweep.finished, name) for name in sweep.variables if not is_seed(name)}
    varied = [name for name in values if len(_ordered(values[name])) > 1]
    chosen = sorted(varied, key=lambda name: (_preference(name), not _is_numeric(values[name]), name))
    return (chosen[0], chosen[1]) if len(chosen) > 1 else None


def is_seed(variable: str) -> bool:
    """Whether trials that differ in it only are repetitions."""
    return variable.rpartition(".")[2] == "seed"


def _preference(variable: str) -> int:
    return next((place for place, word in enumerate(_PREFERRED) if word in variable), len(_PREFERRED))


def _values(trials: Sequence[RunRow], variable: str) -> list[Any]:
    return [trial.swept[variable] for trial in trials if variable in trial.swept]


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _ordered(values: Sequence[Any]) -> list[Any]:
    """The different ones: numbers by size, others as they come."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct) if _is_numeric(distinct) else distinct


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------ heat maps


def heat_maps(sweep: Sweep) -> Iterator[ReportFigure]:
    """One for each objective, where two variables are varied."""
    variables = axis_variables(sweep)
    if variables is None:
        return
    for place, objective in enumerate(sweep.objectives):
        trials = [
            trial for trial in measured(sweep.finished, objective) if all(name in trial.swept for name in variables)
        ]
        if trials:
            yield _heat_map(trials, variables, objective, named("heat-map", place), _averaged(sweep, variables))


def _averaged(sweep: Sweep, variables: tuple[str, str]) -> list[str]:
    """The other variables that are varied."""
    return [
        name for name in sweep.variables if name not in variables and len(_ordered(_values(sweep.finished, name))) > 1
    ]


def cells(trials: Sequence[RunRow], rows: Axis, columns: Axis, objective: Objective) -> dict[tuple[int, int], Cell]:
    """What the trials measured, by row and column."""
    found: dict[tuple[int, int], list[RunRow]] = {}
    for trial in trials:
        place = rows.place(trial.swept[rows.variable]), columns.place(trial.swept[columns.variable])
        found.setdefault(place, []).append(trial)
    is_binned = rows.is_binned or columns.is_binned
    return {
        place: summarize(
            [trial.metrics[objective.metric] for trial in group],
            are_repetitions=not is_binned and _differ_in_seeds_alone(group),
        )
        for place, group in found.items()
    }


def _differ_in_seeds_alone(trials: Sequence[RunRow]) -> bool:
    others = [{name: value for name, value in trial.swept.items() if not is_seed(name)} for trial in trials]
    return all(each == others[0] for each in others)


def _heat_map(
    trials: Sequence[RunRow], variables: tuple[str, str], objective: Objective, name: str, averaged: Sequence[str]
) -> ReportFigure:
    rows, columns = (build_axis(variable, _values(trials, variable)) for variable in variables)
    found = cells(trials, rows, columns, objective)
    seeds = [variable for variable in averaged if is_seed(variable)]
    over = " and ".join([*(["seeds"] if seeds else []), *(each for each in averaged if each not in seeds)])
    caption = (
        f"{objective.metric} ({objective.mode}): mean over the trials of a cell that finished"
        + (f", which differ in {over}" if len(averaged) > len(seeds) else "")
        + f"{_spread(found.values())}. Brighter is better."
    )
    title = f"{objective.metric} over {rows.variable} and {columns.variable}"
    draw = lambda: _draw_heat_map(rows, columns, found, objective)  # noqa: E731
    return ReportFigure(name, title, caption, draw, _plotly_heat_map(rows, columns, found, objective))


def _spread(found: Iterable[Cell]) -> str:
    """What the cells say of n trials beside their mean."""
    several = [cell for cell in found if cell.count > 1]
    told = []
    if any(cell.half is not None for cell in several):
        told.append(f"; ± half of the {LEVEL:.0%} interval by Student's t, of n trials that differ in seeds alone")
    if any(cell.half is None for cell in several):
        told.append("; min – max of n trials that differ in more than seeds")
    return "".join(told)


def _cell_text(cell: Cell, newline: str) -> str:
    if cell.count == 1:
        spread = []
    elif cell.half is None:
        spread = [f"{number(cell.least)} – {number(cell.most)}"]
    else:
        spread = [f"± {cell.half:.2g}"]
    return newline.join([number(cell.mean), *spread, f"n = {cell.count}"])


def _plotly_heat_map(
    rows: Axis, columns: Axis, found: Mapping[tuple[int, int], Cell], objective: Objective
) -> dict[str, Any]:
    places = [[found.get((row, column)) for column in range(len(columns.labels))] for row in range(len(rows.labels))]
    trace = {
        "type": "heatmap",
        "x": [plain(label) for label in columns.labels],
        "y": [plain(label) for label in rows.labels],
        "z": [[None if cell is None else cell.mean for cell in row] for row in places],
        "text": [["" if cell is None else _cell_text(cell, "<br>") for cell in row] for row in places],
        "texttemplate": "%{text}",
        "textfont": {"size": 11 if len(columns.labels) <= 8 else 9},
        "hovertemplate": f"{plain(rows.variable)} %{{y}}, {plain(columns.variable)} %{{x}}<br>%{{text}}<extra></extra>",
        "colorscale": _SCALE,
        "reversescale": objective.mode == "min",
        "colorbar": {"title": {"text": plain(objective.metric), "side": "right"}, "outlinewidth": 0},
        "xgap": 2,
        "ygap": 2,
    }
    layout = {
        "height": max(260, min(760, 58 * len(rows.labels) + 120)),
        "xaxis": {"type": "category", "title": {"text": plain(columns.variable)}, "showgrid": False},
        "yaxis": {"type": "category", "title": {"text": plain(rows.variable)}, "showgrid": False},
    }
    return {"data": [trace], "layout": layout}


def _draw_heat_map(rows: Axis, columns: Axis, found: Mapping[tuple[int, int], Cell], objective: Objective) -> Figure:
    from matplotlib.figure import Figure

    values = np.full((len(rows.labels), len(columns.labels)), np.nan)
    for place, cell in found.items():
        values[place] = cell.mean
    figure = Figure(figsize=(WIDTH, max(2.2, min(7.5, 0.5 * len(rows.labels) + 0.9))))
    axes = figure.subplots()
    scale = _SCALE.lower() + ("_r" if objective.mode == "min" else "")
    image = axes.pcolormesh(values, cmap=scale, edgecolors="white", linewidth=1.5)
    for (row, column), cell in found.items():
        red, green, blue, _ = image.to_rgba(np.asarray(cell.mean))
        is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axes.text(
            column + 0.5,
            row + 0.5,
            _cell_text(cell, "\n"),
            ha="center",
            va="center",
            fontsize=6.5 if len(columns.labels) <= 8 else 5,
            color="white" if is_dark else "black",
        ).set_in_layout(False)
    axes.set_xticks(np.arange(len(columns.labels)) + 0.5, columns.labels)
    axes.set_yticks(np.arange(len(rows.labels)) + 0.5, rows.labels)
    axes.tick_params(length=0)
    axes.set_xlabel(columns.variable)
    axes.set_ylabel(rows.variable)
    figure.colorbar(image, label=objective.metric).outline.set_visible(False)
    return figure


# ------------------------------------------------------------------------------------------------- parallel coordinates


@dataclass(frozen=True)
class _Scale:
    """A vertical axis from 0 to 1: its name, the heights with a text beside them, and the height of each value."""

    name: str
    ticks: tuple[tuple[float, str], ...]
    height: Callable[[Any], float]


@dataclass(frozen=True)
class _Group:
    """Trials that look alike: where the line of each runs, broken where it does not have a variable."""

    name: str
    colour: str
    width: float
    opacity: float
    trials: Sequence[RunRow]
    heights: Sequence[Sequence[float | None]]


def parallel_coordinates(sweep: Sweep) -> Iterator[ReportFigure]:
    """A line for each trial across the variables and the objectives."""
    trials = best_first(sweep.finished, sweep.objectives[0]) if sweep.objectives else []
    trials = [trial for trial in trials if all(measured([trial], each) for each in sweep.objectives)]
    if len(trials) < 2 or not sweep.variables:
        return
    scales = [
        *(build_scale(name, _values(trials, name)) for name in sweep.variables if _values(trials, name)),
        *(build_scale(each.metric, [trial.metrics[each.metric] for trial in trials]) for each in sweep.objectives),
    ]
    groups = _groups(trials, scales)
    best = f"The best by {sweep.objectives[0].metric}, {trials[0].trial},"
    more = f" and the best {_BEST_SHARE:.0%} stand out." if _num_best(trials) > 1 else " stands out."
    caption = f"Each line is a trial that finished. {best}{more}"
    yield ReportFigure(
        "parallel-coordinates",
        "Parallel coordinates",
        caption,
        lambda: _draw_parallel(scales, groups),
        {"data": [_parallel_trace(group) for group in groups], "layout": _parallel_layout(scales)},
    )


def build_scale(name: str, values: Sequence[Any]) -> _Scale:
    """Numbers by size, logarithmic where they span much; other values one above the other."""
    distinct = _ordered(values)
    if not _is_numeric(values):
        between = max(len(distinct) - 1, 1)
        ticks = tuple((place / between, _text(value)) for place, value in enumerate(distinct[:_CELLS]))
        return _Scale(name, ticks, lambda value: distinct.index(value) / between)
    low, high = distinct[0], distinct[-1]
    is_log = low > 0 and high > _LOG_SPAN * low
    transform: Callable[[float], float] = math.log if is_log else float
    span = (transform(high) - transform(low)) or 1.0

    def height(value: float) -> float:
        return (transform(value) - transform(low)) / span

    shown = distinct if len(distinct) <= _TICKS else [low, high]
    return _Scale(name, tuple((height(value), _text(value)) for value in shown), height)


def _groups(trials: Sequence[RunRow], scales: Sequence[_Scale]) -> list[_Group]:
    """The best last, so that it lies above the others."""
    best = _num_best(trials)
    faint = max(0.3, min(0.8, 30 / len(trials)))
    looks = (
        ("other trials", "--quiet", 0.8, faint, trials[best:]),
        (f"best {_BEST_SHARE:.0%}", "--series-1", 1.3, 0.8, trials[1:best]),
        ("best", "--series-2", 2.6, 1.0, trials[:1]),
    )
    return [
        _Group(name, shade, width, opacity, part, [[_height(trial, scale) for scale in scales] for trial in part])
        for name, shade, width, opacity, part in looks
        if part
    ]


def _num_best(trials: Sequence[RunRow]) -> int:
    return max(1, round(_BEST_SHARE * len(trials)))


def _height(trial: RunRow, scale: _Scale) -> float | None:
    value = trial.swept.get(scale.name, trial.metrics.get(scale.name))
    return None if value is None else scale.height(value)


def _parallel_trace(group: _Group) -> dict[str, Any]:
    """All lines of a group as one with gaps: a line of its own for each would take a browser seconds."""
    texts = [trial_text(trial) for trial in group.trials]
    num_scales = len(group.heights[0])
    return {
        "type": "scatter",
        "mode": "lines",
        "name": group.name,
        "x": [place for _ in texts for place in (*range(num_scales), None)],
        "y": [y if y is None else round(y, 4) for heights in group.heights for y in (*heights, None)],
        "hovertext": [text for each in texts for text in (*[plain(each)] * num_scales, "")],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "line": {"color": group.colour, "width": group.width},
        "opacity": group.opacity,
    }


def _parallel_layout(scales: Sequence[_Scale]) -> dict[str, Any]:
    last = len(scales) - 1
    return {
        "height": 420,
        "hovermode": "closest",
        "xaxis": {
            "range": [-0.15, last + 0.35],
            "tickvals": list(range(len(scales))),
            "ticktext": [plain(scale.name) for scale in scales],
            "showgrid": False,
        },
        "yaxis": {"visible": False, "range": [-0.05, 1.05]},
        "shapes": [
            {"type": "line", "x0": place, "x1": place, "y0": 0, "y1": 1, "line": {"color": "--quiet", "width": 1}}
            for place in range(len(scales))
        ],
        "annotations": [
            {
                "x": place,
                "y": y,
                "text": plain(text),
                "showarrow": False,
                "xanchor": "left",
                "xshift": 4,
                "bgcolor": "--paper",
            }
            for place, scale in enumerate(scales)
            for y, text in scale.ticks
        ],
    }


def _draw_parallel(scales: Sequence[_Scale], groups: Sequence[_Group]) -> Figure:
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.subplots()
    for group in groups:
        shade = colour(group.colour)
        lines = [[(x, math.nan if y is None else y) for x, y in enumerate(heights)] for heights in group.heights]
        axes.add_collection(LineCollection(lines, colors=shade, linewidths=0.7 * group.width, alpha=group.opacity))
    _draw_scales(axes, scales)
    key = [Line2D([], [], color=colour(group.colour), linewidth=group.width, label=group.name) for group in groups]
    figure.legend(handles=key, loc="outside upper left", ncols=3)
    return figure


def _draw_scales(axes: Axes, scales: Sequence[_Scale]) -> None:
    for place, scale in enumerate(scales):
        axes.axvline(place, color=colour("--quiet"), linewidth=0.8)
        for y, text in scale.ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
            axes.text(place + 0.03, y, text, va="center", fontsize=6.5, bbox=box, zorder=4)
    axes.set_xlim(-0.15, len(scales) - 0.65)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xticks(range(len(scales)), [scale.name for scale in scales])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
