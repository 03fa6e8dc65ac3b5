"""Which version of a registered model is its champion: the alias moves only to a version that is better."""

from __future__ import annotations

import math

from temper.config.schema import JobConfig
from temper.config.space import Objective
from temper.ranking import is_better
from temper.tracking.registry import resolve_alias, set_alias, version_tags

CHAMPION = "champion"

METRIC = "temper.metric."
"""What the tags of a version begin with that have its final metrics."""

_LESS_IS_BETTER = ("loss", "mse", "mae", "calibration_error")


def job_objective(job: JobConfig) -> Objective:
    """By what two versions are compared: the first metric that the job evaluates, on its test split."""
    metric = next(iter(job.evaluation.metrics), "loss")
    return Objective(metric=f"test/{metric}", mode="min" if metric in _LESS_IS_BETTER else "max")


def offer_champion(uri: str, name: str, version: str, objective: Objective) -> tuple[bool, str]:
    """Makes the version of the model `name` its champion if there is none, or if it is better than that; whether it is
    now, and why, for people. A version without a finite value of the objective never is.

    Raises RunError where the store does not answer.
    """
    metric = objective.metric
    champion = resolve_alias(uri, name, CHAMPION)
    if champion == version:
        return True, "it is the champion already"
    own = _measured(uri, name, version, metric)
    if own is None:
        return False, f"it does not become champion: it has no finite {metric}"
    if champion is None:
        set_alias(uri, name, CHAMPION, version)
        return True, f"it is the first champion: {metric} {own:.6g}"
    other = _measured(uri, name, champion, metric)
    if other is None:
        return False, f"version {champion} stays champion: it has no {metric} to compare with"
    if not is_better(own, other, objective):
        return False, f"version {champion} stays champion: {metric} {own:.6g} is not better than its {other:.6g}"
    set_alias(uri, name, CHAMPION, version)
    return True, f"it is the champion: {metric} {own:.6g} is better than {other:.6g} of version {champion}"


def _measured(uri: str, name: str, version: str, metric: str) -> float | None:
    value = float((version_tags(uri, name, version) or {}).get(f"{METRIC}{metric}", "nan"))
    return value if math.isfinite(value) else None
