"""The page on a sweep: what was asked, what happened, what came of it over its space, what it cost, and the winner.

It is made from what MLflow has of the sweep, so that it can be read wherever MLflow can.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from temper.config.space import Objective
from temper.plan.metric_names import without_classes
from temper.run_folder import JOB
from temper.tracking.report.figure import Section
from temper.tracking.report.page import (
    Content,
    Html,
    Number,
    Tile,
    bullets,
    code,
    duration,
    fold,
    key_table,
    markup,
    note,
    say,
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
    tied,
)
from temper.tracking.results import Curve, RunRow, Sweep, read_curves
from temper.tracking.sweep_progress import number, winner_lines

_SPACE = "space."  # what the names of the parameters begin with that say what is varied
_OUTCOMES = ("finished", "stopped", "diverged", "failed", "interrupted", "running")
_ASKED = {"seed": "search seed"}  # names that say too little beside those of the job
_REASONS = 20
_TRIALS_NAMED = 8
_QUANTITIES = {"seconds": "training time", "steps": "steps", "examples": "examples"}
_TIMES = "Training time leaves out start-up and the first step."


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
    count = len(sweep.trials)
    asked = _num_asked(parent.params)
    trials = f"{count:,} {'trial' if count == 1 else 'trials'}" + (
        f" of {asked:,} asked" if (asked or 0) > count else ""
    )
    what = f"{parent.outcome.capitalize()}, {trials}, begun {began:%Y-%m-%d %H:%M} UTC"
    return Html(f"{markup(what)} · MLflow run <code>{markup(parent.run_id)}</code>")


def sweep_tiles(sweep: Sweep) -> list[Tile]:
    """The best value of each objective, and what the sweep took."""
    parent, also = sweep.parent, _also(sweep)
    tiles = [
        Tile(f"best {each.metric}", _metric(best[0], each.metric), _title(best[0], also if number == 0 else ""))
        for number, each in enumerate(sweep.objectives)
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
        tiles.append(Tile("last command", _seconds(parent, "sweep/seconds")))
    return tiles


def sweep_sections(sweep: Sweep, points: Mapping[str, Curve]) -> list[Section]:
    """All sections on a sweep; those that have nothing to say are empty. `points` are those of :func:`read_points`."""
    return [
        Section("What was asked", key_table(_asked(sweep)), details=_notes(sweep) + _space_table(sweep) + _job(sweep)),
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
        return Number(value, _value_text(value), run.run_id, f"sweep.{name}", source="param")
    return str(value)


def _value_text(value: Any) -> str:
    """With four significant digits; the whole number is what a :class:`Number` shows on demand."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _title(trial: RunRow, also: str) -> Html:
    """e.g. `t007: temperature 4, sparsity 0.5`, with `also` after it."""
    values = (Html(f"{markup(name.rpartition('.')[2])} {markup(_swept(trial, name))}") for name in sorted(trial.swept))
    return Html(f"{markup(trial.trial)}: {', '.join(values)}{markup(f'; {also}' if also else '')}")


def _also(sweep: Sweep) -> str:
    """The trials that are as good as the best one by the first objective, e.g. `also t008, t009; the first wins`."""
    others = tied(sweep)[1:]
    return f"also {_listed([trial.trial for trial in others])}; the first wins" if others else ""


def _num_asked(params: Mapping[str, str]) -> int | None:
    """How many trials the sweep is of: what its budget says, or as many as its grids have points; None where neither
    is known."""
    trials = _section(params.get("budget", "")).get("trials")
    variables = [_section(text) for name, text in params.items() if name.startswith(_SPACE)]
    if any("when" in each for each in variables):
        return None
    sizes = [len(each.get("values") or each.get("settings") or ()) for each in variables if each.get("kind") == "grid"]
    if trials is None and len(sizes) < len(variables):
        return None
    return math.prod(sizes) * (trials or 1) if variables else trials


def _section(text: str) -> Mapping[str, Any]:
    """A section of the space as its parameter has it; empty where that is none, or was too long for MLflow."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


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
    asked = {_ASKED.get(name, name): text for name, text in parent.params.items() if not name.startswith(_SPACE)}
    return [
        *{**asked, "objectives": objectives}.items(),
        ("command", Html(f"<code>{markup(parent.tags.get('temper.command', ''))}</code>")),
    ]


def _notes(sweep: Sweep) -> Html:
    return bullets(json.loads(sweep.parent.tags.get("temper.notes", "[]")))


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
    texts = list(map(_value_text, values))
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
        rows.append(("also trained", ", ".join(f"{run.name} ({run.outcome})" for run in sweep.others)))
    left = sweep.parent.tags.get("temper.left_behind", "")
    # Beside "nothing" stands what was counted.
    shown = "nothing" if left.startswith("nothing") else left
    return key_table([*rows, *([("left in Ray", shown)] if left else [])])


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
    has_reasons = any(trial.tags.get("temper.trial.reason") for trial in ordered)
    header = ["trial", "status", *sweep.variables, *metrics, "steps", "saved", "training time", "MLflow run"]
    header += ["reason"] * has_reasons
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
            *([_short(trial.tags.get("temper.trial.reason", ""))] if has_reasons else []),
        ]
        for trial in ordered
    ]
    caption = f"Steps and times are those that the trial computed itself; steps saved are of reused phases. {_TIMES}"
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
    """What was computed, and what reuse saved: by the trials, by what was trained for them, and together."""
    groups = {"trials": sweep.trials, "teachers and shared phases": sweep.others}
    together = [*sweep.trials, *sweep.others]
    if not any(_summed(together, f"cost/{quantity}").value for quantity in _QUANTITIES):
        return Html()
    header = ["", *_QUANTITIES.values(), *(f"{name} saved" for name in _QUANTITIES.values()), "share of steps saved"]
    rows = [_cost_row(label, runs) for label, runs in groups.items() if runs]
    return table(header, [*rows, _cost_row("together", together, sweep.parent.run_id)], _TIMES)


def _cost_row(label: str, runs: Sequence[RunRow], run_id: str = "") -> list[Content]:
    """`run_id` is of the run that all of `runs` are below."""
    names = [f"cost/{quantity}{suffix}" for suffix in ("", "_saved") for quantity in _QUANTITIES]
    steps, saved = (_summed(runs, name).value for name in ("cost/steps", "cost/steps_saved"))
    share = Number(saved / (steps + saved), say(saved / (steps + saved), ".0f%")) if steps + saved else ""
    return [label, *(_summed(runs, name, run_id) for name in names), share]


def _summed(runs: Sequence[RunRow], metric: str, run_id: str = "") -> Number:
    """The sum over `runs`; traced to MLflow where they are all that are below the run `run_id`."""
    value = math.fsum(run.metrics.get(metric, 0.0) for run in runs)
    text = duration(value) if "seconds" in metric else f"{value:,.0f}"
    return Number(value, text, run_id, metric if run_id else "", source="sum")


# -------------------------------------------------------------------------------------------------------------- winner


def _winner(sweep: Sweep) -> Html:
    """The trial that won on the first objective, and the lines that repeat it."""
    tags = sweep.parent.tags
    winner = next((trial for trial in sweep.trials if trial.run_id == tags.get("temper.best.run_id")), None)
    if winner is None:
        return Html()
    registered = tags.get("temper.best.registered", "")
    command = tags.get("temper.best.command", "")
    alias = ", @champion" if tags.get("temper.best.alias") == "champion" else ""
    rows: list[tuple[str, Content]] = [
        ("trial", Html(f"{markup(winner.trial)} · MLflow run <code>{markup(winner.run_id)}</code>")),
        *((name, _swept(winner, name)) for name in sweep.variables if name in winner.swept),
        *((name, _result(sweep, winner, name)) for name in _shown_metrics(sweep) if name in winner.metrics),
        *([("registered model", f"{registered}{alias}")] if registered else []),
        *([("command", Html(f"<code>{markup(command)}</code>"))] if command else []),
    ]
    lines = [code(line) for line in _lines(command, winner)]
    return Html(key_table(rows) + _phases(winner) + "".join(lines))


def _result(sweep: Sweep, winner: RunRow, name: str) -> Html:
    """A metric of the winner; of the first objective with the trials that are as good."""
    also = _also(sweep) if name == sweep.objectives[0].metric else ""
    return Html(markup(_metric(winner, name)) + markup(f", {also}" if also else ""))


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
    header = ["phase", "after step", "steps", "training time", "computed by", "fingerprint"]
    return table(header, rows, _TIMES) if rows else Html()


def _of_phase(run: RunRow, value: float, text: str) -> Number:
    return Number(value, text, run.run_id, "temper.phases", source="tag")


def _lines(command: str, winner: RunRow) -> Sequence[str]:
    """The shell's lines that repeat the winner, directly and through Ray's job API: the command that MLflow has, but
    where its path of the job depends on where it was typed, those of the copy in the winner's folder, if it is here."""
    storage = winner.tags.get("temper.storage", "runs")
    words = shlex.split(command)
    if words[:2] != ["temper", "train"] or len(words) < 3:
        return [command] if command else []
    copy = Path(storage, winner.tags.get("temper.run_folder", ""), JOB)
    if not Path(words[2]).is_absolute() and copy.is_file():
        return winner_lines(copy, [], storage)
    return [command, winner_lines(Path(words[2]), words[3:], storage)[1]]
