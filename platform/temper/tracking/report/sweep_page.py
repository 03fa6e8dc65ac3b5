"""The page on a sweep: what was asked, what happened, what came of it over its space, what it cost, and the winner.

It is made from what MLflow has of the sweep, so that it can be read wherever MLflow can.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from temper.config.space import Objective
from temper.plan.metric_names import without_classes
from temper.tracking.report.figure import Section
from temper.tracking.report.page import (
    Content,
    Html,
    Number,
    Tile,
    code,
    duration,
    fold,
    key_table,
    markup,
    note,
    short_id,
    table,
)
from temper.tracking.report.space_figures import heat_maps, parallel_coordinates
from temper.tracking.report.sweep_figures import (
    best_first,
    best_trials,
    course_figures,
    curves,
    front,
    pareto_figures,
)
from temper.tracking.results import Curve, RunRow, Sweep, read_curves
from temper.tracking.sweep_progress import number, winner_lines

_SPACE = "space."  # what the names of the parameters begin with that say what is varied
_OUTCOMES = ("finished", "stopped", "diverged", "failed", "interrupted", "running")
_REASONS = 20
_TRIALS_NAMED = 8
_QUANTITIES = ("seconds", "steps", "examples")


def read_points(uri: str, sweep: Sweep) -> dict[str, Curve]:
    """The points of the first objective of the trials whose curves the page shows, by run. Raises RunError where the
    store cannot be reached."""
    if not sweep.objectives:
        return {}
    return read_curves(uri, [trial.run_id for trial in best_trials(sweep)], sweep.objectives[0].metric)


def sweep_subtitle(sweep: Sweep) -> Html:
    """How far the sweep is, when it began, and which run of MLflow it is."""
    parent = sweep.parent
    began = datetime.fromtimestamp(parent.started_ms / 1000, UTC)
    what = f"{parent.outcome.capitalize()}, {len(sweep.trials):,} trials, begun {began:%Y-%m-%d %H:%M} UTC"
    return Html(f"{markup(what)} · MLflow run <code>{markup(parent.run_id)}</code>")


def sweep_tiles(sweep: Sweep) -> list[Tile]:
    """The best value of each objective, and what the sweep took."""
    parent = sweep.parent
    tiles = [
        Tile(f"best {each.metric}", _metric(best[0], each.metric), _title(best[0]))
        for each in sweep.objectives
        if (best := best_first(sweep.finished, each))
    ]
    tiles.append(Tile("trials", f"{len(sweep.trials):,}", _counts(sweep)))
    if "sweep/phases_run" in parent.metrics:
        reused = Html(f"{markup(_count(parent, 'sweep/phases_reused'))} reused")
        tiles.append(Tile("phases run", _count(parent, "sweep/phases_run"), reused))
    if "sweep/steps_run" in parent.metrics:
        saved = Html(f"{markup(_count(parent, 'sweep/steps_saved'))} saved by reuse")
        tiles.append(Tile("steps run", _count(parent, "sweep/steps_run"), saved))
    if "sweep/seconds" in parent.metrics:
        tiles.append(Tile("took", _seconds(parent, "sweep/seconds")))
    return tiles


def sweep_sections(sweep: Sweep, points: Mapping[str, Curve]) -> list[Section]:
    """All sections on a sweep; those that have nothing to say are empty. `points` are those of :func:`read_points`."""
    return [
        Section("What was asked", key_table(_asked(sweep)), details=_space_table(sweep) + _job(sweep)),
        Section("What happened", _outcomes(sweep), course_figures(sweep), _reasons(sweep)),
        Section("Over the space", "", (*heat_maps(sweep), *parallel_coordinates(sweep), *pareto_figures(sweep))),
        Section("Best trials", "", tuple(curves(sweep, points))),
        Section("Trials", _trials_table(sweep)),
        Section("Costs", _costs(sweep)),
        Section("The winner", _winner(sweep)),
    ]


# -------------------------------------------------------------------------------------------------------------- numbers


def _metric(run: RunRow, name: str) -> Number:
    """A metric of a run; nothing where it has none."""
    value = run.metrics.get(name)
    return Number(-math.inf, "") if value is None else Number(value, number(value), run.run_id, name)


def _count(run: RunRow, name: str) -> Number:
    value = run.metrics.get(name)
    return Number(-math.inf, "") if value is None else Number(value, f"{value:,.0f}", run.run_id, name)


def _seconds(run: RunRow, name: str) -> Number:
    value = run.metrics.get(name)
    return Number(-math.inf, "") if value is None else Number(value, duration(value), run.run_id, name)


def _swept(run: RunRow, name: str) -> Content:
    """The trial's value of a variable; nothing where it does not have it."""
    value = run.swept.get(name, "")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Number(value, run.params[f"sweep.{name}"], run.run_id, f"sweep.{name}", source="param")
    return str(value)


def _title(trial: RunRow) -> str:
    """e.g. `t007: temperature 4, sparsity 0.5`."""
    values = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in sorted(trial.swept.items()))
    return f"{trial.trial}: {values}"


def _counts(sweep: Sweep) -> Html:
    """e.g. `12 finished, 3 stopped`."""
    found = Counter(trial.outcome for trial in sweep.trials)
    order = [*_OUTCOMES, *sorted(set(found) - set(_OUTCOMES))]
    counts = [
        Number(found[status], f"{found[status]:,}", sweep.parent.run_id, status, source="count") for status in order
    ]
    return Html(", ".join(f"{markup(each)} {markup(each.metric)}" for each in counts if each.value))


# --------------------------------------------------------------------------------------------------------------- asked


def _asked(sweep: Sweep) -> list[tuple[str, Content]]:
    parent = sweep.parent
    objectives = "; ".join(f"{each.metric} ({each.mode})" for each in sweep.objectives)
    asked = {name: text for name, text in parent.params.items() if not name.startswith(_SPACE)}
    return [
        *{**asked, "objectives": objectives}.items(),
        ("command", Html(f"<code>{markup(parent.tags.get('temper.command', ''))}</code>")),
    ]


def _space_table(sweep: Sweep) -> Html:
    """What is varied, and which values came of it."""
    params = sweep.parent.params
    asked = {name.removeprefix(_SPACE): text for name, text in params.items() if name.startswith(_SPACE)}
    rows = [[name, asked.get(name, ""), _tried(sweep.trials, name)] for name in sorted({*asked, *sweep.variables})]
    return table(["variable", "asked", "tried"], rows) if rows else Html()


def _tried(trials: Sequence[RunRow], variable: str) -> str:
    """Few values, or how many, and between which they lie."""
    values = list(dict.fromkeys(trial.swept[variable] for trial in trials if variable in trial.swept))
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(texts) if len(texts) <= 8 else f"{len(texts):,} values, {texts[0]} to {texts[-1]}"


def _job(sweep: Sweep) -> Html:
    """What all trials have in common."""
    if not sweep.trials:
        return Html()
    common = sweep.trials[0].params
    for trial in sweep.trials[1:]:
        common = {name: text for name, text in common.items() if trial.params.get(name) == text}
    shown = [(name, text) for name, text in common.items() if not name.startswith("sweep.")]
    return fold("The job, but for what the trials differ in", key_table(shown)) if shown else Html()


# ------------------------------------------------------------------------------------------------------------ happened


def _outcomes(sweep: Sweep) -> Html:
    rows: list[tuple[str, Content]] = [("trials", _counts(sweep) or "none yet")]
    if sweep.others:
        rows.append(("beside them", ", ".join(f"{run.name} ({run.outcome})" for run in sweep.others)))
    left = sweep.parent.tags.get("temper.left_behind")
    return key_table([*rows, *([("left behind", left)] if left else [])])


def _reasons(sweep: Sweep) -> Html:
    """Why trials did not come to their end, the most frequent reasons first."""
    told: dict[tuple[str, str], list[str]] = {}
    for trial in sweep.trials:
        reason = trial.tags.get("temper.trial.reason", "")
        if reason:
            told.setdefault((trial.outcome, reason), []).append(trial.trial)
    ordered = sorted(told.items(), key=lambda item: -len(item[1]))
    rows: list[list[Content]] = [
        [status, reason, Number(len(trials), f"{len(trials):,}"), _listed(trials)]
        for (status, reason), trials in ordered[:_REASONS]
    ]
    more = note(f"… and {len(ordered) - _REASONS:,} other reasons") if len(ordered) > _REASONS else Html()
    return Html(table(["status", "reason", "trials", "which"], rows) + more) if rows else Html()


def _listed(trials: Sequence[str]) -> str:
    more = len(trials) - _TRIALS_NAMED
    return ", ".join(trials[:_TRIALS_NAMED]) + (f" and {more:,} more" if more > 0 else "")


# -------------------------------------------------------------------------------------------------------------- trials


def _trials_table(sweep: Sweep) -> Html:
    """All of them, those that finished first, by the first objective."""
    if not sweep.trials:
        return Html()
    ordered = _ranked(sweep.trials, sweep.objectives)
    metrics = _shown_metrics(sweep)
    on_front = {trial.run_id for trial in front(sweep)}
    header = ["trial", "status", *sweep.variables, *metrics, "steps", "saved", "took", "MLflow run", "reason"]
    rows = [
        [
            Html(f"{markup(trial.trial)}{' ★' if trial.run_id in on_front else ''}"),
            trial.outcome,
            *(_swept(trial, name) for name in sweep.variables),
            *(_metric(trial, name) for name in metrics),
            _count(trial, "cost/steps"),
            _count(trial, "cost/steps_saved"),
            _seconds(trial, "cost/seconds"),
            short_id(trial.run_id),
            _short(trial.tags.get("temper.trial.reason", "")),
        ]
        for trial in ordered
    ]
    caption = "Steps and times are those that the trial computed itself; steps saved are of reused phases."
    return table(header, rows, f"{caption}{' ★ is on the Pareto front.' if on_front else ''}")


def _ranked(trials: Sequence[RunRow], objectives: Sequence[Objective]) -> list[RunRow]:
    """Those that finished first, the best of them first."""
    best = best_first([trial for trial in trials if trial.outcome == "finished"], objectives[0]) if objectives else []
    known = {trial.run_id for trial in best}
    return [*best, *(trial for trial in trials if trial.run_id not in known)]


def _shown_metrics(sweep: Sweep) -> list[str]:
    """The objectives, and what was measured on the test split."""
    names = {name for trial in sweep.trials for name in without_classes(trial.metrics) if name.startswith("test/")}
    return list(dict.fromkeys([*(each.metric for each in sweep.objectives), *sorted(names)]))


def _short(reason: str) -> Html:
    """The beginning of a reason, which shows all of it."""
    if len(reason) <= 60:
        return Html(markup(reason))
    return Html(f'<span title="{markup(reason)}">{markup(reason[:59])}…</span>')


# --------------------------------------------------------------------------------------------------------------- costs


def _costs(sweep: Sweep) -> Html:
    """What was computed, and what reuse saved, in all runs of the sweep."""
    runs = [*sweep.trials, *sweep.others]
    rows: list[list[Content]] = []
    for quantity in _QUANTITIES:
        run, saved = (_summed(sweep, runs, f"cost/{quantity}{suffix}") for suffix in ("", "_saved"))
        whole = run.value + saved.value
        share = Number(saved.value / whole, f"{saved.value / whole:.0%}") if whole else ""
        rows.append([quantity, run, saved, share])
    if not any(isinstance(row[1], Number) and row[1].value for row in rows):
        return Html()
    return table(["", "computed", "saved by reuse", "share saved"], rows, "Of all trials, and of what they share.")


def _summed(sweep: Sweep, runs: Sequence[RunRow], metric: str) -> Number:
    value = math.fsum(run.metrics.get(metric, 0.0) for run in runs)
    text = duration(value) if "seconds" in metric else f"{value:,.0f}"
    return Number(value, text, sweep.parent.run_id, metric, source="sum")


# -------------------------------------------------------------------------------------------------------------- winner


def _winner(sweep: Sweep) -> Html:
    """The trial that won on the first objective, and the lines that repeat it."""
    tags = sweep.parent.tags
    winner = next((trial for trial in sweep.trials if trial.run_id == tags.get("temper.best.run_id")), None)
    if winner is None:
        return Html()
    registered = tags.get("temper.best.registered", "")
    rows: list[tuple[str, Content]] = [
        ("trial", Html(f"{markup(winner.trial)} · MLflow run <code>{markup(winner.run_id)}</code>")),
        *((name, _swept(winner, name)) for name in sweep.variables if name in winner.swept),
        *((name, _metric(winner, name)) for name in _shown_metrics(sweep) if name in winner.metrics),
        *([("registered model", registered)] if registered else []),
    ]
    lines = [code(line) for line in _lines(tags.get("temper.best.command", ""), winner)]
    return Html(key_table(rows) + _phases(winner) + "".join(lines))


def _phases(run: RunRow) -> Html:
    rows: list[list[Content]] = [
        [
            phase.name,
            _of_phase(run, phase.first_step, f"{phase.first_step:,}"),
            _of_phase(run, phase.steps, f"{phase.steps:,}"),
            _of_phase(run, phase.seconds, duration(phase.seconds)),
            Html(f"reused from {short_id(phase.computed_by)}") if phase.reused else "this trial",
            short_id(phase.fingerprint),
        ]
        for phase in run.phases
    ]
    return table(["phase", "after step", "steps", "took", "computed by", "fingerprint"], rows) if rows else Html()


def _of_phase(run: RunRow, value: float, text: str) -> Number:
    return Number(value, text, run.run_id, "temper.phases", source="tag")


def _lines(command: str, winner: RunRow) -> Sequence[str]:
    """The shell's lines that repeat the winner: the one that MLflow has, and the same through Ray's job API."""
    words = shlex.split(command)
    if words[:2] != ["temper", "train"] or len(words) < 3:
        return [command] if command else []
    return [command, winner_lines(Path(words[2]), words[3:], winner.tags.get("temper.storage", "runs"))[1]]
