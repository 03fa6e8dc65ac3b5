"""Rungs by phase under Ray Tune's own schedulers: with fake trials, and in real sweeps of scripted learning curves."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from temper.config.space import Params, SpaceConfig
from temper.launch.forks import fork_params
from temper.launch.rungs import RungClock, check_rungs
from temper.launch.schedulers import TRIAL_RESOURCES, build_scheduler, limited_trials, tune_environment
from temper.launch.search import build_search, decode, decode_all, expand_trials
from temper.ranking import best_trial

PHASES = ("dense", "sparse-1", "redense-1")
ACCURACY = {"metric": "eval/accuracy", "mode": "max"}


def make_space(variables: dict[str, Any], scheduler: dict[str, Any], **rest: Any) -> SpaceConfig:
    values = {"name": "test", "job": "job.yaml", "objectives": [ACCURACY], "search": {"kind": "random"}}
    return SpaceConfig.model_validate({**values, "space": variables, "scheduler": scheduler, **rest})


# ----------------------------------------------------------------------------------------------------------- the clock


def test_rungs_are_places_from_the_first_phase_that_differs() -> None:
    clock = RungClock.of(PHASES, "sparse-1", [0.5, 1.0], 3.0)
    assert clock.rungs == (("sparse-1", 0.5), ("sparse-1", 1.0), ("redense-1", 0.5))
    assert RungClock.of(PHASES, "dense", [0.5]).rungs == (("dense", 0.5), ("sparse-1", 0.5), ("redense-1", 0.5))


def test_the_clock_stands_still_between_rungs() -> None:
    clock = RungClock.of(PHASES, "sparse-1", [0.5, 1.0], 3.0)
    shares = (0.0, 0.49, 0.5, 0.99, 1.0)
    assert [clock.rung("dense", share) for share in shares] == [0, 0, 0, 0, 0]
    assert [clock.rung("sparse-1", share) for share in shares] == [0, 0, 1, 1, 2]
    assert [clock.rung("redense-1", share) for share in shares] == [2, 2, 3, 3, 3]
    assert [clock.time(rung) for rung in range(4)] == [0, 1, 3, 9]


def test_a_trial_stops_at_the_first_step_that_reaches_a_rung() -> None:
    clock = RungClock.of(["dense", "sparse-1"], "dense", [0.35, 0.7, 1.0])
    assert clock.stops("dense", 20) == (7, 14, 20)
    assert clock.stops("sparse-1", 10) == (4, 7)
    assert [clock.rung("dense", step / 10) for step in (3, 4, 7)] == [0, 1, 2]


def test_a_clock_without_rungs_is_refused() -> None:
    (problem,) = check_rungs(RungClock.of(["dense"], "dense", [1.0]), [1.0])
    assert str(problem).startswith("scheduler.rungs: [1.0] leaves no rung: trials differ from dense on, where they end")
    assert check_rungs(RungClock.of(["dense"], "dense", [0.5]), [0.5]) == []


# ------------------------------------------------------------------------------------------- Ray's schedulers on fakes


@dataclass(eq=False)
class FakeTrial:
    trial_id: str
    scores: Sequence[float]  # at each rung; the trial ends at the rung after the last
    status: str = Trial.PENDING
    is_saving: bool = False
    passed: list[int] = field(default_factory=list)

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)


class FakeController:
    """Runs one trial at a time, as Ray Tune's controller does with room for one."""

    def __init__(self, scheduler: TrialScheduler, clock: RungClock) -> None:
        self.scheduler, self.clock = scheduler, clock
        self.events: list[tuple[str, int, str]] = []

    def stop_trial(self, trial: FakeTrial) -> None:
        if trial.status in (Trial.PENDING, Trial.PAUSED):
            self.scheduler.on_trial_remove(self, trial)
        else:
            self.scheduler.on_trial_complete(self, trial, self.result(trial))
        trial.status = Trial.TERMINATED
        self.events.append((trial.trial_id, len(trial.passed), "end"))

    def result(self, trial: FakeTrial) -> dict[str, float]:
        return {"rung_time": self.clock.time(len(trial.passed)), "eval/accuracy": trial.scores[len(trial.passed) - 1]}

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def run(self, trials: list[FakeTrial]) -> list[tuple[str, int, str]]:
        """What has been decided: trial, the rungs that it had passed, `pause` or `end`."""
        self.trials = trials
        for trial in trials:
            self.scheduler.on_trial_add(self, trial)
        while trial := self.scheduler.choose_trial_to_run(self):
            trial.status = Trial.RUNNING
            self.run_one(trial)
        return self.events

    def run_one(self, trial: FakeTrial) -> None:
        while trial.status == Trial.RUNNING:
            if len(trial.passed) == len(trial.scores):
                self.stop_trial(trial)
                return
            trial.passed.append(len(trial.passed) + 1)
            decision = self.scheduler.on_trial_result(self, trial, self.result(trial))
            if decision == TrialScheduler.PAUSE:
                trial.status = Trial.PAUSED
                self.events.append((trial.trial_id, len(trial.passed), "pause"))
            elif decision == TrialScheduler.STOP:
                self.stop_trial(trial)


def clock_of(rungs: int, reduction_factor: float) -> RungClock:
    """One rung in the midst of each phase."""
    return RungClock.of([f"phase-{index}" for index in range(rungs)], "phase-0", [0.5], reduction_factor)


def scheduler_of(kind: str, clock: RungClock) -> Any:
    space = make_space({"a": {"kind": "uniform", "low": 0.0, "high": 1.0}}, {"kind": kind})
    return build_scheduler(space, clock)


@pytest.mark.parametrize("reduction_factor", [1.1, 1.5, 2.0, 3.0, 3.7, 100.0])
@pytest.mark.parametrize("rungs", [1, 2, 5, 9])
def test_the_milestones_of_asha_are_the_rungs(rungs: int, reduction_factor: float) -> None:
    clock = clock_of(rungs, reduction_factor)
    (bracket,) = scheduler_of("asha", clock)._brackets
    milestones = [milestone for milestone, _ in reversed(bracket._rungs)]
    assert milestones == [clock.time(rung) for rung in range(1, rungs + 1)]


@pytest.mark.parametrize(
    ("reduction_factor", "rungs"), [(2.0, 9), (2.1, 9), (2.5, 9), (2.9, 9), (3.0, 9), (3.7, 9), (10.0, 9), (100.0, 6)]
)
def test_brackets_of_hyperband_halve_at_each_of_their_rungs(reduction_factor: float, rungs: int) -> None:
    clock = clock_of(rungs, reduction_factor)
    hyperband = scheduler_of("hyperband", clock)
    for halvings in range(rungs + 1):
        bracket = hyperband._create_bracket(halvings)
        # The k-th halving is between the rung that it belongs to and the one before.
        for rung in range(rungs - halvings + 1, rungs + 1):
            assert clock.time(rung - 1) < bracket._cumul_r <= clock.time(rung)
            bracket.successive_halving("eval/accuracy", 1.0)


def test_asha_decides_at_rungs_only_and_stops_no_tie() -> None:
    clock = RungClock.of(PHASES, "sparse-1", [0.5, 1.0], 3.0)
    asha = scheduler_of("asha", clock)

    def decide(trial: FakeTrial, phase: str, share: float, accuracy: float) -> str:
        time = clock.time(clock.rung(phase, share))
        return asha.on_trial_result(None, trial, {"rung_time": time, "eval/accuracy": accuracy})

    first, second, third = (FakeTrial(name, []) for name in "abc")
    for trial in (first, second, third):
        asha.on_trial_add(None, trial)
        # Nothing is compared before the first rung, however bad a trial is.
        assert decide(trial, "dense", 1.0, 0.9) == TrialScheduler.CONTINUE
        assert decide(trial, "sparse-1", 0.1, 0.0 if trial is second else 0.5) == TrialScheduler.CONTINUE
    assert decide(first, "sparse-1", 0.5, 0.8) == TrialScheduler.CONTINUE
    assert decide(second, "sparse-1", 0.5, 0.8) == TrialScheduler.CONTINUE  # a tie
    assert decide(first, "sparse-1", 0.7, 0.1) == TrialScheduler.CONTINUE  # between two rungs
    assert decide(third, "sparse-1", 0.5, 0.79) == TrialScheduler.STOP
    # The last rung is not the end: nothing is stopped for having come so far.
    assert decide(first, "redense-1", 0.5, 0.9) == TrialScheduler.CONTINUE
    assert decide(first, "redense-1", 1.0, 0.9) == TrialScheduler.CONTINUE


def test_hyperband_compares_whole_brackets() -> None:
    clock = clock_of(2, 2.0)
    # Brackets of three that run through, of three that are halved at the second rung, and of four at both.
    scores = [0.1, 0.2, 0.3, 0.4, 0.6, 0.5, 0.7, 0.9, 0.6, 0.8]
    trials = [FakeTrial(str(index), [score, score]) for index, score in enumerate(scores)]
    events = FakeController(scheduler_of("hyperband", clock), clock).run(trials)
    assert {name: rung for name, rung, what in events if what == "pause"} == {
        **{"3": 2, "4": 2},
        **{"6": 1, "7": 1, "8": 1, "9": 2},
    }
    assert [trial.trial_id for trial in trials if len(trial.passed) == 1] == ["6", "8"]
    assert all(trial.status == Trial.TERMINATED for trial in trials)


def test_a_bracket_goes_on_when_the_trial_that_it_waits_for_ends() -> None:
    clock = clock_of(2, 2.0)
    scores = [[0.5, 0.5]] * 6 + [[0.9, 0.9], [0.8, 0.8], [0.7], [0.1]]
    trials = [FakeTrial(str(index), each) for index, each in enumerate(scores)]
    # The eighth passes the first rung and diverges before the second, where the seventh waits for it.
    trials[7].scores = [0.8]
    FakeController(scheduler_of("hyperband", clock), clock).run(trials)
    assert all(trial.status == Trial.TERMINATED for trial in trials)
    assert len(trials[6].passed) == 2


# ---------------------------------------------------------------------------------------------- sweeps of scripted jobs


@pytest.fixture(scope="module")
def embedded_ray() -> Iterator[Any]:
    import ray

    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # Ray's workers don't find the tests
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(module)


class Recorder(tune.Callback):
    """Each trial's results, by id; and the event is set at the first of them."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.ended: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of all that it is given

    def on_trial_result(self, iteration: int, trials: Any, trial: Trial, result: dict[str, Any], **_: Any) -> None:
        self.results.setdefault(trial.trial_id, []).append(dict(result))
        self.event.set()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Trial, **_: Any) -> None:
        self.ended.append(trial.trial_id)

    def in_order(self) -> list[list[dict[str, Any]]]:
        return [self.results[name] for name in sorted(self.results)]


class WhenSet(tune.Stopper):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.event.is_set()

    def __getstate__(self) -> dict[str, Any]:
        return {}


def sweep(
    space: SpaceConfig,
    scheduler: Any,
    trainable: type[tune.Trainable],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    concurrency: int = 1,
    stop_early: bool = False,
    known: Sequence[Params] = (),
) -> Recorder:
    trials, _ = expand_trials(space)
    search = build_search(space, trials, known, concurrency)
    for name, value in tune_environment(space, search.num_samples).items():
        monkeypatch.setenv(name, value)
    event = threading.Event()
    recorder = Recorder(event)
    tuner = tune.Tuner(
        tune.with_resources(trainable, TRIAL_RESOURCES),
        param_space=search.param_space,
        tune_config=tune.TuneConfig(
            search_alg=search.algorithm,
            num_samples=search.num_samples,
            scheduler=scheduler,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[recorder],
            stop=WhenSet(event) if stop_early else None,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    with limited_trials(concurrency):
        assert tuner.fit().num_errors == 0
    return recorder


class Scripted(tune.Trainable):
    """A job of scripted results; what Tune calls goes with the next result."""

    space: SpaceConfig
    clock: RungClock

    def setup(self, config: dict[str, Any]) -> None:
        self.calls = ["setup"]
        self.begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.calls.append("reset_config")
        self.begin(new_config)
        return True

    def begin(self, config: dict[str, Any]) -> None:
        self.params, self.done = decode(self.space, config), 0

    def step(self) -> dict[str, Any]:
        self.calls.append("step")
        self.done += 1
        calls, self.calls = self.calls, []
        return {"calls": calls, "params": self.params, **self.next_result()}

    def next_result(self) -> dict[str, Any]:
        raise NotImplementedError

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        self.calls = ["save_checkpoint"]
        return {"params": self.params, "done": self.done}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        assert checkpoint is not None
        self.calls.append("load_checkpoint")
        self.restore_from(checkpoint)

    def restore_from(self, checkpoint: dict[str, Any]) -> None:
        self.params, self.done = checkpoint["params"], checkpoint["done"]


# ------------------------------------------------------------------------------------------------ the dip after pruning

EPOCHS = 8
"""Of each phase."""
JOB = len(PHASES) * EPOCHS
QUALITY = {0.6: 0.85, 0.2: 0.81, 0.1: 0.80, 0.8: 0.70, 0.3: 0.82, 0.7: 0.90, 0.4: 0.83, 0.9: 0.60, 0.5: 0.84}
"""By sparsity, in the order of the trials: the accuracy that it ends with."""
WINNER = 0.7


def scripted_accuracy(sparsity: float, epoch: int) -> float:
    """All trials are alike until they are pruned. Then the accuracy falls, the more the more is pruned, and recovers
    within a few epochs to what the trial is worth; training densely adds a little."""
    if epoch <= EPOCHS:
        return 0.8 * (1 - math.exp(-epoch / 3))
    accuracy = QUALITY[sparsity] - sparsity * math.exp(-(epoch - EPOCHS) / 1.5)
    return accuracy + 0.02 * max(0, epoch - 2 * EPOCHS) / EPOCHS


def dip_space(scheduler: dict[str, Any]) -> SpaceConfig:
    variables = {"sparsity": {"kind": "grid", "values": list(QUALITY)}}
    return make_space(variables, scheduler, search={"kind": "grid"})


DIP_CLOCK = RungClock.of(PHASES, "sparse-1", [0.5, 1.0], 3.0)


class Dipping(Scripted):
    space = dip_space({"kind": "fifo"})

    def next_result(self) -> dict[str, Any]:
        phase, epochs = divmod(self.done - 1, EPOCHS)
        rung = DIP_CLOCK.rung(PHASES[phase], (epochs + 1) / EPOCHS)
        return {
            "epoch": self.done,
            "rung_time": DIP_CLOCK.time(rung),
            "eval/accuracy": scripted_accuracy(self.params["sparsity"], self.done),
            "done": self.done == JOB,
        }


def epochs_of(recorder: Recorder) -> dict[float, int]:
    return {results[-1]["params"]["sparsity"]: results[-1]["epoch"] for results in recorder.in_order()}


def winner_of(recorder: Recorder) -> float:
    last = [results[-1] for results in recorder.in_order()]
    best = best_trial(last, dip_space({"kind": "fifo"}).objectives[0])
    assert best is not None
    return last[best]["params"]["sparsity"]


@pytest.mark.ray
def test_asha_by_phase_does_not_stop_the_winner_in_its_dip(
    embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = dip_space({"kind": "asha", "reduction_factor": 3.0, "rungs": [0.5, 1.0]})
    plain = AsyncHyperBandScheduler("epoch", **ACCURACY, max_t=JOB, grace_period=1, reduction_factor=3)
    by_step = sweep(space, plain, Dipping, tmp_path / "by step", monkeypatch)
    by_phase = sweep(space, build_scheduler(space, DIP_CLOCK), Dipping, tmp_path / "by phase", monkeypatch)

    assert max(QUALITY, key=lambda sparsity: scripted_accuracy(sparsity, JOB)) == WINNER
    # At the ninth epoch, the first one after pruning, the winner is behind.
    assert epochs_of(by_step)[WINNER] == EPOCHS + 1
    assert winner_of(by_step) == 0.6
    # By phase, trials are compared first when half of the sparse phase has been trained.
    assert min(epochs_of(by_phase).values()) == EPOCHS + EPOCHS // 2
    assert epochs_of(by_phase)[WINNER] == JOB
    assert winner_of(by_phase) == WINNER
    # Epochs really trained; random search trains all trials to their end.
    random = len(QUALITY) * JOB
    assert (sum(epochs_of(by_step).values()), sum(epochs_of(by_phase).values()), random) == (126, 144, 216)


@pytest.mark.ray
@pytest.mark.slow
def test_random_search_trains_all_trials_to_their_end_in_their_order(
    embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = sweep(Dipping.space, None, Dipping, tmp_path, monkeypatch, concurrency=2)
    assert list(epochs_of(recorder).items()) == [(sparsity, JOB) for sparsity in QUALITY]
    begun = [results[0]["params"]["sparsity"] for results in recorder.results.values()]
    assert begun == list(QUALITY)
    assert winner_of(recorder) == WINNER


# ------------------------------------------------------------------------------------------- trials that wait and fork


class Waiting(Scripted):
    """Two phases of two steps, the score is the trial's value."""

    space = make_space({"value": {"kind": "grid", "values": [1, 2, 4, 3]}}, {"kind": "fifo"}, search={"kind": "grid"})
    clock = RungClock.of(["dense", "sparse-1"], "sparse-1", [0.5], 2.0)

    def next_result(self) -> dict[str, Any]:
        phase, half = divmod(self.done - 1, 2)
        time = self.clock.time(self.clock.rung(self.clock.phases[phase], (half + 1) / 2))
        score = self.params["value"] + self.done / 10
        return {"step": self.done, "rung_time": time, "eval/accuracy": score, "done": self.done == 4}


@pytest.mark.ray
def test_a_paused_trial_goes_on_from_its_checkpoint(
    embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"kind": "hyperband", "reduction_factor": 2.0, "rungs": [0.5]}
    space = make_space({"value": {"kind": "grid", "values": [1, 2, 4, 3]}}, config, search={"kind": "grid"})
    recorder = sweep(space, build_scheduler(space, Waiting.clock), Waiting, tmp_path, monkeypatch)
    results = {each[0]["params"]["value"]: each for each in recorder.in_order()}
    # A bracket of two that run through, and one of two that are compared at the rung; the worse one is stopped there.
    assert {value: len(each) for value, each in results.items()} == {1: 4, 2: 4, 3: 3, 4: 4}
    assert [each["step"] for each in results[4]] == [1, 2, 3, 4]
    # In the actor of before, or in a new one: Tune keeps none while all trials are paused.
    assert results[4][3]["calls"][-3:] in ([begin, "load_checkpoint", "step"] for begin in ("setup", "reset_config"))
    assert sum("load_checkpoint" in result["calls"] for each in results.values() for result in each) == 1
    assert len(recorder.ended) == 4


ROUNDS = {"kind": "choice", "values": [1, 2]}
RATE = {"kind": "loguniform", "low": 0.01, "high": 1.0}
SPARSITY = {"kind": "quniform", "low": 0.3, "high": 0.9, "q": 0.1}


class Forking(Scripted):
    """One step is one phase; the score falls with the learning rates and sparsities of the phases so far."""

    space = make_space(
        {
            "lr": RATE,
            "sparsity": SPARSITY,
            "redense_rate": RATE,
            "rounds": ROUNDS,
            "second": {**SPARSITY, "when": {"rounds": 2}},
        },
        {"kind": "pbt", "quantile": 0.34},
        budget={"trials": 6},
        seed=3,
    )
    clock = RungClock.of(["dense", "sparse-1", "redense-1", "sparse-2", "redense-2"], "dense")

    @staticmethod
    def phases_of(params: Params) -> list[str]:
        deciding = [params[name] for name in ("lr", "sparsity", "redense_rate")]
        deciding += [params["second"], "redense"] if params["rounds"] == 2 else []
        return [str(deciding[: length + 1]) for length in range(len(deciding))]

    def begin(self, config: dict[str, Any]) -> None:
        super().begin(config)
        self.wanted = decode_all(self.space, config)

    def restore_from(self, checkpoint: dict[str, Any]) -> None:
        self.done = checkpoint["done"]
        self.params = fork_params(self.space, checkpoint["params"], self.wanted, self.phases_of, self.done)

    def next_result(self) -> dict[str, Any]:
        phases = self.phases_of(self.params)
        self.done = min(self.done, len(phases))  # a fork may be of fewer phases than its source
        score = -sum(self.params.get(name, 0) for name in ("lr", "sparsity", "redense_rate", "second")[: self.done])
        last = self.done == len(phases)
        return {"place": float(self.done), "eval/accuracy": score, "phases": phases[: self.done], "done": last}


def fork_histories(recorder: Recorder) -> list[list[list[str]]]:
    return [[result["phases"] for result in results] for results in recorder.in_order()]


@pytest.mark.ray
def test_a_fork_goes_on_from_another_trials_phases(
    embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = build_scheduler(Forking.space, Forking.clock)
    recorder = sweep(Forking.space, scheduler, Forking, tmp_path, monkeypatch)
    histories = fork_histories(recorder)
    forks = [
        (trial, done)
        for trial, history in enumerate(histories)
        for done in range(1, len(history))
        if history[done][:done] != history[done - 1]
    ]
    assert len(forks) >= 4
    for trial, done in forks:
        # The phases that it goes on from are those of another trial, at the same place.
        others = [
            history[done - 1] for history in histories if len(history) >= done and history is not histories[trial]
        ]
        assert histories[trial][done][:done] in others
        assert recorder.in_order()[trial][done]["calls"][-2:] == ["load_checkpoint", "step"]
    # Trials of one round end after three phases, and those of two, which wait for them there, go on.
    assert (min(map(len, histories)), max(map(len, histories))) == (3, 5)
    params = [result["params"] for results in recorder.in_order() for result in results]
    assert all(0.01 <= each["lr"] <= 1 and 0.3 <= each["sparsity"] <= 0.9 for each in params)


@pytest.mark.ray
@pytest.mark.slow
def test_forks_are_the_same_whatever_runs_at_once(
    embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = []
    for concurrency in (1, 3):
        scheduler = build_scheduler(Forking.space, Forking.clock)
        folder = tmp_path / str(concurrency)
        recorder = sweep(Forking.space, scheduler, Forking, folder, monkeypatch, concurrency)
        histories.append(fork_histories(recorder))
    assert histories[0] == histories[1]


# ------------------------------------------------------------------------------------------------------ ends of a sweep


@pytest.mark.ray
def test_tpe_ends_when_it_has_tried_a_small_space(
    embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"value": {"kind": "choice", "values": [1, 2, 4, 3]}}
    space = make_space(variables, {"kind": "fifo"}, search={"kind": "tpe", "startup_trials": 2}, budget={"trials": 9})
    known = [{"value": 3}, {"value": 1}]
    recorder = sweep(space, None, Waiting, tmp_path, monkeypatch, known=known)
    values = [results[-1]["params"]["value"] for results in recorder.results.values()]
    assert values[:2] == [3, 1] and sorted(values) == [1, 2, 3, 4]


@pytest.mark.ray
def test_a_sweep_is_stopped_from_outside(embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = sweep(Waiting.space, None, Waiting, tmp_path, monkeypatch, stop_early=True)
    assert sum(map(len, recorder.results.values())) < 16 and recorder.ended == []
