"""Histograms of weights with limits that are powers of two, so that they add up exactly; no torch is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BINS = 256
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of the quantiles."""

Counts = npt.NDArray[np.int64]


def widen(counts: Sequence[int], limit: float, wider: float) -> Counts:
    """A histogram over [-`limit`, `limit`] as one over [-`wider`, `wider`], both powers of two, in as many bins.

    Each new bin is a number of old ones, counted from zero outwards.
    """
    factor = round(wider / limit)
    below, above = np.split(np.asarray(counts, dtype=np.int64), 2)
    parts = [np.add.reduceat(half, range(0, len(half), factor)) for half in (below[::-1], above)]
    left, right = (np.pad(part, (0, len(below) - len(part))) for part in parts)
    return np.concatenate([left[::-1], right])
