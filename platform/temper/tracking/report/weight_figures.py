"""What became of the weights in a round of dense-sparse-dense training, as figures; from the phases' `weights.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from temper.techniques.dsd.histogram import BINS, LEVELS, Counts, widen
from temper.tracking.report.figure import WIDTH, ReportFigure, colour
from temper.tracking.report.run_data import PhaseData, Round, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN_BINS = 64
_OUTSIDE = 0.001  # share of the weights that a histogram may leave out on both sides together
_HISTOGRAMS = 12
_ROWS = 40


def weight_figures(item: Round) -> list[ReportFigure]:
    """`weights-<round>` and `returned-<round>`, as far as the round has come."""
    figures = []
    if item.sparse.layers:
        figures.append(
            ReportFigure(
                f"weights-{item.number}",
                "Distribution of the weights",
                f"Weights at the end of {item.before.name}, of {item.sparse.name} and of the re-dense phase: all that "
                "can be pruned together, and the largest layers. Arrow: a peak that does not fit in.",
                lambda: draw_weights(item),
            )
        )
    redense = item.redense
    if redense is not None and redense.weights is not None and redense.weights["total"]["pruned"]:
        figures.append(
            ReportFigure(
                f"returned-{item.number}",
                "Weights that came back",
                f"What the weights that had been pruned are at the end of {redense.name}. Threshold: the largest "
                "magnitude that was pruned. Magnitudes are in units of the median of the layer's other weights.",
                lambda: draw_returned(redense),
            )
        )
    return figures


def draw_weights(item: Round) -> Figure:
    """Histograms of the weights before, at the end of the sparse and at the end of the re-dense phase: of all pruned
    layers together, and of the largest ones."""
    from matplotlib.figure import Figure

    layers = item.sparse.layers
    largest = sorted(layers, key=lambda name: layers[name]["weights"], reverse=True)[: _HISTOGRAMS - 1]
    chosen = [name for name in layers if name in largest]
    panels = [("all pruned layers", None), *((short_name(name, 25), name) for name in chosen)]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 1.4 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (title, name) in zip(axes, panels, strict=False):
        _draw_histograms(panel, _histograms(item, name))
        panel.set_title(title)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    figure.supxlabel("weight (zeros are not in the bins)", fontsize="medium")
    figure.supylabel("share of weights (%)", fontsize="medium")
    _add_moments(figure, item)
    return figure


@dataclass(frozen=True)
class _Histogram:
    colour: str
    counts: Sequence[int]
    limit: float
    zeros: int
    weights: int


def _histograms(item: Round, layer: str | None) -> list[_Histogram]:
    """Of one layer, or of all together: before, sparse, and re-dense if there is that."""
    sources = [("--dense", item.sparse.weights, "before"), ("--sparse", item.sparse.weights, "end")]
    if item.redense is not None:
        sources.append(("--redense", item.redense.weights, "end"))
    found = []
    for name, weights, moment in sources:
        if weights is not None:
            values = weights["total"] if layer is None else weights["layers"][layer]
            counts, zeros = values["histogram"][moment], values["zeros"][moment]
            found.append(_Histogram(colour(name), counts, values["limit"], zeros, values["weights"]))
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
        first = line == 0
        panel.stairs(height, edges, color=histogram.colour, fill=first, alpha=0.3 if first else 1.0, linewidth=1.1)
        share, place = f"{histogram.zeros / histogram.weights:.0%} zero", 0.98 - 0.13 * line
        panel.text(
            1, place, share, transform=panel.transAxes, ha="right", va="top", color=histogram.colour, fontsize=6.5
        )
    top, peak = 1.15 * max(height.max() for height in heights[:2]) or 1.0, heights[-1].max()
    if peak > top:
        # Weights that hardly left zero would press everything else flat.
        shade = histograms[-1].colour
        panel.text(0.02, 0.98, f"↑ {peak:.0f}", transform=panel.transAxes, va="top", color=shade, fontsize=6.5)
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
        Patch(color=colour("--dense"), alpha=0.3, label=f"before: end of {item.before.name}"),
        Patch(facecolor="none", edgecolor=colour("--sparse"), label=f"end of {item.sparse.name}"),
    ]
    if item.redense is not None and item.redense.weights is not None:
        key.append(Patch(facecolor="none", edgecolor=colour("--redense"), label=f"end of {item.redense.name}"))
    figure.legend(handles=key, loc="outside upper left", ncols=3)


def draw_returned(phase: PhaseData) -> Figure:
    """What became of the formerly pruned weights in a re-dense phase, layer by layer: how many came back above the
    threshold at which they had been pruned, and how far they came."""
    from matplotlib.figure import Figure

    assert phase.weights is not None
    layers = {name: layer for name, layer in phase.layers.items() if layer["pruned"]}
    largest = sorted(layers, key=lambda name: layers[name]["weights"], reverse=True)[:_ROWS]
    chosen = [name for name in layers if name in largest]
    figure = Figure(figsize=(WIDTH, 1.4 + 0.19 * len(chosen)))
    shares, sizes = figure.subplots(1, 2, sharey=True)
    _draw_shares(shares, [phase.weights["total"], *(layers[name] for name in chosen)])
    _draw_sizes(sizes, [layers[name] for name in chosen])
    shares.set_yticks(range(len(chosen) + 1), ["all pruned layers", *map(short_name, chosen)])
    shares.invert_yaxis()
    return figure


def _draw_shares(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    places, shade = range(len(rows)), colour("--redense")
    nonzero = [100 * row["returned"]["nonzero"] / row["pruned"] for row in rows]
    panel.barh(places, nonzero, height=0.7, color=shade, alpha=0.25, label="not zero")
    above = [row["returned"]["above_threshold"] for row in rows]
    if None not in above:
        shares = [100 * number / row["pruned"] for number, row in zip(above, rows, strict=True)]
        panel.barh(places, shares, height=0.7, color=shade, label="above the threshold")
        for place, share in zip(places, shares, strict=True):
            panel.text(share + 1, place, f"{share:.3g}", va="center", fontsize=6.5)
    panel.set_xlim(0, 100)
    panel.set_xlabel("share of formerly pruned weights (%)")
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1.0)


def _draw_sizes(panel: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    """Below the row of all layers together, whose quantiles are not those of any unit."""
    low, quarter, middle, upper, high = (
        [(layer["returned"]["quantiles"] or [math.nan] * len(LEVELS))[index] for layer in layers]
        for index in range(len(LEVELS))
    )
    places, shade = range(1, len(layers) + 1), colour("--redense")
    panel.hlines(places, low, high, color=shade, linewidth=1.0, label="10 to 90 %")
    panel.hlines(places, quarter, upper, color=shade, linewidth=4.0, alpha=0.6, label="25 to 75 %")
    panel.plot(middle, places, "o", color=shade, markersize=3.5, label="median")
    if all(layer["threshold"] is not None and layer["returned"]["kept_median"] for layer in layers):
        thresholds = [layer["threshold"] / layer["returned"]["kept_median"] for layer in layers]
        panel.plot(thresholds, places, "|", color=colour("--sparse"), markersize=11, label="threshold")
    panel.axvline(1, color=colour("--quiet"), linewidth=0.6, linestyle=":")
    panel.set_xlim(left=0)
    panel.set_xlabel("their magnitude (median of the kept weights = 1)")
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=0.9, handlelength=1.1)
