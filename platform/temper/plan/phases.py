"""The phases of a job and their fingerprints: what is computed, and the name under which the result is stored.

Two phases with one fingerprint compute the same result; a phase whose fingerprint is in the store is not computed
again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, Literal

from temper.config.schema import JobConfig, PrecisionConfig, ScheduleConfig
from temper.plan.facts import DataFacts
from temper.plan.mesh import BatchPlan, MeshPlan
from temper.schedules import Schedule, build_schedule

NUMERICS_VERSION = 4
"""Raised with every change after which the same job gives other numbers; stored phases are then not reused."""

_LOSS_SCALING = ("loss_scale", "initial_scale", "scale_window", "hysteresis", "min_scale")
_SWITCHES = ("master_weights", "fp32_accumulation", "at_min_scale")
_SERVER = ("shards", "n_fetch", "n_push", "max_staleness", "warm_start_steps")
_LIBRARIES = ("torch", "torchvision", "deepspeed")


PhaseKind = Literal["dense", "sparse", "redense"]


@dataclass(frozen=True)
class Pruning:
    """What a sparse phase prunes: `layers` gives the share of each pruned layer, by the name of its weight in the
    model; `structure` and `criterion` as in the job's round. `seed` is that of a random criterion."""

    structure: str
    criterion: str
    layers: dict[str, float]
    seed: int


@dataclass(frozen=True)
class PhasePlan:
    """`steps` optimizer steps from `first_step` (0-based, over the whole job) under one DeepSpeed configuration, which
    is empty where DeepSpeed has no part in them.

    `lr` is what the phase's schedule is multiplied by. A sparse phase has a `pruning`. `fresh` says that the optimizer
    begins the phase without moments. `fingerprint` is over `before`, that of the phase before (none: empty), and the
    `ingredients`, which are JSON-able.
    """

    name: str
    kind: PhaseKind
    first_step: int
    steps: int
    lr: float
    fingerprint: str
    deepspeed: dict[str, Any]
    pruning: Pruning | None = None
    fresh: bool = False
    ingredients: dict[str, Any] = field(default_factory=dict)
    before: str = ""

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps


def phase_schedule(job: JobConfig, kind: PhaseKind) -> ScheduleConfig:
    """The schedule of the learning rate in phases of this kind; each begins it anew."""
    own = job.dsd.schedule if job.dsd is not None and kind != "dense" else None
    return own or job.optimizer.schedule


def learning_rate(job: JobConfig, phase: PhasePlan) -> Schedule:
    """The learning rate of the phase's optimizer step `step`, which is counted from 0 in each phase."""
    factor = build_schedule(phase_schedule(job, phase.kind), phase.steps)
    return lambda step: phase.lr * factor(step)


def plan_steps(job: JobConfig, data: DataFacts) -> int:
    """Optimizer steps of the budget, which is that of the dense phase."""
    return phase_steps(job.budget.steps, job.budget.epochs, job, data)


def phase_steps(steps: int | None, epochs: float | None, job: JobConfig, data: DataFacts) -> int:
    """Optimizer steps of a phase of so many steps or epochs. Batches run on across epochs, so that each example is seen
    once in each."""
    if steps is not None:
        return steps
    assert epochs is not None, "check_job lets exactly one of steps and epochs through"
    return max(1, round(epochs * data.train_examples / job.data.global_batch))


def ingredients(
    job: JobConfig, data: DataFacts, mesh: MeshPlan, batch: BatchPlan, steps: int, sources: dict[str, str]
) -> dict[str, Any]:
    """Everything that decides the result of the dense phase, JSON-able, to be hashed, and to be read when hashes
    differ.

    - `numerics`, `libraries`: temper's own version of its numerics; the libraries that compute and that build the
      models.
    - `model`: its section, the number of classes filled in from the data.
    - `data`: fingerprint of the examples, and what is done to them in training: holdout, augmentation, normalisation,
      global batch, and the labels and classes that are taken away, where there are such. Not `eval_transforms` and
      `loader_processes`, which no weight depends on.
    - `loss`, `optimizer`: their sections. The schedule depends on `steps`, which is an ingredient of its own.
    - `precision`: only the type where it is not fp16; the loss scale acts on nothing else. Parts that are switched off,
      and what is done at the least scale where that is not to stop.
    - `topology`: sums are taken in another order with another number of ranks, ZeRO stage or micro-batch, on another
      device, or on a CPU with another number of threads, and the last bits with them. The cut, the splits and the keys
      of a parameter server where there are such.
    - `sources`: hash of the code behind each `kind: python` target.

    Not in it, because no weight depends on them: name, storage, tracking, evaluation, the intervals of the budget,
    restarts.
    """
    return {
        "numerics": NUMERICS_VERSION,
        "libraries": library_versions(job),
        "model": _model(job, data),
        "data": _data(job, data),
        "loss": job.loss.model_dump(mode="json"),
        "optimizer": job.optimizer.model_dump(mode="json"),
        "precision": _precision(job),
        "topology": _topology(job, mesh, batch),
        "steps": steps,
        "seed": job.seed,
        "sources": sources,
    }


def fingerprint(recipe: dict[str, Any], before: str = "") -> str:
    """SHA-256 over the fingerprint of the phase before (none: empty) and the canonical JSON of the ingredients."""
    text = json.dumps([before, recipe], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _model(job: JobConfig, data: DataFacts) -> dict[str, Any]:
    section = job.model.model_dump(mode="json")
    if "num_classes" in section and section["num_classes"] is None:
        section["num_classes"] = data.num_classes
    return section


def _data(job: JobConfig, data: DataFacts) -> dict[str, Any]:
    taken_away: dict[str, Any] = {}
    if job.data.labels < 1:
        taken_away["labels"] = job.data.labels
    if job.data.omit_classes:
        taken_away["omit_classes"] = sorted(job.data.omit_classes)
    return {
        "fingerprint": data.fingerprint,
        "holdout": job.data.holdout,
        "augment": [transform.model_dump(mode="json") for transform in job.data.augment],
        "mean": list(data.mean),
        "std": list(data.std),
        "global_batch": job.data.global_batch,
        **taken_away,
    }


def _precision(job: JobConfig) -> dict[str, Any]:
    """Only what acts, so that a key which does nothing changes no fingerprint."""
    precision, default = job.precision, PrecisionConfig()
    keys = ["dtype", *(_LOSS_SCALING if precision.dtype == "fp16" else ())]
    keys += [name for name in _SWITCHES if getattr(precision, name) != getattr(default, name)]
    values = {name: getattr(precision, name) for name in keys}
    if precision.at_min_scale == "back_off":
        values["checkpoint_every"] = job.budget.checkpoint_every  # where it goes back to
    return values


def _topology(job: JobConfig, mesh: MeshPlan, batch: BatchPlan) -> dict[str, Any]:
    topology: dict[str, Any] = {
        "data": mesh.data,
        "pipeline": mesh.pipeline,
        "zero": job.parallel.zero,
        "offload": job.parallel.offload,
        "micro_batch": batch.micro_batch,
        "device": mesh.device,
        "threads": job.parallel.cpus_per_worker if mesh.device == "cpu" else None,
    }
    if mesh.pipeline > 1:
        topology["cut"] = list(mesh.cut)
    if mesh.tensor > 1:
        topology |= {"tensor": mesh.tensor, "splits": dict(mesh.splits)}
    if job.parallel.mode != "synchronous":
        topology |= {name: getattr(job.parallel, name) for name in ("mode", *_SERVER)}
    return topology


def library_versions(job: JobConfig) -> dict[str, str]:
    """Installed versions of the libraries that decide the job's numbers, read from their metadata, not imported."""
    names = (*_LIBRARIES, "transformers") if job.model.kind == "transformers" else _LIBRARIES
    return {name: _version(name) for name in names}


@cache  # a sweep plans hundreds of jobs, and half of a plan's time would be reading these files
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
