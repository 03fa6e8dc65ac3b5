"""What runs in each Ray Train worker: builds every part of a phase by name, wires them, calls the loop.

Ray is not imported here; the one thing that a worker needs of it, the report call, is handed in.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from temper import checkpoint, remote_store
from temper.console import quieten
from temper.data.batches import Batch, DataState, eval_batches, train_batches, views_of
from temper.data.sources import Split, SplitName, labelling_of, load_splits
from temper.engine.base import EngineState, LossFunction
from temper.engine.build import build_engine
from temper.engine.deepspeed_setup import device_of, passing_engines, prepare
from temper.engine.sharded import shard_module
from temper.errors import RunError
from temper.evaluation import Answers, TeacherView, evaluate, evaluate_splits
from temper.files import read_lines
from temper.locks import awaited
from temper.loop import Calendar, Interrupted, Record, Reporter, TrainState, build_recovery, train
from temper.losses import build_loss
from temper.metrics import build_metrics
from temper.models.build import build_model
from temper.parallel.groups import Group, MeshGroups, build_groups
from temper.plan.build import Plan
from temper.plan.mesh import MeshPlan
from temper.plan.peaks import Speed, plan_speed
from temper.plan.phases import PhasePlan, learning_rate
from temper.precision.watch import TwinWatch, Watch, unwatched, watch_skips
from temper.products import complete_phase, read_phase
from temper.run_folder import PHASE_MANIFEST, STAGES, STOP, TraceSpec, TraceTask, WorkerSpec
from temper.targets import apply_target_folders, forget_modules
from temper.techniques.distill.features import FeatureTaps
from temper.techniques.distill.technique import Distillation, build_distillation
from temper.techniques.dsd.border import begin_phase
from temper.techniques.dsd.sparsity import count_zeros, latest_pruning, sparsity_metrics
from temper.techniques.dsd.summary import summarize, write_summary
from temper.verify import begin_at_once, trace

Report = Callable[[str, list[Record]], None]
"""Takes the name of a phase and records of it. All ranks call it together; only rank 0 has records."""


def work(spec: WorkerSpec, report: Report) -> None:
    """Trains the spec's phases on this rank, one after the other; the first that is not complete resumes from its
    newest sound checkpoint. Collective over all workers."""
    rank = int(os.environ["RANK"])
    stage = _begin(spec, rank)
    prepare(spec.plan.mesh.device)
    try:
        with _alone(spec, rank, stage), process_group(spec.plan.mesh.device):
            _train_phases(_Worker(spec, rank, stage, Kept()), report)
    except Exception as error:
        # Ray Train takes the traceback off on the way to the controller; a note stays.
        error.add_note(traceback.format_exc())
        raise


class WarmWorker:
    """A rank that outlives the runs that it serves: its process, its imports, its process groups and the data of the
    run before stay, and everything else of a run is gone when it ends. Collective in all of its methods."""

    def __init__(self, device: str) -> None:
        self.rank = int(os.environ["RANK"])
        prepare(device)
        self._kept = Kept()

    def work(self, spec: WorkerSpec, port: Port) -> None:
        """As :func:`work`, in the process group that is there. Raises Interrupted where `port` asked for a stop."""
        with self.nothing_left(spec.import_folders):
            stage = _begin(spec, self.rank)
            self._kept.groups(spec.plan.mesh)  # which outlive the engine
            with _alone(spec, self.rank, stage), passing_engines():
                worker = _Worker(spec, self.rank, stage, self._kept, port)
                try:
                    _train_phases(worker, port.report)
                finally:
                    worker.engine.close()

    @contextmanager
    def nothing_left(self, import_folders: Sequence[str]) -> Iterator[None]:
        """What happens in this block leaves nothing in this process that the next run could notice."""
        path, threads = list(sys.path), torch.get_num_threads()
        linear, fastpath = torch.nn.functional.linear, torch.backends.mha.get_fastpath_enabled()
        try:
            yield
        finally:
            sys.path[:] = path
            forget_modules([Path(folder) for folder in import_folders])
            torch.set_num_threads(threads)
            # DeepSpeed's ZeRO-3 puts one of its own in its place, and split attention switches the other off.
            torch.nn.functional.linear = linear
            torch.backends.mha.set_fastpath_enabled(fastpath)
            gc.collect()  # engines hold themselves in cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _begin(spec: WorkerSpec, rank: int) -> Callable[[str], None]:
    """Points this process at the run: its log, its targets; returns what tells people where it is."""
    _redirect_output(spec.run_folder / "logs" / f"rank-{rank}.log")
    apply_target_folders([Path(folder) for folder in spec.import_folders])
    stage = _stage_writer(spec.run_folder, rank)
    stage(f"loading {spec.plan.job.data.kind}")
    return stage


@contextmanager
def _alone(spec: WorkerSpec, rank: int, stage: Callable[[str], None]) -> Iterator[None]:
    """Waits for the ranks of an earlier attempt that have not yet noticed its end."""
    with ExitStack() as earlier:
        for phase in spec.phases:
            lock = spec.plan.lock(phase, rank)
            earlier.enter_context(awaited(lock, lambda: stage("waiting for the end of an earlier attempt")))
        yield


def _train_phases(worker: _Worker, report: Report) -> None:
    incomplete = _incomplete(worker.spec)
    for phase in worker.spec.phases:
        if phase not in incomplete:
            # It may have ended with its last report not yet heard.
            report(phase.name, worker.last_records(phase))
        elif worker.run(phase, partial(report, phase.name)) and phase != worker.spec.phases[-1]:
            raise Interrupted


def _incomplete(spec: WorkerSpec) -> list[PhasePlan]:
    """The phases that an attempt before this one has not completed, as rank 0 sees them."""
    for phase in spec.phases if dist.get_rank() == 0 else ():
        remote_store.fetch_phase(spec.phase_folder(phase))
    found = [{phase.name for phase in spec.phases if not (spec.phase_folder(phase) / PHASE_MANIFEST).exists()}]
    dist.broadcast_object_list(found, src=0)
    return [phase for phase in spec.phases if phase.name in found[0]]


def trace_work(spec: TraceSpec) -> None:
    """Takes the first steps of each of the spec's traces and writes down what they did. Collective over all workers."""
    rank = int(os.environ["RANK"])
    _redirect_output(spec.run_folder / "logs" / f"verify-rank-{rank}.log")
    apply_target_folders([Path(folder) for folder in spec.import_folders])
    prepare(spec.plan.mesh.device)
    with process_group(spec.plan.mesh.device):
        groups = build_groups(spec.plan.mesh.data, spec.plan.mesh.pipeline, spec.plan.mesh.tensor)
        for task in spec.traces:
            _trace(task, spec.steps, groups)


def _trace(task: TraceTask, steps: int, groups: MeshGroups) -> None:
    plan, job = task.plan, task.plan.job
    model = build_model(job.model, plan.data, job.seed)
    parts = build_parts(plan, groups)
    engine = build_engine(model, parts.loss, job, plan.batch, plan.mesh, groups, task.phase.deepspeed, parts.taps)
    if task.phase.pruning is not None:
        begin_at_once(engine, task.phase, task.folder)
    batches = train_batches(
        job.data,
        load_splits(job.data, job.storage_folder, plan.data, labelling_of(job))["train"],
        plan.data,
        seed=job.seed,
        batch=plan.batch,
        rank=groups.data.rank,
        world_size=groups.data.size,
        first_step=0,
        last_step=steps,
        views=views_of(job),
    )
    examples = (batch for batch, _ in batches)
    lr_at = learning_rate(job, task.phase)
    trace(engine, model, examples, task.folder, lr_at=lr_at, seed=job.seed, technique=parts.technique)


@dataclass(frozen=True)
class Parts:
    """What decides a step's loss: `base` on the labels alone, `loss` as it is trained on; `taps` hook levels."""

    base: LossFunction
    loss: LossFunction
    technique: Distillation | None
    taps: FeatureTaps | None


def build_parts(plan: Plan, groups: MeshGroups) -> Parts:
    """The loss of the plan's job, and its technique where it has one. Collective where a teacher is sharded."""
    base = build_loss(plan.job.loss)
    technique = build_distillation(plan, base, device_of(plan.mesh.device), groups, shard_module)
    if technique is None:
        return Parts(base, base, None, None)
    return Parts(base, technique.loss, technique, technique.taps)


class Port:
    """A run's connection to who watches it. `decisive` are steps after which a report is answered before the training
    goes on: whether it does."""

    decisive: frozenset[int] = frozenset()

    def report(self, phase: str, records: list[Record]) -> None:
        """All ranks call it together; only rank 0 has records."""

    def stop_requested(self) -> bool:
        """Rank 0's answer counts."""
        return False


class Kept:
    """What a rank keeps from run to run because it depends on no run: process groups by mesh, and the last data."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int, int], MeshGroups] = {}
        self._splits: tuple[str, dict[SplitName, Split]] | None = None

    def groups(self, mesh: MeshPlan) -> MeshGroups:
        key = (mesh.data, mesh.pipeline, mesh.tensor)
        if key not in self._groups:
            self._groups[key] = build_groups(*key)
        return self._groups[key]

    def splits(self, plan: Plan) -> dict[SplitName, Split]:
        job = plan.job
        # Where all examples have their labels, nothing depends on the seed.
        labelling = asdict(labelling_of(job)) if job.data.labels < 1 else None
        parts = [job.data.model_dump(mode="json"), job.storage, asdict(plan.data), labelling]
        key = json.dumps(parts, sort_keys=True, default=str)
        if self._splits is None or self._splits[0] != key:
            self._splits = None  # not both at once in memory
            self._splits = key, load_splits(job.data, job.storage_folder, plan.data, labelling_of(job))
        return self._splits[1]


class _Worker:
    """The parts of one rank, built once a run."""

    def __init__(
        self, spec: WorkerSpec, rank: int, stage: Callable[[str], None], kept: Kept, port: Port | None = None
    ) -> None:
        plan = self.plan = spec.plan
        job = plan.job
        self.spec, self.rank, self.stage = spec, rank, stage
        self.port = port or Port()
        self._stop = remote_store.Flag(spec.run_folder / STOP, plan.cluster.nodes)
        self.world_size = plan.mesh.world_size
        self.splits = kept.splits(plan)
        stage(f"building {job.model.kind}")
        model = build_model(job.model, plan.data, job.seed)
        self.groups = kept.groups(plan.mesh)
        if plan.distill is not None and plan.distill.cache is None:
            stage(f"building the teacher ({', '.join(teacher.name for teacher in plan.distill.teachers)})")
        self.parts = build_parts(plan, self.groups)
        config = spec.phases[0].deepspeed
        self.engine = build_engine(
            model, self.parts.loss, job, plan.batch, plan.mesh, self.groups, config, self.parts.taps
        )

    def last_records(self, phase: PhasePlan) -> list[Record]:
        """Rank 0's: what a complete phase's last checkpoint has."""
        return checkpoint.CheckpointReader(self._end_of(phase)).records() if self.rank == 0 else []

    @cached_property
    def _metrics(self) -> Any:
        """Built at the first evaluation: torchmetrics takes seconds to import, and the first step need not wait."""
        return build_metrics(self.plan.job.evaluation, self.plan.data, self.engine.device, self.groups.data)

    @cached_property
    def _speed(self) -> Speed:
        """Collective on GPUs."""
        on_gpu = self.plan.mesh.device == "cuda"
        devices = self._share(torch.cuda.get_device_name(self.engine.device)) if on_gpu else []
        return plan_speed(self.plan, devices)

    def run(self, phase: PhasePlan, report: Callable[[list[Record]], None]) -> bool:
        """Trains `phase` to its end, from its newest sound checkpoint or else from the end of the phase before; whether
        a stop was asked for in its last step."""
        job, plan = self.plan.job, self.plan
        restored = self._restore(phase)
        state, records = restored or (self._enter(phase), [])
        report(records if self.rank == 0 else [])
        reporter = Reporter(
            report,
            self._stop_requested,
            first_step=state.step,
            rank=self.rank,
            world_size=self.world_size,
            speed=self._speed,
            record_every=job.tracking.record_every,
            device=self.engine.device,
            constants={"phase": float(plan.phases.index(phase))},
        )
        if state.step == 0 and self._teacher is not None:
            reporter.add_metrics(1, self._teacher.metrics())
        if state.step == 0 or restored:
            self.stage("taking the first step" if state.step == 0 else f"training from step {state.step}")
        state = train(
            self.engine,
            self._train_batches(state.step, phase.last_step),
            state,
            calendar=Calendar(
                phase.last_step, job.budget.evaluate_every, job.budget.checkpoint_every, self.port.decisive
            ),
            lr_at=learning_rate(job, phase),
            seed=job.seed,
            rank=self.groups.data.rank,
            reporter=reporter,
            evaluate=partial(self._evaluate, phase),
            save=lambda reached: self._save(phase, reached, reporter.take_segment()),
            watch=self._watch(),
            recover=build_recovery(job.precision.at_min_scale, partial(self._go_back, phase)),
            technique=self.parts.technique,
        )
        self._finish(phase, state)
        return reporter.stop

    def _stop_requested(self) -> bool:
        return self.port.stop_requested() or self._stop.is_set()

    def _watch(self) -> Watch:
        """Only fp16 has a loss scale to be looked at, and only a rank with the whole model can run it again."""
        precision = self.plan.job.precision
        if precision.dtype != "fp16":
            return unwatched
        if self.groups.replica.size > 1:
            return watch_skips
        ranks = self.groups.data.process_group
        every, has_levels = precision.underflow_every, self.parts.taps is not None
        return TwinWatch(self.engine, self.parts.loss, self.plan.batch.accumulation, ranks, every, has_levels)

    def _train_batches(self, first_step: int, last_step: int) -> Iterator[tuple[Batch, DataState]]:
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
            last_step=last_step,
            views=views_of(plan.job),
        )

    def _evaluate(self, phase: PhasePlan, step: int) -> Mapping[str, float]:
        held_out = self.plan.data.validation_examples > 0
        return {**evaluate_splits(self._on, held_out, step == phase.last_step), **self._sparsity(phase)}

    def _sparsity(self, phase: PhasePlan) -> dict[str, float]:
        """See :mod:`temper.techniques.dsd.sparsity`. Collective."""
        pruning = latest_pruning(self.plan.phases, phase)
        if pruning is None:
            return {}
        layers = list(pruning.layers)
        zeros = count_zeros(self.engine.shards(), layers).to(self.engine.device)
        dist.all_reduce(zeros)
        return sparsity_metrics(zeros.tolist(), layers, self.engine.shapes())

    def _on(self, split: SplitName) -> dict[str, float]:
        answers = None if self._teacher is None else self._teacher.answers(split)
        return self._measure(self.engine.predict, self._eval_batches(split), answers)

    def _eval_batches(self, split: SplitName) -> Iterator[tuple[Batch, int]]:
        return eval_batches(
            self.plan.job.data,
            self.splits[split],
            self.plan.data,
            rank=self.groups.data.rank,
            world_size=self.groups.data.size,
            batch=self.plan.job.evaluation.batch,
        )

    def _measure(
        self, predict: Callable[[Tensor], Any], batches: Iterator[tuple[Batch, int]], answers: Answers | None = None
    ) -> dict[str, float]:
        device, group = self.engine.device, self.groups.data
        return evaluate(predict, batches, self.parts.base, self._metrics, device, group, answers)

    @cached_property
    def _teacher(self) -> TeacherView | None:
        """None where there is no teacher."""
        technique, distill, device = self.parts.technique, self.plan.distill, self.engine.device
        if technique is None or distill is None:
            return None

        def asked(split: SplitName) -> Iterator[tuple[Batch, int]]:
            self.stage("evaluating the teacher")
            return technique.asked(split, self._eval_batches(split))

        measure = partial(self._measure, lambda logits: logits.to(device))
        everyone = Group(self.rank, self.world_size, dist.group.WORLD)
        return TeacherView(distill, asked, measure, self.groups.data, everyone)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, phase: PhasePlan, state: TrainState, records: list[Record]) -> None:
        root = self.spec.checkpoints(phase)
        folder = checkpoint.checkpoint_folder(root, state.step)
        shapes = self.engine.shapes()
        keep = self.plan.job.budget.keep_checkpoints
        checkpoint.write_shards(folder, self.rank, self.engine.shards())
        remote_store.publish_shards(folder, self.rank)
        dist.barrier()
        if self.rank == 0:
            scalars = {**asdict(state), "engine": asdict(self.engine.state())}
            remote_store.fetch_digests(folder, self.world_size)
            checkpoint.write_manifest(folder, self.world_size, scalars, shapes, records)
            checkpoint.prune_checkpoints(root, keep)
            remote_store.publish_checkpoint(folder, keep)

    def _restore(self, phase: PhasePlan) -> tuple[TrainState, list[Record]] | None:
        """The phase's newest sound checkpoint's state and records, None where there is none; a damaged one is named and
        the one before it is used."""
        for folder in self._candidates(phase):
            problem = self._problem(folder)
            if problem is None:
                self.stage(f"loading {folder.name}")
                reader = checkpoint.CheckpointReader(folder)
                return self._load(reader), reader.records()
            self.stage(f"refused {folder.name}: {problem}")
        return None

    def _candidates(self, phase: PhasePlan) -> list[Path]:
        """Complete checkpoints, newest first, as rank 0 sees them."""
        root, found = self.spec.checkpoints(phase), list[Path]()
        if self.rank == 0:
            remote_store.fetch_newest_checkpoint(root)
            found = checkpoint.list_checkpoints(root)[::-1]
        listed = [found]
        dist.broadcast_object_list(listed, src=0)
        return listed[0]

    def _problem(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, or None; each rank reads a part of it."""
        problems: list[str | None] = [None] * self.world_size
        dist.all_gather_object(problems, checkpoint.check_checkpoint(folder, self.rank, self.world_size))
        return next((problem for problem in problems if problem), None)

    def _load(self, reader: checkpoint.CheckpointReader) -> TrainState:
        engine = EngineState(**reader.state["engine"])
        self.engine.load(reader, engine)
        known = {field.name: reader.state[field.name] for field in fields(TrainState) if field.name in reader.state}
        return TrainState(**known)

    def _enter(self, phase: PhasePlan) -> TrainState:
        """Begins a phase with the last checkpoint of the one before it, also where that was trained just now: so the
        result does not depend on it."""
        before = self.plan.phase_before(phase)
        if before is None:
            return TrainState()
        dist.barrier()  # until rank 0 has completed that checkpoint
        folder = self._end_of(before)
        problem = self._problem(folder)
        if problem is not None:
            raise RunError(
                f"{phase.name} cannot begin with the end of {before.name}: {problem}; train it anew (--fresh)"
            )
        self.stage(
            f"{phase.name}: " + ("choosing what is pruned" if phase.pruning else "all weights are trained again")
        )
        start = begin_phase(folder, phase, rank=self.rank, size=self.world_size, share=self._share)
        return self._load(start).in_next_phase()

    def _end_of(self, phase: PhasePlan) -> Path:
        """The last checkpoint of a complete phase."""
        folder = self.spec.phase_folder(phase)
        remote_store.fetch_phase(folder)
        manifest = read_phase(folder)
        if manifest is None:
            raise RunError(f"{phase.name} is not complete any more; start again, and it is computed anew")
        return folder / manifest["checkpoint"]

    def _share(self, own: Any) -> list[Any]:
        """What every rank has, from what this rank has."""
        parts = [None] * self.world_size
        dist.all_gather_object(parts, own)
        return parts

    def _go_back(self, phase: PhasePlan) -> TrainState | None:
        """Loads the phase's newest sound checkpoint in the middle of the training, or else where it began; None where
        that is the beginning of all."""
        restored = self._restore(phase)
        state = restored[0] if restored else self._enter(phase)
        return state if state.step else None

    def _finish(self, phase: PhasePlan, state: TrainState) -> None:
        """Declares the phase complete, with what came of its weights. Its metrics are those of the last record, which
        the last checkpoint holds."""
        folder = checkpoint.checkpoint_folder(self.spec.checkpoints(phase), state.step)
        pruning, before = latest_pruning(self.plan.phases, phase), self.plan.phase_before(phase)
        if pruning is not None and before is not None:
            dist.barrier()  # until rank 0 has completed the checkpoint
            remote_store.fetch_checkpoint(folder)
            layers, start = list(pruning.layers), self._end_of(before)
            summary = summarize(phase, layers, start, folder, rank=self.rank, size=self.world_size, share=self._share)
            if self.rank == 0:
                write_summary(self.spec.phase_folder(phase), summary)
        if self.rank == 0:
            last = read_lines(folder / checkpoint.RECORDS)[-1]
            manifest = {
                "name": phase.name,
                "fingerprint": phase.fingerprint,
                "checkpoint": str(folder.relative_to(self.spec.phase_folder(phase))),
                "steps": phase.steps,
                "skipped_steps": state.skipped - state.skipped_before,
                "seconds": state.seconds,
                "metrics": last["metrics"],
            }
            complete_phase(self.spec.phase_folder(phase), manifest)


@contextmanager
def process_group(device: str) -> Iterator[None]:
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
    quieten("ray.train", logging.WARNING)
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
