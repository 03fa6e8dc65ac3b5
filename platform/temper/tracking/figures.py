"""Figures of a run as SVG texts: its course, and what became of the weights in sparse and re-dense phases.

They are drawn from plain data, with matplotlib's own objects and none of pyplot's global state. Matplotlib is imported
only inside functions, because that takes a second. The same data gives the same text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from temper.techniques.dsd.summary import BINS, LEVELS, Counts, widen
from temper.tracking.history import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

COLOURS = {"dense": "#0072b2", "sparse": "#d55e00", "redense": "#009e73"}
"""By the kind of a phase; told apart by colour-blind people, too (Okabe and Ito)."""

_GREY = "#666666"
_WIDTH = 9.0  # inches, as are all sizes here; a page shows it about 860 pixels wide
_POINTS = 500  # most points of one curve
_SHOWN_BINS = 64
_OUTSIDE = 0.001  # share of the weights that a histogram may leave out on both sides together
_HISTOGRAMS = 12
_ROWS = 40
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "figure.constrained_layout.use": True,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "temper",
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@dataclass(frozen=True)
class PhaseData:
    """One phase of a run: `first_step` and `last_step` as in its plan, its `records` so far, the `metrics` of its end
    (empty before that), and its `weights.json`, if it has one."""

    name: str
    kind: str
    first_step: int
    last_step: int
    records: Sequence[Record]
    metrics: Mapping[str, float]
    weights: Mapping[str, Any] | None


@dataclass(frozen=True)
class Round:
    """A sparse phase, the phase before it, and the re-dense phase after it, if there is one."""

    number: int
    before: PhaseData
    sparse: PhaseData
    redense: PhaseData | None


def rounds(phases: Sequence[PhaseData]) -> list[Round]:
    """The rounds of dense-sparse-dense training among `phases`; none of a job without them."""
    found: list[Round] = []
    for before, sparse, after in zip(phases, phases[1:], [*phases[2:], None], strict=False):
        if sparse.kind == "sparse":
            redense = after if after is not None and after.kind == "redense" else None
            found.append(Round(len(found) + 1, before, sparse, redense))
    return found


def draw_figures(phases: Sequence[PhaseData]) -> dict[str, str]:
    """Every figure that there is something to show in, by name: `training`, `sparsity`, `weights-1`, `returned-1`, …"""
    figures: dict[str, str] = {}
    if any(phase.records for phase in phases):
        figures["training"] = draw_training(phases)
    if _measured_layers(phases):
        figures["sparsity"] = draw_sparsity(phases)
    for item in rounds(phases):
        if item.sparse.weights and item.sparse.weights["layers"]:
            figures[f"weights-{item.number}"] = draw_weights(item)
        if item.redense and item.redense.weights and item.redense.weights["total"]["pruned"]:
            figures[f"returned-{item.number}"] = draw_returned(item.redense)
    return figures


def short_name(weight: str, length: int = 35) -> str:
    """The layer of a weight, `layer1.0.conv1` for `layer1.0.conv1.weight`; what is longer than `length` lacks its
    middle."""
    name = weight.removesuffix(".weight")
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def _as_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """`draw` in temper's style, with the figure as the text of an SVG element."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        stream = io.StringIO()
        with matplotlib.rc_context(_STYLE):
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            draw(*args, **kwargs).savefig(stream, format="svg", metadata=nothing, dpi=150)
        text = stream.getvalue()
        return text[text.index("<svg") :]

    return drawn


# ------------------------------------------------------------------------------------------------ the run over steps


@_as_svg
def draw_training(phases: Sequence[PhaseData]) -> Figure:
    """Evaluation metrics, losses and the learning rate over the steps of all phases."""
    names = [name for name in _evaluated(phases) if name != "loss"]
    figure, axes = _stacked([*[1.4] * len(names), 2.0, 0.9])
    for panel, name in zip(axes, names, strict=False):
        _draw_evaluations(panel, phases, name)
        panel.set_ylabel(name)
    loss, rate = axes[-2:]
    for phase in phases:
        loss.plot(*_curve(phase, "train/loss"), color=COLOURS[phase.kind], alpha=0.45, linewidth=0.9)
        rate.plot(*_curve(phase, "train/lr"), color=COLOURS[phase.kind])
    _draw_evaluations(loss, phases, "loss")
    _scale(loss, [value for phase in phases for value in _curve(phase, "train/loss")[1]])
    loss.set_ylabel("loss")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    _add_key(loss)
    _finish_steps(axes, phases)
    return figure


@_as_svg
def draw_sparsity(phases: Sequence[PhaseData]) -> Figure:
    """Share of weights that are exactly zero, as evaluations found it: over all pruned layers, and layer by layer."""
    from matplotlib.colors import LinearSegmentedColormap

    layers = _measured_layers(phases)
    colours = LinearSegmentedColormap.from_list("sparsity", ["white", COLOURS["sparse"]])
    figure, axes = _stacked([1.2, min(9.0, 0.7 + 0.17 * len(layers))])
    total, each = axes
    for phase in phases:
        edges, columns = _sparsities(phase, ["sparsity", *layers])
        if not columns:
            continue
        values = 100 * np.array(columns).T
        total.stairs(values[0], edges, baseline=None, color=COLOURS[phase.kind], linewidth=1.6)
        rows = np.arange(len(layers) + 1)
        mesh = each.pcolormesh(edges, rows, values[1:], cmap=colours, vmin=0, vmax=100, rasterized=True)
    total.set_ylabel("all, zero (%)")
    total.set_ylim(0, 100)
    every = math.ceil(len(layers) / 50)
    names = [short_name(name.removeprefix("sparsity/")) for name in layers[::every]]
    each.set_yticks(np.arange(0, len(layers), every) + 0.5, names)
    each.invert_yaxis()
    figure.colorbar(mesh, ax=each, label="zero (%)", fraction=0.03, pad=0.01)
    _finish_steps(axes, phases, shaded=axes[:1])
    return figure


def _stacked(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Axes one below the other, with one axis of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.6))
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    return figure, list(grid[:, 0])


def _finish_steps(axes: Sequence[Axes], phases: Sequence[PhaseData], shaded: Sequence[Axes] = ()) -> None:
    """Bands of the phases in all axes, or in those that are `shaded`, their names on top, and the axis of steps."""
    first, last = phases[0].first_step, phases[-1].last_step
    for panel in shaded or axes:
        for phase in phases if len(phases) > 1 else ():
            panel.axvspan(phase.first_step, phase.last_step, color=COLOURS[phase.kind], alpha=0.08, linewidth=0)
    for phase in phases if len(phases) > 1 else ():
        if 120 * (phase.last_step - phase.first_step) / (last - first) > len(phase.name):
            middle = (phase.first_step + phase.last_step) / 2, 1.02
            place = axes[0].get_xaxis_transform()
            axes[0].text(*middle, phase.name, transform=place, ha="center", va="bottom", color=COLOURS[phase.kind])
    axes[-1].set_xlim(first, last)
    axes[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes[-1].set_xlabel("optimizer step")


def _evaluated(phases: Sequence[PhaseData]) -> list[str]:
    """Names of the metrics that were evaluated, in the order in which they come."""
    keys = (key for phase in phases for record in phase.records for key in record["metrics"])
    return [key.removeprefix("eval/") for key in dict.fromkeys(keys) if key.startswith("eval/")]


def _curve(phase: PhaseData, metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric in a phase; of many values in a row their mean, at the last one's step."""
    found = [(record["step"], record["metrics"][metric]) for record in phase.records if metric in record["metrics"]]
    width = max(1, math.ceil(len(found) / _POINTS))
    parts = [found[begin : begin + width] for begin in range(0, len(found), width)]
    return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


def _draw_evaluations(panel: Axes, phases: Sequence[PhaseData], name: str) -> None:
    for phase in phases:
        colour = COLOURS[phase.kind]
        steps, values = _curve(phase, f"eval/{name}")
        panel.plot(steps, values, color=colour, marker="o", markersize=2.5)
        if f"test/{name}" in phase.metrics:
            tested = phase.metrics[f"test/{name}"]
            panel.plot([phase.last_step], [tested], color=colour, marker="D", markersize=5, clip_on=False, zorder=3)


def _add_key(panel: Axes) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=_GREY, alpha=0.5, linewidth=0.9, label="training"),
        Line2D([], [], color=_GREY, marker="o", markersize=2.5, label="evaluation"),
        Line2D([], [], color=_GREY, marker="D", markersize=5, linestyle="", label="test, end of phase"),
    ]
    panel.legend(handles=lines, loc="upper right", ncols=3)


def _scale(panel: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span more than a factor of twenty."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(lambda value, _: "")


def _measured_layers(phases: Sequence[PhaseData]) -> list[str]:
    keys = (key for phase in phases for record in phase.records for key in record["metrics"])
    return [key for key in dict.fromkeys(keys) if key.startswith("sparsity/")]


def _sparsities(phase: PhaseData, keys: Sequence[str]) -> tuple[list[int], list[list[float]]]:
    """Edges, one more than columns, and the values of `keys` at each evaluation, which hold since the one before."""
    found = [record for record in phase.records if "sparsity" in record["metrics"]]
    columns = [[record["metrics"].get(key, math.nan) for key in keys] for record in found]
    return [phase.first_step, *(record["step"] for record in found)], columns


# ------------------------------------------------------------------------------------------------------- the weights


@_as_svg
def draw_weights(item: Round) -> Figure:
    """Histograms of the weights before, at the end of the sparse and at the end of the re-dense phase: of all pruned
    layers together, and of the largest ones."""
    from matplotlib.figure import Figure

    assert item.sparse.weights is not None
    layers = item.sparse.weights["layers"]
    largest = sorted(layers, key=lambda name: layers[name]["weights"], reverse=True)[: _HISTOGRAMS - 1]
    chosen = [name for name in layers if name in largest]
    panels = [("all pruned layers", None), *((short_name(name, 25), name) for name in chosen)]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_WIDTH, 0.7 + 1.55 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (title, name) in zip(axes, panels, strict=False):
        _draw_histograms(panel, _histograms(item, name))
        panel.set_title(title)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    figure.supxlabel("weight (zeros are not in the bins)", fontsize=8.5)
    figure.supylabel("share of weights (%)", fontsize=8.5)
    _add_moments(figure, item)
    return figure


@dataclass(frozen=True)
class _Histogram:
    kind: str
    counts: Sequence[int]
    limit: float
    zeros: int
    weights: int


def _histograms(item: Round, layer: str | None) -> list[_Histogram]:
    """Of one layer, or of all together: before, sparse, and re-dense if there is that."""
    sources = [("dense", item.sparse, "before"), ("sparse", item.sparse, "end")]
    if item.redense is not None and item.redense.weights is not None:
        sources.append(("redense", item.redense, "end"))
    found = []
    for kind, phase, moment in sources:
        assert phase.weights is not None
        values = phase.weights["total"] if layer is None else phase.weights["layers"][layer]
        counts, zeros = values["histogram"][moment], values["zeros"][moment]
        found.append(_Histogram(kind, counts, values["limit"], zeros, values["weights"]))
    return found


def _draw_histograms(panel: Axes, histograms: Sequence[_Histogram]) -> None:
    limit = max(histogram.limit for histogram in histograms)
    wide = [widen(histogram.counts, histogram.limit, limit) for histogram in histograms]
    half = max(map(_least_half, wide))
    shown_limit = limit * half / (BINS // 2)
    edges = np.linspace(-shown_limit, shown_limit, _SHOWN_BINS + 1)
    heights = [
        100 * counts[BINS // 2 - half : BINS // 2 + half].reshape(_SHOWN_BINS, -1).sum(axis=1) / histogram.weights
        for histogram, counts in zip(histograms, wide, strict=True)
    ]
    for line, (histogram, height) in enumerate(zip(histograms, heights, strict=True)):
        colour, first = COLOURS[histogram.kind], line == 0
        panel.stairs(height, edges, color=colour, fill=first, alpha=0.3 if first else 1.0, linewidth=1.1)
        share, place = f"{histogram.zeros / histogram.weights:.0%} zero", 0.98 - 0.13 * line
        panel.text(1, place, share, transform=panel.transAxes, ha="right", va="top", color=colour, fontsize=7)
    top, peak = 1.15 * max(height.max() for height in heights[:2]) or 1.0, heights[-1].max()
    if peak > top:
        # Weights that hardly left zero would press everything else flat.
        colour = COLOURS[histograms[-1].kind]
        panel.text(0.02, 0.98, f"↑ {peak:.0f}", transform=panel.transAxes, va="top", color=colour, fontsize=7)
    panel.set_xlim(-shown_limit, shown_limit)
    panel.set_ylim(0, top)
    panel.locator_params(nbins=4)


def _least_half(counts: Counts) -> int:
    """Bins on each side of zero that leave out no more than `_OUTSIDE`: a power of two that gives enough to show."""
    half = BINS // 2
    total = counts.sum()
    while half > _SHOWN_BINS // 2:
        inner = counts[BINS // 2 - half // 2 : BINS // 2 + half // 2].sum()
        if total - inner > _OUTSIDE * total:
            break
        half //= 2
    return half


def _add_moments(figure: Figure, item: Round) -> None:
    from matplotlib.patches import Patch

    key = [
        Patch(color=COLOURS["dense"], alpha=0.3, label=f"before: end of {item.before.name}"),
        Patch(facecolor="none", edgecolor=COLOURS["sparse"], label=f"end of {item.sparse.name}"),
    ]
    if item.redense is not None and item.redense.weights is not None:
        key.append(Patch(facecolor="none", edgecolor=COLOURS["redense"], label=f"end of {item.redense.name}"))
    figure.legend(handles=key, loc="outside upper center", ncols=3)


@_as_svg
def draw_returned(phase: PhaseData) -> Figure:
    """What became of the formerly pruned weights in a re-dense phase, layer by layer: how many came back above the
    threshold at which they had been pruned, and how far they came."""
    from matplotlib.figure import Figure

    assert phase.weights is not None
    layers = {name: layer for name, layer in phase.weights["layers"].items() if layer["pruned"]}
    largest = sorted(layers, key=lambda name: layers[name]["weights"], reverse=True)[:_ROWS]
    chosen = [name for name in layers if name in largest]
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.2 * len(chosen)))
    shares, sizes = figure.subplots(1, 2, sharey=True)
    _draw_shares(shares, [phase.weights["total"], *(layers[name] for name in chosen)])
    _draw_sizes(sizes, [layers[name] for name in chosen])
    shares.set_yticks(range(len(chosen) + 1), ["all pruned layers", *map(short_name, chosen)])
    shares.invert_yaxis()
    return figure


def _draw_shares(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(rows))
    nonzero = [100 * row["returned"]["nonzero"] / row["pruned"] for row in rows]
    panel.barh(places, nonzero, height=0.7, color=COLOURS["redense"], alpha=0.25, label="not zero")
    above = [row["returned"]["above_threshold"] for row in rows]
    if None not in above:
        shares = [100 * number / row["pruned"] for number, row in zip(above, rows, strict=True)]
        panel.barh(places, shares, height=0.7, color=COLOURS["redense"], label="above the threshold")
        for place, share in zip(places, shares, strict=True):
            panel.text(share + 1, place, f"{share:.3g}", va="center", fontsize=7)
    panel.set_xlim(0, 100)
    panel.set_xlabel("share of formerly pruned weights (%)")
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1.0)


def _draw_sizes(panel: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    """Below the row of all layers together, whose quantiles are not those of any unit."""
    low, quarter, middle, upper, high = (
        [(layer["returned"]["quantiles"] or [math.nan] * len(LEVELS))[index] for layer in layers]
        for index in range(len(LEVELS))
    )
    places, colour = range(1, len(layers) + 1), COLOURS["redense"]
    panel.hlines(places, low, high, color=colour, linewidth=1.0, label="10 to 90 %")
    panel.hlines(places, quarter, upper, color=colour, linewidth=4.0, alpha=0.6, label="25 to 75 %")
    panel.plot(middle, places, "o", color=colour, markersize=3.5, label="median")
    if all(layer["threshold"] is not None and layer["returned"]["kept_median"] for layer in layers):
        thresholds = [layer["threshold"] / layer["returned"]["kept_median"] for layer in layers]
        panel.plot(thresholds, places, "|", color=COLOURS["sparse"], markersize=11, label="threshold")
    panel.axvline(1, color=_GREY, linewidth=0.6, linestyle=":")
    panel.set_xlim(left=0)
    panel.set_xlabel("their magnitude (median of the kept weights = 1)")
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1.0, handlelength=1.2)
