"""Which version of a registered model is its champion: the alias moves only to a version that is better."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from temper.config.schema import JobConfig
from temper.config.space import Objective
from temper.locks import awaited
from temper.ranking import is_better
from temper.tracking.registry import resolve_alias, set_alias, version_tags, versions_beside

CHAMPION = "champion"

METRIC = "temper.metric."
"""What the tags of a version begin with that have its final metrics."""

_LESS_IS_BETTER = ("loss", "mse", "mae", "calibration_error")

_SAME_TIME_S = 60.0
"""Between two versions that may have been offered at once. Others were judged before; a user who gave the alias back to
an older version is not overruled."""

_LOOKS = 5


def job_objective(job: JobConfig) -> Objective:
    """By what two versions are compared: the first metric that the job evaluates, on its test split."""
    metric = next(iter(job.evaluation.metrics), "loss")
    return Objective(metric=f"test/{metric}", mode="min" if metric in _LESS_IS_BETTER else "max")


def offer_champion(uri: str, name: str, version: str, objective: Objective) -> tuple[bool, str]:
    """Makes the version of the model `name` its champion if there is none, or if it is better than that; whether it is
    now, and why, for people. A version without a finite value of the objective never is.

    Of several versions that are offered at once the best is champion: on one machine they wait for each other, and of
    those of other machines it is looked afterwards whether one was overwritten, as MLflow cannot compare and set.

    Raises RunError where the store does not answer.
    """
    with awaited(_lock(uri, name), lambda: None):
        return _offer(uri, name, version, objective)


def _lock(uri: str, name: str) -> Path:
    """Beside a SQLite database, whose users may be on several machines; else this user's on this machine."""
    if uri.startswith("sqlite:///") and "?" not in uri:
        return Path(f"{uri.removeprefix('sqlite:///')}.champion-{_digest(name)}.lock")
    return Path(tempfile.gettempdir(), f"temper-{os.getuid()}-champion-{_digest(f'{uri} {name}')}.lock")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _offer(uri: str, name: str, version: str, objective: Objective) -> tuple[bool, str]:
    metric = objective.metric
    champion = resolve_alias(uri, name, CHAMPION)
    if champion == version:
        return True, "it is the champion already"
    own = _measured(uri, name, version, metric)
    if own is None:
        return False, f"it does not become champion: it has no finite {metric}"
    if champion is None:
        return _crown(uri, name, version, objective, f"it is the first champion: {metric} {own:.6g}")
    other = _measured(uri, name, champion, metric)
    if other is None:
        return False, f"version {champion} stays champion: it has no {metric} to compare with"
    if not is_better(own, other, objective):
        return False, f"version {champion} stays champion: {metric} {own:.6g} is not better than its {other:.6g}"
    reason = f"it is the champion: {metric} {own:.6g} is better than {other:.6g} of version {champion}"
    return _crown(uri, name, version, objective, reason)


def _crown(uri: str, name: str, version: str, objective: Objective, reason: str) -> tuple[bool, str]:
    """Gives the alias to `version`, or to a better one that was offered meanwhile; `reason` is told of the first."""
    set_alias(uri, name, CHAMPION, version)
    champion = version
    for _ in range(_LOOKS):
        champion = resolve_alias(uri, name, CHAMPION) or version
        better = _best_beside(uri, name, version, champion, objective)
        if better is None:
            break
        set_alias(uri, name, CHAMPION, better)
        champion = better
    if champion == version:
        return True, reason
    return False, f"version {champion} has become champion meanwhile"


def _best_beside(uri: str, name: str, version: str, champion: str, objective: Objective) -> str | None:
    """Of the versions that were offered at about the time of `version` the best, if it is better than the champion."""
    reached = _measured(uri, name, champion, objective.metric)
    best: str | None = None
    for each, tags in versions_beside(uri, name, version, _SAME_TIME_S).items():
        value = _value(tags, objective.metric)
        if reached is not None and value is not None and is_better(value, reached, objective):
            best, reached = each, value
    return best


def _measured(uri: str, name: str, version: str, metric: str) -> float | None:
    return _value(version_tags(uri, name, version) or {}, metric)


def _value(tags: Mapping[str, str], metric: str) -> float | None:
    value = float(tags.get(f"{METRIC}{metric}", "nan"))
    return value if math.isfinite(value) else None
