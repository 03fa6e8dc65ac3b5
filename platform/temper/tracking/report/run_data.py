"""All that a report on a run says, as it lies in the run's folder and in the phase store.

What is delivered to MLflow comes from the same files, so that the numbers are those of the run there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.errors import JobError, Problem
from temper.files import read_json, read_lines
from temper.products import find_storage, run_name
from temper.remote_store import fetch_place
from temper.run_folder import ENVIRONMENT, FAILURES, GIT, HISTORY, JOB, PHASES, PLAN, RUN, STAGES, SYSTEM, WEIGHTS
from temper.tracking.history import Record, read_history
from temper.tracking.tree import PhaseState, read_phases


@dataclass(frozen=True)
class PhaseData:
    """One phase of a run: its part of the plan, as JSON has it, its `records` so far, the `weights.json` that it may
    have, its `state`, None where it has not begun, and its `owner`, the name of the run that computed it."""

    plan: Mapping[str, Any]
    records: Sequence[Record]
    weights: Mapping[str, Any] | None
    state: PhaseState | None
    owner: str

    @property
    def name(self) -> str:
        return self.plan["name"]

    @property
    def kind(self) -> str:
        return self.plan["kind"]

    @property
    def first_step(self) -> int:
        return self.plan["first_step"]

    @property
    def last_step(self) -> int:
        return self.plan["first_step"] + self.plan["steps"]

    @property
    def is_complete(self) -> bool:
        return self.state is not None and self.state.is_complete

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of its end; empty before that."""
        return self.state.metrics if self.state is not None and self.state.is_complete else {}

    @property
    def layers(self) -> Mapping[str, Any]:
        """By the name of the weight, what came of each that was pruned."""
        return {} if self.weights is None else self.weights["layers"]


@dataclass(frozen=True)
class Round:
    """A sparse phase, the phase before it, and the re-dense phase after it, if there is one."""

    number: int
    before: PhaseData
    sparse: PhaseData
    redense: PhaseData | None


@dataclass(frozen=True)
class RunData:
    """A run. `record` is its `run.json`, `stages` what it did before its first step, `failures` the workers' errors,
    `system` the samples of its machines, `git` and `environment` where it came from; each may be empty."""

    folder: Path
    plan: Mapping[str, Any]
    job: JobConfig
    record: Mapping[str, Any]
    phases: Sequence[PhaseData]
    stages: Sequence[Mapping[str, Any]]
    failures: Sequence[Mapping[str, Any]]
    system: Sequence[Record]
    git: Mapping[str, Any]
    environment: str

    @property
    def run_id(self) -> str:
        """Of MLflow."""
        return self.record.get("run_id", "")

    @property
    def is_complete(self) -> bool:
        return all(phase.is_complete for phase in self.phases)

    @property
    def began(self) -> list[PhaseState]:
        """The phases that have begun, or are there already."""
        return [phase.state for phase in self.phases if phase.state is not None]

    @property
    def step(self) -> int:
        """The last one that the run has come through."""
        return max((state.first_step + state.steps_done for state in self.began), default=0)


def read_run(folder: Path) -> RunData:
    """What the run's folder and its phases' hold so far. Raises JobError where the folder is no run's."""
    plan = read_json(folder / PLAN)
    if plan is None or folder.parent.name == PHASES:
        remedy = "give a run's id, or its folder in the storage"
        raise JobError([Problem("RUN", str(folder), "is not a run's folder", remedy)])
    storage = find_storage(folder)
    folders = [storage / PHASES / phase["fingerprint"] for phase in plan["phases"]]
    for place in folders:
        fetch_place(place)
    states = {state.name: state for state in read_phases(plan, storage)}
    return RunData(
        folder=folder,
        plan=plan,
        job=load_job(folder / JOB),
        record=read_json(folder / RUN) or {},
        phases=[
            _read_phase(phase, place, states.get(phase["name"]))
            for phase, place in zip(plan["phases"], folders, strict=True)
        ],
        stages=read_lines(folder / STAGES),
        failures=read_lines(folder / FAILURES),
        system=read_history(folder / SYSTEM),
        git=read_json(folder / GIT) or {},
        environment=_text(folder / ENVIRONMENT),
    )


def _read_phase(phase: Mapping[str, Any], folder: Path, state: PhaseState | None) -> PhaseData:
    return PhaseData(
        plan=phase,
        records=read_history(folder / HISTORY),
        weights=read_json(folder / WEIGHTS),
        state=state,
        owner=run_name(read_json(folder / PLAN) or {}),
    )


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def rounds(phases: Sequence[PhaseData]) -> list[Round]:
    """The rounds of dense-sparse-dense training among `phases`; none of a job without them."""
    found: list[Round] = []
    for before, sparse, after in zip(phases, phases[1:], [*phases[2:], None], strict=False):
        if sparse.kind == "sparse":
            redense = after if after is not None and after.kind == "redense" else None
            found.append(Round(len(found) + 1, before, sparse, redense))
    return found


def recorded(records: Iterable[Record], prefix: str = "") -> list[str]:
    """Names of the metrics that begin with `prefix`, in the order in which they come."""
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    return [name for name in names if name.startswith(prefix)]


def short_name(weight: str, length: int = 35) -> str:
    """The layer of a weight, `layer1.0.conv1` for `layer1.0.conv1.weight`; what is longer than `length` lacks its
    middle."""
    name = weight.removesuffix(".weight")
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
