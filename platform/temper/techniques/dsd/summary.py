"""What came of the weights in a sparse or re-dense phase, as plain numbers for the report and MLflow: how they were
distributed before and after, what was pruned, and what came back of it. Han et al. 2017 show the same as histograms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from temper.checkpoint import MASK, MASTER, CheckpointReader
from temper.files import read_json, write_json
from temper.plan.phases import PhasePlan, Pruning
from temper.run_folder import WEIGHTS
from temper.techniques.dsd.border import Share
from temper.techniques.dsd.histogram import BINS, LEVELS, widen

Layers = dict[str, dict[str, Any]]


def summarize(
    phase: PhasePlan,
    layers: Sequence[str],
    before: Path,
    end: Path,
    *,
    rank: int = 0,
    size: int = 1,
    share: Share[dict[str, Any]] = lambda own: [own],
) -> dict[str, Any]:
    """What came of the weights `layers` in `phase`, JSON-able; each of `size` ranks reads some, `share` joins them.

    `before` is the last checkpoint of the phase before, `end` that of this one. The result has `phase`, `kind`,
    `layers` (by the name of the weight) and `total`, and each layer and the total have

    - `weights`, `pruned`: numbers of weights; `pruned` are those that the mask prunes or, in a re-dense phase, pruned.
    - `zeros`: `{before, end}`, how many weights are exactly zero.
    - `histogram`: `{before, end}`, counts of the other weights in `BINS` bins of equal width over [-`limit`, `limit`].
      A limit is a power of two, so that histograms with different limits add up exactly.
    - `threshold`: the largest magnitude that was pruned; null where nothing was, or where not each weight was pruned
      for its own magnitude. The total has none.
    - `returned`: null in a sparse phase; else what the formerly pruned weights are now: how many are `nonzero`, and how
      many `above_threshold`. Layers also have `kept_median`, the median magnitude of the weights that were kept, and
      `quantiles`, those of the formerly pruned weights' magnitudes at `LEVELS`, in units of it.

    Collective where ranks share. A re-dense phase takes the thresholds from the summary of the phase before.
    """
    readers = CheckpointReader(before), CheckpointReader(end)
    known = {} if phase.pruning else _thresholds(before)
    own = {name: _summarize_layer(name, phase.pruning, known.get(name), *readers) for name in layers[rank::size]}
    found = {name: layer for part in share(own) for name, layer in part.items()}
    ordered = {name: found[name] for name in layers}
    return {"phase": phase.name, "kind": phase.kind, "layers": ordered, "total": _add_up(list(ordered.values()))}


def write_summary(phase_folder: Path, summary: dict[str, Any]) -> None:
    """Writes what :func:`summarize` gives to the phase's `weights.json`."""
    write_json(phase_folder / WEIGHTS, summary)


def _thresholds(checkpoint: Path) -> dict[str, float | None]:
    """The thresholds in the summary of the phase that wrote `checkpoint`, `<phase folder>/checkpoints/step-…`."""
    summary = read_json(checkpoint.parents[1] / WEIGHTS) or {"layers": {}}
    return {name: layer["threshold"] for name, layer in summary["layers"].items()}


def _summarize_layer(
    name: str, pruning: Pruning | None, threshold: float | None, before: CheckpointReader, end: CheckpointReader
) -> dict[str, Any]:
    kept = (end if pruning else before).read(MASK, name)
    old, new = before.read(MASTER, name), end.read(MASTER, name)
    limit = max(_limit(old), _limit(new))
    return {
        "weights": new.numel(),
        "pruned": int((~kept).sum()),
        "zeros": {"before": int((old == 0).sum()), "end": int((new == 0).sum())},
        "threshold": _threshold(old[~kept], pruning) if pruning else threshold,
        "limit": limit,
        "histogram": {"before": _histogram(old, limit), "end": _histogram(new, limit)},
        "returned": None if pruning else _returned(new[~kept], new[kept], threshold),
    }


def _threshold(pruned: Tensor, pruning: Pruning) -> float | None:
    if (pruning.structure, pruning.criterion) != ("weights", "magnitude") or not len(pruned):
        return None
    return float(pruned.abs().max())


def _returned(pruned: Tensor, kept: Tensor, threshold: float | None) -> dict[str, Any]:
    kept_median = float(kept.abs().median()) if len(kept) else 0.0
    return {
        "nonzero": int((pruned != 0).sum()),
        "above_threshold": None if threshold is None else int((pruned.abs() > threshold).sum()),
        "kept_median": kept_median,
        "quantiles": _quantiles(pruned.abs() / kept_median) if len(pruned) and kept_median > 0 else None,
    }


def _quantiles(values: Tensor) -> list[float]:
    """The value nearest in rank to each of `LEVELS`: none is made up between two, and sorting has no limit on size."""
    ordered = values.sort().values
    return [float(ordered[round(level * (len(ordered) - 1))]) for level in LEVELS]


def _finite(values: Tensor) -> Tensor:
    return values[torch.isfinite(values) & (values != 0)]


def _limit(values: Tensor) -> float:
    """The smallest power of two above all finite magnitudes."""
    finite = _finite(values).abs()
    return math.ldexp(1.0, math.frexp(float(finite.max()) if len(finite) else 0.0)[1])


def _histogram(values: Tensor, limit: float) -> list[int]:
    counts, _ = np.histogram(_finite(values).numpy(), BINS, (-limit, limit))
    return counts.tolist()


def _add_up(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    limit = max((layer["limit"] for layer in layers), default=1.0)
    moments, start = ("before", "end"), np.zeros(BINS, dtype=np.int64)
    return {
        "weights": sum(layer["weights"] for layer in layers),
        "pruned": sum(layer["pruned"] for layer in layers),
        "zeros": {moment: sum(layer["zeros"][moment] for layer in layers) for moment in moments},
        "limit": limit,
        "histogram": {
            moment: sum((widen(layer["histogram"][moment], layer["limit"], limit) for layer in layers), start).tolist()
            for moment in moments
        },
        "returned": _add_up_returned([layer for layer in layers if layer["pruned"]]),
    }


def _add_up_returned(layers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Counts over all layers; null in a sparse phase, and where nothing had been pruned."""
    found = [layer["returned"] for layer in layers if layer["returned"]]
    if not found:
        return None
    above = [returned["above_threshold"] for returned in found]
    return {
        "nonzero": sum(returned["nonzero"] for returned in found),
        "above_threshold": None if None in above else sum(above),
    }
