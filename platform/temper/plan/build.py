"""A job and a cluster's shape → the plan: everything that is decided before a process starts, as plain data.

Every problem that can be known here is collected and raised together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from temper.config.checks import check_job
from temper.config.schema import JobConfig
from temper.errors import JobError, Problem
from temper.plan.checks import check_data, check_model, check_storage, check_tracking
from temper.plan.deepspeed_config import deepspeed_config, zero_stage
from temper.plan.distill import DistillPlan, Teacher
from temper.plan.dsd import expand_phases, pruning_notes
from temper.plan.facts import DataFacts, data_facts
from temper.plan.memory import MemoryPlan, plan_memory, stage_weights
from temper.plan.mesh import BatchPlan, ClusterShape, MeshPlan, check_mesh, plan_batch, plan_mesh
from temper.plan.pairs import with_connectors
from temper.plan.phases import PhasePlan, fingerprint, ingredients, plan_steps
from temper.plan.precision import check_precision_device, local_capability
from temper.plan.probe import ModelFacts, Timing, model_facts
from temper.plan.stages import LEAST_MICRO_BATCHES, StagePlan, bubble, plan_stages
from temper.plan.targets import check_targets, hash_targets
from temper.plan.teaching import plan_teaching, teaching_ingredients, teaching_notes
from temper.storage import is_remote

Found = TypeVar("Found")

# Layers are timed on no more examples than this: enough to keep the processor busy, and few for its memory.
_MOST_TIMED_EXAMPLES = 16


@dataclass(frozen=True)
class Plan:
    """What will happen, and what it costs. `steps` are optimizer steps of all phases together; `memory` is bytes on one
    rank. `fingerprint` is that of the last phase.

    `stages` are those of the pipeline, empty without one. `place` is the run's folder in the storage where it is not
    the job's own, as in a sweep.
    """

    job: JobConfig
    data: DataFacts
    model: ModelFacts
    cluster: ClusterShape
    mesh: MeshPlan
    stages: tuple[StagePlan, ...]
    batch: BatchPlan
    steps: int
    phases: tuple[PhasePlan, ...]
    memory: MemoryPlan
    fingerprint: str
    notes: tuple[str, ...]
    distill: DistillPlan | None = None
    place: str | None = None

    @property
    def run_folder(self) -> Path:
        """Where this run's logs and live state lie; two plans share it only if they compute the same."""
        return self.job.storage_folder / (self.place or f"{self.job.name}-{self.fingerprint[:10]}")

    def phase_folder(self, phase: PhasePlan) -> Path:
        """The phase's place in the store: checkpoint, history and manifest, shared by every job that has this phase."""
        return self.job.storage_folder / "phases" / phase.fingerprint

    def phase_before(self, phase: PhasePlan) -> PhasePlan | None:
        """The phase that `phase` goes on from; None for the first."""
        index = self.phases.index(phase)
        return self.phases[index - 1] if index else None

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
            "stages": [asdict(stage) for stage in self.stages],
            "batch": asdict(self.batch),
            "steps": self.steps,
            "phases": [asdict(phase) for phase in self.phases],
            "memory": asdict(self.memory),
            "distill": None if self.distill is None else self.distill.to_dict(),
            "fingerprint": self.fingerprint,
            "run_folder": str(self.run_folder),
            "notes": list(self.notes),
        }


def build_plan(job: JobConfig, cluster: ClusterShape, job_folder: Path, teachers: Sequence[Teacher] = ()) -> Plan:
    """Decide the run of `job` on `cluster`; `teachers` are those of its `distill` section, found.

    `job_folder` is where the job file lies: data paths and `kind: python` targets are looked for there too. The model
    is built once, in a process of its own, and what was learnt is kept under `<storage>/cache`; nothing else is
    written. Raises JobError with every problem found.
    """
    problems = [
        *check_job(job),
        *check_mesh(job.parallel, cluster),
        *_check_precision(job, cluster),
        *check_storage(job),
        *check_tracking(job),
        *check_targets(job, job_folder),
    ]
    data = _collect(problems, lambda: data_facts(job.data, job_folder, taught=job.distill is not None))
    if data is not None:
        problems += check_data(job, data)
    if problems or data is None:
        raise JobError(problems)
    batch = _batch(job)
    # Building the model takes seconds, so it is tried only for a job that is right as far as can be seen without it.
    model = model_facts(job, data, job_folder, _timing(job, cluster, batch))
    problems += check_model(job, data, model)
    if problems:
        raise JobError(problems)
    return _decide(job, data, model, teachers, cluster, batch, job_folder)


def _check_precision(job: JobConfig, cluster: ClusterShape) -> list[Problem]:
    capability = local_capability() if job.precision.dtype == "tf32" else None
    return check_precision_device(job.precision.dtype, plan_mesh(job.parallel, cluster).device, capability)


def _batch(job: JobConfig) -> BatchPlan:
    parallel = job.parallel
    chosen = parallel.pipeline > 1 and parallel.micro_batch is None
    least = LEAST_MICRO_BATCHES * parallel.pipeline if chosen else 1
    return plan_batch(job.data.global_batch, parallel.workers, parallel.micro_batch, least)


def _timing(job: JobConfig, cluster: ClusterShape, batch: BatchPlan) -> Timing | None:
    if job.parallel.pipeline == 1 or job.parallel.stages != "measured":
        return None
    return Timing(
        device=plan_mesh(job.parallel, cluster).device,
        threads=max(1, int(job.parallel.cpus_per_worker)),
        dtype=job.precision.dtype,
        examples=min(batch.micro_batch, _MOST_TIMED_EXAMPLES),
    )


def _decide(
    job: JobConfig,
    data: DataFacts,
    model: ModelFacts,
    teachers: Sequence[Teacher],
    cluster: ClusterShape,
    batch: BatchPlan,
    job_folder: Path,
) -> Plan:
    stages = plan_stages(job, model.layers, batch)
    mesh = replace(
        plan_mesh(job.parallel, cluster),
        tensor=job.parallel.tensor,
        cut=tuple(stage.first_layer for stage in stages),
        splits=model.splits,
    )
    steps = plan_steps(job, data)
    sources = hash_targets(job, job_folder)
    recipe = ingredients(job, data, mesh, batch, steps, sources)
    distill = plan_teaching(job, data, model, teachers, mesh, batch, sources, job_folder)
    trained = model  # with what is trained beside the model
    if distill is not None:
        recipe["distill"] = teaching_ingredients(job, distill)
        trained = with_connectors(model, distill.pairs)
    dense = PhasePlan(
        name="dense",
        kind="dense",
        first_step=0,
        steps=steps,
        lr=job.optimizer.lr,
        fingerprint=fingerprint(recipe),
        deepspeed=_deepspeed(job, trained, mesh, batch),
        ingredients=recipe,
    )
    phases = expand_phases(job, data, model.prunable, dense)
    return Plan(
        job=job,
        data=data,
        model=model,
        cluster=cluster,
        mesh=mesh,
        stages=stages,
        batch=batch,
        steps=phases[-1].last_step,
        phases=phases,
        memory=plan_memory(job, trained, mesh, batch, distill),
        fingerprint=phases[-1].fingerprint,
        notes=(
            *_notes(job, data, mesh, batch, phases),
            *pruning_notes(job, model.prunable),
            *teaching_notes(job, mesh, batch, distill),
        ),
        distill=distill,
    )


def _deepspeed(job: JobConfig, model: ModelFacts, mesh: MeshPlan, batch: BatchPlan) -> dict[str, Any]:
    """Alike on all ranks: its buffers are made for the rank with the most parameters."""
    if job.parallel.mode == "parameter_server":
        return {}
    return deepspeed_config(job, batch, mesh, max(sum(weights.sizes) for weights in stage_weights(model, mesh)))


def _collect(problems: list[Problem], find: Callable[[], Found]) -> Found | None:
    """What `find` returns; where it raises JobError, None, with its problems added to `problems`."""
    try:
        return find()
    except JobError as error:
        problems += error.problems
        return None


def _notes(job: JobConfig, data: DataFacts, mesh: MeshPlan, batch: BatchPlan, phases: Sequence[PhasePlan]) -> list[str]:
    """What a user may not expect, in full sentences."""
    return [
        *_precision_notes(job, mesh),
        *_budget_notes(batch, data, phases),
        *_micro_batch_notes(job, batch),
        *_pipeline_notes(job, batch),
        *_server_notes(job),
        *_sharding_notes(job, mesh),
        *_evaluation_notes(data),
        *_storage_notes(job),
    ]


def _precision_notes(job: JobConfig, mesh: MeshPlan) -> list[str]:
    notes = []
    if job.precision.dtype == "fp16" and mesh.device == "cpu":
        notes.append(
            "fp16 on CPU runs through DeepSpeed's capability override: real fp16 arithmetic and loss scaling, but slow"
        )
    if zero_stage(job) != job.parallel.zero and job.parallel.mode == "synchronous":
        dtype = job.precision.dtype
        notes.append(f"zero: 0 in {dtype} runs as stage 1, which computes the same: DeepSpeed's stage 0 is wrong there")
    return notes


def _budget_notes(batch: BatchPlan, data: DataFacts, phases: Sequence[PhasePlan]) -> list[str]:
    steps = phases[-1].last_step
    epochs = steps * batch.global_batch / data.train_examples
    together = f" in all {len(phases)} phases" if len(phases) > 1 else ""
    passes = f"{epochs:.3g} epochs of {data.train_examples} examples"
    return [f"{steps} steps of {batch.global_batch} examples{together} are {passes}"]


def _micro_batch_notes(job: JobConfig, batch: BatchPlan) -> list[str]:
    asked = job.parallel.micro_batch
    if asked is None or 2 * batch.micro_batch > min(asked, batch.rank_batch):
        return []
    return [
        f"micro-batches are of {batch.micro_batch}, because no number up to parallel.micro_batch: {asked} and nearer "
        f"to it divides a rank's {batch.rank_batch} examples"
    ]


def _pipeline_notes(job: JobConfig, batch: BatchPlan) -> list[str]:
    parallel = job.parallel
    if parallel.pipeline == 1:
        return []
    notes = []
    if parallel.micro_batch is None:
        idle = bubble(parallel.pipeline, batch.accumulation)
        few = batch.accumulation < LEAST_MICRO_BATCHES * parallel.pipeline
        reason = "a rank has no more examples" if few else f"at least {LEAST_MICRO_BATCHES} for each stage"
        notes.append(
            f"a rank's batch is cut into {batch.accumulation} micro-batches of {batch.micro_batch} ({reason}), which "
            f"leaves a bubble of {idle:.0%}; parallel.micro_batch sets another size"
        )
    if parallel.stages == "measured":
        notes.append(
            f"the cut follows times that were measured on this machine and are kept in {job.storage}/cache/models; "
            "measured anew it may come out differently, and the phases are then other ones"
        )
    return notes


def _server_notes(job: JobConfig) -> list[str]:
    if job.parallel.mode != "parameter_server":
        return []
    notes = [
        "workers of a parameter server do not wait for each other: the result depends on their timing and is not "
        "repeated bit for bit"
    ]
    if job.budget.checkpoint_every == 0:
        notes.append("budget.checkpoint_every: 0 saves nothing before the end: a shard that dies begins anew")
    return notes


def _storage_notes(job: JobConfig) -> list[str]:
    if not is_remote(job.storage) or job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    return [
        f"what MLflow is told stays on this machine, in {job.storage_folder}/mlflow.db; set tracking.uri to a server "
        "that all machines share"
    ]


def _sharding_notes(job: JobConfig, mesh: MeshPlan) -> list[str]:
    if not job.parallel.zero or mesh.data > 1:
        return []
    return [f"zero: {job.parallel.zero} saves nothing on one worker: there is no other rank to share with"]


def _evaluation_notes(data: DataFacts) -> list[str]:
    if data.validation_examples:
        return []
    return ["no examples are held out (data.holdout: 0): evaluations during training use the test split"]
