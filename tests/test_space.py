"""Spaces: what is read, what is said about what is wrong, what the params of a trial mean for the job, and what the
corners tell before anything starts. Every shipped space is tried: the list is the folder's."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.config.load import apply_override, job_folder, load_job
from temper.config.schema import JobConfig
from temper.config.space import Params, SpaceConfig, space_schema
from temper.config.space_checks import check_objectives, check_space, objective_notes
from temper.config.space_corners import corners
from temper.config.space_load import (
    active_params,
    base_job,
    build_space,
    job_values,
    load_space,
    shown_params,
    space_to_yaml,
    trial_overrides,
)
from temper.config.text import format_value, parse_yaml
from temper.errors import EXIT_WRONG_JOB, JobError
from temper.launch.teachers import plan_job
from temper.plan.build import Plan
from temper.plan.mesh import ClusterShape
from temper.plan.space import check_corners, rung_phases, share_cache, share_teachers, shared_phases

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tune_spaces"
SPACES = sorted(FOLDER.rglob("*.yaml"))
SHAPE = ClusterShape(nodes=1, cpus=4.0, gpus=0.0)

BASE: dict[str, Any] = {
    "name": "space",
    "job": "job.yaml",
    "space": {"optimizer.lr": {"kind": "choice", "values": [0.1, 0.2]}},
    "objectives": [{"metric": "eval/accuracy", "mode": "max"}],
    "search": {"kind": "random"},
    "budget": {"trials": 4},
}
GRID = {"search": {"kind": "grid"}, "budget": {}}
ROUND = {"sparsity": 0.5, "sparse_steps": 2, "redense_steps": 2}
JOB: dict[str, Any] = {
    "name": "job",
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {"kind": "digits", "global_batch": 32, "holdout": 100},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "budget": {"steps": 4},
    "dsd": {"rounds": [ROUND]},
}


def space_of(variables: dict[str, Any] | None = None, **changes: Any) -> SpaceConfig:
    return build_space({**BASE, **({} if variables is None else {"space": variables}), **changes})


def choice(*values: Any, **more: Any) -> dict[str, Any]:
    return {"kind": "choice", "values": list(values), **more}


def grid(*values: Any, **more: Any) -> dict[str, Any]:
    return {"kind": "grid", "values": list(values), **more}


def labelled(**by_label: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "choice", "settings": by_label}


def write(folder: Path, value: Any, name: str = "space.yaml") -> Path:
    file = folder / name
    file.write_text(json.dumps(value))
    return file


def said(act: Callable[[], Any]) -> list[str]:
    """`key: value rule; remedy` of every problem."""
    with pytest.raises(JobError) as caught:
        act()
    assert caught.value.exit_code == EXIT_WRONG_JOB
    return [str(problem) for problem in caught.value.problems]


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_space_is_read_with_its_own_overrides_and_leaves_those_of_the_job(tmp_path: Path) -> None:
    given = ["sweep.budget.trials=9", "parallel.workers=2", "sweep.search={kind: tpe}", "storage=/x"]
    space, others = load_space(write(tmp_path, BASE), given)
    assert space.budget.trials == 9
    assert space.search.kind == "tpe"
    assert others == ("parallel.workers=2", "storage=/x")
    assert base_job(tmp_path / "space.yaml", space) == tmp_path / "job.yaml"


def test_an_override_reaches_names_that_have_dots(tmp_path: Path) -> None:
    raw = {**BASE, "set": {"data.holdout": 10}, "space": {**BASE["space"], "split": labelled(long={"budget.steps": 8})}}
    overrides = [
        "sweep.set.data.holdout=20",
        "sweep.set.budget.evaluate_every=5",
        "sweep.space.optimizer.lr.values.0=0.4",
        "sweep.space.optimizer.lr.when={split: long}",
        "sweep.space.split.settings.long.budget.steps=9",
        "sweep.space.seed={kind: randint, low: 0, high: 9}",
    ]
    space, _ = load_space(write(tmp_path, raw), overrides)
    assert space.set == {"data.holdout": 20, "budget.evaluate_every": 5}
    assert list(space.space) == ["optimizer.lr", "split", "seed"]
    assert job_values(space, {"optimizer.lr": 0.4, "split": "long", "seed": 3}) == {
        "data.holdout": 20,
        "budget.evaluate_every": 5,
        "budget.steps": 9,
        "optimizer.lr": 0.4,
        "seed": 3,
    }
    no_set, _ = load_space(write(tmp_path, BASE), ["sweep.set.data.holdout=20"])
    assert no_set.set == {"data.holdout": 20}


def test_a_space_reads_back_equal(tmp_path: Path) -> None:
    space, _ = load_space(FOLDER / "rounds.yaml")
    file = tmp_path / "again.yaml"
    file.write_text(space_to_yaml(space))
    assert load_space(file) == (space, ())


def test_all_problems_are_said_at_once_and_as_those_of_a_job(tmp_path: Path) -> None:
    raw = {
        **BASE,
        "space": {"optimizer.lr": {"kind": "chioce", "values": [1]}, "seed": {"kind": "uniform", "low": 0, "hihg": 1}},
        "serach": {"kind": "grid"},
        "concurrency": 0,
        "job": 3,
    }
    problems = said(lambda: load_space(write(tmp_path, raw), ["sweep.budget.trials.x=1", "sweep.winner.alias=best"]))
    assert problems == [
        "budget.trials.x: 1 cannot be set: budget.trials is a single value, not a section",
        "job: 3 must be text, not an integer",
        "space.optimizer.lr.kind: chioce is not a kind of optimizer.lr; did you mean 'choice'?",
        "space.seed.high: is missing; add it",
        "space.seed.hihg: 1 is not a key of space.seed; did you mean 'high'?",
        "concurrency: 0 must be greater than 0",
        "serach: {'kind': 'grid'} is not a key of a space; did you mean 'search'?",
    ]


def test_a_name_that_is_no_key_is_a_problem_of_its_place() -> None:
    raw = {**BASE, "space": {"a b": choice(1), "split": labelled(**{"two words": {"x..y": 1}})}}
    assert said(lambda: build_space(raw)) == [
        "space.a b: a b must be a dotted key, e.g. optimizer.lr",
        "space.split.settings.two words: two words must be 1 to 50 letters, digits, '.', '_', '+' or '-', beginning "
        "with a letter or a digit",
        "space.split.settings.two words.x..y: x..y must be a dotted key, e.g. optimizer.lr",
    ]


def test_a_job_in_the_place_of_a_space_is_told_apart(tmp_path: Path) -> None:
    (problem,) = said(lambda: load_space(ROOT / "jobs/digits.yaml"))
    assert "is a job, not a space; train it with temper train" in problem
    (problem,) = said(lambda: load_job(FOLDER / "dsd.yaml"))
    assert problem.endswith("dsd.yaml: is a space, not a job; use it so: temper sweep " + str(FOLDER / "dsd.yaml"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "is empty, and a space is a mapping of keys to values"),
        ("[1]", "holds list at its top level"),
        ("name: a\nname: b\n", "name: is written twice, in lines 1 and 2"),
        ("name: !!python/object:os.system x", "has the tag !!python/object:os.system"),
    ],
)
def test_what_is_no_space_is_refused(tmp_path: Path, content: str, what: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(content)
    assert any(what in problem for problem in said(lambda: load_space(file)))


def test_a_missing_space_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    assert said(lambda: load_space(tmp_path / "spaec.yaml"))[0].endswith(f"did you mean {tmp_path / 'space.yaml'}?")


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("data.holdout=3", "set.data.holdout"),
        ("optimizer.lr=0.5", "space.optimizer.lr"),
        ("dsd.rounds.0.sparse_steps=3", "space.rounds.settings.one.dsd.rounds"),
    ],
)
def test_an_override_of_the_job_that_no_trial_would_see_is_refused(tmp_path: Path, override: str, place: str) -> None:
    variables = {**BASE["space"], "rounds": labelled(one={"dsd.rounds": [ROUND]})}
    file = write(tmp_path, {**BASE, "set": {"data.holdout": 2}, "space": variables})
    (problem,) = said(lambda: load_space(file, [override]))
    assert f"is set by the space ({place}); write sweep.{place}=… for the space, or leave it out" in problem
    assert load_space(file, ["data={kind: digits, global_batch: 8}"])[1] == ("data={kind: digits, global_batch: 8}",)


# ------------------------------------------------------------------------------------------------------------ rules


def broken(variables: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    return [str(problem) for problem in check_space(space_of(variables, **changes))]


def test_a_right_space_breaks_no_rule() -> None:
    assert broken() == []
    assert broken({"seed": grid(0, 1)}, **GRID) == []
    assert broken({"seed": grid(0, 1)}, budget={}) == []
    assert broken({"x": {"kind": "quniform", "low": 0.3, "high": 0.9, "q": 0.1}}) == []
    assert broken(objectives=[{"metric": name, "mode": "max"} for name in ("eval/f1", "parameters_left")]) == []


UNIFORM = {"kind": "uniform", "low": 0.0, "high": 1.0}
TWO = [{"metric": name, "mode": "min"} for name in ("eval/loss", "time/step_s")]


@pytest.mark.parametrize(
    ("variables", "changes", "problems"),
    [
        ({"x": {"kind": "choice"}}, {}, ["space.x: names neither values nor settings; give one of the two"]),
        (
            {"x": {"kind": "grid", "values": [1], "settings": {"a": {"seed": 1}}}},
            {"budget": {}},
            ["space.x: names values and settings; give one of the two"],
        ),
        ({"x": choice(1, True, 1.0)}, {}, ["space.x.values.2: 1.0 is listed twice; keep one of them"]),
        ({"x": labelled(a={"s": 1}, b={"s": 1})}, {}, ["space.x.settings.b: sets the same as a; keep one of them"]),
        (
            {"x": {"kind": "uniform", "low": 2, "high": 1}},
            {},
            ["space.x.high: 1.0 must be more than low: 2; exchange them, or leave the variable out"],
        ),
        (
            {"x": {"kind": "quniform", "low": 0.25, "high": 0.9, "q": 0.1}},
            {},
            ["space.x.low: 0.25 is no multiple of q: 0.1; use 0.2"],
        ),
        (
            {"x": choice(1, 2), "y": choice(3, when={"z": 1})},
            {},
            ["space.y.when.z: 1 is not a variable of this space; use x"],
        ),
        (
            {"x": choice(1, when={"x": 1})},
            {},
            ["space.x.when.x: 1 is the variable itself; name another, or leave it out"],
        ),
        (
            {"x": choice("a", "1"), "y": choice(3, when={"x": ["a", 1]})},
            {},
            ["space.y.when.x: 1 is never a value of x; use a or '1'"],
        ),
        (
            {"x": {"kind": "randint", "low": 1, "high": 3}, "y": choice(3, when={"x": [3, 4]})},
            {},
            ["space.y.when.x: 4 is never a value of x; use whole numbers from 1 to 3"],
        ),
        (
            {"x": UNIFORM, "y": choice(3, when={"x": 0.5})},
            {},
            ["space.y.when.x: 0.5 is never a value of x; make it a choice, whose values can be named"],
        ),
        (
            {"x": choice(1, when={"z": 1}), "y": choice(1, when={"x": 1}), "z": choice(1, when={"y": 1})},
            {},
            ["space.x.when: depends on itself: x → z → y → x; leave one of these out"],
        ),
        (
            {"x": choice(1, 2), "y": choice(1, when={"x": 1}), "z": choice(1, when={"x": 2, "y": 1})},
            {},
            [
                "space.z.when: {'x': 2, 'y': 1} is never met: what it names is there only with other values of the "
                "same variables; leave part of it out"
            ],
        ),
        (
            {"seed": choice(1, 2), "x": labelled(a={"seed": 1, "b": 1}, c={"b": 1})},
            {"set": {"b": 2}},
            [
                "space.x.settings.a.b: is set by set.b, too; keep one of them",
                "space.x.settings.c.b: is set by set.b, too; keep one of them",
                "space.seed: is set by space.x.settings.a.seed, too; keep one of them",
            ],
        ),
        (
            {"dsd": choice({"rounds": []}, {})},
            {"set": {"dsd.exclude": []}},
            ["space.dsd: overwrites set.dsd.exclude; keep one of them"],
        ),
        (
            {"storage": choice("a", "b")},
            {"set": {"tracking.uri": "x"}},
            ["space.storage: is the same for all trials of a sweep; put storage into set"],
        ),
        (
            {"x": UNIFORM, "y": grid(1)},
            {"search": {"kind": "grid"}},
            [
                "space.x.kind: uniform is no grid; use kind: grid, or search: {kind: random}",
                "budget.trials: 4 has no effect with search.kind: grid, which tries every combination once; "
                "leave it out",
            ],
        ),
        (
            {"x": grid(1, 2), "y": UNIFORM},
            {"search": {"kind": "tpe"}, "budget": {"hours": 1}},
            [
                "space.x.kind: grid is not for search.kind: tpe, which draws; use kind: choice",
                "budget.trials: is missing, and search.kind: tpe has no end of its own; give it, e.g. trials: 20",
            ],
        ),
        (
            None,
            {"budget": {}},
            ["budget.trials: is missing, and search.kind: random has no end of its own; give it, e.g. trials: 20"],
        ),
        (
            {"x": grid(1, 2)},
            {"budget": {"trials": 3}},
            ["budget.trials: 3 trains every combination of the grids 3 times to the same result; leave it out"],
        ),
        (
            None,
            {"objectives": TWO, "scheduler": {"kind": "asha"}},
            [
                "scheduler.kind: asha ranks trials by one objective, and there are 2; keep one of them, or use "
                "scheduler: {kind: fifo}, which gives the Pareto front"
            ],
        ),
        (
            None,
            {"scheduler": {"kind": "hyperband", "rungs": [1.0, 0.5, 0.5]}},
            ["scheduler.rungs: [1.0, 0.5, 0.5] must rise; use [0.5, 1.0]"],
        ),
        (
            {"x": UNIFORM},
            {"scheduler": {"kind": "pbt"}, "search": {"kind": "tpe"}, "budget": {"trials": 3}},
            [
                "search.kind: tpe is not for scheduler.kind: pbt, which draws the first population and then changes it "
                "itself; use search: {kind: random}",
                "budget.trials: 3 is too few for scheduler.kind: pbt, where trials go on from better ones: 3; use at "
                "least 4",
            ],
        ),
        (
            None,
            {"objectives": [TWO[0], {"metric": "test/f1", "mode": "max"}, TWO[0]]},
            [
                "objectives.1.metric: test/f1 cannot be an objective: choose on held-out data; the test set is "
                "reported once; use eval/f1, with data.holdout",
                "objectives.2.metric: eval/loss is listed twice; keep one of them",
            ],
        ),
    ],
)
def test_a_broken_rule_says_what_to_write(
    variables: dict[str, Any] | None, changes: dict[str, Any], problems: list[str]
) -> None:
    assert broken(variables, **changes) == problems


def test_settings_of_one_variable_may_set_the_same_key_and_variables_reach_into_them() -> None:
    variables = {
        "rounds": labelled(one={"dsd.rounds": [ROUND]}, two={"dsd.rounds": [ROUND, ROUND]}),
        "dsd.rounds.0.sparsity": choice(0.3, 0.5),
    }
    assert broken(variables, set={"dsd": {"rounds": []}}) == []


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("eval/acuracy", "did you mean 'eval/accuracy'?"),
        ("accuracy", "did you mean 'eval/accuracy'?"),
        ("eval/f1", "add f1 to evaluation.metrics"),
        ("sparsity", "add dsd"),
        ("precision/skipped_steps", "use precision.dtype: fp16"),
        ("time/steps", "did you mean 'time/step_s'?"),
    ],
)
def test_an_objective_that_the_job_does_not_measure_is_refused(metric: str, remedy: str) -> None:
    job = JobConfig.model_validate({**JOB, "dsd": None})
    space = space_of(objectives=[{"metric": "eval/loss", "mode": "min"}, {"metric": metric, "mode": "max"}])
    (problem,) = check_objectives(space, job)
    assert str(problem) == f"objectives.1.metric: {metric} is not measured by job; {remedy}"


def test_what_a_job_measures_can_be_an_objective() -> None:
    job = JobConfig.model_validate({**JOB, "precision": {"dtype": "fp16"}, "evaluation": {"metrics": ["f1"]}})
    every = ["eval/f1", "eval/loss", "sparsity", "sparsity/layers.0", "train/loss", "precision/skipped_steps"]
    for metric in (*every, "parameters_left", "time/step_s", "time/examples_per_s", "train/grad_norm"):
        assert check_objectives(space_of(objectives=[{"metric": metric, "mode": "min"}]), job) == []


def test_without_held_out_examples_a_note_says_what_the_choice_is_made_on() -> None:
    held_out = JobConfig.model_validate(JOB)
    none = held_out.model_copy(update={"data": held_out.data.model_copy(update={"holdout": 0})})
    (note,) = objective_notes(space_of(), none)
    assert note == (
        "no examples are held out (data.holdout: 0): eval/accuracy is of the test split, so the best trial is chosen "
        "on what it is tested on"
    )
    assert objective_notes(space_of(), held_out) == []
    assert objective_notes(space_of(objectives=[{"metric": "parameters_left", "mode": "min"}]), none) == []


# ---------------------------------------------------------------------------------------------------- a trial's params

CONDITIONAL = {
    "dsd.rounds.1.sparsity": choice(0.3, 0.4, when={"rounds": "two"}),
    "rounds": labelled(one={"dsd.rounds": [ROUND]}, two={"dsd.rounds": [ROUND, ROUND]}),
    "deep": choice(1, when={"dsd.rounds.1.sparsity": [0.3]}),
}


def test_only_variables_whose_condition_is_met_are_there() -> None:
    space = space_of(CONDITIONAL)
    every = {"deep": 1, "rounds": "two", "dsd.rounds.1.sparsity": 0.3}
    assert list(active_params(space, every).items()) == [("dsd.rounds.1.sparsity", 0.3), ("rounds", "two"), ("deep", 1)]
    assert active_params(space, {**every, "rounds": "one"}) == {"rounds": "one"}
    shallow = {"dsd.rounds.1.sparsity": 0.4, "rounds": "two"}
    assert active_params(space, {**every, **shallow}) == shallow


def test_set_comes_first_then_settings_then_plain_variables() -> None:
    space = space_of(CONDITIONAL, set={"data.holdout": 5})
    values = job_values(space, {"dsd.rounds.1.sparsity": 0.4, "rounds": "two"})
    assert list(values.items()) == [
        ("data.holdout", 5),
        ("dsd.rounds", [ROUND, ROUND]),
        ("dsd.rounds.1.sparsity", 0.4),
    ]
    assert trial_overrides(space, {"rounds": "one", "deep": 1}) == [
        "data.holdout=5",
        "dsd.rounds=[{sparsity: 0.5, sparse_steps: 2, redense_steps: 2}]",
    ]


def test_params_are_shown_short() -> None:
    params = {"lr": 0.30000000000000004, "eps": 1e-05, "scale": 65536.0, "n": 12345678, "label": "two", "no": None}
    assert shown_params(params) == {
        "lr": "0.3",
        "eps": "1e-05",
        "scale": "65536",
        "n": "12345678",
        "label": "two",
        "no": "null",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-05, "1.0e-05"),
        (2.0, "2.0"),
        ("2.0", "'2.0'"),
        ("5e-4", "'5e-4'"),
        ("true", "'true'"),
        (True, "true"),
        (None, "null"),
        ("", "''"),
        ("a\nb", '"a\\nb"'),
        ("a, b", "'a, b'"),
        (["x", [1, {"k": None}]], "[x, [1, {k: null}]]"),
        ([], "[]"),
    ],
)
def test_a_value_is_one_line_that_reads_back(value: Any, text: str) -> None:
    assert format_value(value) == text
    assert parse_yaml(text, "text") == value


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
scalars = st.none() | st.booleans() | st.integers(-(10**39), 10**39) | texts
scalars |= st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(value=values)
def test_every_value_travels_through_its_override_unchanged(value: Any) -> None:
    space = space_of({"model.args.x": choice(value)})
    (override,) = trial_overrides(space, {"model.args.x": value})
    assert len(override.splitlines()) == 1
    found = apply_override({}, override)["model"]["args"]["x"]
    assert found == value
    assert repr(found) == repr(value)  # 1, 1.0 and true are equal, too


def test_a_trial_is_the_job_that_its_overrides_make(tmp_path: Path) -> None:
    file = write(tmp_path, JOB, "job.yaml")
    space = space_of({**BASE["space"], **CONDITIONAL, "data.normalize": choice(None, {"mean": [0.5], "std": [1e-05]})})
    params = {"optimizer.lr": 1e-05, "rounds": "two", "data.normalize": {"mean": [0.5], "std": [1e-05]}}
    job = load_job(file, trial_overrides(space, {**params, "dsd.rounds.1.sparsity": 0.4}))
    assert job.optimizer.lr == 1e-05
    assert job.data.normalize is not None
    assert job.data.normalize.std == [1e-05]
    assert job.dsd is not None
    assert [round_.sparsity for round_ in job.dsd.rounds] == [0.5, 0.4]


# ------------------------------------------------------------------------------------------------------------ corners


def test_corners_are_all_combinations_of_extremes() -> None:
    assert corners(space_of({"x": choice(1, 2, 3), "y": UNIFORM})) == [
        {"x": x, "y": y} for x in (1, 2, 3) for y in (0.0, 1.0)
    ]


def test_a_variable_that_is_not_there_has_no_corners() -> None:
    assert corners(space_of(CONDITIONAL)) == [
        {"rounds": "one"},
        {"dsd.rounds.1.sparsity": 0.3, "rounds": "two", "deep": 1},
        {"dsd.rounds.1.sparsity": 0.4, "rounds": "two"},
    ]


def test_a_value_within_a_range_is_a_corner_where_a_condition_names_it() -> None:
    space = space_of({"n": {"kind": "randint", "low": 1, "high": 9}, "x": choice(7, when={"n": [5]})})
    assert corners(space) == [{"n": 1}, {"n": 9}, {"n": 5, "x": 7}]


def pairs_of(params: Params) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(sorted(params.items()), 2))


def test_of_many_corners_a_few_have_every_pair_of_values() -> None:
    names = [f"v{index}" for index in range(8)]
    space = space_of({name: choice(1, 2, 3) for name in names})
    found = corners(space, limit=64)
    assert len(found) <= 30  # of 6,561; 9 would be the least
    every = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in (1, 2, 3) for y in (1, 2, 3)}
    assert set().union(*map(pairs_of, found)) == every
    assert corners(space, limit=64) == found


def test_every_value_occurs_however_few_the_corners() -> None:
    variables: dict[str, Any] = {f"v{index}": choice(*range(6), when={"on": True}) for index in range(4)}
    variables["on"] = choice(False, True)
    space = space_of(variables)
    found = corners(space, limit=7)
    assert len(found) == 7
    assert {"on": False} in found
    assert {(name, value) for params in found for name, value in params.items()} >= {
        (f"v{index}", value) for index in range(4) for value in range(6)
    }
    assert all(active_params(space, params) == params for params in found)


# -------------------------------------------------------------------------------------------------- planned corners


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, which keeps what is learnt about the models."""
    return tmp_path_factory.mktemp("space_plans")


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def planner(file: Path, space: SpaceConfig, storage: Path, *overrides: str) -> Callable[[Params], Plan]:
    """Plans the trials of `space` over the job in `file`."""

    def plan(params: Params) -> Plan:
        job = load_job(file, [f"storage={storage}", *overrides, *trial_overrides(space, params)])
        return plan_job(job, SHAPE, job_folder(file))

    return plan


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    return write(tmp_path, JOB, "job.yaml")


def test_phases_that_no_variable_touches_are_shared(job_file: Path, storage: Path) -> None:
    space = space_of({"dsd.rounds.0.sparsity": grid(0.3, 0.5), "dsd.redense_lr_factor": grid(0.1, 0.2)}, **GRID)
    found = check_corners(space, planner(job_file, space, storage))
    assert found.params == tuple(corners(space))
    assert [plan.job.dsd.redense_lr_factor for plan in found.plans if plan.job.dsd] == [0.1, 0.2, 0.1, 0.2]
    assert [phase.name for phase in shared_phases(found.plans)] == ["dense"]
    assert [phase.name for phase in shared_phases(found.plans[:2])] == ["dense", "sparse-1"]
    assert [phase.name for phase in shared_phases(found.plans[:1])] == ["dense", "sparse-1", "redense-1"]
    assert rung_phases(found.plans) == ("sparse-1", "redense-1")
    assert rung_phases(found.plans[:2]) == ("redense-1",)
    assert rung_phases(found.plans[:1]) == ()
    assert found.notes == ()
    assert not share_teachers(found.plans)
    assert not share_cache(found.plans)


def test_rungs_are_in_the_phases_of_the_longest_trial_in_their_order(job_file: Path, storage: Path) -> None:
    sparse_end = {**ROUND, "redense_steps": 0}
    rounds = labelled(short={"dsd.rounds": [ROUND]}, long={"dsd.rounds": [sparse_end, ROUND]})
    space = space_of({"rounds": rounds})
    found = check_corners(space, planner(job_file, space, storage))
    assert [phase.name for phase in shared_phases(found.plans)] == ["dense", "sparse-1"]
    assert rung_phases(found.plans) == ("redense-1", "sparse-2", "redense-2")


def test_a_variable_that_changes_nothing_is_a_note(job_file: Path, storage: Path) -> None:
    space = space_of({"seed": choice(0, 1), "optimizer.lr": choice(0.1, 0.2), "evaluation.batch": choice(64, 128)})
    plan = planner(job_file, space, storage)
    note = "evaluation.batch changes no weight: all its values give the same phases"
    assert check_corners(space, plan).notes == (note,)
    few = check_corners(space, plan, limit=1)
    assert few.notes == (note,)
    assert len(few.plans) == 5  # two that have every value, and what differs from the first in one


def test_no_held_out_examples_is_a_note(job_file: Path, storage: Path) -> None:
    space = space_of(set={"data.holdout": 0})
    (note,) = check_corners(space, planner(job_file, space, storage)).notes
    assert note.startswith("no examples are held out (data.holdout: 0): eval/accuracy")


def test_a_key_that_the_job_does_not_have_is_said_once(job_file: Path, storage: Path) -> None:
    variables = {
        "optimizer.lr": choice(0.1, 0.2),
        "optimizer.momentun": UNIFORM,
        "split": labelled(a={"dsd.redense_factor": 0.1}, b={"dsd.redense_lr_factor": 0.1}),
    }
    space = space_of(variables)
    assert said(lambda: check_corners(space, planner(job_file, space, storage))) == [
        "optimizer.momentun: 0.0 is not a key of optimizer; did you mean 'momentum'?",
        "dsd.redense_factor: 0.1 is not a key of dsd (with split=a); did you mean 'redense_lr_factor'?",
    ]


def test_a_problem_names_the_params_that_led_to_it(job_file: Path, storage: Path) -> None:
    variables = {
        "dsd.rounds.0.sparsity": choice(0.5, 1.5),
        "parallel.workers": choice(1, 3),
        "precision.dtype": choice("fp32", "bf16"),
        "warmup": labelled(none={"optimizer.schedule.warmup_steps": 0}, long={"optimizer.schedule.warmup_steps": 3}),
    }
    space = space_of(variables, objectives=[{"metric": "eval/f1", "mode": "max"}])
    assert said(lambda: check_corners(space, planner(job_file, space, storage))) == [
        "optimizer.schedule.warmup_steps: 3 never ends in a phase of 2 steps (dsd.rounds.0.sparse_steps or _epochs) "
        "(with warmup=long); use at most 1 or give these phases a dsd.schedule of their own",
        "data.global_batch: 32 cannot be split evenly over parallel.workers: 3 (with parallel.workers=3); use 30 or "
        "33, or workers: 2",
        "dsd.rounds.0.sparsity: 1.5 must be less than 1",
        "objectives.0.metric: eval/f1 is not measured by job; add f1 to evaluation.metrics",
    ]


def test_a_population_needs_a_place_to_fork(job_file: Path, storage: Path) -> None:
    space = space_of(scheduler={"kind": "pbt"})
    assert check_corners(space, planner(job_file, space, storage)).notes == ()
    assert said(lambda: check_corners(space, planner(job_file, space, storage, "dsd=null"))) == [
        "scheduler.kind: pbt forks a trial where a phase ends, and the job has one phase; add dsd, or use scheduler: "
        "{kind: asha}"
    ]


def test_a_space_that_breaks_its_own_rules_is_not_planned() -> None:
    def never(params: Params) -> Plan:
        raise AssertionError("planned")

    space = space_of({"x": choice(1, when={"y": 1}), "y": choice(1, when={"x": 1})})
    assert said(lambda: check_corners(space, never)) == [
        "space.x.when: depends on itself: x → y → x; leave one of these out"
    ]


# ------------------------------------------------------------------------------------------------- the shipped spaces

# Building the networks of Fashion-MNIST to plan with takes longest.
LONG = {"fashion_student_dsd"}
assert {path.stem for path in SPACES} > LONG

every_space = pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
each_space = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else ()) for path in SPACES],
    ids=lambda path: path.stem,
)


@every_space
def test_it_names_its_schema_and_says_what_it_is(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=space.schema.json"
    assert second.startswith("# ")
    assert load_space(path)[0].name == path.stem


@each_space
def test_all_its_corners_plan_and_every_variable_acts(path: Path, storage: Path) -> None:
    space, _ = load_space(path)
    file = base_job(path, space)
    found = check_corners(space, planner(file, space, storage))
    assert len({plan.fingerprint for plan in found.plans}) == len(found.plans)
    assert found.notes == ()
    for objective in space.objectives:
        assert objective.metric.startswith("eval/")
    assert all(plan.data.validation_examples > 0 for plan in found.plans)


def test_the_schema_file_for_editors_is_fresh() -> None:
    assert json.loads((FOLDER / "space.schema.json").read_text()) == space_schema()


def test_the_shipped_spaces_share_what_their_comments_say(storage: Path) -> None:
    def planned(name: str) -> tuple[SpaceConfig, tuple[Plan, ...]]:
        space, _ = load_space(FOLDER / f"{name}.yaml")
        return space, check_corners(space, planner(base_job(FOLDER / f"{name}.yaml", space), space, storage)).plans

    space, plans = planned("temperature_sparsity")
    assert len(plans) == math.prod(len(variable.values or []) for variable in space.space.values()) == 24
    assert len({plan.phases[0].fingerprint for plan in plans}) == 6
    assert share_teachers(plans)
    assert share_cache(plans)
    _, plans = planned("loss_scale")
    assert len(plans) == 12
    _, plans = planned("dsd")
    assert {plan.steps for plan in plans} == {400}
    assert len({plan.phases[0].fingerprint for plan in plans}) == 3
    _, plans = planned("rounds")
    assert {plan.steps for plan in plans} == {400}
    assert [phase.name for phase in shared_phases(plans)] == ["dense"]
