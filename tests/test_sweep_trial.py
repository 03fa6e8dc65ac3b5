"""One trial of a sweep: what Ray Tune is told of it and when, where it waits for a decision, when it has diverged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import mlp_facts
from temper.config.load import build_job
from temper.files import write_json
from temper.launch.rungs import RungClock
from temper.launch.sweep import trial as module
from temper.launch.sweep.ledger import LedgerTrial, Result
from temper.launch.sweep.trial import Answer, Finiteness, Mailbox, Trial, TrialFailed, TrialStopped, parameters_left
from temper.launch.sweep.watchers import RunWatcher, TrialWatcher
from temper.plan import probe
from temper.plan.build import Plan, build_plan
from temper.plan.mesh import ClusterShape
from temper.plan.phases import PhasePlan
from temper.run_folder import HISTORY, PHASE_MANIFEST
from temper.tracking.history import History, Record, read_history

BOUND_S = 60.0  # on what must not hang
FACTS = replace(mlp_facts.FACTS, prunable=mlp_facts.PRUNABLE)
CHAIN = ("dense", "sparse-1", "redense-1")
STEPS = (100, 40, 30)
CLOCK = RungClock.of(CHAIN, "sparse-1", (0.5, 1.0), 3.0)
JOB: dict[str, Any] = {
    "name": "tiny",
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "budget": {"steps": STEPS[0], "evaluate_every": 25},
    "dsd": {"rounds": [{"sparsity": 0.5, "sparse_steps": STEPS[1], "redense_steps": STEPS[2]}]},
}


@pytest.fixture(autouse=True)
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(FACTS))))
    monkeypatch.chdir(tmp_path)


def planned(*overrides: str) -> Plan:
    job = build_job({**JOB, "storage": str(Path.cwd() / "runs")}, overrides)
    return build_plan(job, ClusterShape(nodes=1, cpus=8.0, gpus=0.0), Path.cwd())


def trial_of(decide: Any = "never", *overrides: str) -> Trial:
    return Trial("t000", {"optimizer.lr": 0.1}, planned(*overrides), CLOCK, decide)


def phase_of(plan: Plan, name: str) -> PhasePlan:
    return next(phase for phase in plan.phases if phase.name == name)


def record(step: int, **metrics: float) -> Record:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"step": step, "time_ms": 1000 * step, "metrics": {"train/loss": 1 / step, **named}}


def evaluated(step: int, **metrics: float) -> Record:
    return record(step, eval__accuracy=step / 200, **metrics)


# ---------------------------------------------------------------------------------------------------------- the mailbox


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


def result(step: int) -> Result:
    return {"step": step}


def told(step: int) -> Answer:
    return Answer("result", result(step))


def at_once(mailbox: Mailbox, number: int) -> Answer:
    """The answer of one call that does not wait."""
    with mock.patch.object(module, "_PULL_S", 0.0):
        return mailbox.pull(number)


def test_results_come_in_order_and_then_the_end() -> None:
    mailbox = Mailbox()
    assert at_once(mailbox, 0) == Answer("wait")
    for step in (10, 20):
        mailbox.put(result(step), decisive=False)
    assert mailbox.results == [result(10), result(20)]
    mailbox.end("failed", "the disk is full")
    # Also what is asked for again, as after a lost answer.
    assert [mailbox.pull(number) for number in (0, 1, 1)] == [told(10), told(20), told(20)]
    assert mailbox.pull(2) == Answer("over", None, "failed", "the disk is full")


def test_a_result_that_is_asked_for_is_waited_for(threads: ThreadPoolExecutor) -> None:
    mailbox = Mailbox()
    answer = threads.submit(mailbox.pull, 0)
    mailbox.put(result(10), decisive=False)
    assert answer.result(BOUND_S) == told(10)
    answer = threads.submit(mailbox.pull, 1)
    mailbox.end("finished")
    assert answer.result(BOUND_S) == Answer("over", None, "finished")


def put_decisive(threads: ThreadPoolExecutor, mailbox: Mailbox, step: int) -> Future[None]:
    """A result whose decision is being waited for, and has been taken."""
    number = len(mailbox.results)
    waiting = threads.submit(mailbox.put, result(step), decisive=True)
    assert mailbox.pull(number) == told(step)
    return waiting


def test_after_a_decisive_result_the_trial_waits_until_the_next_is_asked_for(threads: ThreadPoolExecutor) -> None:
    mailbox = Mailbox()
    mailbox.put(result(10), decisive=False)
    waiting = put_decisive(threads, mailbox, 20)
    assert mailbox.pull(1) == told(20) and mailbox.pull(0) == told(10)
    assert not waiting.done()
    assert at_once(mailbox, 2) == Answer("wait")
    assert waiting.result(BOUND_S) is None
    assert not mailbox.is_stopping


def test_a_trial_that_is_let_go_of_stops_where_it_waits(threads: ThreadPoolExecutor) -> None:
    mailbox = Mailbox()
    waiting = put_decisive(threads, mailbox, 10)
    mailbox.let_go()
    with pytest.raises(TrialStopped):
        waiting.result(BOUND_S)
    assert mailbox.is_stopping
    for decisive in (False, True):
        with pytest.raises(TrialStopped):
            mailbox.put(result(20), decisive=decisive)
    mailbox.end("stopped")
    assert mailbox.pull(9) == Answer("over", None, "stopped")


# ------------------------------------------------------------------------------------------------------------ decisions


def test_first_come_first_served_decides_nothing() -> None:
    assert trial_of("never").decisive_steps() == frozenset()


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        # Half of the sparse phase is step 120, its end 140; half of the re-dense one is 155, and 170 the end of all.
        (5, {120, 140, 155}),
        (25, {125, 140}),
        (50, {140}),
        (0, {140}),
        (1, {120, 140, 155}),
    ],
)
def test_a_rung_is_decided_on_at_its_first_evaluation_and_never_at_the_very_end(every: int, steps: set[int]) -> None:
    assert trial_of("rung", f"budget.evaluate_every={every}").decisive_steps() == steps


def test_a_population_is_decided_on_where_a_phase_ends() -> None:
    assert trial_of("phase").decisive_steps() == {100, 140}


# -------------------------------------------------------------------------------------------------------------- results


def results_of(trial: Trial, name: str, records: list[Record], after_step: int = 0) -> list[Result]:
    finiteness = Finiteness(trial.plan.job.precision.dtype)
    return list(trial.results_of(phase_of(trial.plan, name), records, after_step, finiteness))


def test_every_evaluation_is_a_result_with_its_place() -> None:
    trial = trial_of("rung")
    (first,) = results_of(trial, "dense", [record(24), evaluated(25), record(26)])
    assert first == {
        "train/loss": 1 / 25,
        "eval/accuracy": 25 / 200,
        "parameters_left": 2410.0,
        "step": 25,
        "phase_name": "dense",
        "phase_share": 0.25,
        "phases_done": 0,
        "place": 0.25,
        "rung": 0,
        "rung_time": 0.0,
        "done": False,
    }
    assert (trial.step, trial.phase, trial.rung) == (26, "dense", 0)
    half, end = results_of(trial, "sparse-1", [evaluated(120), evaluated(140)])
    assert (half["place"], half["phases_done"], half["rung"], half["rung_time"]) == (1.5, 1, 1, 1.0)
    assert (end["place"], end["phases_done"], end["rung"], end["rung_time"]) == (2.0, 2, 2, 3.0)
    (over,) = results_of(trial, "redense-1", [evaluated(170)])
    assert (over["place"], over["phases_done"], over["rung"], over["rung_time"]) == (3.0, 3, 3, 9.0)
    assert [each["done"] for each in (first, half, end, over)] == [False, False, False, True]
    assert trial.metrics == {"train/loss": 1 / 170, "eval/accuracy": 170 / 200, "parameters_left": 2410.0}
    assert (trial.step, trial.phase, trial.rung) == (170, "redense-1", 3)


def test_what_is_known_already_is_not_told_again() -> None:
    trial = trial_of()
    history = [evaluated(25), evaluated(50), record(51)]
    assert [each["step"] for each in results_of(trial, "dense", history, after_step=25)] == [50]
    assert results_of(trial, "dense", history, after_step=51) == []


def test_a_trial_is_as_far_as_its_last_result_that_was_asked_for() -> None:
    trial = trial_of()
    dense = phase_of(trial.plan, "dense")
    results = trial.results_of(dense, [evaluated(25), evaluated(50)], 0, Finiteness("fp32"))
    assert next(results)["step"] == 25
    assert (trial.step, trial.metrics["eval/accuracy"]) == (25, 25 / 200)
    assert next(results)["step"] == 50
    assert (trial.step, trial.metrics["eval/accuracy"]) == (50, 50 / 200)


def test_parameters_left_are_those_that_are_not_pruned() -> None:
    plan = planned()
    shapes = {weight.name: weight.shape for weight in plan.model.prunable}
    assert parameters_left(2410, shapes, {}) == 2410
    # 2048 and 320 weights; of a share that was counted, whole weights come out again.
    assert parameters_left(2410, shapes, {"sparsity/1.weight": 0.5, "sparsity/3.weight": 0.25}) == 2410 - 1024 - 80
    assert parameters_left(2410, shapes, {"sparsity/3.weight": 107 / 320, "sparsity/all": 0.9}) == 2410 - 107
    trial = Trial("t000", {}, plan, CLOCK, "never")
    (end,) = results_of(trial, "sparse-1", [evaluated(140, sparsity__1__weight=0.5)])
    assert end["parameters_left"] == 2410
    named = evaluated(140)
    named["metrics"]["sparsity/1.weight"] = 0.5
    (end,) = results_of(trial, "sparse-1", [named])
    assert end["parameters_left"] == trial.metrics["parameters_left"] == 2410 - 1024


def test_a_trial_of_an_earlier_attempt_is_recalled() -> None:
    trial, before = trial_of("rung"), trial_of("rung")
    results = results_of(before, "sparse-1", [evaluated(125), evaluated(140)])
    trial.recall(LedgerTrial("t000", {}, ["abc"], results, "diverged", "step 141: no", 12.5, 0.75))
    assert (trial.status, trial.reason, trial.is_over) == ("diverged", "step 141: no", True)
    assert (trial.seconds, trial.time_to_first_step_s) == (12.5, 0.75)
    assert (trial.step, trial.phase, trial.rung) == (140, "sparse-1", 2)
    assert trial.metrics == before.metrics
    silent = trial_of()
    silent.recall(LedgerTrial("t001", {}, end="failed", reason="no room"))
    assert (silent.step, silent.phase, silent.metrics, silent.is_over) == (0, "dense", {}, True)


def test_the_time_of_a_trial_is_that_of_all_of_its_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter([100.0, 110.0, 120.0, 150.0, 155.0, 160.0])
    monkeypatch.setattr(module.time, "time", lambda: next(clock_s))
    trial = trial_of()  # at 100
    trial.begin()  # 110
    trial.pause()  # 120
    assert trial.elapsed_s == 10.0
    trial.begin()  # 150
    assert trial.elapsed_s == 15.0
    trial.end("finished", "")
    assert (trial.seconds, trial.elapsed_s, trial.status) == (20.0, 20.0, "finished")


# ----------------------------------------------------------------------------------------------------------- divergence


def losses(*values: float) -> list[Record]:
    return [record(step, train__loss=value) for step, value in enumerate(values, 1)]


def check(dtype: str, records: list[Record]) -> None:
    finiteness = Finiteness(dtype)
    for each in records:
        finiteness.check(each)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_loss_that_is_not_finite_ends_a_trial(dtype: str, value: float) -> None:
    check(dtype, losses(1.0, 1e30))
    with pytest.raises(TrialFailed, match=r"^step 2: train/loss is not finite$") as caught:
        check(dtype, losses(1.0, value))
    assert caught.value.status == "diverged"


def test_with_fp16_twenty_in_a_row_end_it() -> None:
    """Single ones are those of skipped steps, while the loss scale falls."""
    check("fp16", losses(*[math.inf] * 19, 1.0, *[math.nan] * 19, 2.0))
    with pytest.raises(TrialFailed, match="step 21: train/loss is not finite"):
        check("fp16", losses(1.0, *[math.inf] * 20))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_evaluation_that_is_not_finite_ends_it(dtype: str) -> None:
    with pytest.raises(TrialFailed, match=r"^step 1: eval/loss is not finite$"):
        check(dtype, [record(1, eval__loss=math.nan, eval__accuracy=0.5, train__grad_norm=math.inf)])


def test_results_before_the_divergence_are_told() -> None:
    trial = trial_of()
    results = trial.results_of(
        phase_of(trial.plan, "dense"), [evaluated(25), evaluated(50, train__loss=math.nan)], 0, Finiteness("fp32")
    )
    assert next(results)["step"] == 25
    with pytest.raises(TrialFailed):
        next(results)
    assert trial.step == 25


# ---------------------------------------------------------------------------------------------------------- the watcher


class Notes:
    """What a watcher has noted."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.results: list[int] = []
        self.computed: list[tuple[str, str | None]] = []

    def note_computed(self, phase: PhasePlan, trial: Trial | None) -> None:
        self.computed.append((phase.name, None if trial is None else trial.id))

    def note_steps(self, steps: int) -> None:
        self.steps.append(steps)

    def note_result(self, trial: Trial, result: Result) -> None:
        self.results.append(result["step"])


def session(trial: Trial, after_step: int = 0) -> tuple[TrialWatcher, Mailbox, Notes]:
    notes, mailbox = Notes(), Mailbox()
    return TrialWatcher(notes, trial, mailbox, after_step), mailbox, notes


def finish(plan: Plan, name: str, *records: Record) -> None:
    """A phase that somebody has completed."""
    phase = phase_of(plan, name)
    History(plan.phase_folder(phase) / HISTORY).append(records)
    write_json(plan.phase_folder(phase) / PHASE_MANIFEST, {"fingerprint": phase.fingerprint, "files": {}})


def steps_of(mailbox: Mailbox) -> list[int]:
    return [each["step"] for each in mailbox.results]


def test_reports_go_to_the_history_and_evaluations_to_ray_tune() -> None:
    trial = trial_of()
    watcher, mailbox, notes = session(trial)
    watcher.tell("running")
    assert trial.status == "running"
    assert watcher.report("dense", [record(1), evaluated(25)]) is False
    # A worker that went back to its checkpoint reports steps again.
    assert watcher.report("dense", [evaluated(25), record(26)]) is False
    assert watcher.report("sparse-1", [evaluated(125)]) is False
    dense, sparse = (trial.plan.phase_folder(phase) / HISTORY for phase in trial.plan.phases[:2])
    assert [each["step"] for each in read_history(dense)] == [1, 25, 26]
    assert [each["step"] for each in read_history(sparse)] == [125]
    assert (notes.results, notes.steps) == ([25, 125], [25, 1, 25])
    assert steps_of(mailbox) == [25, 125]
    watcher.computed(trial.plan.phases[0])
    assert notes.computed == [("dense", "t000")]


def test_the_first_step_of_a_trial_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_of()
    monkeypatch.setattr(module.time, "time", lambda: 10.0)
    trial.begin()
    watcher, _, _ = session(trial)
    watcher.tell("running")
    watcher.report("dense", [])
    assert trial.time_to_first_step_s is None
    watcher.report("dense", [{**record(1), "time_ms": 10_750}])
    watcher.report("dense", [{**record(2), "time_ms": 12_000}])
    assert trial.time_to_first_step_s == 0.75


def test_at_a_rung_a_report_is_answered_when_ray_tune_has_decided(threads: ThreadPoolExecutor) -> None:
    trial = trial_of("rung")
    watcher, mailbox, _ = session(trial)
    answer = threads.submit(watcher.report, "sparse-1", [evaluated(125)])
    assert mailbox.pull(0).kind == "result"
    assert not answer.done()
    assert at_once(mailbox, 1) == Answer("wait")
    assert answer.result(BOUND_S) is False
    answer = threads.submit(watcher.report, "sparse-1", [evaluated(140)])
    assert mailbox.pull(1).kind == "result"
    mailbox.let_go()
    assert answer.result(BOUND_S) is True
    assert watcher.is_cancelled() and watcher.failure is None


def test_the_end_is_known_and_not_yet_told() -> None:
    trial = trial_of("rung")
    watcher, mailbox, notes = session(trial)
    assert watcher.report("redense-1", [evaluated(170)]) is False
    assert watcher.last is not None and watcher.last["step"] == 170
    assert (steps_of(mailbox), notes.results) == ([], [])


def test_a_trial_that_diverges_is_to_stop() -> None:
    trial = trial_of()
    watcher, mailbox, _ = session(trial)
    assert watcher.report("dense", [evaluated(25), record(26, train__loss=math.nan)]) is True
    assert str(watcher.failure) == "step 26: train/loss is not finite"
    assert steps_of(mailbox) == [25] and not watcher.is_cancelled()
    with pytest.raises(TrialFailed, match="step 26"):
        watcher.know()


def test_what_was_stored_before_is_told_up_to_the_first_phase_that_is_not_complete() -> None:
    trial = trial_of()
    watcher, mailbox, notes = session(trial)
    watcher.know()
    assert steps_of(mailbox) == []
    finish(trial.plan, "dense", evaluated(25), record(99), evaluated(100))
    History(trial.plan.phase_folder(trial.plan.phases[1]) / HISTORY).append([evaluated(125)])
    History(trial.plan.phase_folder(trial.plan.phases[2]) / HISTORY).append([evaluated(150)])  # of another attempt
    watcher.know()
    watcher.know()
    assert steps_of(mailbox) == notes.results == [25, 100, 125]
    assert (notes.steps, watcher.last) == ([], None)


def test_a_paused_trial_goes_on_with_the_results_after_the_one_it_was_paused_at(threads: ThreadPoolExecutor) -> None:
    """All that it needs may be there already: one result is told, and decided on, after the other."""
    trial = trial_of("rung")
    finish(trial.plan, "dense", evaluated(100))
    finish(trial.plan, "sparse-1", evaluated(125), evaluated(140))
    finish(trial.plan, "redense-1", evaluated(150), evaluated(170))
    told_of: list[list[int]] = []
    after_step = 0
    for paused_at in (125, 140):
        watcher, mailbox, _ = session(trial, after_step)
        knowing = threads.submit(watcher.know)
        pull_until(mailbox, paused_at)
        mailbox.let_go()
        with pytest.raises(TrialStopped):
            knowing.result(BOUND_S)
        told_of.append(steps_of(mailbox))
        after_step = paused_at
    watcher, mailbox, _ = session(trial, after_step)
    watcher.know()
    told_of.append(steps_of(mailbox))
    assert told_of == [[100, 125], [140], [150]]
    assert watcher.last is not None and watcher.last["done"]


def pull_until(mailbox: Mailbox, step: int) -> None:
    number = 0
    while (answer := mailbox.pull(number)).result is None or answer.result["step"] != step:
        number += answer.kind == "result"


def test_the_end_is_told_also_to_who_is_past_it() -> None:
    """A clone may be of fewer phases than its source has done."""
    trial = trial_of("phase")
    for name, end in zip(CHAIN, (100, 140, 170), strict=True):
        finish(trial.plan, name, evaluated(end))
    watcher, mailbox, _ = session(trial, after_step=200)
    watcher.know()
    assert steps_of(mailbox) == []
    assert watcher.last is not None and watcher.last["step"] == 170


def test_skipped_steps_count_once_however_often_the_history_is_read() -> None:
    trial = trial_of("never", "precision.dtype=fp16")
    watcher, _, _ = session(trial)
    for each in losses(*[math.inf] * 12):
        assert watcher.report("dense", [each]) is False
        watcher.know()
    assert watcher.failure is None


def test_steps_of_an_earlier_session_are_not_counted_again() -> None:
    trial = trial_of()
    for first, last in ((1, 20), (21, 30), (11, 31)):
        watcher, _, notes = session(trial)
        watcher.report("dense", [record(step) for step in range(first, last + 1)])
        assert sum(notes.steps) == {20: 20, 30: 10, 31: 1}[last]


def test_a_run_beside_the_trials_begins_when_it_is_computed() -> None:
    plan, begun = planned(), []
    watcher = RunWatcher(None, plan, lambda: begun.append(plan), lambda: len(begun) > 0)
    watcher.tell("waiting")
    assert (begun, watcher.has_begun, watcher.is_cancelled()) == ([], False, False)
    watcher.tell("running")
    watcher.tell("running")
    assert (begun, watcher.has_begun) == ([plan], True)
    assert watcher.report("dense", [record(1)]) is True
    assert [each["step"] for each in read_history(plan.phase_folder(plan.phases[0]) / HISTORY)] == [1]
