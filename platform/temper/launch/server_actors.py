"""The processes of a parameter-server run as Ray actors: shards of the parameters, and workers.

torch, and all that imports it, is imported in the actors' processes only; the driver knows these classes by name.
Answers that the driver reads are plain values.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper import remote_store
from temper.errors import RunError
from temper.files import read_json
from temper.launch.ledger import Computed, Pushed, Ticket
from temper.plan.build import Plan
from temper.plan.phases import PhasePlan, learning_rate
from temper.run_folder import PHASE_MANIFEST, STAGES, WorkerSpec

if TYPE_CHECKING:
    from torch import nn

    from temper.checkpoint import CheckpointReader
    from temper.data.batches import Batch
    from temper.data.sources import SplitName
    from temper.engine.parameter_server import (
        DownpourWorker,
        MiniBatch,
        Outcome,
        ParameterShard,
        Push,
        ShardState,
        Values,
    )
    from temper.evaluation import Answers, TeacherView
    from temper.tracking.history import Record


@dataclass(frozen=True)
class PhaseSpec:
    """What the processes of one phase are told: the run, and which of its phases is theirs."""

    run: WorkerSpec
    phase: PhasePlan

    @property
    def plan(self) -> Plan:
        return self.run.plan

    @property
    def folder(self) -> Path:
        return self.run.phase_folder(self.phase)

    @property
    def checkpoints(self) -> Path:
        return self.run.checkpoints(self.phase)

    def lr_at(self, step: int) -> float:
        """The learning rate of the job's step `step` (0-based)."""
        return learning_rate(self.plan.job, self.phase)(step - self.phase.first_step)


class ShardActor:
    """One shard. Ray starts it again where its process is lost, and makes the calls again that it had not answered.

    It then goes on from the phase's newest complete checkpoint, or from where the phase began if there is none yet.
    What was pushed since is lost: at most what is pushed from one checkpoint to the next, `checkpoint_every` ×
    `workers` / `n_push` pushes, and while the next one's evaluation is under way; with `checkpoint_every: 0` all.
    """

    def __init__(self, spec: PhaseSpec, index: int) -> None:
        self._spec, self._index = spec, index
        self._locks = ExitStack()

    # Built at the first call and not in the constructor, so that an error reaches the caller and is not tried again.
    @cached_property
    def _shard(self) -> ParameterShard:
        from temper.engine.parameter_server import ParameterShard, named_shapes
        from temper.locks import awaited

        plan = self._spec.plan
        _enter_process(self._spec.run, f"shard-{self._index}")
        say, lock = stage_writer(plan.run_folder), plan.lock(self._spec.phase, self._index)
        with ExitStack() as locks:
            locks.enter_context(awaited(lock, lambda: say("waiting for the end of an earlier attempt")))
            model = _build_model(self._spec)
            shard = ParameterShard(model, self._index, plan.job.parallel.shards, plan.job.optimizer)
            start = find_start(self._spec)
            if start.reader is not None:
                shard.load(start.reader, self._state_at(start))
            self._shapes, self._found = named_shapes(model), start.describe(self._spec.phase)
            self._locks = locks.pop_all()
        return shard

    def _state_at(self, start: Start) -> ShardState:
        """Where a phase begins, nothing is pushed yet; its updates are counted on where the moments go on."""
        from temper.engine.parameter_server import ShardState

        assert start.reader is not None
        saved = ShardState(**start.reader.state["server"]["shards"][self._index])
        if start.is_resumed:
            return saved
        return ShardState(0 if self._spec.phase.fresh else saved.version, {})

    def ready(self) -> dict[str, Any]:
        """The state that the phase goes on from, see :meth:`Start.describe`."""
        assert self._shard
        return self._found

    def fetch(self) -> tuple[Values, int]:
        return self._shard.fetch()

    def push(self, worker: str, clock: int, gradient: Values, fetched_version: int, lr: float) -> int:
        return self._shard.push(worker, clock, gradient, fetched_version, lr)

    def save(self, step: int, stored: dict[str, Any] | None) -> dict[str, Any]:
        """Writes this shard's part of the checkpoint of `step`, with the tensors `stored` where they are given, and
        returns the shard's state. The checkpoint counts when :meth:`complete` has been called on one shard."""
        from temper import checkpoint

        parts = self._shard.shards()
        for name, value in (stored or {}).items():
            parts.append(checkpoint.Shard(name, 0, {checkpoint.BUFFER: value.reshape(-1)}))
        folder = checkpoint.checkpoint_folder(self._spec.checkpoints, step)
        checkpoint.write_shards(folder, self._index, parts)
        remote_store.publish_shards(folder, self._index)
        return asdict(self._shard.state())

    def complete(self, state: dict[str, Any], records: list[Record]) -> str:
        """Completes the checkpoint that all shards have saved, removes old ones and returns its folder's name."""
        from temper import checkpoint

        assert self._shard
        job = self._spec.plan.job
        folder = checkpoint.checkpoint_folder(self._spec.checkpoints, state["step"])
        remote_store.fetch_digests(folder, job.parallel.shards)
        checkpoint.write_manifest(folder, job.parallel.shards, state, self._shapes, records)
        checkpoint.prune_checkpoints(self._spec.checkpoints, job.budget.keep_checkpoints)
        remote_store.publish_checkpoint(folder, job.budget.keep_checkpoints)
        return folder.name

    # ------------------------------------------------------------------------------------ in sparse and re-dense phases

    @property
    def _layers(self) -> list[str]:
        """The weights that are pruned, or were in the sparse phase before."""
        from temper.techniques.dsd.sparsity import latest_pruning

        pruning = latest_pruning(self._spec.plan.phases, self._spec.phase)
        assert pruning is not None
        return list(pruning.layers)

    def count_zeros(self) -> list[int]:
        """How many of each pruned layer's weights are exactly zero in this shard's range."""
        from temper.techniques.dsd.sparsity import count_zeros

        return count_zeros(self._shard.shards(), self._layers).tolist()

    def sparsity(self, *zeros: list[int]) -> dict[str, float]:
        """The metrics from what all shards have counted."""
        from temper.techniques.dsd.sparsity import sparsity_metrics

        assert self._shard
        return sparsity_metrics([sum(counts) for counts in zip(*zeros, strict=True)], self._layers, self._shapes)

    def summarize(self, folder: str) -> None:
        """Writes down what came of the weights in the phase, whose last checkpoint is `folder`."""
        from temper.techniques.dsd.summary import summarize, write_summary

        assert self._shard
        phase, before = self._spec.phase, end_of_phase_before(self._spec)
        assert before is not None
        write_summary(self._spec.folder, summarize(phase, self._layers, before, self._spec.checkpoints / folder))


class RemoteShard:
    """A worker's way to a shard: see :class:`temper.engine.parameter_server.ShardClient`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def fetch(self) -> Awaitable[tuple[Values, int]]:
        return self._actor.fetch.remote()

    def push(self, worker: str, clock: int, gradient: Values, fetched_version: int, lr: float) -> Awaitable[int]:
        return self._actor.push.remote(worker, clock, gradient, fetched_version, lr)


class WorkerActor:
    """One worker. It keeps its own batch-norm statistics while it trains; see :meth:`refresh`.

    The caller numbers its calls from 0, because Ray may begin those of an asyncio actor in another order than they were
    made in.
    """

    def __init__(self, spec: PhaseSpec, number: int, shards: list[Any]) -> None:
        self._spec, self._number, self._actors = spec, number, shards
        self._name = f"{number}-{uuid.uuid4().hex}"
        self._next_turn = 0
        self._early: dict[int, asyncio.Future[None]] = {}

    async def _turn(self, turn: int) -> None:
        """Waits until all calls before `turn` have begun."""
        if turn != self._next_turn:
            await self._early.setdefault(turn, asyncio.get_running_loop().create_future())
        self._next_turn += 1
        if self._next_turn in self._early:
            self._early.pop(self._next_turn).set_result(None)

    async def prepare(self, turn: int) -> str:
        """Loads the data and builds the model, with the buffers and masks that the phase goes on from. Returns the
        name of the device that the driver gives it, empty for a CPU."""
        await self._turn(turn)
        return self._prepare()

    def _prepare(self) -> str:
        import torch

        from temper.data.sources import labelling_of, load_splits
        from temper.engine.deepspeed_setup import device_of
        from temper.engine.parameter_server import DownpourWorker, Replica
        from temper.losses import build_loss
        from temper.techniques.distill.technique import build_distillation

        plan = self._spec.plan
        job = plan.job
        _enter_process(self._spec.run, f"rank-{self._number}", max(1, int(job.parallel.cpus_per_worker)))
        self._loss = build_loss(job.loss)
        self._splits = load_splits(job.data, job.storage_folder, plan.data, labelling_of(job))
        device = device_of(plan.mesh.device)
        self._technique = build_distillation(plan, self._loss, device)
        loss = self._loss if self._technique is None else self._technique.loss
        replica = Replica(_build_model(self._spec), loss, job.precision, device)
        start = find_start(self._spec)
        if start.reader is not None:
            replica.load(start.reader)
        self._downpour: DownpourWorker = DownpourWorker(
            self._name,
            replica,
            [RemoteShard(actor) for actor in self._actors],
            n_fetch=job.parallel.n_fetch,
            n_push=job.parallel.n_push,
            clip_norm=job.optimizer.clip_norm,
        )
        if self._number == 0 and start.reader is None and self._teacher is not None:
            self._teacher.metrics()
        return torch.cuda.get_device_name(device) if device.type == "cuda" else ""

    async def train(self, turn: int, ticket: Ticket) -> Pushed | None:
        """Computes one mini-batch; where that is the last of a push, answers when every shard has it."""
        await self._turn(turn)
        return _plain(await self._downpour.train(ticket, lambda: self._mini_batch(ticket)))

    async def flush(self, turn: int, step: int) -> Pushed | None:
        """Pushes what is left of less than `n_push` mini-batches, at the learning rate of `step`."""
        await self._turn(turn)
        return _plain(await self._downpour.flush(self._spec.lr_at(step)))

    async def refresh(self, turn: int) -> tuple[None, dict[str, Any]]:
        """Brings the model up to date, to be evaluated; returns its buffers and frozen parameters, to be stored.

        They travel from here to the shard that writes them; the driver waits for the first value only.
        """
        from temper.engine.parameter_server import stored_tensors

        await self._turn(turn)
        await self._downpour.fetch()
        stored = stored_tensors(self._downpour.replica.module)
        return None, {name: value.detach().cpu().clone() for name, value in stored.items()}

    async def evaluate(self, turn: int, last: bool) -> dict[str, float]:
        """See :func:`temper.evaluation.evaluate_splits`; `last`: at the end of the phase."""
        await self._turn(turn)
        return await self._downpour.use(lambda: self._evaluate(last))

    def _evaluate(self, last: bool) -> dict[str, float]:
        from temper.evaluation import evaluate_splits

        values = evaluate_splits(self._on, self._spec.plan.data.validation_examples > 0, last)
        return values if self._teacher is None else {**values, **self._teacher.metrics()}

    def _on(self, split: SplitName) -> dict[str, float]:
        answers = None if self._teacher is None else self._teacher.answers(split)
        return self._measure(self._downpour.replica.predict, self._eval_batches(split), answers)

    def _eval_batches(self, split: SplitName) -> Iterator[tuple[Batch, int]]:
        from temper.data.batches import eval_batches

        plan = self._spec.plan
        batch = plan.job.evaluation.batch
        return eval_batches(plan.job.data, self._splits[split], plan.data, rank=0, world_size=1, batch=batch)

    def _measure(
        self, predict: Callable[[Any], Any], batches: Iterator[tuple[Batch, int]], answers: Answers | None = None
    ) -> dict[str, float]:
        from temper.evaluation import evaluate

        device = self._downpour.replica.device
        return evaluate(predict, batches, self._loss, self._metrics, device, answers=answers)

    @cached_property
    def _teacher(self) -> TeacherView | None:
        """None where there is no teacher."""
        from temper.evaluation import TeacherView

        technique, distill, device = self._technique, self._spec.plan.distill, self._downpour.replica.device
        if technique is None or distill is None:
            return None
        measure = partial(self._measure, lambda logits: logits.to(device))
        return TeacherView(distill, lambda split: technique.asked(split, self._eval_batches(split)), measure)

    @cached_property
    def _metrics(self) -> Any:
        """Built at the first evaluation: torchmetrics takes seconds to import, and the first step need not wait."""
        from temper.metrics import build_metrics

        plan = self._spec.plan
        return build_metrics(plan.job.evaluation, plan.data, self._downpour.replica.device)

    def _mini_batch(self, ticket: Ticket) -> MiniBatch:
        """The part of the global batch that is rank `ticket.part`'s in synchronous training."""
        from temper.data.batches import train_batches, views_of
        from temper.engine.parameter_server import MiniBatch
        from temper.loop import step_seed

        plan = self._spec.plan
        job = plan.job
        batches = train_batches(
            job.data,
            self._splits["train"],
            plan.data,
            seed=job.seed,
            batch=plan.batch,
            rank=ticket.part,
            world_size=plan.mesh.data,
            first_step=ticket.step,
            last_step=ticket.step + 1,
            views=views_of(job),
        )
        batch, _ = next(batches)
        seed = step_seed(job.seed, ticket.step, ticket.part)
        targets = batch.targets if self._technique is None else self._technique.prepare(batch, ticket.step)
        return MiniBatch(batch.inputs, targets, self._spec.lr_at(ticket.step), seed)


def _plain(push: Push | None) -> Pushed | None:
    """What the driver is told of a push, in types that it knows without torch."""
    return None if push is None else Pushed(push.staleness, {item.ticket: _computed(item) for item in push.outcomes})


def _computed(outcome: Outcome) -> Computed:
    terms = {f"train/loss/{name}": value for name, value in outcome.terms.items()}
    losses = {"train/loss": sum(terms.values()), **(terms if len(terms) > 1 else {})}
    return Computed(losses, outcome.grad_norm)


# --------------------------------------------------------------------------------------------------- in every process


@dataclass(frozen=True)
class Start:
    """Where the processes of a phase start from.

    `reader` has the phase's newest sound checkpoint if `is_resumed`, else the end of the phase before as this one
    begins with it; it is None where the job begins. `refused` says what is wrong with a newer checkpoint.
    """

    reader: CheckpointReader | None
    is_resumed: bool
    refused: str | None

    def describe(self, phase: PhasePlan) -> dict[str, Any]:
        """The phase's state, with the `folder` and the `records` of its checkpoint, and `refused`, as plain values."""
        if self.reader is None or not self.is_resumed:
            begun = {"step": phase.first_step, "seconds": 0.0, "server": {}, "folder": "", "records": []}
            return {**begun, "refused": self.refused}
        reader = self.reader
        return {**reader.state, "folder": reader.folder.name, "records": reader.records(), "refused": self.refused}


def find_start(spec: PhaseSpec) -> Start:
    """Where `spec`'s phase goes on from. Whoever asks first or last finds the same masks.

    Raises:
        RunError: the phase begins with the end of the one before it, and that is damaged.
    """
    from temper.checkpoint import check_checkpoint
    from temper.techniques.dsd.border import begin_phase

    reader, refused = newest_checkpoint(spec.checkpoints)
    if reader is not None:
        return Start(reader, True, refused)
    before = end_of_phase_before(spec)
    if before is None:
        return Start(None, False, refused)
    problem = check_checkpoint(before)
    if problem is not None:
        name = spec.phase.name
        raise RunError(f"{name} cannot begin with the end of the phase before: {problem}; train it anew (--fresh)")
    return Start(begin_phase(before, spec.phase), False, refused)


def end_of_phase_before(spec: PhaseSpec) -> Path | None:
    """The last checkpoint of the phase before `spec`'s; None for the first phase."""
    before = spec.plan.phase_before(spec.phase)
    if before is None:
        return None
    folder = spec.run.phase_folder(before)
    remote_store.fetch_phase(folder)
    manifest = read_json(folder / PHASE_MANIFEST)
    assert manifest is not None, f"{before.name} is not complete"
    return folder / str(manifest["checkpoint"])


def newest_checkpoint(root: Path) -> tuple[CheckpointReader | None, str | None]:
    """The newest sound checkpoint in `root`, and what is wrong with the newest, if it is not that."""
    from temper.checkpoint import MANIFEST, CheckpointReader, check_checkpoint, list_checkpoints

    remote_store.fetch_newest_checkpoint(root)
    refused = None
    for folder in reversed(list_checkpoints(root)):
        problem = check_checkpoint(folder)
        if problem is None:
            return CheckpointReader(folder), refused
        if not (folder / MANIFEST).is_file():
            # Not damaged: a newer one was completed meanwhile, and this one removed.
            return newest_checkpoint(root)
        refused = refused or f"{folder.name}: {problem}"
    return None, refused


def _build_model(spec: PhaseSpec) -> nn.Module:
    from temper.models.build import build_model

    return build_model(spec.plan.job.model, spec.plan.data, spec.plan.job.seed)


def _enter_process(spec: WorkerSpec, name: str, threads: int = 1) -> None:
    """What a new process does first: its output goes to `logs/<name>.log`, and the user's modules are found."""
    import torch

    from temper.targets import apply_target_folders

    warnings.filterwarnings("ignore")
    path = spec.run_folder / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", buffering=1)
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        stream.flush()
        os.dup2(log.fileno(), number)
    sys.stdout = sys.stderr = log
    torch.set_num_threads(threads)
    apply_target_folders([Path(folder) for folder in spec.import_folders])


def stage_writer(run_folder: Path) -> Callable[[str], None]:
    """Tells people what a run is doing: appends to `stages.jsonl`."""

    def stage(text: str) -> None:
        with (run_folder / STAGES).open("a") as file:
            file.write(json.dumps({"time_ms": int(time.time() * 1000), "text": text}) + "\n")

    return stage
