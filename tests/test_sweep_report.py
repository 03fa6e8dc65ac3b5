"""The page on a sweep: its numbers are those that MLflow has, and its figures show what the trials measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sweep_tree import CLASSES, MadeSweep, write_sweep
from temper.config.space import Objective
from temper.tracking.mlflow_store import build_client
from temper.tracking.report import save, sweep_report
from temper.tracking.report.figure import ReportFigure, Section
from temper.tracking.report.page import build_page
from temper.tracking.report.space_figures import axis_variables, build_axis, build_scale, cells, heat_maps, summarize
from temper.tracking.report.sweep_figures import CURVES, best_trials, front, pack_rows, pareto_figures, timeline
from temper.tracking.report.sweep_page import read_points, sweep_sections, sweep_subtitle, sweep_tiles
from temper.tracking.results import PhaseRow, RunRow, Sweep, read_sweep

SWEEP = MadeSweep()
TWO_AIMS = MadeSweep(
    sparsities=(0.7, 0.8, 0.95),
    seeds=(0,),
    name="two",
    objectives=(("test/accuracy", "max"), ("parameters_left", "min")),
)
ACCURACY = Objective(metric="eval/accuracy", mode="max")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    database = tmp_path_factory.mktemp("runs") / "mlflow.db"
    write_sweep(database, SWEEP)
    write_sweep(database, TWO_AIMS)
    return f"sqlite:///{database}"


@pytest.fixture(scope="module")
def sweep(uri: str) -> Sweep:
    return read_sweep(uri, SWEEP.id)


@pytest.fixture(scope="module")
def sections(uri: str, sweep: Sweep) -> list[Section]:
    return sweep_sections(sweep, read_points(uri, sweep))


def figure(sections: Sequence[Section], name: str) -> dict[str, Any]:
    """The interactive form of the figure with this name."""
    found = [each for section in sections for each in section.figures if each.name == name]
    assert found and found[0].plotly is not None
    return dict(found[0].plotly)


def trial(number: int, swept: dict[str, Any], status: str = "finished", **metrics: float) -> RunRow:
    """A trial that is in no store."""
    tags = {"temper.trial": f"t{number:03d}", "temper.trial.status": status}
    params = {f"sweep.{name}": str(value) for name, value in swept.items()}
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return RunRow(
        f"{number:032x}", tags["temper.trial"], "trial", "", "FINISHED", 0, 1, 9, swept, params, named, tags, ()
    )


def sweep_of(trials: Sequence[RunRow], *objectives: Objective) -> Sweep:
    parent = RunRow("f" * 32, "a sweep", "sweep", "", "RUNNING", 0, 0, 0, {}, {}, {}, {"temper.kind": "sweep"}, ())
    return Sweep(parent, objectives or (ACCURACY,), tuple(trials), ())


# -------------------------------------------------------------------------------------------------- numbers and MLflow


class _Traced(HTMLParser):
    """The numbers of a page that say where they are from: their attributes and their texts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str], str]] = []
        self._attributes: dict[str, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        if known.get("class") == "traced":
            self._attributes = known

    def handle_data(self, data: str) -> None:
        if self._attributes is not None:
            self.found.append((self._attributes, data))
            self._attributes = None


def stored_values(runs: dict[str, Any], attributes: dict[str, str]) -> list[float]:
    """What MLflow has where the number says it is from; a tag may hold several numbers."""
    run_id = attributes["data-run"]
    run = runs[run_id]
    below = [each for each in runs.values() if each.data.tags.get("mlflow.parentRunId") == run_id]
    if "data-metric" in attributes:
        return [run.data.metrics[attributes["data-metric"]]]
    if "data-param" in attributes:
        return [float(run.data.params[attributes["data-param"]])]
    if "data-sum" in attributes:
        return [math.fsum(each.data.metrics.get(attributes["data-sum"], 0.0) for each in below)]
    if "data-count" in attributes:
        statuses = [each.data.tags.get("temper.trial.status") for each in below]
        return [statuses.count(attributes["data-count"])]
    phases = json.loads(run.data.tags[attributes["data-tag"]])
    return [value for phase in phases for value in phase.values() if isinstance(value, int | float)]


def test_every_number_is_in_mlflow(uri: str, tmp_path: Path) -> None:
    client = build_client(uri)
    experiment = client.get_experiment_by_name("temper").experiment_id
    runs = {run.info.run_id: run for run in client.search_runs([experiment], max_results=1000)}
    parser = _Traced()
    parser.feed(sweep_report(uri, SWEEP.id, tmp_path).page)
    for attributes, text in parser.found:
        shown = float(attributes["data-value"])
        assert any(shown == pytest.approx(value, rel=1e-12) for value in stored_values(runs, attributes)), attributes
        digits = text.replace(",", "").replace("−", "-")
        if digits.replace(".", "").isdigit():
            decimals = len(digits.partition(".")[2])
            assert float(digits) == pytest.approx(shown, abs=0.5001 * 10**-decimals), text
    sources = {name for attributes, _ in parser.found for name in attributes if name.startswith("data-")}
    assert {"data-metric", "data-param", "data-sum", "data-count", "data-tag"} < sources
    # Each trial's three values, objective, two further metrics and three costs, and more.
    assert len(parser.found) > len(SWEEP.trials()) * 9


def test_the_table_has_a_row_for_each_trial_the_best_first(sweep: Sweep, sections: list[Section]) -> None:
    html = next(section for section in sections if section.title == "Trials").html
    rows = html.split("<tbody>")[1].split("<tr>")[1:]
    order = [row.removeprefix("<td>")[:4] for row in rows]
    finished = sorted(sweep.finished, key=lambda each: -each.metrics["eval/accuracy"])
    assert order[: len(finished)] == [each.trial for each in finished]
    assert sorted(order) == [each.trial for each in sweep.trials]
    assert not [number for number in range(CLASSES) if f"class_accuracy/{number}" in html]


def test_what_users_write_is_text(uri: str, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    bad = trial(0, {"optimizer.kind": hostile}, "failed", eval_accuracy=0.5)
    bad = replace(bad, tags={**bad.tags, "temper.trial.reason": hostile})
    made = sweep_of([bad, trial(1, {"optimizer.kind": "sgd"}, eval_accuracy=0.4)])
    made = replace(made, parent=replace(made.parent, name=hostile, params={"job": hostile, "space.x": hostile}))
    page = build_page(made.parent.name, sweep_subtitle(made), sweep_sections(made, {}), tiles=sweep_tiles(made))
    assert hostile not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_winner_and_the_lines_that_repeat_it(sweep: Sweep, sections: list[Section]) -> None:
    best = max(sweep.finished, key=lambda each: each.metrics["eval/accuracy"])
    html = next(section for section in sections if section.title == "The winner").html
    assert best.run_id in html and "models:/temperature_sparsity/1" in html
    assert f"<code>{best.tags['temper.command']}</code>" in html
    assert "<code>ray job submit --address http://127.0.0.1:8265" in html
    assert f"reused from {'<code'}" in html  # its dense phase


def test_a_sweep_that_has_only_begun_has_a_page() -> None:
    for trials in ([], [trial(0, {"seed": 1}, "running")], [trial(0, {}, "failed", eval_accuracy=math.nan)]):
        made = sweep_of(trials)
        page = build_page("a sweep", sweep_subtitle(made), sweep_sections(made, {}), tiles=sweep_tiles(made))
        assert "What was asked" in page


def told(made: Sweep) -> str:
    return build_page("a sweep", sweep_subtitle(made), sweep_sections(made, {}), tiles=sweep_tiles(made))


def test_trials_that_are_as_good_as_the_best_are_named() -> None:
    values = [0.9, 0.8, 0.9, 0.9]
    made = sweep_of([trial(number, {"lr": 0.00703573702}, eval_accuracy=value) for number, value in enumerate(values)])
    best = made.trials[0].run_id
    made = replace(made, parent=replace(made.parent, tags={"temper.best.run_id": best}))
    page = told(made)
    assert page.count("also t002, t003; the first wins") == 2  # in the tile, and of the winner
    assert "0.00703573702" in page
    assert ">0.007036</span>" in page and ">0.00703573702<" not in page
    assert ">reason<" not in page


def test_the_winner_is_repeated_from_its_copy(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").touch()
    best = trial(0, {"lr": 1}, eval_accuracy=0.5)
    best = replace(best, tags={**best.tags, "temper.storage": str(tmp_path.parent), "temper.run_folder": tmp_path.name})
    made = sweep_of([best])
    tags = {
        "temper.best.run_id": best.run_id,
        "temper.best.command": "temper train jobs/one.yaml lr=1",
        "temper.best.registered": "models:/one/1",
        "temper.best.alias": "champion",
    }
    page = told(replace(made, parent=replace(made.parent, tags=tags)))
    assert f"<code>temper train {tmp_path / 'job.yaml'}</code>" in page
    assert "<dd><code>temper train jobs/one.yaml lr=1</code></dd>" in page
    assert "models:/one/1, @champion" in page


def test_what_was_asked_is_in_full() -> None:
    params = {"space.lr": "{kind: grid, values: [1, 2, 3]}", "space.seed": "{values: [0, 1], kind: grid}", "seed": "7"}
    notes = json.dumps(["the objective is measured on the <test> split"])
    made = sweep_of([trial(0, {"lr": 1, "seed": 0}, eval_accuracy=0.5)])
    page = told(replace(made, parent=replace(made.parent, params=params, tags={"temper.notes": notes})))
    assert "Running, 1 trial of 6 asked, begun" in page
    assert "<li>the objective is measured on the &lt;test&gt; split</li>" in page
    assert "<dt>search seed</dt>" in page
    drawn = {"space.lr": "{kind: uniform, low: 1, high: 2}", "budget": "{trials: 9}"}
    assert "1 trial of 9 asked" in sweep_subtitle(replace(made, parent=replace(made.parent, params=drawn)))


def test_costs_of_trials_and_of_what_they_share_are_apart(sweep: Sweep, sections: list[Section]) -> None:
    html = next(section for section in sections if section.title == "Costs").html
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in html.split("<tbody>")[1].split("<tr>")[1:]]
    steps = {row[0]: int(re.sub(r"<[^>]*>|,", "", row[2])) for row in rows}
    run = round(sweep.parent.metrics["sweep/steps_run"])
    assert steps == {"trials": run, "teachers and shared phases": 300, "together": run + 300}


def test_one_point_is_no_front() -> None:
    aims = (ACCURACY, Objective(metric="eval/loss", mode="min"))
    one = [trial(0, {}, eval_accuracy=0.5, eval_loss=1.0)]
    assert list(pareto_figures(sweep_of(one, *aims))) == []
    (shown,) = pareto_figures(sweep_of([*one, trial(1, {}, eval_accuracy=0.4, eval_loss=2.0)], *aims))
    assert "1 is on the front" in shown.caption


def test_the_page_and_its_figures_are_files(uri: str, tmp_path: Path) -> None:
    path = save(sweep_report(uri, TWO_AIMS.id, tmp_path), tmp_path / "page" / "sweep.html")
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert sorted(file.name for file in (tmp_path / "page" / "sweep_plots").iterdir()) == [
        "curves.png",
        "heat-map-2.png",
        "heat-map.png",
        "objective-2.png",
        "objective.png",
        "parallel-coordinates.png",
        "pareto-front.png",
        "timeline.png",
    ]


# ----------------------------------------------------------------------------------------------------- what happened


def test_the_timeline_has_the_phases_at_their_times(sweep: Sweep, sections: list[Section]) -> None:
    traces = {trace["name"]: trace for trace in figure(sections, "timeline")["data"]}
    assert set(traces) == {"dense", "dense, reused", "sparse", "redense"}
    reused = [phase for each in sweep.trials for phase in each.phases if phase.reused]
    assert len(traces["dense, reused"]["x"]) == len(reused) == 12
    assert "pattern" in traces["dense, reused"]["marker"] and "pattern" not in traces["dense"]["marker"]
    first = sweep.trials[0].phases[0]
    began = (first.started_ms - sweep.parent.started_ms) / 1000
    assert (traces["dense"]["base"][0], traces["dense"]["x"][0]) == pytest.approx((began, first.seconds), abs=1e-4)
    assert figure(sections, "timeline")["layout"]["xaxis"]["title"]["text"] == "seconds since the sweep began"


def phase_row(*, reused: bool = False, **values: Any) -> PhaseRow:
    known = {"name": "dense", "kind": "dense", "fingerprint": "f", "first_step": 0, "steps": 10, "seconds": 1.0}
    return PhaseRow(**known, reused=reused, complete=True, **values)


def test_a_phase_from_before_the_sweep_is_at_zero_and_an_own_one_where_it_was() -> None:
    phase = phase_row(reused=True, computed_by="other", started_ms=-90_000, ended_ms=-60_000)
    (shown,) = timeline(sweep_of([replace(trial(0, {}), phases=(phase,))]))
    assert shown.plotly is not None
    (trace,) = shown.plotly["data"]
    assert (trace["base"], trace["x"]) == ([0], [0])
    own = phase_row(started_ms=-2000, ended_ms=4000)
    (shown,) = timeline(sweep_of([replace(trial(0, {}), phases=(own,))]))
    assert shown.plotly is not None
    (trace,) = shown.plotly["data"]
    assert (trace["base"], trace["x"]) == ([-2], [6])
    assert trace["hovertext"] == ["t000 dense: 6.0 s by the clock, training time 1.0 s"]


def test_trials_that_follow_each_other_share_a_row() -> None:
    def run(number: int, start: int, end: int) -> RunRow:
        phase = phase_row(started_ms=start, ended_ms=end)
        return replace(trial(number, {}), phases=(phase,))

    runs = [run(0, 1, 10), run(1, 2, 5), run(2, 5, 7), run(3, 6, 20), run(4, 11, 12)]
    assert list(pack_rows(runs).values()) == [0, 1, 1, 2, 0]
    assert pack_rows([trial(5, {})]) == {}


def test_the_best_so_far_is_of_finished_trials(sweep: Sweep, sections: list[Section]) -> None:
    traces = {trace["name"]: trace for trace in figure(sections, "objective")["data"]}
    assert [*traces] == ["finished", "stopped", "diverged", "failed", "best so far"]
    values = [each.metrics["eval/accuracy"] for each in sweep.finished]
    assert traces["best so far"]["y"] == np.maximum.accumulate(values).tolist()
    assert traces["failed"]["x"] == [7]


def test_curves_are_those_of_the_best(uri: str, sections: list[Section], sweep: Sweep) -> None:
    shown = figure(sections, "curves")["data"]
    best = best_trials(sweep)
    assert [trace["name"] for trace in shown] == [each.trial for each in reversed(best)]
    assert len(best) == min(CURVES, len(sweep.finished))
    points = build_client(uri).get_metric_history(best[0].run_id, "eval/accuracy")
    assert (shown[-1]["x"], shown[-1]["y"]) == ([each.step for each in points], [each.value for each in points])


# ----------------------------------------------------------------------------------------------------- over the space


def test_an_interval_is_students() -> None:
    # t of 2 degrees of freedom at 0.975 is 4.303; the deviation of 1, 2, 3 is 1.
    cell = summarize([1.0, 2.0, 3.0], are_repetitions=True)
    assert (cell.mean, cell.least, cell.most, cell.count) == (2.0, 1.0, 3.0, 3)
    assert cell.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert summarize([0.5], are_repetitions=True).half is None
    assert summarize([1.0, 2.0, 3.0], are_repetitions=False).half is None


def test_the_heat_map_has_means_over_seeds(sweep: Sweep, sections: list[Section]) -> None:
    (trace,) = figure(sections, "heat-map")["data"]
    assert (trace["y"], trace["x"]) == (["1", "2", "4"], ["0.5", "0.7", "0.9"])
    finished = [each for each in sweep.finished if each.swept["distill.temperature"] == 1.0]
    values = [each.metrics["eval/accuracy"] for each in finished if each.swept["dsd.rounds.0.sparsity"] == 0.9]
    assert trace["z"][0][2] == pytest.approx(np.mean(values))
    half = 12.7062 * np.std(values, ddof=1) / math.sqrt(2)
    assert trace["text"][0][2] == f"{np.mean(values):.4f}<br>± {half:.2g}<br>n = 2"
    # One of the two trials of temperature 2 and sparsity 0.5 diverged.
    assert trace["text"][1][0].endswith("<br>n = 1") and "±" not in trace["text"][1][0]


def test_the_caption_says_what_a_mean_is_over() -> None:
    trials = [
        trial(number, {"a.sparsity": sparsity, "temperature": heat, "lr": lr, "seed": 0}, eval_accuracy=lr)
        for number, (sparsity, heat, lr) in enumerate([(0.5, 1, 0.1), (0.5, 2, 0.1), (0.9, 1, 0.1), (0.5, 1, 0.3)])
    ]
    (shown,) = heat_maps(sweep_of(trials))
    assert shown.title == "eval/accuracy over temperature and a.sparsity"
    assert "which differ in lr;" in shown.caption
    assert shown.plotly is not None
    assert shown.plotly["data"][0]["z"] == [[pytest.approx(0.2), 0.1], [0.1, None]]
    # The two of a cell differ in more than seeds.
    assert shown.plotly["data"][0]["text"][0][0] == "0.2000<br>0.1000 – 0.3000<br>n = 2"
    assert "interval" not in shown.caption and "min – max" in shown.caption


def test_temperature_and_sparsity_are_the_axes_then_numbers_then_labels() -> None:
    def axes(*swept: dict[str, Any]) -> tuple[str, str] | None:
        return axis_variables(sweep_of([trial(number, each) for number, each in enumerate(swept)]))

    assert axes({"lr": 1, "a": "x", "seed": 1}, {"lr": 2, "a": "y", "seed": 2}) == ("lr", "a")
    assert axes({"lr": 1, "b": 0.1, "a": "x"}, {"lr": 2, "b": 0.2, "a": "y"}) == ("b", "lr")
    assert axes({"lr": 1, "sparsity": 0.1}, {"lr": 2, "sparsity": 0.2}) == ("sparsity", "lr")
    assert axes({"lr": 1, "seed": 1}, {"lr": 2, "seed": 2}) is None
    assert axes({"lr": 1, "b": 1}, {"lr": 2, "b": 1}) is None


def test_a_variable_of_many_values_is_cut_into_ranges() -> None:
    values = [float(value) for value in range(60)]
    axis = build_axis("lr", values)
    assert axis.labels[0] == "0 – 9.833" and len(axis.labels) == 6
    assert [axis.place(value) for value in (0.0, 9.0, 10.0, 59.0)] == [0, 0, 1, 5]
    assert np.bincount([axis.place(value) for value in values]).tolist() == [10] * 6
    pairs = [trial(number, {"lr": value, "x": 1}, eval_accuracy=value) for number, value in enumerate(values)]
    found = cells(pairs, build_axis("x", [1]), axis, ACCURACY)[0, 1]
    assert (found.mean, found.half) == (pytest.approx(14.5), None)


def test_axes_of_parallel_coordinates() -> None:
    linear, wide = build_scale("a", [0.5, 0.7, 0.9]), build_scale("lr", [1e-4, 1e-2])
    assert [linear.height(value) for value in (0.5, 0.7, 0.9)] == pytest.approx([0, 0.5, 1])
    assert wide.height(1e-3) == pytest.approx(0.5)  # by its logarithm
    labels = build_scale("kind", ["sgd", "adam", "sgd"])
    assert labels.ticks == ((0, "sgd"), (1, "adam")) and labels.height("adam") == 1
    assert build_scale("same", [3, 3]).height(3) == 0


def test_parallel_coordinates_have_every_finished_trial_once(sweep: Sweep, sections: list[Section]) -> None:
    traces = figure(sections, "parallel-coordinates")["data"]
    texts = [text.split(" ")[0] for trace in traces for text in trace["hovertext"] if text]
    assert sorted(texts) == sorted([each.trial for each in sweep.finished] * 4)
    # The best at the top of the objective, which is the last axis.
    assert (traces[-1]["name"], traces[-1]["y"][3]) == ("best", 1)


# ---------------------------------------------------------------------------------------------------- two objectives


def test_the_front_is_what_no_trial_is_better_than(uri: str) -> None:
    sweep = read_sweep(uri, TWO_AIMS.id)
    results = {each.trial: (each.metrics["test/accuracy"], each.metrics["parameters_left"]) for each in sweep.finished}
    expected = {
        name
        for name, (accuracy, left) in results.items()
        if not any(a >= accuracy and b <= left and (a, b) != (accuracy, left) for a, b in results.values())
    }
    assert {each.trial for each in front(sweep)} == expected and 1 < len(expected) < len(results)
    shown = sweep_sections(sweep, {})
    others, best = figure(shown, "pareto-front")["data"]
    assert {text.split(" ")[0] for text in best["hovertext"]} == expected
    assert len(others["x"]) + len(best["x"]) == len(results)
    table = next(section for section in shown if section.title == "Trials").html
    assert table.count(" ★</td>") == len(expected)


def test_less_is_better_where_the_objective_says_so(uri: str) -> None:
    sweep = read_sweep(uri, TWO_AIMS.id)
    shown = sweep_sections(sweep, {})
    best = figure(shown, "objective-2")["data"][-1]["y"]
    assert best == np.minimum.accumulate([each.metrics["parameters_left"] for each in sweep.finished]).tolist()
    assert figure(shown, "heat-map-2")["data"][0]["reversescale"]


def test_every_figure_can_be_drawn(sections: list[Section]) -> None:
    figures: list[ReportFigure] = [each for section in sections for each in section.figures]
    for each in figures:
        assert each.draw().get_axes(), each.name
        json.dumps(each.plotly)
