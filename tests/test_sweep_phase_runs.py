"""Who computes the phases that a trial lacks: the first that comes, once for all; the others wait and hold nothing."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml

import mlp_facts
from temper.config.load import build_job
from temper.errors import RunError
from temper.files import describe_file, write_json
from temper.launch.phase_store import is_complete
from temper.launch.sweep import phase_runs
from temper.launch.sweep.phase_runs import PhaseRunner, Watcher, truncated
from temper.launch.sweep.pool import Cancelled, OnReport, Records
from temper.launch.sweep.tasks import AskTask, Outcome, TrainTask
from temper.launch.teachers import plan_job
from temper.locks import claimed, is_held
from temper.plan import probe
from temper.plan.build import Plan
from temper.plan.mesh import ClusterShape
from temper.plan.phases import PhasePlan
from temper.plan.room import GroupShape
from temper.products import complete_phase
from temper.run_folder import HISTORY, JOB, LOCK, PLAN
from temper.techniques.distill.cache_files import Piece
from temper.tracking.history import read_history

CHAIN = ("dense", "sparse-1", "redense-1")
TEACHER: dict[str, Any] = {
    "name": "wise",
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "parallel": {"cpus_per_worker": 0.5},
    "budget": {"steps": 30},
}
JOB_FILE: dict[str, Any] = {
    **TEACHER,
    "name": "young",
    "parallel": {"workers": 2, "max_restarts": 2},
    "dsd": {"rounds": [{"sparsity": 0.5, "sparse_steps": 20, "redense_steps": 10}]},
}
DONE, LOST = Outcome("done"), Outcome("lost", "a worker was lost")


@pytest.fixture(autouse=True)
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = asdict(mlp_facts.FACTS) | {"prunable": [asdict(weight) for weight in mlp_facts.PRUNABLE]}
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(known)))
    monkeypatch.chdir(tmp_path)


def planned(*overrides: str, **sections: Any) -> Plan:
    job = build_job({**JOB_FILE, "storage": str(Path.cwd() / "runs"), **sections}, overrides)
    return plan_job(job, ClusterShape(nodes=1, cpus=8.0, gpus=0.0), Path.cwd())


def student(**distill: Any) -> Plan:
    """One whose teacher is a job in `wise.yaml`."""
    (Path.cwd() / "wise.yaml").write_text(yaml.safe_dump(TEACHER))
    return planned(distill={"teacher": {"source": "wise.yaml"}, **distill})


def teacher_of(plan: Plan) -> Plan:
    assert plan.distill is not None
    (teacher,) = plan.distill.teachers
    assert teacher.plan is not None
    return teacher.plan


def finish(plan: Plan, phase: PhasePlan) -> None:
    """The phase as workers leave it, its last record not heard."""
    folder = plan.phase_folder(phase)
    end = folder / "checkpoints" / f"step-{phase.last_step:08}"
    end.mkdir(parents=True)
    (end / "rank-00000.safetensors").write_bytes(phase.name.encode())
    (end / "records.jsonl").write_text(json.dumps(record(phase.last_step)) + "\n")
    files = {path.name: describe_file(path) for path in end.iterdir()}
    write_json(end / "manifest.json", {"format": 1, "step": phase.last_step, "files": files})
    manifest = {"name": phase.name, "fingerprint": phase.fingerprint, "steps": phase.steps, "metrics": {}}
    complete_phase(folder, {**manifest, "checkpoint": str(end.relative_to(folder))})


def record(step: int) -> dict[str, Any]:
    return {"step": step, "time_ms": step, "metrics": {"train/loss": 1.0}}


# ------------------------------------------------------------------------------------------------------ who plays along


class Workers:
    """In a pool's place: what is performed is done here and now by the next of `turns`, or else computed."""

    def __init__(self, *turns: Callable[[Any, OnReport], Outcome]) -> None:
        self._turns = deque(turns)
        self.tasks: list[Any] = []
        self.shapes: list[GroupShape] = []
        self.held = 0
        self.cancelled: Callable[[], bool] | None = None

    @contextmanager
    def taken(self, shape: GroupShape, cancelled: Callable[[], bool]) -> Iterator[None]:
        self.cancelled = cancelled
        if cancelled():
            raise Cancelled
        self.shapes.append(shape)
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def perform_in(self, group: None, task: Any, on_report: OnReport) -> Outcome:
        self.tasks.append(task)
        return self._turns.popleft()(task, on_report) if self._turns else compute(task, on_report)

    def perform(self, task: Any, shape: GroupShape, on_report: OnReport, cancelled: Callable[[], bool]) -> Outcome:
        with self.taken(shape, cancelled) as group:
            return self.perform_in(group, task, on_report)


def compute(task: Any, on_report: OnReport) -> Outcome:
    if isinstance(task, TrainTask):
        for phase in task.spec.phases:
            finish(task.spec.plan, phase)
    return DONE


def outcome(told: Outcome) -> Callable[[Any, OnReport], Outcome]:
    return lambda task, on_report: told


class Log(Watcher):
    """What a watcher hears; it does not want the phases any more after `patience` questions."""

    decisive = frozenset((5, 7))

    def __init__(self, patience: int = 10_000) -> None:
        self.heard: list[Any] = []
        self._patience = patience

    def is_cancelled(self) -> bool:
        self._patience -= 1
        return self._patience < 0

    def know(self) -> None:
        self.heard.append("know")

    def tell(self, state: Literal["waiting", "running"]) -> None:
        self.heard.append(state)

    def report(self, phase: str, records: Records) -> bool:
        self.heard.append((phase, records))
        return True

    def computed(self, phase: PhasePlan) -> None:
        self.heard.append(phase.name)


class Runner:
    """A phase runner, who asked for teachers, and what was said."""

    def __init__(self, *turns: Callable[[Any, OnReport], Outcome]) -> None:
        self.workers = Workers(*turns)
        self.said: list[str] = []
        self.teachers: list[tuple[Plan, Watcher]] = []
        self.log = Log()
        self._runner = PhaseRunner(self.workers, self._watch_teacher, self.said.append)  # type: ignore[arg-type]

    @contextmanager
    def _watch_teacher(self, plan: Plan, student: Watcher) -> Iterator[Watcher]:
        self.teachers.append((plan, student))
        yield Log()

    def complete(self, plan: Plan) -> None:
        self._runner.complete(plan, ("here",), self.log)

    def teach(self, plan: Plan) -> None:
        self._runner.teach(plan, ("here",), self.log)

    def trained(self) -> list[tuple[str, str]]:
        """The phases of each training, with the name of their job."""
        tasks = [task for task in self.workers.tasks if isinstance(task, TrainTask)]
        return [(task.spec.plan.job.name, phase.name) for task in tasks for phase in task.spec.phases]


def completed(plan: Plan) -> list[str]:
    return [phase.name for phase in plan.phases if is_complete(plan, phase)]


# --------------------------------------------------------------------------------------------------------------- phases


def test_all_phases_that_are_missing_are_one_task() -> None:
    plan = planned()

    def check(task: TrainTask, on_report: OnReport) -> Outcome:
        assert all(is_held(plan.lock(phase)) for phase in plan.phases) and is_held(plan.run_folder / LOCK)
        for folder in (plan.run_folder, *map(plan.phase_folder, plan.phases)):
            assert (folder / JOB).is_file() and (folder / PLAN).is_file()
        assert on_report("dense", [record(1)]) is True
        return compute(task, on_report)

    runner = Runner(check)
    runner.complete(plan)
    (task,) = runner.workers.tasks
    assert (task.spec.plan, task.spec.phases, task.spec.import_folders) == (plan, plan.phases, ("here",))
    assert task.decisive == Log.decisive
    assert runner.workers.shapes == [GroupShape(2, 1.0)]
    said = ["know", "waiting", "know", "running", ("dense", [record(1)]), *CHAIN, "know"]
    assert runner.log.heard == said
    assert completed(plan) == list(CHAIN)
    assert not any(is_held(plan.lock(phase)) for phase in plan.phases) and not is_held(plan.run_folder / LOCK)
    # What the workers reported last was not heard.
    assert [each["step"] for each in read_history(plan.phase_folder(plan.phases[1]) / HISTORY)] == [50]


def test_what_is_stored_is_not_computed() -> None:
    plan, runner = planned(), Runner()
    finish(plan, plan.phases[0])
    runner.complete(plan)
    assert runner.trained() == [("young", "sparse-1"), ("young", "redense-1")]
    again = Runner()
    again.complete(plan)
    assert (again.workers.shapes, again.workers.tasks, again.log.heard) == ([], [], ["know"])


def test_a_part_of_a_plan() -> None:
    plan, runner = planned(), Runner()
    part = truncated(plan, plan.phases[1])
    assert (part.steps, part.run_folder, [phase.name for phase in part.phases]) == (50, plan.run_folder, [*CHAIN[:2]])
    runner.complete(part)
    assert completed(plan) == ["dense", "sparse-1"]


def test_a_phase_that_somebody_else_computes_is_waited_for_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, runner, elsewhere = planned(), Runner(), ExitStack()
    elsewhere.enter_context(claimed(plan.lock(plan.phases[0]), "elsewhere"))
    naps: list[int] = []

    def sleep(seconds: float) -> None:
        assert seconds > 0
        naps.append(runner.workers.held)
        if len(naps) == 3:
            finish(plan, plan.phases[0])
            elsewhere.close()

    monkeypatch.setattr(phase_runs, "time", SimpleNamespace(sleep=sleep))
    runner.complete(plan)
    assert naps == [0, 0, 0]
    assert runner.trained() == [("young", "sparse-1"), ("young", "redense-1")]
    assert runner.log.heard[-6:] == ["waiting", "know", "running", "sparse-1", "redense-1", "know"]
    assert runner.log.heard[:-6] == ["know", *["waiting", "know"] * 3]


def test_what_is_waited_for_may_be_all_that_was_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, runner, elsewhere = planned(), Runner(), ExitStack()
    elsewhere.enter_context(claimed(plan.lock(plan.phases[2]), "elsewhere"))

    def sleep(seconds: float) -> None:
        for phase in plan.phases:
            finish(plan, phase)
        elsewhere.close()

    monkeypatch.setattr(phase_runs, "time", SimpleNamespace(sleep=sleep))
    runner.complete(plan)
    assert runner.workers.tasks == [] and completed(plan) == list(CHAIN)


def test_a_claim_that_fails_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials that each hold what the other one needs would wait for ever."""
    plan, runner = planned(), Runner()
    runner.log = Log(patience=1)

    def sleep(seconds: float) -> None:
        assert [is_held(plan.lock(phase)) for phase in plan.phases] == [False, True, False]
        assert not is_held(plan.run_folder / LOCK)

    monkeypatch.setattr(phase_runs, "time", SimpleNamespace(sleep=sleep))
    with claimed(plan.lock(plan.phases[1]), "elsewhere"), pytest.raises(Cancelled):
        runner.complete(plan)
    assert runner.workers.tasks == []


def test_the_same_trial_elsewhere_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, runner, elsewhere = planned(), Runner(), ExitStack()
    elsewhere.enter_context(claimed(plan.run_folder / LOCK, "elsewhere"))
    monkeypatch.setattr(phase_runs, "time", SimpleNamespace(sleep=lambda seconds: elsewhere.close()))
    runner.complete(plan)
    assert runner.trained() == [("young", name) for name in CHAIN]


# ------------------------------------------------------------------------------------------------------ what goes wrong


def after_the_first(task: TrainTask, on_report: OnReport) -> Outcome:
    """The workers are lost when they have completed one phase."""
    finish(task.spec.plan, task.spec.phases[0])
    return LOST


def test_a_task_whose_workers_were_lost_goes_on_where_it_was() -> None:
    plan, runner = planned(), Runner(after_the_first, outcome(LOST))
    runner.complete(plan)
    tasks = [[phase.name for phase in task.spec.phases] for task in runner.workers.tasks]
    assert tasks == [list(CHAIN), list(CHAIN[1:]), list(CHAIN[1:])]
    assert [each for each in runner.log.heard if each in CHAIN] == list(CHAIN)


def test_it_is_tried_again_as_often_as_the_job_allows() -> None:
    plan, runner = planned(), Runner(*[outcome(LOST)] * 3)
    with pytest.raises(RunError, match="its workers were lost 3 times, the last time: a worker was lost"):
        runner.complete(plan)
    assert len(runner.workers.tasks) == 3
    assert not any(is_held(plan.lock(phase)) for phase in plan.phases)
    impatient = Runner(outcome(LOST))
    with pytest.raises(RunError, match="lost 1 times"):
        impatient.complete(planned("parallel.max_restarts=0"))


def test_waiting_for_somebody_else_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, naps = planned("parallel.max_restarts=0"), []
    runner, elsewhere = Runner(), ExitStack()
    elsewhere.enter_context(claimed(plan.lock(plan.phases[0]), "elsewhere"))

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 5:
            elsewhere.close()

    monkeypatch.setattr(phase_runs, "time", SimpleNamespace(sleep=sleep))
    runner.complete(plan)
    assert len(runner.workers.tasks) == 1


def test_what_fails_is_not_tried_again() -> None:
    runner = Runner(outcome(Outcome("failed", "rank 1: ValueError: no such layer")))
    with pytest.raises(RunError, match=r"^rank 1: ValueError: no such layer$"):
        runner.complete(planned())
    assert len(runner.workers.tasks) == 1


def test_what_was_interrupted_is_not_wanted() -> None:
    plan = planned()

    def stop(task: TrainTask, on_report: OnReport) -> Outcome:
        finish(plan, plan.phases[0])
        return Outcome("interrupted")

    runner = Runner(stop)
    with pytest.raises(Cancelled):
        runner.complete(plan)
    assert len(runner.workers.tasks) == 1
    assert runner.log.heard[-2:] == ["dense", "know"]
    assert runner.workers.cancelled == runner.log.is_cancelled


def test_what_a_watcher_raises_ends_it() -> None:
    class Refusing(Log):
        def know(self) -> None:
            raise LookupError("diverged")

    runner = Runner()
    runner.log = Refusing()
    with pytest.raises(LookupError, match="diverged"):
        runner.complete(planned())
    assert runner.workers.tasks == []


# ------------------------------------------------------------------------------------------------------------- teachers


def test_teachers_are_trained_first_and_once() -> None:
    plan, runner = student(), Runner()
    runner.complete(plan)
    assert runner.trained() == [("wise", "dense"), *(("young", name) for name in CHAIN)]
    ((taught, asking),) = runner.teachers
    assert (taught.job.name, taught.run_folder, asking) == ("wise", teacher_of(plan).run_folder, runner.log)
    assert runner.said == ["teacher wise"]
    assert runner.workers.shapes == [GroupShape(1, 0.5), GroupShape(2, 1.0)]
    other = Runner()
    other.complete(student(temperature=7.0))
    assert other.trained() == [("young", name) for name in CHAIN]
    assert other.teachers == []


def test_of_a_trial_that_is_complete_no_teacher_is_needed() -> None:
    plan, runner = student(), Runner()
    for phase in plan.phases:
        finish(plan, phase)
    runner.complete(plan)
    assert (runner.workers.tasks, runner.teachers) == ([], [])


def test_a_teacher_stays_while_its_student_is_trained() -> None:
    plan = student()
    users = teacher_of(plan).phase_folder(teacher_of(plan).phases[0]).with_suffix(".users.lock")

    def check(task: TrainTask, on_report: OnReport) -> Outcome:
        assert is_held(users)
        return compute(task, on_report)

    finish(teacher_of(plan), teacher_of(plan).phases[0])
    Runner(check).complete(plan)
    assert not is_held(users)


def test_teaching_computes_no_phase_of_the_student() -> None:
    plan, runner = student(), Runner()
    runner.teach(plan)
    assert runner.trained() == [("wise", "dense")]
    assert completed(plan) == []


# ------------------------------------------------------------------------------------------------------------ the cache


PIECES = [Piece("train", 0, 0, 1024), Piece("train", 0, 1024, 413), Piece("test", 0, 0, 360)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the caches that were made."""
    keys: list[str] = []

    def make_cache(plan: Plan, import_folders: Sequence[str], say: Callable[[str], None], ask: Any) -> int:
        assert plan.distill is not None and plan.distill.cache is not None
        assert import_folders == ("here",)
        ask(PIECES)
        say("asked")
        keys.append(plan.distill.cache.key)
        return sum(piece.rows for piece in PIECES)

    monkeypatch.setattr(phase_runs, "make_cache", make_cache)
    return keys


def test_the_cache_is_asked_in_pieces_through_the_pool(made: list[str]) -> None:
    plan, runner = student(cache="logits"), Runner()
    runner.complete(plan)
    kinds = [type(task).__name__ for task in runner.workers.tasks]
    assert kinds == ["TrainTask", "AskTask", "TrainTask"]
    assert runner.workers.tasks[1] == AskTask(plan, tuple(PIECES), ("here",))
    assert runner.workers.shapes[1] == GroupShape(2, 1.0)
    assert runner.said == ["teacher wise", "asked"]
    assert len(made) == 1


def test_the_same_cache_is_looked_at_once(made: list[str]) -> None:
    runner = Runner()
    for temperature in (1.0, 4.0, 7.0):
        runner.complete(student(cache="logits", temperature=temperature))
    assert len(made) == 1
    runner.teach(student(cache="logits", signals="fp32"))
    assert len(set(made)) == 2


def test_asking_is_tried_again_where_workers_were_lost(made: list[str]) -> None:
    runner = Runner(compute, outcome(LOST), outcome(LOST), outcome(DONE))
    runner.teach(student(cache="logits"))
    assert [type(task) for task in runner.workers.tasks] == [TrainTask, AskTask, AskTask, AskTask]
    assert len(made) == 1


@pytest.mark.parametrize(("told", "attempts"), [(LOST, 3), (Outcome("failed", "no memory"), 1)])
def test_asking_that_fails_ends_it(made: list[str], told: Outcome, attempts: int) -> None:
    runner = Runner(compute, *[outcome(told)] * attempts)
    with pytest.raises(RunError, match=f"^asking the teacher failed: {told.reason}$"):
        runner.complete(student(cache="logits"))
    assert len(runner.workers.tasks) == 1 + attempts
    assert made == []
