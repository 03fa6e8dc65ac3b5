"""A sweep's trials, the searchers that hand them out, and which results are best."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from ray.tune.search import Searcher

from temper.config.space import Objective, Params, SpaceConfig
from temper.config.space_load import active_params
from temper.launch.forks import fork_params
from temper.launch.search import (
    DistinctOptunaSearch,
    build_search,
    decode,
    decode_all,
    encode,
    expand_trials,
    order_trials,
)
from temper.ranking import best_trial, is_better, pareto_front

ROUNDS = {"kind": "choice", "values": [1, 2]}
SPARSITY = {"kind": "quniform", "low": 0.3, "high": 0.9, "q": 0.1}
RATE = {"kind": "loguniform", "low": 1e-3, "high": 1.0}
ACCURACY = {"metric": "eval/accuracy", "mode": "max"}


def make_space(variables: dict[str, Any], search: dict[str, Any], **rest: Any) -> SpaceConfig:
    values = {"name": "test", "job": "job.yaml", "objectives": [ACCURACY], "space": variables, "search": search}
    return SpaceConfig.model_validate({**values, **rest})


def random_space(variables: dict[str, Any], trials: int, **rest: Any) -> SpaceConfig:
    return make_space(variables, {"kind": "random"}, budget={"trials": trials}, **rest)


# --------------------------------------------------------------------------------------------------------------- points


def test_a_point_holds_numbers_only_and_is_its_params() -> None:
    schedules = [{"kind": "constant"}, {"eval": "1 + 1"}]
    variables = {
        "optimizer.schedule": {"kind": "choice", "values": schedules},
        "split": {"kind": "grid", "settings": {"even": {"a": 1}, "late": {"a": 2}}},
        "sparsity": SPARSITY,
        "optimizer.lr": RATE,
        "seed": {"kind": "randint", "low": 0, "high": 9},
    }
    space = random_space(variables, 1)
    params = {
        "optimizer.schedule": {"eval": "1 + 1"},
        "split": "late",
        "sparsity": 0.3,
        "optimizer.lr": 0.01,
        "seed": 7,
    }
    point = encode(space, params)
    assert point == {"optimizer.schedule": 1, "split": 1, "sparsity": 3, "optimizer.lr": 0.01, "seed": 7}
    assert decode(space, point) == params


def test_true_and_one_are_two_values() -> None:
    space = random_space({"flag": {"kind": "choice", "values": [1, True, "1"]}}, 1)
    assert [encode(space, {"flag": value})["flag"] for value in (1, True, "1")] == [0, 1, 2]


def test_only_active_variables_are_decoded() -> None:
    space = random_space({"rounds": ROUNDS, "second": {**SPARSITY, "when": {"rounds": 2}}}, 1)
    assert decode(space, {"rounds": 0, "second": 4}) == {"rounds": 1}
    assert decode(space, {"rounds": 1, "second": 4}) == {"rounds": 2, "second": 0.4}
    assert decode_all(space, {"rounds": 0, "second": 4}) == {"rounds": 1, "second": 0.4}


# --------------------------------------------------------------------------------------------------------------- trials


def test_a_grid_is_every_combination_once() -> None:
    variables = {"a": {"kind": "grid", "values": [1, 2, 3]}, "b": {"kind": "grid", "settings": {"x": {}, "y": {}}}}
    trials, doubles = expand_trials(make_space(variables, {"kind": "grid"}))
    assert doubles == 0
    assert Counter((params["a"], params["b"]) for params in trials) == Counter(
        (a, b) for a in (1, 2, 3) for b in ("x", "y")
    )


def test_combinations_that_differ_only_in_what_is_not_there_are_one_trial() -> None:
    variables = {
        "rounds": {"kind": "grid", "values": [1, 2]},
        "second": {"kind": "grid", "values": [0.5, 0.7, 0.9], "when": {"rounds": 2}},
    }
    trials, doubles = expand_trials(make_space(variables, {"kind": "grid"}))
    assert doubles == 2
    assert sorted(trials, key=str) == [
        {"rounds": 1},
        {"rounds": 2, "second": 0.5},
        {"rounds": 2, "second": 0.7},
        {"rounds": 2, "second": 0.9},
    ]


def test_random_trials_are_the_same_on_every_machine() -> None:
    variables = {"rounds": ROUNDS, "second": {**SPARSITY, "when": {"rounds": 2}}, "lr": RATE}
    trials, doubles = expand_trials(random_space(variables, 3, seed=5))
    assert doubles == 0
    assert trials == [
        {"rounds": 2, "second": 0.9, "lr": pytest.approx(0.40944626946107576)},
        {"rounds": 1, "lr": pytest.approx(0.569944705733941)},
        {"rounds": 1, "lr": pytest.approx(0.06842764422737327)},
    ]
    assert expand_trials(random_space(variables, 3, seed=6))[0] != trials


def test_a_random_search_draws_as_often_for_each_combination_of_the_grids() -> None:
    trials, _ = expand_trials(random_space({"seed": {"kind": "grid", "values": [0, 1]}, "lr": RATE}, 4))
    assert Counter(params["seed"] for params in trials) == {0: 4, 1: 4}
    assert len({params["lr"] for params in trials}) == 8


def test_whole_ranges_are_drawn_with_both_ends_and_no_trial_twice() -> None:
    variables = {"steps": {"kind": "randint", "low": 3, "high": 5}, "sparsity": {**SPARSITY, "low": 0.7}}
    trials, doubles = expand_trials(random_space(variables, 100))
    assert doubles == 100 - 9
    assert sorted((params["steps"], params["sparsity"]) for params in trials) == [
        (steps, sparsity) for steps in (3, 4, 5) for sparsity in (0.7, 0.8, 0.9)
    ]


def test_trials_of_different_groups_alternate() -> None:
    trials = [{"seed": seed, "t": t} for seed in (0, 1, 2) for t in range(4 - seed)]
    ordered = order_trials(trials, lambda params: f"dense of {params['seed']}")
    assert [(params["seed"], params["t"]) for params in ordered] == [
        *[(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)],
        *[(0, 2), (1, 2), (0, 3)],
    ]


def test_what_a_broken_sweep_began_comes_first() -> None:
    trials, _ = expand_trials(random_space({"lr": RATE}, 5))
    search = build_search(random_space({"lr": RATE}, 5), trials, [trials[3], trials[1]], 2)
    assert [point["lr"] for point in search.algorithm._points_to_evaluate] == [
        trials[index]["lr"] for index in (3, 1, 0, 2, 4)
    ]
    assert search.num_samples == 5


# ------------------------------------------------------------------------------------------------------------------ TPE


def run_tpe(
    space: SpaceConfig, measure: Callable[[Params], dict[str, float]], known: list[Params], trials: int = 100
) -> tuple[list[Params], DistinctOptunaSearch]:
    """One trial after the other, each with its result at once."""
    searcher = DistinctOptunaSearch(space, space.search, known)
    done: list[Params] = []
    while len(done) < trials and (point := searcher.suggest(str(len(done)))) != Searcher.FINISHED:
        params = decode(space, point)
        done.append(params)
        searcher.on_trial_complete(str(len(done) - 1), measure(params))
    return done, searcher


CONDITIONAL = make_space(
    {"second": {**SPARSITY, "when": {"rounds": 2}}, "rounds": ROUNDS, "lr": RATE},
    {"kind": "tpe", "startup_trials": 5},
    budget={"trials": 30},
)


def conditional_accuracy(params: Params) -> dict[str, float]:
    """Best at two rounds, the second of 0.7, and a learning rate of 0.01."""
    missed = abs(params["second"] - 0.7) if params["rounds"] == 2 else 0.5
    return {"eval/accuracy": 1 - missed - 0.1 * abs(math.log10(params["lr"]) + 2)}


def test_tpe_knows_which_variables_are_there_and_learns() -> None:
    done, _ = run_tpe(CONDITIONAL, conditional_accuracy, [], trials=30)
    assert all(("second" in params) == (params["rounds"] == 2) for params in done)
    assert done == [active_params(CONDITIONAL, params) for params in done]
    scores = [conditional_accuracy(params)["eval/accuracy"] for params in done]
    assert sum(scores[-10:]) / 10 > sum(scores[:10]) / 10 + 0.1
    assert max(scores) > 0.95


def test_a_broken_tpe_sweep_goes_on_as_the_unbroken_one() -> None:
    unbroken, _ = run_tpe(CONDITIONAL, conditional_accuracy, [], trials=14)
    resumed, searcher = run_tpe(CONDITIONAL, conditional_accuracy, unbroken[:8], trials=14)
    assert resumed == unbroken
    assert [trial.state.name for trial in searcher._ot_study.trials] == ["COMPLETE"] * 14


def test_tpe_tries_a_small_space_once_and_ends() -> None:
    variables = {"a": {"kind": "choice", "values": [1, 2, 3]}, "b": {"kind": "choice", "values": ["x", "y"]}}
    space = make_space(variables, {"kind": "tpe", "startup_trials": 2}, budget={"trials": 30})
    done, searcher = run_tpe(space, lambda params: {"eval/accuracy": params["a"]}, [])
    assert sorted((params["a"], params["b"]) for params in done) == [(a, b) for a in (1, 2, 3) for b in "xy"]
    states = Counter(trial.state.name for trial in searcher._ot_study.trials)
    assert states["COMPLETE"] == 6 and set(states) == {"COMPLETE", "FAIL"}


def test_a_diverged_trial_is_the_worst_to_tpe_and_a_crashed_one_is_none() -> None:
    space = make_space({"lr": RATE}, {"kind": "tpe", "startup_trials": 2}, budget={"trials": 3})
    searcher = DistinctOptunaSearch(space, space.search, [])
    for name in "abc":
        searcher.suggest(name)
    searcher.on_trial_complete("a", {"eval/accuracy": float("nan")})
    searcher.on_trial_complete("b", {"train/loss": 1.0})
    searcher.on_trial_complete("c", error=True)
    assert [trial.state.name for trial in searcher._ot_study.trials] == ["PRUNED", "PRUNED", "FAIL"]


def test_tpe_of_two_objectives_comes_to_the_front() -> None:
    objectives = [ACCURACY, {"metric": "parameters_left", "mode": "min"}]
    variables = {"sparsity": {"kind": "uniform", "low": 0.0, "high": 1.0}, "lr": RATE}
    space = make_space(
        variables, {"kind": "tpe", "startup_trials": 5}, budget={"trials": 30}, objectives=objectives, seed=1
    )

    def measure(params: Params) -> dict[str, float]:
        missed = abs(math.log10(params["lr"]) + 2)
        return {"eval/accuracy": 1 - params["sparsity"] ** 2 - missed, "parameters_left": 1 - params["sparsity"]}

    done, _ = run_tpe(space, measure, [], trials=30)
    missed = [abs(math.log10(params["lr"]) + 2) for params in done]
    assert sum(missed[-10:]) < 0.6 * sum(missed[:10])
    # Both ends of the front are still tried.
    assert min(params["sparsity"] for params in done[-10:]) < 0.4 < 0.7 < max(p["sparsity"] for p in done[-10:])


# -------------------------------------------------------------------------------------------------------------- ranking

BEST = Objective(metric="eval/accuracy", mode="max")
LEAST = Objective(metric="parameters_left", mode="min")


def test_better_is_more_or_less() -> None:
    assert is_better(2, 1, BEST) and not is_better(1, 1, BEST)
    assert is_better(1, 2, LEAST) and not is_better(2, 2, LEAST)


def test_the_best_trial_is_measured_and_the_first_of_equal_ones() -> None:
    accuracies = [float("nan"), 0.5, None, 0.7, float("inf"), 0.7]
    results: list[dict[str, Any]] = [{"eval/accuracy": accuracy} for accuracy in accuracies]
    assert best_trial([*results, {}], BEST) == 3
    assert best_trial(results[:1], BEST) is None


def test_the_front_is_what_nothing_else_beats() -> None:
    pairs = [(0.9, 100), (0.8, 50), (0.8, 60), (0.7, 50), (0.9, 100), (float("nan"), 1), (0.1, 10)]
    results = [{"eval/accuracy": accuracy, "parameters_left": left} for accuracy, left in pairs]
    assert pareto_front([*results, {"parameters_left": 0}], [BEST, LEAST]) == [0, 1, 4, 6]
    assert pareto_front(results, [LEAST]) == [5]


# ---------------------------------------------------------------------------------------------------------------- forks

FORKING = random_space(
    {
        "temperature": {"kind": "choice", "values": [1, 4]},
        "sparsity": SPARSITY,
        "rounds": ROUNDS,
        "second": {**SPARSITY, "when": {"rounds": 2}},
        "redense_rate": RATE,
    },
    4,
)


def phases_of(params: Params) -> list[str]:
    dense = f"dense {params['temperature']}"
    first = f"{dense} sparse {params['sparsity']}"
    second = f"{first} again {params['redense_rate']}"
    return [dense, first, second, *([f"{second} sparse {params['second']}"] if params["rounds"] == 2 else [])]


def test_a_fork_keeps_what_acts_in_the_phases_that_are_done() -> None:
    source = {"temperature": 4, "sparsity": 0.5, "rounds": 1, "redense_rate": 0.1}
    wanted = {"temperature": 1, "sparsity": 0.9, "rounds": 2, "second": 0.8, "redense_rate": 0.02}
    assert fork_params(FORKING, source, wanted, phases_of, 0) == wanted
    assert fork_params(FORKING, source, wanted, phases_of, 1) == {**wanted, "temperature": 4}
    assert fork_params(FORKING, source, wanted, phases_of, 2) == {**wanted, "temperature": 4, "sparsity": 0.5}
    after_three = {"temperature": 4, "sparsity": 0.5, "rounds": 2, "second": 0.8, "redense_rate": 0.1}
    assert fork_params(FORKING, source, wanted, phases_of, 3) == after_three


def test_a_fork_leaves_out_what_its_own_values_leave_out() -> None:
    source = {"temperature": 4, "sparsity": 0.5, "rounds": 2, "second": 0.6, "redense_rate": 0.1}
    wanted = {"temperature": 4, "sparsity": 0.5, "rounds": 1, "second": 0.8, "redense_rate": 0.3}
    fork = fork_params(FORKING, source, wanted, phases_of, 2)
    assert fork == {"temperature": 4, "sparsity": 0.5, "rounds": 1, "redense_rate": 0.3}
