"""The loop with an engine of plain numbers: what is due when, what a record holds, stopping and going on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed import run_distributed
from temper import loop
from temper.data.batches import Batch, DataState
from temper.engine.base import StepResult
from temper.errors import RunError
from temper.loop import Calendar, Interrupted, Record, Reporter, TrainState, build_recovery, step_seed, train
from temper.plan.peaks import Speed
from temper.precision.watch import Observation, Watch, WatchedStep, unwatched

CPU = torch.device("cpu")
TIMES = {"time/step_s", "time/examples_per_s"}


@dataclass
class FakeEngine:
    """Remembers what it is given. Step n (1-based) has the loss n / 2 + rank; steps of `skipped` and of `exhausted` are
    not applied, the latter at the smallest loss scale. `weight` is the sum of the steps that were applied."""

    terms: tuple[str, ...] = ("cross_entropy",)
    skipped: tuple[int, ...] = ()
    exhausted: tuple[int, ...] = ()
    weight: int = 0
    loss_scale: float | None = None
    grad_norm: float | torch.Tensor | None = None
    rank: int = 0
    now: list[float] = field(default_factory=lambda: [0.0])
    step_s: float = 0.0
    calls: list[dict[str, Any]] = field(default_factory=list)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, *, lr: float, seed: int) -> StepResult:
        step = int(inputs) + 1
        self.now[0] += self.step_s
        self.calls.append({"step": step, "target": int(targets), "lr": lr, "seed": seed})
        loss = torch.tensor(step / 2 + self.rank)
        terms = {name: loss * share for name, share in zip(self.terms, (0.75, 0.25), strict=False)}
        applied = step not in self.skipped + self.exhausted
        self.weight += step if applied else 0
        return StepResult(loss, terms, self.grad_norm, applied, self.loss_scale, step in self.exhausted)


def batches(first: int, last: int) -> Iterator[tuple[Batch, DataState]]:
    """Batch n (0-based) holds n and 10 n."""
    for step in range(first, last):
        number = torch.tensor(step)
        yield Batch(number, number * 10, number, number), DataState(step + 1, 0, step)


@dataclass
class Run:
    """What one call of the loop did, as a worker sees it: reports, evaluations and saves in the order they came."""

    events: list[tuple[str, int]] = field(default_factory=list)
    reports: list[list[Record]] = field(default_factory=list)
    saved: list[tuple[TrainState, list[Record]]] = field(default_factory=list)
    checkpoints: list[tuple[TrainState, int]] = field(default_factory=list)
    state: TrainState | None = None
    failure: str = ""

    @property
    def records(self) -> list[Record]:
        return [record for report in self.reports for record in report]

    def metrics(self) -> dict[int, dict[str, float]]:
        """By step, without those of time."""
        return {
            record["step"]: {name: value for name, value in record["metrics"].items() if name not in TIMES}
            for record in self.records
        }


def run_loop(
    engine: FakeEngine,
    calendar: Calendar,
    state: TrainState | None = None,
    *,
    record_every: int = 1,
    rank: int = 0,
    world_size: int = 1,
    stop_at: int | None = None,
    pause_s: float = 0.0,
    policy: Literal["stop", "hold", "back_off"] = "stop",
    watch: Watch = unwatched,
    before: Run | None = None,
) -> Run:
    """Trains from `state` to the calendar's end; a request to stop is there from step `stop_at` on. Evaluating and
    saving take `pause_s` each. `before` has the checkpoints of an earlier attempt."""
    run, state = Run(checkpoints=list(before.checkpoints) if before else []), state or TrainState()

    def report(records: list[Record]) -> None:
        run.events.append(("report", engine.calls[-1]["step"]))
        run.reports.append(records)

    def evaluate(step: int) -> dict[str, float]:
        run.events.append(("evaluate", step))
        engine.now[0] += pause_s
        return {"eval/accuracy": step / 100}

    def save(reached: TrainState) -> None:
        run.events.append(("save", reached.step))
        engine.now[0] += pause_s
        run.saved.append((reached, reporter.take_segment()))
        run.checkpoints.append((reached, engine.weight))

    def restore() -> TrainState | None:
        if not run.checkpoints:
            return None
        good, engine.weight = run.checkpoints[-1]
        run.events.append(("restore", good.step))
        return good

    reporter = Reporter(
        report,
        lambda: stop_at is not None and engine.calls[-1]["step"] >= stop_at,
        first_step=state.step,
        rank=rank,
        world_size=world_size,
        speed=Speed(32),
        record_every=record_every,
        device=CPU,
    )
    try:
        run.state = train(
            engine,  # type: ignore[arg-type]
            batches(state.step, calendar.last_step),
            state,
            calendar=calendar,
            lr_at=lambda applied: 1 / (1 + applied),
            seed=5,
            rank=rank,
            reporter=reporter,
            evaluate=evaluate,
            save=save,
            watch=watch,
            recover=build_recovery(policy, restore),
        )
    except Interrupted:
        run.events.append(("interrupted", engine.calls[-1]["step"]))
    except RunError as error:
        run.failure = str(error)
    return run


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loop's clock; it stands still until a test moves it."""
    seconds = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(loop.time, "time", lambda: 1_700_000_000.5)
    return seconds


# -------------------------------------------------------------------------------------------------------- calendar


def steps_of(run: Run, kind: str) -> list[int]:
    return [step for name, step in run.events if name == kind]


@pytest.mark.parametrize(
    ("evaluate_every", "checkpoint_every", "evaluated", "saved"),
    [(0, 0, [10], [10]), (4, 0, [4, 8, 10], [10]), (0, 3, [10], [3, 6, 9, 10]), (5, 5, [5, 10], [5, 10])],
)
def test_what_is_due_when(evaluate_every: int, checkpoint_every: int, evaluated: list[int], saved: list[int]) -> None:
    run = run_loop(FakeEngine(), Calendar(10, evaluate_every, checkpoint_every))
    assert steps_of(run, "evaluate") == evaluated
    assert steps_of(run, "save") == saved
    assert [reached.step for reached, _ in run.saved] == saved
    assert run.state is not None
    assert run.state.step == 10


def test_a_save_follows_the_report_of_its_steps() -> None:
    run = run_loop(FakeEngine(), Calendar(6, 3, 3))
    for step in (3, 6):
        position = run.events.index(("save", step))
        assert run.events[position - 2 : position] == [("evaluate", step), ("report", step)]
    assert [record["step"] for record in run.records] == [1, 2, 3, 4, 5, 6]


def test_each_batch_is_trained_on_once_with_its_own_seed() -> None:
    engine = FakeEngine()
    run_loop(engine, Calendar(4, 0, 0), rank=2)
    assert [(call["step"], call["target"]) for call in engine.calls] == [(1, 0), (2, 10), (3, 20), (4, 30)]
    assert [call["seed"] for call in engine.calls] == [step_seed(5, step, 2) for step in range(4)]


def test_skipped_steps_count_and_do_not_advance_the_schedule() -> None:
    engine = FakeEngine(skipped=(2, 3), loss_scale=1024.0)
    run = run_loop(engine, Calendar(5, 0, 0))
    assert [call["lr"] for call in engine.calls] == [1, 1 / 2, 1 / 2, 1 / 2, 1 / 3]
    assert run.state is not None
    assert (run.state.step, run.state.applied, run.state.skipped) == (5, 3, 2)
    assert [run.metrics()[step]["precision/skipped_steps"] for step in range(1, 6)] == [0, 1, 2, 2, 2]
    assert [run.metrics()[step]["train/lr"] for step in range(1, 6)] == [call["lr"] for call in engine.calls]


# --------------------------------------------------------------------------------------------------------- records


def test_a_record_of_one_term() -> None:
    run = run_loop(FakeEngine(), Calendar(2, 2, 0))
    assert run.metrics() == {
        1: {"train/loss": 0.5, "train/lr": 1.0},
        2: {"train/loss": 1.0, "train/lr": 0.5, "eval/accuracy": 0.02},
    }
    assert [set(record) for record in run.records] == [{"step", "time_ms", "metrics"}] * 2
    assert [record["time_ms"] for record in run.records] == [1_700_000_000_500] * 2


@pytest.mark.parametrize("norm", [4.0, torch.tensor(4.0)])
def test_a_record_of_terms_in_fp16(norm: float | torch.Tensor) -> None:
    engine = FakeEngine(terms=("hard", "soft"), loss_scale=65536.0, grad_norm=norm)
    assert run_loop(engine, Calendar(1, 0, 0)).metrics()[1] == {
        "train/loss": 0.5,
        "train/loss/hard": 0.375,
        "train/loss/soft": 0.125,
        "train/lr": 1.0,
        "train/grad_norm": 4.0,
        "precision/loss_scale": 65536.0,
        "precision/skipped_steps": 0.0,
        "eval/accuracy": 0.01,
    }


def test_values_are_plain_numbers() -> None:
    engine = FakeEngine(terms=("hard", "soft"), loss_scale=8.0, grad_norm=torch.tensor(4.0))
    for record in run_loop(engine, Calendar(3, 2, 2)).records:
        assert all(type(value) is float for value in record["metrics"].values())


@pytest.mark.parametrize(
    ("step_s", "reported"), [(1.0, [1, 3, 5, 7, 9, 10]), (5.0, list(range(1, 11))), (0.125, [1, 10])]
)
def test_reports_come_every_two_seconds_of_steps(now: list[float], step_s: float, reported: list[int]) -> None:
    run = run_loop(FakeEngine(now=now, step_s=step_s), Calendar(10, 0, 0))
    assert steps_of(run, "report") == reported
    assert [record["metrics"]["time/step_s"] for record in run.records] == [step_s] * 10
    assert [record["metrics"]["time/examples_per_s"] for record in run.records] == [32 / step_s] * 10
    assert run.state is not None
    assert run.state.seconds == 10 * step_s


def test_evaluating_and_saving_are_not_counted_as_steps(now: list[float]) -> None:
    run = run_loop(FakeEngine(now=now, step_s=0.5), Calendar(12, 3, 4), pause_s=60.0)
    assert [record["metrics"]["time/step_s"] for record in run.records] == [0.5] * 12
    assert run.state is not None
    assert run.state.seconds == 6.0
    # The first report at once, then every four steps of 0.5 s, whatever came between.
    assert steps_of(run, "report") == [1, 4, 8, 12]


@pytest.mark.parametrize(
    ("every", "recorded"), [(1, list(range(1, 12))), (4, [1, 4, 5, 8, 10, 11]), (100, [1, 5, 10, 11])]
)
def test_record_every(every: int, recorded: list[int]) -> None:
    """The first step, each `every`-th, and all evaluated ones."""
    run = run_loop(FakeEngine(), Calendar(11, 5, 0), record_every=every)
    assert [record["step"] for record in run.records] == recorded
    assert [step for step, metrics in run.metrics().items() if "eval/accuracy" in metrics] == [5, 10, 11]


@settings(max_examples=30, deadline=None)
@given(last=st.integers(1, 20), checkpoint_every=st.integers(0, 7), evaluate_every=st.integers(0, 7))
def test_the_segments_of_all_checkpoints_hold_each_step_once(last, checkpoint_every, evaluate_every) -> None:
    run = run_loop(FakeEngine(), Calendar(last, evaluate_every, checkpoint_every))
    segments = [record for _, segment in run.saved for record in segment]
    assert segments == run.records
    assert [record["step"] for record in segments] == list(range(1, last + 1))
    for reached, segment in run.saved:
        assert segment[-1]["step"] == reached.step


# ----------------------------------------------------------------------------------------------- stopping, going on


@pytest.mark.parametrize("first", [1, 3, 6, 9])
def test_a_resumed_run_records_the_same(first: int) -> None:
    calendar, how = Calendar(10, 4, 3), {"skipped": (2, 7), "loss_scale": 4.0}
    whole_engine, rest_engine = FakeEngine(**how), FakeEngine(**how)
    whole = run_loop(whole_engine, calendar)
    applied = first - sum(step <= first for step in how["skipped"])
    rest = run_loop(rest_engine, calendar, TrainState(first, applied, 12.5))
    assert rest_engine.calls == whole_engine.calls[first:]
    assert rest.metrics() == {step: metrics for step, metrics in whole.metrics().items() if step > first}
    assert [reached.step for reached, _ in rest.saved] == [step for step in (3, 6, 9, 10) if step > first]
    assert rest.state == TrainState(10, 8, 12.5)


def test_nothing_is_left_to_do_at_the_end() -> None:
    reached = TrainState(10, 9, 3.0)
    run = run_loop(FakeEngine(), Calendar(10, 2, 2), reached)
    assert run.state == reached
    assert run.events == []


def test_a_request_to_stop_saves_and_interrupts(now: list[float]) -> None:
    engine = FakeEngine(now=now, step_s=2.0)  # a report is due at every step
    run = run_loop(engine, Calendar(10, 0, 0), stop_at=4)
    assert run.events[-3:] == [("report", 4), ("save", 4), ("interrupted", 4)]
    assert len(engine.calls) == 4
    assert len(run.saved) == 1
    assert run.saved[0][0].step == 4
    assert [record["step"] for record in run.saved[0][1]] == [1, 2, 3, 4]
    assert run.state is None


def test_a_request_to_stop_at_a_checkpoint_saves_once() -> None:
    run = run_loop(FakeEngine(), Calendar(10, 0, 5), stop_at=2)  # no report is due between 1 and 5
    assert run.events == [("report", 1), ("report", 5), ("save", 5), ("interrupted", 5)]


def test_a_request_to_stop_at_the_last_step_finishes() -> None:
    run = run_loop(FakeEngine(), Calendar(3, 0, 0), stop_at=3)
    assert run.events == [("report", 1), ("evaluate", 3), ("report", 3), ("save", 3)]
    assert run.state is not None
    assert run.state.step == 3


# --------------------------------------------------------------------------------------------- at the minimum scale


def test_stop_saves_and_names_the_step_and_the_module() -> None:
    engine = FakeEngine(exhausted=(4,), loss_scale=1.0)
    run = run_loop(engine, Calendar(10, 0, 0), watch=see_skips)
    assert run.events == [("report", 1), ("report", 4), ("save", 4)]
    assert run.saved[0][0] == TrainState(4, 3)
    assert run.saved[0][1][-1]["events"] == ["step 4 overflowed in conv1"]
    assert run.failure.startswith(
        "step 4: gradients overflow at the smallest loss scale (step 4 overflowed in conv1). The state is saved"
    )
    assert run.state is None
    # The same command once more: with the next batch, from the same weights.
    again = run_loop(engine, Calendar(10, 0, 0), run.saved[0][0])
    assert again.state == TrainState(10, 9)
    assert [call["step"] for call in engine.calls] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_hold_skips_the_step_and_goes_on() -> None:
    engine = FakeEngine(exhausted=(3, 4, 5, 6, 7), loss_scale=1.0)
    run = run_loop(engine, Calendar(9, 0, 0), policy="hold")
    assert run.state == TrainState(9, 4)
    assert engine.weight == 1 + 2 + 8 + 9
    assert [call["lr"] for call in engine.calls] == [1, 1 / 2, *[1 / 3] * 6, 1 / 4]


def test_back_off_returns_to_the_checkpoint_and_goes_on_with_the_next_batch() -> None:
    engine = FakeEngine(skipped=(6,), exhausted=(7,), loss_scale=1.0)
    run = run_loop(engine, Calendar(10, 0, 4), policy="back_off")
    # Step 5 was applied and is taken back; batches 5 to 7 are not seen again.
    assert [call["step"] for call in engine.calls] == list(range(1, 11))
    assert engine.weight == 1 + 2 + 3 + 4 + 8 + 9 + 10
    assert run.state == TrainState(10, 7, undone=1, back_offs=1)
    assert run.state is not None
    assert run.state.skipped == 2
    assert [call["lr"] for call in engine.calls[6:]] == [1 / 6, 1 / 5, 1 / 6, 1 / 7]
    metrics = run.metrics()
    assert [metrics[step]["precision/skipped_steps"] for step in range(5, 9)] == [0, 1, 2, 2]
    assert [metrics[step].get("precision/back_offs") for step in range(5, 9)] == [None, None, 1, 1]


def test_back_off_ends_at_the_fourth_time_in_a_row() -> None:
    engine = FakeEngine(skipped=(6, 8), exhausted=(5, 7, 9, 10, 11), loss_scale=1.0)
    run = run_loop(engine, Calendar(20, 0, 4), policy="back_off")
    assert engine.calls[-1]["step"] == 10
    assert [step for name, step in run.events if name == "restore"] == [4, 4, 8]
    assert run.failure.startswith(
        "step 10: gradients overflow at the smallest loss scale after 3 returns to the last checkpoint (loss scale 1)."
    )
    assert run.saved[-1][0] == TrainState(10, 4, back_offs=3, back_offs_in_row=3)


def test_an_applied_step_ends_the_row() -> None:
    engine = FakeEngine(exhausted=(4, 6, 8, 10, 12), loss_scale=1.0)
    run = run_loop(engine, Calendar(12, 0, 3), policy="back_off")
    assert run.failure == ""
    assert run.state == TrainState(12, 4, undone=3, back_offs=5, back_offs_in_row=1)


def test_back_off_without_a_checkpoint_stops() -> None:
    run = run_loop(FakeEngine(exhausted=(2,), loss_scale=1.0), Calendar(9, 0, 3), policy="back_off")
    assert run.failure.startswith("step 2: gradients overflow at the smallest loss scale (loss scale 1).")
    assert run.saved[0][0] == TrainState(2, 1)


@settings(max_examples=60, deadline=None)
@given(
    exhausted=st.sets(st.integers(1, 20), max_size=8),
    skipped=st.sets(st.integers(1, 20), max_size=5),
    killed=st.integers(1, 19),
    every=st.integers(1, 6),
    policy=st.sampled_from(["hold", "back_off", "stop"]),
)
def test_a_killed_run_goes_on_to_the_same_weights(exhausted, skipped, killed, every, policy) -> None:
    """Killed after any step, with what its last checkpoint holds; stopped runs are started again, too."""
    how = {"exhausted": tuple(exhausted), "skipped": tuple(skipped - exhausted), "loss_scale": 1.0}

    def attempts(kill_at: int | None) -> tuple[int, TrainState]:
        run, last = Run(), kill_at or 20
        while True:
            state, weight = run.checkpoints[-1] if run.checkpoints else (TrainState(), 0)
            engine = FakeEngine(weight=weight, **how)
            # A run that is killed has neither its last evaluation nor its last save.
            run = run_loop(engine, Calendar(last, 0, every), state, policy=policy, before=run)
            if run.failure:
                continue
            if last == 20:
                assert run.state is not None
                return engine.weight, run.state
            if last % every:
                run.checkpoints.pop()
            last = 20

    assert attempts(None) == attempts(killed)


# ----------------------------------------------------------------------------------------------------------- watching


def see_skips(step: WatchedStep) -> Observation:
    """One number a step, and an event where it was skipped."""
    events = () if step.applied else (f"step {step.step} overflowed in conv1",)
    return Observation({"precision/underflow": 0.25} if step.step == 5 else {}, events)


def test_events_and_samples_are_in_the_records_of_their_steps() -> None:
    engine = FakeEngine(skipped=(3,), loss_scale=8.0)
    run = run_loop(engine, Calendar(6, 0, 0), record_every=100, watch=see_skips)
    assert [record["step"] for record in run.records] == [1, 3, 5, 6]
    assert [record.get("events") for record in run.records] == [None, ["step 3 overflowed in conv1"], None, None]
    assert [record["metrics"].get("precision/underflow") for record in run.records] == [None, None, 0.25, None]


def test_a_watch_is_told_what_the_engine_was() -> None:
    engine, told = FakeEngine(skipped=(2,), loss_scale=8.0), []

    def watch(step: WatchedStep) -> Observation:
        told.append((step.step, int(step.inputs), int(step.targets), step.seed, step.applied, step.loss_scale))
        return Observation()

    run_loop(engine, Calendar(2, 0, 0), watch=watch, rank=3)
    assert told == [(1, 0, 0, step_seed(5, 0, 3), True, 8.0), (2, 1, 10, step_seed(5, 1, 3), False, 8.0)]


def test_watching_is_not_counted_as_steps(now: list[float]) -> None:
    def watch(step: WatchedStep) -> Observation:
        now[0] += 60.0
        return Observation()

    run = run_loop(FakeEngine(now=now, step_s=0.5), Calendar(4, 0, 0), watch=watch)
    assert [record["metrics"]["time/step_s"] for record in run.records] == [0.5] * 4
    assert run.state is not None
    assert run.state.seconds == 2.0


# ----------------------------------------------------------------------------------------------------------- seeds


def test_step_seeds_are_stable_and_differ() -> None:
    # Pinned: another value would give other weights under an old fingerprint.
    assert step_seed(0, 0, 0) == 18352313451623707
    assert step_seed(12, 3456, 7) == 52035469366276128
    seeds = [step_seed(seed, step, rank) for seed in range(10) for step in range(20) for rank in range(10)]
    assert len(set(seeds)) == len(seeds)
    # torch.manual_seed takes 64 bits.
    assert all(0 <= seed < 2**56 for seed in seeds)
    # 1/23 and 12/3 are not the same text.
    assert step_seed(1, 23, 4) != step_seed(12, 3, 4)


# ----------------------------------------------------------------------------------------------------------- ranks


def two_ranks(rank: int) -> list[Run]:
    runs = []
    for how in ({"terms": ("hard", "soft")}, {"loss_scale": 2.0, "grad_norm": 3.0}):
        engine = FakeEngine(rank=rank, **how)
        runs.append(run_loop(engine, Calendar(6, 3, 0), rank=rank, world_size=2, stop_at=None if rank else 10**9))
    # Rank 1 asks to stop and is not heard; rank 0 asks and both stop together.
    runs.append(run_loop(FakeEngine(rank=rank), Calendar(6, 0, 2), rank=rank, world_size=2, stop_at=1 if rank else 4))
    return runs


def test_two_ranks_report_their_mean_and_agree() -> None:
    first, second = run_distributed(two_ranks, 2)
    terms, scaled, _ = first
    # Losses are n / 2 on rank 0 and n / 2 + 1 on rank 1.
    assert [terms.metrics()[step]["train/loss"] for step in range(1, 7)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert [terms.metrics()[step]["train/loss/hard"] for step in (1, 6)] == [0.75, 2.625]
    assert [terms.metrics()[step]["train/loss/soft"] for step in (1, 6)] == [0.25, 0.875]
    # What is global already stays as it is.
    assert scaled.metrics()[6] == {
        "train/loss": 3.5,
        "train/lr": 1 / 6,
        "train/grad_norm": 3.0,
        "precision/loss_scale": 2.0,
        "precision/skipped_steps": 0.0,
        "eval/accuracy": 0.06,
    }
    for mine, other in zip(first, second, strict=True):
        assert steps_of(other, "report") == steps_of(mine, "report")
        assert steps_of(other, "save") == steps_of(mine, "save")
        assert other.records == []
    assert steps_of(first[2], "save") == [2, 4]
    assert first[2].events[-1] == second[2].events[-1] == ("interrupted", 4)
    assert first[2].saved[1][0].step == second[2].saved[1][0].step == 4
    # Time is rank 0's own, not a sum.
    assert all(record["metrics"]["time/step_s"] < 5.0 for record in first[0].records)
