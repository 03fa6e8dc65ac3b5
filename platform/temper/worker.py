"""What runs in each Ray Train worker: builds every part of a phase by name, wires them, calls the loop.

Ray is not imported here; the one thing that a worker needs of it, the report call, is handed in.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from temper import checkpoint
from temper.data.batches import Batch, DataState, eval_batches, train_batches
from temper.data.sources import SplitName, load_splits
from temper.engine.base import EngineState, LossFunction
from temper.engine.build import build_engine
from temper.engine.deepspeed_setup import device_of, prepare
from temper.evaluation import evaluate, evaluate_splits
from temper.files import write_json
from temper.locks import awaited
from temper.loop import Calendar, Record, Reporter, TrainState, build_recovery, train
from temper.losses import build_loss
from temper.metrics import build_metrics
from temper.models.build import build_model
from temper.parallel.groups import MeshGroups, build_groups
from temper.plan.build import Plan
from temper.precision.watch import TwinWatch, Watch, unwatched, watch_skips
from temper.run_folder import PHASE_MANIFEST, STAGES, STOP, TraceSpec, WorkerSpec
from temper.schedules import build_schedule
from temper.targets import apply_target_folders
from temper.verify import trace


def work(spec: WorkerSpec, report: Callable[[list[Record]], None]) -> None:
    """Trains one phase on this rank, resuming from its newest sound checkpoint. Collective over all workers."""
    rank = int(os.environ["RANK"])
    _redirect_output(spec.run_folder / "logs" / f"rank-{rank}.log")
    apply_target_folders([Path(folder) for folder in spec.import_folders])
    stage = _stage_writer(spec.run_folder, rank)
    stage(f"loading {spec.plan.job.data.kind}")
    prepare(spec.plan.mesh.device)
    earlier = awaited(spec.plan.lock(spec.phase, rank), lambda: stage("waiting for the end of an earlier attempt"))
    try:
        with earlier, _process_group(spec.plan.mesh.device):
            _Worker(spec, rank, stage).run(report)
    except Exception as error:
        # Ray Train takes the traceback off on the way to the controller; a note stays.
        error.add_note(traceback.format_exc())
        raise


def trace_work(spec: TraceSpec) -> None:
    """Takes the first steps of each of the spec's plans and writes down what they did. Collective over all workers."""
    rank = int(os.environ["RANK"])
    _redirect_output(spec.run_folder / "logs" / f"verify-rank-{rank}.log")
    apply_target_folders([Path(folder) for folder in spec.import_folders])
    prepare(spec.plan.mesh.device)
    with _process_group(spec.plan.mesh.device):
        groups = build_groups(spec.plan.mesh.data, spec.plan.mesh.pipeline, spec.plan.mesh.tensor)
        for plan, folder in spec.traces:
            _trace(plan, folder, spec.steps, groups)


def _trace(plan: Plan, folder: Path, steps: int, groups: MeshGroups) -> None:
    job = plan.job
    model = build_model(job.model, plan.data, job.seed)
    config = plan.phases[0].deepspeed
    engine = build_engine(model, build_loss(job.loss), job, plan.batch, plan.mesh, groups, config)
    batches = train_batches(
        job.data,
        load_splits(job.data, Path(job.storage), plan.data)["train"],
        plan.data,
        seed=job.seed,
        batch=plan.batch,
        rank=groups.data.rank,
        world_size=groups.data.size,
        first_step=0,
        last_step=steps,
    )
    factor = build_schedule(job.optimizer.schedule, plan.steps)
    parts = ((batch.inputs, batch.targets) for batch, _ in batches)
    trace(engine, model, parts, folder, lr_at=lambda applied: job.optimizer.lr * factor(applied), seed=job.seed)


class _Worker:
    """The parts of one rank, built once."""

    def __init__(self, spec: WorkerSpec, rank: int, stage: Callable[[str], None]) -> None:
        plan = self.plan = spec.plan
        job = plan.job
        self.spec, self.rank, self.stage = spec, rank, stage
        self.world_size = plan.mesh.world_size
        storage = Path(job.storage)
        self.splits = load_splits(job.data, storage, plan.data)
        stage(f"building {job.model.kind}")
        self.loss: LossFunction = build_loss(job.loss)
        model = build_model(job.model, plan.data, job.seed)
        self.groups = build_groups(plan.mesh.data, plan.mesh.pipeline, plan.mesh.tensor)
        self.engine = build_engine(model, self.loss, job, plan.batch, plan.mesh, self.groups, spec.phase.deepspeed)

    @cached_property
    def _metrics(self) -> Any:
        """Built at the first evaluation: torchmetrics takes seconds to import, and the first step need not wait."""
        return build_metrics(self.plan.job.evaluation, self.plan.data, self.engine.device, self.groups.data)

    def run(self, report: Callable[[list[Record]], None]) -> None:
        job, plan, phase = self.plan.job, self.plan, self.spec.phase
        state, records = self._restore()
        report(records if self.rank == 0 else [])
        reporter = Reporter(
            report,
            (self.spec.run_folder / STOP).exists,
            first_step=state.step,
            rank=self.rank,
            world_size=self.world_size,
            global_batch=plan.batch.global_batch,
            record_every=job.tracking.record_every,
            device=self.engine.device,
        )
        factor = build_schedule(job.optimizer.schedule, phase.steps)
        self.stage("taking the first step" if state.step == 0 else f"training from step {state.step}")
        state = train(
            self.engine,
            self._train_batches(state.step),
            state,
            calendar=Calendar(phase.steps, job.budget.evaluate_every, job.budget.checkpoint_every),
            lr_at=lambda applied: job.optimizer.lr * factor(applied),
            seed=job.seed,
            rank=self.groups.data.rank,
            reporter=reporter,
            evaluate=self._evaluate,
            save=lambda reached: self._save(reached, reporter.take_segment()),
            watch=self._watch(),
            recover=build_recovery(job.precision.at_min_scale, self._go_back),
        )
        self._finish(state)

    def _watch(self) -> Watch:
        """Only fp16 has a loss scale to be looked at, and only a rank with the whole model can run it again."""
        precision = self.plan.job.precision
        if precision.dtype != "fp16":
            return unwatched
        if self.groups.replica.size > 1:
            return watch_skips
        ranks = self.groups.data.process_group
        return TwinWatch(self.engine, self.loss, self.plan.batch.accumulation, ranks, precision.underflow_every)

    def _train_batches(self, first_step: int) -> Iterator[tuple[Batch, DataState]]:
        plan = self.plan
        return train_batches(
            plan.job.data,
            self.splits["train"],
            plan.data,
            seed=plan.job.seed,
            batch=plan.batch,
            rank=self.groups.data.rank,
            world_size=self.groups.data.size,
            first_step=first_step,
            last_step=self.spec.phase.steps,
        )

    def _evaluate(self, step: int) -> Mapping[str, float]:
        held_out = self.plan.data.validation_examples > 0
        return evaluate_splits(self._on, held_out, step == self.spec.phase.steps)

    def _on(self, split: SplitName) -> dict[str, float]:
        batches = eval_batches(
            self.plan.job.data,
            self.splits[split],
            self.plan.data,
            rank=self.groups.data.rank,
            world_size=self.groups.data.size,
            batch=self.plan.job.evaluation.batch,
        )
        return evaluate(self.engine.predict, batches, self.loss, self._metrics, self.engine.device, self.groups.data)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, state: TrainState, records: list[Record]) -> None:
        folder = checkpoint.checkpoint_folder(self.spec.checkpoints, state.step)
        shapes = self.engine.shapes()
        checkpoint.write_shards(folder, self.rank, self.engine.shards())
        dist.barrier()
        if self.rank == 0:
            scalars = {**asdict(state), "engine": asdict(self.engine.state())}
            checkpoint.write_manifest(folder, self.world_size, scalars, shapes, records)
            checkpoint.prune_checkpoints(self.spec.checkpoints, self.plan.job.budget.keep_checkpoints)

    def _restore(self) -> tuple[TrainState, list[Record]]:
        """The newest sound checkpoint's state and records; a damaged one is named and the one before it is used."""
        for folder in self._candidates():
            problems: list[str | None] = [None] * self.world_size
            dist.all_gather_object(problems, checkpoint.check_checkpoint(folder, self.rank, self.world_size))
            found = [problem for problem in problems if problem]
            if not found:
                self.stage(f"loading {folder.name}")
                return self._load(folder)
            self.stage(f"refused {folder.name}: {found[0]}")
        return TrainState(), []

    def _candidates(self) -> list[Path]:
        """Complete checkpoints, newest first, as rank 0 sees them."""
        listed = [list(reversed(checkpoint.list_checkpoints(self.spec.checkpoints))) if self.rank == 0 else []]
        dist.broadcast_object_list(listed, src=0)
        return listed[0]

    def _load(self, folder: Path) -> tuple[TrainState, list[Record]]:
        reader = checkpoint.CheckpointReader(folder)
        self.engine.load(reader, EngineState(**reader.state["engine"]))
        known = {field.name: reader.state[field.name] for field in fields(TrainState) if field.name in reader.state}
        return TrainState(**known), reader.records()

    def _go_back(self) -> TrainState | None:
        """Loads the newest sound checkpoint in the middle of the training; None where there is none."""
        state, _ = self._restore()
        return state if state.step else None

    def _finish(self, state: TrainState) -> None:
        """Declares the phase complete. Its metrics are those of the last record, which the last checkpoint holds."""
        if self.rank > 0:
            return
        folder = checkpoint.checkpoint_folder(self.spec.checkpoints, state.step)
        last = checkpoint.CheckpointReader(folder).records()[-1]
        manifest = {
            "name": self.spec.phase.name,
            "fingerprint": self.spec.phase.fingerprint,
            "checkpoint": str(folder.relative_to(self.spec.phase_folder)),
            "steps": state.step,
            "skipped_steps": state.skipped,
            "seconds": state.seconds,
            "metrics": last["metrics"],
        }
        write_json(self.spec.phase_folder / PHASE_MANIFEST, manifest)


@contextmanager
def _process_group(device: str) -> Iterator[None]:
    """The group of all ranks, which the environment describes."""
    device_of(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _redirect_output(path: Path) -> None:
    """Sends what this process prints, its libraries' C code included, to the run's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", buffering=1)
    # Ray says every report, with all of its records, at level INFO.
    for handler in logging.getLogger("ray.train").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log


def _stage_writer(run_folder: Path, rank: int) -> Callable[[str], None]:
    """Tells people what a run is doing before its first step: rank 0 appends to `stages.jsonl`."""

    def stage(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
        if rank == 0:
            with (run_folder / STAGES).open("a") as file:
                file.write(json.dumps({"time_ms": int(time.time() * 1000), "text": text}) + "\n")

    return stage
