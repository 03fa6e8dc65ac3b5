"""The sweep's own run in MLflow, the parent of all others: what was asked, and what came of it."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import yaml

from temper.claims import folder_id
from temper.errors import RunError
from temper.files import write_json
from temper.launch.sweep.spec import SweepSpec
from temper.remote_store import publish
from temper.run_folder import SWEEP_RUN
from temper.storage import storage_folder
from temper.tracking.description import origin_files, origin_tags
from temper.tracking.mlflow_store import RunStatus, close_run, known_run, log_outcome, open_parent
from temper.tracking.redact import redact_text
from temper.tracking.sweep_progress import SweepDisplay

if TYPE_CHECKING:
    from temper.launch.sweep.driver import SweepResult

_ROWS = 20
_NOTES = 12  # which fit into a tag


def open_sweep(spec: SweepSpec) -> str:
    """Opens the sweep's run, or goes on with the one that an earlier attempt opened; returns its id. Raises RunError
    where the store cannot be used."""
    space, file = spec.space, spec.folder / SWEEP_RUN
    objectives = [each.model_dump(mode="json") for each in space.objectives]
    tags = {
        "temper.kind": "sweep",
        "temper.objectives": json.dumps(objectives),
        "temper.storage": spec.storage,
        "temper.run_folder": spec.place,
        "temper.storage.id": folder_id(storage_folder(spec.storage)),
        "temper.notes": json.dumps([note[:500] for note in spec.notes[:_NOTES]]),
        **origin_tags(spec.command),
    }
    asked = space.model_dump(mode="json", exclude={"name", "job", "space", "objectives"}, exclude_defaults=True)
    variables = {name: each.model_dump(mode="json", exclude_defaults=True) for name, each in space.space.items()}
    params = {
        "job": str(spec.job_file),
        **{key: _flow(value) for key, value in asked.items()},
        "seed": str(space.seed),
        **{f"space.{name}": _flow(variable) for name, variable in variables.items()},
        "objectives": ", ".join(f"{each.metric} {each.mode}" for each in space.objectives),
    }
    run_id = open_parent(
        spec.uri,
        spec.job({}),
        run_id=known_run(file, spec.uri),
        name=space.name,
        tags=tags,
        params=params,
        texts={**spec.texts, **origin_files()},
        began_ms=spec.began_ms,
        # At once: what fails after that must not lead to another parent.
        created=lambda run_id: _record(spec, run_id, open=True),
    )
    _record(spec, run_id, open=True)
    publish([file])
    return run_id


def tell_outcome(spec: SweepSpec, result: SweepResult, display: SweepDisplay) -> bool:
    """Tells the sweep's run what came of it; whether it took that."""
    if not result.parent_run_id:
        return False
    best, objective = result.best, spec.space.objectives[0]
    statuses = [trial["status"] for trial in result.trials]
    metrics = {
        "sweep/trials": float(len(statuses)),
        **{f"sweep/trials_{status}": float(statuses.count(status)) for status in sorted(set(statuses))},
        "sweep/phases_run": float(result.phases_run),
        "sweep/phases_reused": float(result.phases_reused),
        "sweep/steps_run": float(result.steps_computed),
        "sweep/steps_saved": float(result.steps_saved),
        "sweep/seconds": result.seconds,
    }
    tags = {"temper.left_behind": result.left_behind.removeprefix("left behind: ")}
    if best is not None:
        metrics[f"best/{objective.metric}"] = best["metrics"][objective.metric]
        tags |= {
            "temper.best.trial": best["id"],
            "temper.best.run_id": best["run_id"],
            "temper.best.overrides": " ".join(best["overrides"]),
            "temper.best.command": spec.train_line(best["params"]),
            "temper.best.registered": best["registered"],
            "temper.best.alias": best.get("alias", ""),
        }
    try:
        note = lambda experiment: _note(spec, result, f"#/experiments/{experiment}/runs")  # noqa: E731
        log_outcome(spec.uri, result.parent_run_id, metrics, tags, {"trials.csv": _table(result.trials)}, note)
        return True
    except RunError as error:
        display.note(f"the sweep's own run lacks what came of it: {error}")
        return False


def log_reports(spec: SweepSpec, result: SweepResult, display: SweepDisplay) -> None:
    """Puts the sweep's page into its run, and the winner's into that one's. Never raises."""
    if not result.parent_run_id:
        return
    display.stage("writing the report")
    # Only now: it imports matplotlib and torch.
    from temper.tracking.report import log_report, log_sweep_report

    if result.best is not None and result.best["run_id"]:
        log_report(spec.uri, result.best["run_id"], spec.run_folder(result.best["id"]))
    log_sweep_report(spec.uri, result.parent_run_id, storage_folder(spec.storage))


def close_sweep(spec: SweepSpec, status: RunStatus, display: SweepDisplay) -> None:
    """Gives the sweep's run its end."""
    run_id = known_run(spec.folder / SWEEP_RUN, spec.uri)
    if not run_id:
        return
    is_closed = close_run(spec.uri, run_id, status)
    _record(spec, run_id, open=not is_closed, status=status)
    if not is_closed:
        display.note("MLflow did not take the end of the sweep's own run")


def _record(spec: SweepSpec, run_id: str, **state: bool | str) -> None:
    write_json(spec.folder / SWEEP_RUN, {"uri": spec.uri, "run_id": run_id, **state})


def _flow(value: Any) -> str:
    """On one line, as in YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n...\n").strip()


def _table(trials: list[dict[str, Any]]) -> str:
    """All trials as CSV: their values, what came of them, and their last metrics."""
    params = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
    metrics = list(dict.fromkeys(name for trial in trials for name in trial["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    known = ["id", "run_id", "status", "reason", "steps", "seconds"]
    writer.writerow([*known, *params, *metrics])
    for trial in trials:
        values = [_flow(trial["params"][name]) if name in trial["params"] else "" for name in params]
        writer.writerow(
            [*(trial[name] for name in known), *values, *(trial["metrics"].get(name, "") for name in metrics)]
        )
    return redact_text(text.getvalue())


def _note(spec: SweepSpec, result: SweepResult, runs: str) -> str:
    """What MLflow's page says of the sweep, in Markdown."""
    objectives = [each.metric for each in spec.space.objectives]
    sign = -1 if spec.space.objectives[0].mode == "max" else 1
    known = [trial for trial in result.trials if objectives[0] in trial["metrics"]]
    ranked = sorted(known, key=lambda trial: (trial["status"] != "finished", sign * trial["metrics"][objectives[0]]))
    params = list(dict.fromkeys(name for trial in result.trials for name in trial["params"]))
    rows = [["trial", "status", *params, *objectives], ["---"] * (2 + len(params) + len(objectives))]
    for trial in ranked[:_ROWS]:
        values = [_flow(trial["params"].get(name, "")) for name in params]
        reached = [f"{trial['metrics'][name]:.6g}" if name in trial["metrics"] else "" for name in objectives]
        rows.append([f"[{trial['id']}]({runs}/{trial['run_id']})", trial["status"], *values, *reached])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    best = [] if result.best is None else [f"The winner again:\n\n```\n{spec.train_line(result.best['params'])}\n```"]
    return "\n\n".join([f"```\n{spec.command}\n```", table, *best])
