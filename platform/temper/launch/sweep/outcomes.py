"""What came of trials, for the display and for `--json`."""

from __future__ import annotations

from typing import Any

from temper.config.space_load import shown_params
from temper.files import read_json
from temper.launch.rungs import RungClock
from temper.launch.sweep.ledger import LedgerTrial
from temper.launch.sweep.trial import Trial
from temper.plan.phases import PhasePlan
from temper.products import read_phase
from temper.run_folder import RUN
from temper.tracking.sweep_progress import TrialView


def phases_reused(trial: Trial) -> list[PhasePlan]:
    """Phases that the trial has come through and did not compute itself."""
    phases = [phase for phase in trial.plan.phases if phase.last_step <= trial.step]
    return [phase for phase in phases if phase.fingerprint not in trial.computed]


def trial_view(trial: Trial, clock: RungClock) -> TrialView:
    return TrialView(
        id=trial.id,
        params=shown_params(trial.params),
        status=trial.status,
        phase=trial.phase,
        step=trial.step,
        steps=trial.plan.steps,
        rung=trial.rung,
        rungs=len(clock.rungs),
        metrics=dict(trial.metrics),
        phases_run=len(trial.computed),
        phases_reused=len(phases_reused(trial)),
        seconds=trial.elapsed_s,
        reason=trial.reason,
    )


def trial_result(trial: Trial) -> dict[str, Any]:
    """`metrics` are those of the trial's last evaluation; of a phase, those of its end."""
    return {
        "id": trial.id,
        "run_id": (read_json(trial.plan.run_folder / RUN) or {}).get("run_id", ""),
        "params": trial.params,
        "status": trial.status,
        "reason": trial.reason,
        "metrics": trial.metrics,
        "phases": _phases(trial),
        "steps": trial.step,
        "seconds": trial.seconds,
        "time_to_first_step_s": trial.time_to_first_step_s,
    }


def _phases(trial: Trial) -> list[dict[str, Any]]:
    through = [phase for phase in trial.plan.phases if phase.last_step <= trial.step]
    manifests = [(phase, read_phase(trial.plan.phase_folder(phase))) for phase in through]
    return [
        {
            "name": phase.name,
            "fingerprint": phase.fingerprint,
            "steps": phase.steps,
            "reused": phase.fingerprint not in trial.computed,
            "seconds": manifest["seconds"],
            "metrics": manifest["metrics"],
        }
        for phase, manifest in manifests
        if manifest is not None
    ]


def refused_view(trial: LedgerTrial) -> TrialView:
    """Of a trial whose job cannot be planned."""
    params = shown_params(trial.params)
    return TrialView(trial.id, params, "failed", "", 0, 0, 0, 0, {}, 0, 0, 0.0, trial.reason)


def refused_result(trial: LedgerTrial) -> dict[str, Any]:
    return {
        "id": trial.id,
        "run_id": "",
        "params": trial.params,
        "status": "failed",
        "reason": trial.reason,
        "metrics": {},
        "phases": [],
        "steps": 0,
        "seconds": 0.0,
        "time_to_first_step_s": None,
    }
