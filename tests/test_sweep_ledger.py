"""What a sweep writes down: its ledger, from which a broken one goes on, and its tree in MLflow, where nothing is lost
or doubled."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from temper.errors import RunError
from temper.files import read_json, write_json
from temper.launch import tracked_run
from temper.launch.sweep import tracking
from temper.launch.sweep.ledger import Ledger, LedgerTrial, find_trial, params_key, read_ledger
from temper.launch.sweep.tracking import SweepTracking
from temper.launch.tracked_run import TrackedRun
from temper.plan.build import Plan
from temper.plan.phases import PhasePlan
from temper.run_folder import HISTORY, PHASE_MANIFEST, PLAN, RUN
from temper.tracking import history
from temper.tracking.history import History, Record
from temper.tracking.mlflow_store import RunGoneError
from test_sweep_trial import evaluated, facts, planned, record  # noqa: F401

BOUND_S = 60.0  # on what must not hang
TOLD = {"uri": "here", "command": "temper train job.yaml"}
PARAMS = {"optimizer.lr": 0.1, "distill.temperature": 4}
END = {"reason": "", "seconds": 2.5, "time_to_first_step_s": 0.125}


# ----------------------------------------------------------------------------------------------------------- the ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sweeps" / "a" / "trials.jsonl"


def test_what_is_added_is_there_again(path: Path) -> None:
    assert read_ledger(path) == []
    ledger = Ledger(path)
    ledger.add("t001", params=PARAMS)
    ledger.add("t000", params={})
    ledger.add("t001", computed="abc")
    ledger.add("t001", result={"step": 10, "eval/accuracy": 0.1 + 0.2, "phase_name": "dense"})
    ledger.add("t001", result={"step": 20, "eval/accuracy": math.inf, "phase_name": "dense"})
    ledger.add("t001", computed="def")
    ledger.add("t001", end="diverged", **{**END, "reason": "step 21: no"})
    expected = [
        LedgerTrial(
            id="t001",
            params=PARAMS,
            computed=["abc", "def"],
            results=[
                {"step": 10, "eval/accuracy": 0.1 + 0.2, "phase_name": "dense"},
                {"step": 20, "eval/accuracy": math.inf, "phase_name": "dense"},
            ],
            end="diverged",
            reason="step 21: no",
            seconds=2.5,
            time_to_first_step_s=0.125,
        ),
        LedgerTrial(id="t000", params={}),
    ]
    assert list(ledger.trials.values()) == read_ledger(path) == list(Ledger(path).trials.values()) == expected


def test_a_trial_that_was_begun_twice_is_one(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("t000", params=PARAMS)
    ledger.add("t000", computed="abc")
    ledger.add("t000", params=PARAMS)
    assert read_ledger(path) == [LedgerTrial("t000", PARAMS, ["abc"])]


def test_of_two_ends_the_last_one_counts(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("t000", params=PARAMS)
    ledger.add("t000", end="failed", **END)
    ledger.add("t000", end="finished", **END)
    assert [trial.end for trial in read_ledger(path)] == ["finished"]


def test_a_line_is_on_the_disk_before_its_writer_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, sync, synced = Ledger(path), os.fsync, []

    def note(handle: int) -> None:
        sync(handle)
        synced.append((Path(os.readlink(f"/proc/self/fd/{handle}")), path.read_text()))

    monkeypatch.setattr(os, "fsync", note)
    ledger.add("t000", params={})
    line = '{"trial": "t000", "params": {}}\n'
    assert synced == [(path, line), (path.parent, line)]


def test_a_last_line_that_was_cut_short_is_dropped_and_the_ledger_goes_on(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("t000", params=PARAMS)
    whole, before = path.read_bytes(), read_ledger(path)
    ledger.add("t000", result={"step": 10, "note": "a line\nof two"})
    last = path.read_bytes()[len(whole) :]
    assert last.count(b"\n") == 1
    for length in range(len(last)):
        path.write_bytes(whole + last[:length])
        assert read_ledger(path) == before
        reopened = Ledger(path)
        assert list(reopened.trials.values()) == before
        assert path.read_bytes() == whole
        reopened.add("t000", computed="abc")
        assert read_ledger(path) == [replace(before[0], computed=["abc"])]


def test_nothing_but_a_part_of_the_first_line(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text('{"trial": "t0')
    assert Ledger(path).trials == {}
    assert path.read_bytes() == b""


def test_lines_of_several_threads_stay_whole(path: Path) -> None:
    ledger = Ledger(path)
    for number in range(4):
        ledger.add(f"t{number}", params={"number": number})

    def write(number: int) -> None:
        for step in range(10):
            ledger.add(f"t{number}", result={"step": step, "text": "x" * 500})

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(4)))
    assert [[each["step"] for each in trial.results] for trial in read_ledger(path)] == [list(range(10))] * 4
    assert read_ledger(path) == list(ledger.trials.values())


def test_a_trial_is_known_by_its_params(path: Path) -> None:
    trials = [LedgerTrial("t000", {"a": 1, "b": [1, {"c": 2}]}), LedgerTrial("t001", {"a": 1})]
    assert find_trial(trials, {"b": [1, {"c": 2}], "a": 1}) is trials[0]
    assert find_trial(trials, {"a": 1}) is trials[1]
    assert find_trial(trials, {"a": 2}) is None
    assert find_trial([], {}) is None
    keys = [params_key(params) for params in ({"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {})]
    assert len(set(keys)) == len(keys)


def test_params_that_were_read_back_are_the_same_trial(path: Path) -> None:
    params = {"lr": 1e-4 / 3, "large": 1e22, "rounds": ({"sparsity": 0.1 + 0.2},), "name": "é", "none": None}
    Ledger(path).add("t000", params=params)
    (known,) = read_ledger(path)
    assert params_key(known.params) == params_key(params)
    assert find_trial([known], params) is known


# -------------------------------------------------------------------------------------------------- the tree in MLflow


class Store:
    """MLflow in memory; `down` calls fail with RunError."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.points: dict[str, list[int]] = defaultdict(list)
        self.down: set[str] = set()
        self.opened: list[str] = []
        self.gone: set[str] = set()
        self.arrived = threading.Condition()
        self.sweeps: list[SweepTracking] = []

    def check(self, call: str) -> None:
        if call in self.down:
            raise RunError(f"no {call}")

    def open_sweep(self) -> str:
        self.check("open_sweep")
        self.opened.append("sweep")
        return "sweep"

    def open_run(
        self, uri: str, plan: Plan, *, run_id: str | None, name: str, tags: Mapping[str, str], **_: Any
    ) -> str:
        self.check("open_run")
        if run_id is None or run_id in self.gone:
            run_id = f"run {len(self.runs) + len(self.gone)}"
        self.opened.append(run_id)
        run = self.runs.setdefault(run_id, {"name": name, "tags": dict(tags)})
        run["status"] = "RUNNING"
        return run_id

    def log_tags(self, uri: str, run_id: str, tags: Mapping[str, str]) -> None:
        self.check("log_tags")
        self.runs[run_id]["tags"] |= tags

    def tree(self, uri: str, run_id: str, plan: Any, storage: Path) -> Tree:
        return Tree(self, run_id)

    def close_run(self, uri: str, run_id: str, status: str, timeout_s: float) -> bool:
        if "close_run" not in self.down:
            self.runs[run_id]["status"] = status
        return "close_run" not in self.down

    def sink(self, uri: str, run_id: str) -> Sink:
        self.check("sink")
        return Sink(self, run_id)

    def come_back_empty(self) -> None:
        with self.arrived:
            self.gone |= {*self.runs, "sweep"}
            self.runs.clear()
            self.points.clear()

    def wait_for(self, run_id: str, steps: Sequence[int]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.points[run_id] == list(steps), BOUND_S)


@dataclass
class Tree:
    """The run's phases, of which :mod:`test_tree` has the tests."""

    store: Store
    run_id: str

    def grow(self) -> None:
        self.store.check("grow")

    def end(self, status: str, tags: Mapping[str, str]) -> None:
        self.store.check("end")
        self.store.runs[self.run_id]["tags"] |= tags


class Sink:
    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id, self._steps = store, run_id, store.points[run_id]

    def last_step(self) -> int:
        return max(self._steps, default=0)

    def send(self, records: Sequence[Record]) -> None:
        with self._store.arrived:
            self._store.check("send")
            if self._run_id in self._store.gone:
                raise RunGoneError(self._run_id)
            self._steps.extend(each["step"] for each in records)
            self._store.arrived.notify_all()
            self._store.check("answer")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    fake = Store()
    for name in ("open_run", "log_tags", "close_run"):
        monkeypatch.setattr(tracked_run, name, getattr(fake, name))
    monkeypatch.setattr(tracked_run, "RunTree", fake.tree)
    monkeypatch.setattr(tracking, "RunMetrics", fake.sink)
    monkeypatch.setattr(tracking, "_LOOK_S", 0.0)
    yield fake
    fake.down.clear()
    for sweep in fake.sweeps:
        sweep.close()


class NoSystem:
    """Of nodes that were never looked at."""

    def deliver(self) -> None: ...


def no_system(parent: str) -> Any:
    return NoSystem()


def begun(store: Store) -> SweepTracking:
    sweep = SweepTracking(store.open_sweep, lambda: None, no_system)
    store.sweeps.append(sweep)
    return sweep


def trial_run(plan: Plan, name: str = "", uri: str = "here", **tags: str) -> TrackedRun:
    return TrackedRun(uri, plan, "temper train job.yaml", name, tags)


def trial_plan(id: str, seed: int = 0) -> Plan:
    return replace(planned(f"seed={seed}"), place=f"sweeps/a/trials/{id}")


def write_history(plan: Plan, name: str, records: Sequence[Record]) -> None:
    phase = next(phase for phase in plan.phases if phase.name == name)
    History(plan.phase_folder(phase) / HISTORY).append(records)


def write_whole(plan: Plan) -> list[int]:
    """The history of every phase; the steps in them."""
    written = []
    for phase in plan.phases:
        records = [record(phase.first_step + 1), evaluated(phase.last_step)]
        write_history(plan, phase.name, records)
        written += [each["step"] for each in records]
    return written


def run_record(plan: Plan) -> dict[str, Any]:
    found = read_json(plan.run_folder / RUN)
    assert isinstance(found, dict)
    return found


def test_each_trial_is_a_child_of_the_one_parent(store: Store) -> None:
    trials = [trial_plan(f"t00{seed}", seed) for seed in range(2)]
    sweep = begun(store)
    for number, plan in enumerate(trials):
        sweep.begin(TrackedRun("here", plan, TOLD["command"], f"trial {number}", {"temper.trial": f"t00{number}"}))
    steps = [write_whole(plan) for plan in trials]
    sweep.end(trials[0], "FINISHED", {"temper.trial.status": "finished"})
    sweep.end(trials[1], "KILLED", {"temper.trial.status": "stopped"})
    assert sweep.close() == []
    assert sweep.parent_id == "sweep" and store.opened == ["sweep", "run 0", "run 1"]
    assert [run["name"] for run in store.runs.values()] == ["trial 0", "trial 1"]
    assert [run["status"] for run in store.runs.values()] == ["FINISHED", "KILLED"]
    for number, plan in enumerate(trials):
        tags = store.runs[f"run {number}"]["tags"]
        assert tags["mlflow.parentRunId"] == "sweep"
        assert tags["temper.trial"] == f"t00{number}"
        assert tags["temper.trial.status"] == ("finished", "stopped")[number]
        assert store.points[f"run {number}"] == steps[number]
        assert {**TOLD, "run_id": f"run {number}", "open": False, "delivered": True}.items() <= run_record(plan).items()


def test_a_run_is_delivered_while_it_grows(store: Store) -> None:
    plan = trial_plan("t000")
    sweep = begun(store)
    sweep.begin(trial_run(plan))
    write_history(plan, "dense", [record(1), record(2)])
    store.wait_for("run 0", [1, 2])
    assert {**TOLD, "run_id": "run 0", "open": True}.items() <= run_record(plan).items()
    write_history(plan, "dense", [record(3)])
    store.wait_for("run 0", [1, 2, 3])
    sweep.end(plan, "KILLED", {})
    assert sweep.close() == []
    assert store.points["run 0"] == [1, 2, 3]


def test_the_next_attempt_goes_on_with_the_run(store: Store) -> None:
    plan = trial_plan("t000")
    write_history(plan, "dense", [record(1), record(2)])
    first, run = begun(store), trial_run(plan)
    first.begin(run)
    store.wait_for("run 0", [1, 2])
    assert first.close() == [str(plan.run_folder)]
    run.let_go()  # as the end of its process does
    assert store.runs["run 0"]["status"] == "RUNNING"
    write_history(plan, "dense", [record(3)])
    second = begun(store)
    second.begin(trial_run(plan))
    store.wait_for("run 0", [1, 2, 3])
    second.end(plan, "FINISHED", {})
    assert second.close() == []
    elsewhere = begun(store)
    elsewhere.begin(trial_run(plan, uri="there"))
    elsewhere.end(plan, "FINISHED", {})
    assert elsewhere.close() == []
    assert store.points == {"run 0": [1, 2, 3], "run 1": [1, 2, 3]}


def test_a_trial_that_is_gone_on_with_is_one_run(store: Store) -> None:
    plan = trial_plan("t000")
    sweep = begun(store)
    sweep.begin(trial_run(plan))
    write_history(plan, "dense", [record(1)])
    store.wait_for("run 0", [1])
    sweep.begin(trial_run(plan))
    write_history(plan, "dense", [record(2)])
    sweep.end(plan, "FINISHED", {})
    assert sweep.close() == []
    assert (set(store.runs), store.points["run 0"], store.runs["run 0"]["status"]) == ({"run 0"}, [1, 2], "FINISHED")


@pytest.mark.parametrize("call", ["open_sweep", "open_run", "sink", "send", "answer", "log_tags", "end", "close_run"])
def test_an_outage_loses_and_doubles_nothing(store: Store, call: str) -> None:
    plan = trial_plan("t000")
    steps = write_whole(plan)
    store.down = {call}
    sweep = begun(store)
    sweep.begin(trial_run(plan, "first"))
    sweep.end(plan, "FINISHED", {"temper.trial.status": "finished"})
    assert sweep.close(timeout_s=0.0) == [str(plan.run_folder)]
    assert (read_json(plan.run_folder / RUN) or {}).get("delivered") is not True
    store.down.clear()
    assert sweep.close() == []
    assert store.points == {"run 0": steps}
    (run,) = store.runs.values()
    assert (run["name"], run["status"], run["tags"]["temper.trial.status"]) == ("first", "FINISHED", "finished")
    assert run_record(plan)["delivered"] is True


def test_one_run_that_is_refused_keeps_no_other_waiting(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [trial_plan(f"t00{seed}", seed) for seed in range(2)]
    for plan in plans:
        write_whole(plan)

    def open_run(uri: str, plan: Plan, **more: Any) -> str:
        if plan.job.seed == 0:
            raise RunError("no such experiment")
        return store.open_run(uri, plan, **more)

    monkeypatch.setattr(tracked_run, "open_run", open_run)
    sweep = begun(store)
    for plan in plans:
        sweep.begin(trial_run(plan))
        sweep.end(plan, "FINISHED", {})
    store.wait_for("run 0", [1, 100, 101, 140, 141, 170])
    assert sweep.close(timeout_s=0.0)[0] == str(plans[0].run_folder)
    monkeypatch.setattr(tracked_run, "open_run", store.open_run)
    assert sweep.close() == []


def test_a_store_that_came_back_empty_is_given_the_whole_tree_again(store: Store) -> None:
    """Also the trial that had ended."""
    plans = [trial_plan(f"t00{seed}", seed) for seed in range(2)]
    sweep = begun(store)
    ended = write_whole(plans[0])
    for plan in plans:
        sweep.begin(trial_run(plan))
    sweep.end(plans[0], "FINISHED", {"temper.trial.status": "finished"})
    first = plans[1].phases[0]
    write_history(plans[1], first.name, [record(1)])
    store.wait_for("run 1", [1])
    store.wait_for("run 0", ended)
    while not (read_json(plans[0].run_folder / RUN) or {}).get("delivered"):
        threading.Event().wait(0.001)

    store.come_back_empty()
    steps = write_whole(plans[1])
    sweep.end(plans[1], "KILLED", {"temper.trial.status": "stopped"})
    assert sweep.close() == []
    assert store.opened.count("sweep") == 2
    found = [run_record(plan)["run_id"] for plan in plans]
    assert store.runs.keys() == {*found}
    assert not {*found} & store.gone
    assert [store.points[run_id] for run_id in found] == [ended, steps]
    assert [store.runs[run_id]["status"] for run_id in found] == ["FINISHED", "KILLED"]


def test_of_a_phase_that_another_trial_computed_a_trial_has_an_extract(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is complete; of its own phases it has every step."""
    monkeypatch.setattr(history, "_EXTRACT", 5)
    first, second = (trial_plan(f"t00{number}") for number in range(2))
    sweep = begun(store)
    for plan in (first, second):
        sweep.begin(trial_run(plan))
    dense, sparse = first.phases[:2]
    steps = [*range(1, dense.last_step + 1)]
    mark(first, dense)
    write_history(first, dense.name, [(evaluated if step % 40 == 0 else record)(step) for step in steps])
    store.wait_for("run 0", steps)
    assert store.points["run 1"] == []
    write_json(first.phase_folder(dense) / PHASE_MANIFEST, {})
    mark(second, sparse)
    write_history(second, sparse.name, [record(step) for step in range(101, 111)])
    sweep.end(first, "KILLED", {})
    sweep.end(second, "KILLED", {})
    assert sweep.close() == []
    assert store.points["run 1"] == [25, 40, 75, 80, 100, *range(101, 111)]


def mark(plan: Plan, phase: PhasePlan) -> None:
    """As the trial does that computes it."""
    plan.phase_folder(phase).mkdir(parents=True)
    write_json(plan.phase_folder(phase) / PLAN, plan.to_dict())


class System:
    """The use of the nodes, which the sweep's own run is given; it is gone once."""

    def __init__(self, store: Store) -> None:
        self.store, self.samples, self.delivered = store, 0, 0
        self.is_gone = False

    def open(self, parent: str) -> Any:
        return self

    def deliver(self) -> None:
        if self.is_gone:
            self.is_gone = False
            raise RunGoneError("sweep")
        self.delivered = self.samples


def test_the_last_samples_of_the_nodes_arrive(store: Store) -> None:
    system = System(store)
    sweep = SweepTracking(store.open_sweep, lambda: None, system.open)
    plan = trial_plan("t000")
    steps = write_whole(plan)
    sweep.begin(trial_run(plan))
    sweep.end(plan, "FINISHED", {})
    store.wait_for("run 0", steps)
    system.samples = 7
    assert sweep.close() == []
    assert (system.delivered, sweep.parent_id, store.opened) == (7, "sweep", ["sweep", "run 0"])


def test_a_store_that_lost_the_sweep_after_its_trials_is_given_all_again(store: Store) -> None:
    system = System(store)
    sweep = SweepTracking(store.open_sweep, lambda: None, system.open)
    plan = trial_plan("t000")
    steps = write_whole(plan)
    sweep.begin(trial_run(plan))
    sweep.end(plan, "FINISHED", {})
    while not (read_json(plan.run_folder / RUN) or {}).get("delivered"):
        threading.Event().wait(0.001)
    store.come_back_empty()
    system.samples, system.is_gone = 7, True
    assert sweep.close() == []
    assert store.opened == ["sweep", "run 0", "sweep", "run 2"]
    assert (store.points["run 2"], store.runs["run 2"]["status"], system.delivered) == (steps, "FINISHED", 7)


def test_a_real_store_has_the_tree(tmp_path: Path) -> None:
    """MLflow on SQLite."""
    from temper.tracking.mlflow_store import build_client, close_run, open_parent

    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    plan = trial_plan("t000")
    steps = write_whole(plan)
    # A run in another store.
    plan.run_folder.mkdir(parents=True)
    write_json(plan.run_folder / RUN, {"uri": "elsewhere", "run_id": "none"})

    def open_sweep() -> str:
        described = {
            "tags": {"temper.kind": "sweep"},
            "params": {"search": "grid"},
            "texts": {"space.yaml": "name: a\n"},
        }
        return open_parent(uri, plan.job, run_id=None, name="a", **described)

    sweep = SweepTracking(open_sweep, lambda: None, no_system)
    tags, params = {"temper.kind": "trial"}, {"sweep.optimizer.lr": "0.1"}
    sweep.begin(TrackedRun(uri, plan, "temper train job.yaml", "t000 lr=0.1", tags, params))
    sweep.end(plan, "FINISHED", {"temper.trial.status": "finished"})
    assert sweep.close() == []
    assert close_run(uri, sweep.parent_id, "FINISHED")
    client = build_client(uri)
    runs = {run.info.run_id: run for run in client.search_runs(["1"])}
    assert len(runs) == 2 + len(plan.phases)
    assert runs[sweep.parent_id].data.params == {"search": "grid"}
    child = runs[run_record(plan)["run_id"]]
    assert {runs[id].info.status for id in (sweep.parent_id, child.info.run_id)} == {"FINISHED"}
    assert child.info.run_name == "t000 lr=0.1"
    assert child.data.tags["mlflow.parentRunId"] == sweep.parent_id
    assert child.data.tags["temper.command"] == "temper train job.yaml"
    assert child.data.params["sweep.optimizer.lr"] == "0.1"
    assert child.data.tags["temper.trial.status"] == "finished"
    assert child.data.params["optimizer.lr"] == "0.1"
    points = client.get_metric_history(child.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(step, 1 / step) for step in steps]
    assert json.loads(json.dumps(child.data.metrics))["eval/accuracy"] == 170 / 200
