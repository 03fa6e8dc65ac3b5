"""Figures of a sweep's course: its phases on a time line, the objective trial by trial, the curves of the best trials,
and the Pareto front. Each is described once, from plain rows, and drawn by matplotlib and by plotly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from temper.config.space import Objective
from temper.ranking import is_measured, pareto_front
from temper.tracking.report.figure import WIDTH, ReportFigure, colour, plain
from temper.tracking.report.panels import Band, band_layout, draw_bands
from temper.tracking.results import Curve, RunRow, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = 20
"""Trials whose curves are shown."""

_KINDS = {"dense": "--dense", "sparse": "--sparse", "redense": "--redense"}
_LOOKS = {
    "finished": ("--series-1", "circle", "o"),
    "running": ("--series-3", "circle-open", "o"),
    "stopped": ("--series-8", "triangle-down", "v"),
    "diverged": ("--series-5", "x", "x"),
    "failed": ("--bad", "cross", "P"),
    "interrupted": ("--series-4", "diamond", "D"),
    "killed": ("--series-7", "square", "s"),
}
"""By what became of a trial: its colour, and its mark in plotly and matplotlib."""
_OTHER_LOOK = ("--quiet", "circle", "o")
_UNITS = (("hours", 3_600_000, 3.0), ("minutes", 60_000, 3.0), ("seconds", 1000, 0.0))
"""Of the time line: a unit, its milliseconds, and how many of it a sweep must take for it to be used."""
_ROWS = 60  # most runs with a row each on the time line
_POINTS = 300  # most points of one curve
_NAMED = 15  # most points with their names beside them


def measured(trials: Sequence[RunRow], objective: Objective) -> list[RunRow]:
    """Those that have a finite number for the objective, in their order."""
    return [trial for trial in trials if is_measured(trial.metrics, objective)]


def best_first(trials: Sequence[RunRow], objective: Objective) -> list[RunRow]:
    """Those that have the objective, the best first."""
    sign = -1 if objective.mode == "max" else 1
    return sorted(measured(trials, objective), key=lambda trial: sign * trial.metrics[objective.metric])


def tied(sweep: Sweep) -> list[RunRow]:
    """The finished trials that share the best value of the first objective, in their order: the first is the best."""
    best = best_first(sweep.finished, sweep.objectives[0]) if sweep.objectives else []
    metric = sweep.objectives[0].metric if best else ""
    return [trial for trial in best if trial.metrics[metric] == best[0].metrics[metric]]


def course_figures(sweep: Sweep) -> tuple[ReportFigure, ...]:
    """What happened: the time line, and each objective over the trials."""
    return (
        *timeline(sweep),
        *(each for number in range(len(sweep.objectives)) for each in over_trials(sweep, number)),
    )


def named(name: str, number: int) -> str:
    """The name of the figure of the objective with this number, from 0."""
    return f"{name}-{number + 1}" if number else name


# ------------------------------------------------------------------------------------------------------- the time line


@dataclass(frozen=True)
class _Bar:
    """A phase in a row; times are since the sweep began, in the time line's unit."""

    row: int
    kind: str
    reused: bool
    start: float
    length: float
    text: str


def timeline(sweep: Sweep) -> Iterator[ReportFigure]:
    """Each run's phases over time, if there are any."""
    runs = [*sweep.others, *sweep.trials]
    began_ms = sweep.parent.started_ms
    took_ms = max((phase.ended_ms for run in runs for phase in run.phases), default=began_ms) - began_ms
    unit, unit_ms = next((name, ms) for name, ms, least in _UNITS if took_ms >= least * ms or not least)
    clock = f"{unit} since the sweep began"
    caption = (
        "The phases of each trial, and of what trials share, by the clock; training time leaves out start-up and the "
        "first step. "
    )
    if len(runs) <= _ROWS:
        bars = [bar for row, run in enumerate(runs) for bar in _bars(run, row, began_ms, unit_ms)]
        names = [_row_name(run) for run in runs]
        caption += (
            "A hatched phase is reused: it stands where another run computed it, or at zero where that was "
            "before the sweep."
        )
    else:
        rows = pack_rows(runs)
        own = [run for run in runs if run.run_id in rows]
        bars = [bar for run in own for bar in _bars(run, rows[run.run_id], began_ms, unit_ms) if not bar.reused]
        names = [str(row + 1) for row in range(max(rows.values(), default=-1) + 1)]
        caption += "Trials follow each other in a row; reused phases, which take no time, are not shown."
    if bars:
        groups = _grouped(bars)
        plotly = {"data": [_bar_trace(*group) for group in groups.items()], "layout": _bar_layout(names, clock)}
        yield ReportFigure("timeline", "Time line", caption, lambda: _draw_bars(names, groups, clock), plotly)


def pack_rows(runs: Sequence[RunRow]) -> dict[str, int]:
    """For each run the first row in which no other one computes at the same time: as many rows as ran at once."""
    rows: dict[str, int] = {}
    free_ms: list[int] = []
    spans = {run.run_id: [phase for phase in run.phases if not phase.reused and phase.ended_ms] for run in runs}
    spans = {run_id: phases for run_id, phases in spans.items() if phases}
    for run_id, phases in sorted(spans.items(), key=lambda item: item[1][0].started_ms):
        row = next((row for row, ms in enumerate(free_ms) if ms <= phases[0].started_ms), len(free_ms))
        free_ms[row : row + 1] = [phases[-1].ended_ms]
        rows[run_id] = row
    return rows


def _row_name(run: RunRow) -> str:
    return run.trial or run.name


def _bars(run: RunRow, row: int, began_ms: int, unit_ms: int) -> Iterator[_Bar]:
    for phase in run.phases:
        start, end = ((ms - began_ms) / unit_ms for ms in (phase.started_ms, phase.ended_ms))
        if phase.reused:
            # Another sweep may have computed it: before this one, or while it ran.
            start, end = max(start, 0.0), max(end, 0.0)
        if phase.ended_ms and (phase.reused or end > start):
            clock = (phase.ended_ms - phase.started_ms) / 1000
            text = f"{_row_name(run)} {phase.name}: {clock:.1f} s by the clock, training time {phase.seconds:.1f} s"
            text += ", reused" if phase.reused else ""
            yield _Bar(row, phase.kind, phase.reused, start, end - start, text)


def _grouped(bars: Sequence[_Bar]) -> dict[tuple[str, bool], list[_Bar]]:
    """By the phases' kind, and whether they are reused."""
    keys = [(kind, reused) for kind in _KINDS for reused in (False, True)]
    groups = {key: [bar for bar in bars if (bar.kind, bar.reused) == key] for key in keys}
    return {key: group for key, group in groups.items() if group}


def _group_name(kind: str, reused: bool) -> str:
    return f"{kind}, reused" if reused else kind


def _bar_trace(key: tuple[str, bool], bars: Sequence[_Bar]) -> dict[str, Any]:
    kind, reused = key
    pattern = {"pattern": {"shape": "/", "size": 5, "solidity": 0.35}} if reused else {}
    return {
        "type": "bar",
        "orientation": "h",
        "name": _group_name(kind, reused),
        "y": [bar.row for bar in bars],
        "base": [round(bar.start, 4) for bar in bars],
        "x": [round(bar.length, 4) for bar in bars],
        "width": 0.84,
        "marker": {"color": _KINDS[kind], "line": {"width": 0}, **pattern},
        "hovertext": [plain(bar.text) for bar in bars],
        "hoverinfo": "text",
    }


def _bar_layout(names: Sequence[str], clock: str) -> dict[str, Any]:
    return {
        "height": 20 * len(names) + 120,
        "barmode": "overlay",
        "hovermode": "closest",
        "xaxis": {"title": {"text": clock}, "rangemode": "tozero"},
        "yaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": [plain(name) for name in names],
            "range": [len(names) - 0.4, -0.6],
            "showgrid": False,
        },
    }


def _draw_bars(names: Sequence[str], groups: Mapping[tuple[str, bool], Sequence[_Bar]], clock: str) -> Figure:
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(WIDTH, max(1.7, 0.15 * len(names) + 0.9)))
    axes = figure.subplots()
    key = []
    for (kind, reused), bars in groups.items():
        shade = colour(_KINDS[kind])
        fill, hatch = ("none", "////") if reused else (shade, None)
        corners = [_corners(bar) for bar in bars]
        axes.add_collection(PolyCollection(corners, facecolor=fill, edgecolor=shade, hatch=hatch, linewidth=0))
        label = _group_name(kind, reused)
        key.append(Patch(label=label, facecolor=fill, edgecolor=shade, hatch=hatch, linewidth=0))
    axes.set_xlim(
        min(0.0, *(bar.start for bars in groups.values() for bar in bars)),
        1.01 * max(bar.start + bar.length for bars in groups.values() for bar in bars),
    )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.set_xlabel(clock)
    figure.legend(handles=key, loc="outside upper left", ncols=6)
    return figure


def _corners(bar: _Bar) -> list[tuple[float, float]]:
    left, right, top, bottom = bar.start, bar.start + bar.length, bar.row - 0.42, bar.row + 0.42
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# -------------------------------------------------------------------------------------------- the objective over trials


def over_trials(sweep: Sweep, number: int) -> Iterator[ReportFigure]:
    """The objective with this number, trial by trial, and the best of those that finished so far."""
    objective = sweep.objectives[number]
    trials = measured(sweep.trials, objective)
    if not trials:
        return
    places = {trial.run_id: place for place, trial in enumerate(sweep.trials)}
    groups = {status: [each for each in trials if each.outcome == status] for status in _statuses(trials)}
    finished = measured(sweep.finished, objective)
    pick = max if objective.mode == "max" else min
    best = list(accumulate((trial.metrics[objective.metric] for trial in finished), pick))
    steps = ([places[trial.run_id] for trial in finished], best)
    plotly = {
        "data": [
            *(_trial_trace(status, group, places, objective.metric) for status, group in groups.items()),
            _stairs_trace(*steps),
        ],
        "layout": {
            "xaxis": {"title": {"text": "trial"}, "tickformat": ",d", **({"dtick": 1} if len(places) <= 20 else {})},
            "yaxis": {"title": {"text": plain(objective.metric)}},
        },
    }
    caption = (
        f"The last {objective.metric} of each trial, by what became of it, and the best of the trials so far that were "
        "trained to their end."
    )
    title = f"{objective.metric} over the trials"
    yield ReportFigure(
        named("objective", number),
        title,
        caption,
        lambda: _draw_trials(groups, places, objective.metric, steps),
        plotly,
    )


def _statuses(trials: Sequence[RunRow]) -> list[str]:
    order = list(_LOOKS)
    found = {trial.outcome for trial in trials}
    return sorted(found, key=lambda status: (order.index(status) if status in order else len(order), status))


def _trial_trace(status: str, trials: Sequence[RunRow], places: Mapping[str, int], metric: str) -> dict[str, Any]:
    shade, symbol, _ = _LOOKS.get(status, _OTHER_LOOK)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(status),
        "x": [places[trial.run_id] for trial in trials],
        "y": [trial.metrics[metric] for trial in trials],
        "marker": {"color": shade, "symbol": symbol, "size": 7, "opacity": 0.8},
        "hovertext": [plain(trial_text(trial)) for trial in trials],
        "hovertemplate": "%{hovertext}<br>%{y:.6~g}<extra></extra>",
    }


def _stairs_trace(places: Sequence[int], best: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "best so far",
        "x": list(places),
        "y": list(best),
        "line": {"color": "--series-2", "width": 2, "shape": "hv"},
        "hovertemplate": "best so far %{y:.6~g}<extra></extra>",
    }


def trial_text(trial: RunRow) -> str:
    """e.g. `t007 distill.temperature 4, seed 1`."""
    return f"{trial.trial} " + ", ".join(f"{name} {value}" for name, value in sorted(trial.swept.items()))


def _draw_trials(
    groups: Mapping[str, Sequence[RunRow]],
    places: Mapping[str, int],
    metric: str,
    steps: tuple[Sequence[int], Sequence[float]],
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.8))
    axes = figure.subplots()
    for status, trials in groups.items():
        shade, _, mark = _LOOKS.get(status, _OTHER_LOOK)
        points = [(places[trial.run_id], trial.metrics[metric]) for trial in trials]
        axes.plot(*zip(*points, strict=True), mark, color=colour(shade), markersize=3, alpha=0.8, label=status)
    axes.step(*steps, where="post", color=colour("--series-2"), label="best so far")
    axes.locator_params(axis="x", integer=True)
    _label(axes, "trial", metric)
    figure.legend(loc="outside upper left", ncols=8)
    return figure


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


# ---------------------------------------------------------------------------------------------- curves of the best ones


def best_trials(sweep: Sweep) -> list[RunRow]:
    """The trials whose curves are shown: of those that finished, else of all, the best by the first objective."""
    objective = sweep.objectives[0]
    return (best_first(sweep.finished, objective) or best_first(sweep.trials, objective))[:CURVES]


def curves(sweep: Sweep, points: Mapping[str, Curve]) -> Iterator[ReportFigure]:
    """The first objective over the steps of the best trials, whose points are given by their run."""
    shown = [trial for trial in best_trials(sweep) if points.get(trial.run_id)] if sweep.objectives else []
    if not shown:
        return
    metric = sweep.objectives[0].metric
    bands = _bands(shown)
    # The best last, so that it lies above the others.
    lines = [(trial, _thinned(points[trial.run_id]), trial is shown[0]) for trial in reversed(shown)]
    layout = {
        **band_layout(bands, ["y"]),
        "xaxis": {"title": {"text": "optimizer step"}, "tickformat": ",d", "showgrid": False},
        "yaxis": {"title": {"text": plain(metric)}},
    }
    caption = f"{metric} over the steps of {_which(sweep, shown)}"
    plotly = {"data": [_curve_trace(*line) for line in lines], "layout": layout}
    yield ReportFigure(
        "curves", "Curves of the best trials", caption, lambda: _draw_curves(lines, metric, bands), plotly
    )


def _which(sweep: Sweep, shown: Sequence[RunRow]) -> str:
    """Of which trials the curves are, as the end of a sentence."""
    best = shown[0].trial
    if len(shown) == 1:
        return f"the best trial, {best}."
    if len(shown) == len(sweep.trials):
        return f"all {len(shown)} trials; the best, {best}, stands out."
    if len(shown) == len(sweep.finished):
        return f"all {len(shown)} trials that finished; the best, {best}, stands out."
    return f"the {len(shown)} best trials; the best, {best}, stands out."


def _bands(trials: Sequence[RunRow]) -> list[Band]:
    """The phases, where they lie at the same steps in all trials."""
    found = {
        tuple((phase.name, phase.kind, phase.first_step, phase.steps) for phase in trial.phases) for trial in trials
    }
    phases = found.pop() if len(found) == 1 else ()
    if len(phases) < 2:
        return []
    return [Band(name, first, first + steps, _KINDS[kind]) for name, kind, first, steps in phases]


def _thinned(points: Curve) -> Curve:
    """Evenly, with the last one."""
    stride = math.ceil(len(points) / _POINTS)
    return points[::-1][::stride][::-1]


def _curve_trace(trial: RunRow, points: Curve, is_best: bool) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(trial.trial),
        "showlegend": False,
        "x": [step for step, _ in points],
        "y": [value for _, value in points],
        "line": {"color": "--series-2" if is_best else "--series-1", "width": 2.4 if is_best else 1.1},
        "opacity": 1 if is_best else 0.5,
        "hovertemplate": f"{plain(trial_text(trial))}<br>step %{{x:,d}}: %{{y:.6~g}}<extra></extra>",
    }


def _draw_curves(lines: Sequence[tuple[RunRow, Curve, bool]], metric: str, bands: Sequence[Band]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.0))
    axes = figure.subplots()
    for trial, points, is_best in lines:
        shade, width = ("--series-2", 1.8) if is_best else ("--series-1", 0.6)
        label = trial.trial if is_best else None
        axes.plot(*zip(*points, strict=True), color=colour(shade), linewidth=width, label=label)
    draw_bands([axes], bands)
    _label(axes, "optimizer step", metric)
    axes.legend(loc="lower right")
    return figure


# ----------------------------------------------------------------------------------------------------- the Pareto front


def front(sweep: Sweep) -> list[RunRow]:
    """The trials that finished and that none other is better than by all objectives; none where there is one only."""
    if len(sweep.objectives) < 2:
        return []
    finished = sweep.finished
    return [finished[index] for index in pareto_front([trial.metrics for trial in finished], sweep.objectives)]


def pareto_figures(sweep: Sweep) -> Iterator[ReportFigure]:
    """The first objective against each other one, with the front."""
    best = front(sweep)
    for number, other in enumerate(sweep.objectives[1:]):
        first = sweep.objectives[0]
        others = [trial for trial in measured(measured(sweep.finished, first), other) if trial not in best]
        if len(best) + len(others) > 1:
            yield _pareto(best, others, (other, first), named("pareto-front", number), len(sweep.objectives))


def _pareto(
    best: Sequence[RunRow], others: Sequence[RunRow], axes: tuple[Objective, Objective], name: str, objectives: int
) -> ReportFigure:
    x, y = axes
    ordered = sorted(best, key=lambda trial: (trial.metrics[x.metric], trial.metrics[y.metric]))
    of_all = " by all objectives" if objectives > 2 else ""
    are = "is" if len(best) == 1 else "are"
    caption = (
        f"{y.metric} ({y.mode}) against {x.metric} ({x.mode}) of the trials that finished. {len(best)} {are} on the "
        f"front{of_all}: no other trial is as good by every objective and better by one."
    )
    plotly = {
        "data": [
            _pareto_trace("other trials", others, axes, "--quiet", "markers"),
            _pareto_trace(
                "Pareto front", ordered, axes, "--series-2", "lines+markers" if objectives == 2 else "markers"
            ),
        ],
        "layout": {
            "height": 420,
            "xaxis": {"title": {"text": plain(f"{x.metric} ({x.mode})")}},
            "yaxis": {"title": {"text": plain(f"{y.metric} ({y.mode})")}},
        },
    }
    return ReportFigure(
        name,
        f"Pareto front: {y.metric} and {x.metric}",
        caption,
        lambda: _draw_pareto(ordered, others, axes, objectives == 2),
        plotly,
    )


def _pareto_trace(
    name: str, trials: Sequence[RunRow], axes: tuple[Objective, Objective], shade: str, mode: str
) -> dict[str, Any]:
    x, y = axes
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [trial.metrics[x.metric] for trial in trials],
        "y": [trial.metrics[y.metric] for trial in trials],
        "marker": {"color": shade, "size": 9 if shade != "--quiet" else 6, "opacity": 0.85},
        "line": {"color": shade, "width": 1.2, "dash": "dot"},
        "hovertext": [plain(trial_text(trial)) for trial in trials],
        "hovertemplate": "%{hovertext}<br>%{x:.6~g}, %{y:.6~g}<extra></extra>",
    }


def _draw_pareto(
    best: Sequence[RunRow], others: Sequence[RunRow], pair: tuple[Objective, Objective], joined: bool
) -> Figure:
    from matplotlib.figure import Figure

    x, y = pair
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    points = [(trial.metrics[x.metric], trial.metrics[y.metric]) for trial in others]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=colour("--quiet"), markersize=3, alpha=0.6)
    points = [(trial.metrics[x.metric], trial.metrics[y.metric]) for trial in best]
    look = "o:" if joined else "o"
    axes.plot(*zip(*points, strict=True), look, color=colour("--series-2"), markersize=5, label="Pareto front")
    for trial, point in list(zip(best, points, strict=True))[:_NAMED]:
        axes.annotate(trial.trial, point, xytext=(3, 3), textcoords="offset points", fontsize=6.5)
    _label(axes, f"{x.metric} ({x.mode})", f"{y.metric} ({y.mode})")
    axes.legend(loc="best")
    return figure
