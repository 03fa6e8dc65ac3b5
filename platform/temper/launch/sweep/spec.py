"""What a sweep is, as the driver has decided it and the coordinator is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.config.space import Params, SpaceConfig
from temper.config.space_load import trial_overrides
from temper.launch.rungs import RungClock
from temper.launch.teachers import plan_job
from temper.plan.build import Plan
from temper.plan.mesh import ClusterShape
from temper.storage import storage_folder
from temper.tracking.sweep_progress import winner_lines


@dataclass(frozen=True)
class SweepSpec:
    """`overrides` are those of the command line, for every trial; `place` is the sweep's folder in the storage; `ids`
    are those of the trials that are known beforehand, by their params' key. `concurrency` counts worker groups.
    `working_folder` is the driver's, in which relative paths of a job are looked for. `texts` and `notes` describe
    the sweep in MLflow, which begins at `began_ms`, Unix time."""

    space: SpaceConfig
    job_file: Path
    overrides: tuple[str, ...]
    storage: str
    place: str
    uri: str
    cluster: ClusterShape
    import_folders: tuple[str, ...]
    working_folder: str
    command: str
    ids: dict[str, str]
    clock: RungClock
    concurrency: int
    embedded: bool
    began_ms: int
    texts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return storage_folder(self.storage) / self.place

    @property
    def decide(self) -> Literal["never", "rung", "phase"]:
        """Where Ray Tune's scheduler decides on a trial."""
        kind = self.space.scheduler.kind
        return "rung" if kind in ("asha", "hyperband") else "phase" if kind == "pbt" else "never"

    def job(self, params: Params) -> JobConfig:
        """The ordinary job that a trial with these params is. Raises JobError."""
        job = load_job(self.job_file, self.job_overrides(params))
        tracking = job.tracking.model_copy(update={"uri": self.uri})
        return job.model_copy(update={"storage": self.storage, "tracking": tracking})

    def job_overrides(self, params: Params) -> list[str]:
        """What makes the base job this trial."""
        return [*trial_overrides(self.space, params), *self.overrides]

    def train_line(self, params: Params) -> str:
        """The shell's line that repeats a trial."""
        return winner_lines(self.job_file, self.job_overrides(params), self.storage)[0]

    def plan_alike(self, params: Params) -> Plan:
        """The plan of a trial wherever it is run. Raises JobError."""
        return plan_job(self.job(params), self.cluster, self.job_file.parent)

    def plan(self, params: Params, trial: str) -> Plan:
        """The plan of a trial, whose run folder is the sweep's. Raises JobError."""
        job = self.job(params)
        if not self.space.reuse:
            job = job.model_copy(update={"storage": str(self._alone(trial))})
        plan = plan_job(job, self.cluster, self.job_file.parent)
        return replace(plan, place=f"{self.place}/trials/{trial}" if self.space.reuse else "run")

    def run_folder(self, trial: str) -> Path:
        return self.folder / "trials" / trial if self.space.reuse else self._alone(trial) / "run"

    def _alone(self, trial: str) -> Path:
        """The storage of a trial that shares nothing."""
        return self.folder / "alone" / trial
