"""Files by which the driver, the controller and the workers of one run know each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from temper.plan.build import Plan
from temper.plan.phases import PhasePlan

JOB = "job.yaml"
PLAN = "plan.json"
RUN = "run.json"  # which MLflow run this is, and where
LOST = "lost.json"  # the MLflow run that the store does not have any more; who reads it opens another one
SYSTEM = "system.jsonl"  # the use of the nodes while the run was computed
STAGES = "stages.jsonl"  # what the run is doing before its first step, for people
FAILURES = "failures.jsonl"
REPORT = "report.html"  # what `temper report` writes, also of a sweep
GIT = "git.json"  # the state of the repository in which the command was typed
ENVIRONMENT = "environment.txt"  # versions of Python and the packages
REGISTERED = "registered.json"  # which version of a registered model the run has become
TRACKING_LOCK = "tracking.lock"  # held by the process that opens the run in MLflow and brings it to its end
LOCK = "lock"  # held by the command that writes in the run's folder and delivers to the run in MLflow
STOP = "stop"  # its presence asks the workers to save and stop

SWEEPS = "sweeps"  # in the storage: a folder for each sweep
SWEEP_RUN = "sweep.json"  # of a sweep: its own run in MLflow, where that is, and whether it is open
RESULT = "result.json"  # of a sweep: what came of it, once it has come to its end

PHASES = "phases"  # in the storage: a folder for each phase, by its fingerprint
HISTORY = "history.jsonl"  # of a phase: one record a step
CHECKPOINTS = "checkpoints"
CHECKPOINT_MANIFEST = "manifest.json"  # of a checkpoint; there only when it is complete
PHASE_MANIFEST = "phase.json"  # of a phase; there only when the phase is complete
USED = "used"  # of a phase; written when it was last reused
WEIGHTS = "weights.json"  # of a sparse or re-dense phase: what came of the weights


@dataclass(frozen=True)
class TraceTask:
    """One trace to be taken: steps of `phase`, as if it began with the initial weights, written into `folder`."""

    plan: Plan
    phase: PhasePlan
    folder: Path


@dataclass(frozen=True)
class TraceSpec:
    """What workers that verify are told; the plans are of one mesh, one a precision."""

    run_folder: Path
    traces: tuple[TraceTask, ...]
    steps: int
    import_folders: tuple[str, ...]

    @property
    def plan(self) -> Plan:
        return self.traces[0].plan


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker is told. `phases` are those to be run, in their order; `import_folders` are searched for
    `kind: python` targets."""

    plan: Plan
    phases: tuple[PhasePlan, ...]
    import_folders: tuple[str, ...]

    @property
    def run_folder(self) -> Path:
        return self.plan.run_folder

    def phase_folder(self, phase: PhasePlan) -> Path:
        return self.plan.phase_folder(phase)

    def checkpoints(self, phase: PhasePlan) -> Path:
        return self.phase_folder(phase) / CHECKPOINTS
