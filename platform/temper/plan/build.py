"""A job and a cluster's shape → the plan: everything that is decided before a process starts, as plain data.

Every problem that can be known here is collected and raised together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from temper.config.checks import check_job
from temper.config.schema import JobConfig
from temper.errors import JobError, Problem
from temper.plan.checks import check_data, check_model, check_storage, check_tracking
from temper.plan.deepspeed_config import deepspeed_config, zero_stage
from temper.plan.facts import DataFacts, data_facts
from temper.plan.memory import MemoryPlan, plan_memory
from temper.plan.mesh import BatchPlan, ClusterShape, MeshPlan, check_mesh, plan_batch, plan_mesh
from temper.plan.phases import PhasePlan, fingerprint, ingredients, plan_steps
from temper.plan.probe import ModelFacts, model_facts
from temper.plan.targets import check_targets, hash_targets

Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan:
    """What will happen, and what it costs. `steps` are optimizer steps; `memory` is bytes on one rank."""

    job: JobConfig
    data: DataFacts
    model: ModelFacts
    cluster: ClusterShape
    mesh: MeshPlan
    batch: BatchPlan
    steps: int
    phases: tuple[PhasePlan, ...]
    memory: MemoryPlan
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def run_folder(self) -> Path:
        """Where this run's logs and live state lie; two plans share it only if they compute the same."""
        return Path(self.job.storage) / f"{self.job.name}-{self.fingerprint[:10]}"

    def phase_folder(self, phase: PhasePlan) -> Path:
        """The phase's place in the store: checkpoint, history and manifest, shared by every job that has this phase."""
        return Path(self.job.storage) / "phases" / phase.fingerprint

    def lock(self, phase: PhasePlan, rank: int | None = None) -> Path:
        """Held by the command that runs the phase, and one for each rank that writes it. Beside the phase's folder,
        so that it outlives a phase that is computed anew."""
        suffix = ".lock" if rank is None else f".rank-{rank}.lock"
        return self.phase_folder(phase).with_name(phase.fingerprint + suffix)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values, for `temper plan --json` and the run's artifacts."""
        return {
            "job": self.job.model_dump(mode="json"),
            "data": asdict(self.data),
            "model": asdict(self.model),
            "cluster": asdict(self.cluster),
            "mesh": {**asdict(self.mesh), "world_size": self.mesh.world_size},
            "batch": asdict(self.batch),
            "steps": self.steps,
            "phases": [asdict(phase) for phase in self.phases],
            "memory": asdict(self.memory),
            "fingerprint": self.fingerprint,
            "run_folder": str(self.run_folder),
            "notes": list(self.notes),
        }


def build_plan(job: JobConfig, cluster: ClusterShape, job_folder: Path) -> Plan:
    """Decide the run of `job` on `cluster`.

    `job_folder` is where the job file lies: data paths and `kind: python` targets are looked for there too. The model
    is built once, in a process of its own, and what was learnt is kept under `<storage>/cache`; nothing else is
    written. Raises JobError with every problem found.
    """
    problems = [
        *check_job(job),
        *check_mesh(job.parallel, cluster),
        *check_storage(job),
        *check_tracking(job),
        *check_targets(job, job_folder),
    ]
    data = _collect(problems, lambda: data_facts(job.data, job_folder))
    if data is not None:
        problems += check_data(job, data)
    if problems or data is None:
        raise JobError(problems)
    # Building the model takes seconds, so it is tried only for a job that is right as far as can be seen without it.
    model = model_facts(job, data, job_folder)
    problems += check_model(job, data, model)
    if problems:
        raise JobError(problems)
    return _decide(job, data, model, cluster, job_folder)


def _decide(job: JobConfig, data: DataFacts, model: ModelFacts, cluster: ClusterShape, job_folder: Path) -> Plan:
    mesh = plan_mesh(job.parallel, cluster)
    batch = plan_batch(job.data.global_batch, mesh.data, job.parallel.micro_batch)
    steps = plan_steps(job, data)
    recipe = ingredients(job, data, mesh, batch, steps, hash_targets(job, job_folder))
    engine = deepspeed_config(job, batch, mesh, model.num_trainable)
    dense = PhasePlan("dense", 0, steps, fingerprint(recipe), engine)
    return Plan(
        job=job,
        data=data,
        model=model,
        cluster=cluster,
        mesh=mesh,
        batch=batch,
        steps=steps,
        phases=(dense,),
        memory=plan_memory(job, model, mesh, batch),
        fingerprint=dense.fingerprint,
        notes=tuple(_notes(job, data, mesh, batch, steps)),
    )


def _collect(problems: list[Problem], find: Callable[[], Found]) -> Found | None:
    """What `find` returns; where it raises JobError, None, with its problems added to `problems`."""
    try:
        return find()
    except JobError as error:
        problems += error.problems
        return None


def _notes(job: JobConfig, data: DataFacts, mesh: MeshPlan, batch: BatchPlan, steps: int) -> list[str]:
    """What a user may not expect, in full sentences."""
    notes = []
    if job.precision.dtype == "fp16" and mesh.device == "cpu":
        notes.append(
            "fp16 on CPU runs through DeepSpeed's capability override: real fp16 arithmetic and loss scaling, but slow"
        )
    if zero_stage(job) != job.parallel.zero:
        dtype = job.precision.dtype
        notes.append(f"zero: 0 in {dtype} runs as stage 1, which computes the same: DeepSpeed's stage 0 is wrong there")
    epochs = steps * batch.global_batch / data.train_examples
    notes.append(
        f"{steps} steps of {batch.global_batch} examples are {epochs:.3g} epochs of {data.train_examples} examples"
    )
    if job.parallel.micro_batch is not None and 2 * batch.micro_batch <= min(
        job.parallel.micro_batch, batch.rank_batch
    ):
        notes.append(
            f"micro-batches are of {batch.micro_batch}, because no number up to parallel.micro_batch: "
            f"{job.parallel.micro_batch} and nearer to it divides a rank's {batch.rank_batch} examples"
        )
    if job.parallel.zero and mesh.data == 1:
        notes.append(f"zero: {job.parallel.zero} saves nothing on one worker: there is no other rank to share with")
    if data.validation_examples == 0:
        notes.append("no examples are held out (data.holdout: 0): evaluations during training use the test split")
    return notes
