"""`temper report`: what its page on a run says, that its numbers are MLflow's, and that nothing else is needed."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from made_run import FACTS, JOB, RUN_ID, START_MS, Made, make_once
from sweep_tree import MadeSweep, write_sweep
from temper.cli import main
from temper.config.load import build_job, job_to_yaml
from temper.errors import JobError
from temper.files import read_json, write_json
from temper.launch.teachers import plan_job
from temper.launch.tracked_run import TrackedRun
from temper.plan import probe
from temper.plan.mesh import local_cluster
from temper.plan.probe import ModuleOutput
from temper.tracking import report
from temper.tracking.delivery import replay
from temper.tracking.history import phase_histories
from temper.tracking.mlflow_store import build_client
from temper.tracking.report import log_report, run_report, sweep_report
from temper.tracking.report.figure import PALETTE, ReportFigure, Section, figure_svg
from temper.tracking.report.page import Html, Number, build_page, duration, say, table, traced
from temper.tracking.report.panels import Band, Line, Panel, panel_figure
from temper.tracking.report.phase_figures import classes_figure, timeline_figure
from temper.tracking.report.run_data import read_run
from temper.tracking.report.run_figures import system_figure, training_figure

FIGURES = (
    *("timeline", "training", "terms", "classes", "agreement", "precision"),
    *("sparsity", "weights-1", "returned-1", "speed"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_once(tmp_path_factory.mktemp("made"))


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """A copy of the run that a test may change."""
    storage = tmp_path / "runs"
    shutil.copytree(made.folder.parent, storage)
    moved = {name: storage / "phases" / folder.name for name, folder in made.phases.items()}
    return Made(made.plan, storage / made.folder.name, moved)


@pytest.fixture(scope="module")
def page(made: Made) -> str:
    return page_of(made.folder)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without matplotlib's figures, which take time."""
    monkeypatch.setattr("temper.tracking.report.page.figure_svg", lambda figure: "<svg></svg>")
    monkeypatch.setattr(report, "figure_png", lambda figure: b"")


def page_of(folder: Path) -> str:
    return run_report(read_run(folder)).page


class Page(HTMLParser):
    """What a page is made of; every tag must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.policy = ""
        self.scripts: list[tuple[Mapping[str, str | None], str]] = []
        self.traced: list[tuple[Mapping[str, str], str]] = []
        self.figures: list[str] = []
        self._open: list[tuple[str, Mapping[str, Any]]] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        if tag == "figure":
            self.figures.append((values["id"] or "").removeprefix("figure-"))
        if tag == "script":
            self.scripts.append((values, ""))
        if tag not in ("meta", "link", "wbr", "br"):
            self._open.append((tag, values))

    def handle_data(self, data: str) -> None:
        tag, values = self._open[-1] if self._open else ("", {})
        if tag == "script":
            self.scripts[-1] = (values, self.scripts[-1][1] + data)
        if "data-metric" in values:
            self.traced.append((values, data))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag


def text_of(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def cells(page: str, first: str) -> list[str]:
    """The texts of the table row that begins with this cell."""
    rows = [
        [text_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(<td.*?)</tr>", page)
    ]
    (found,) = [row for row in rows if row[0] == first]
    return found


def known(page: str) -> dict[str, str]:
    """What the page says by name, in lists of names and what they are."""
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    return {text_of(name): text_of(value) for name, value in pairs}


def figure(figures: Sequence[ReportFigure], name: str) -> ReportFigure:
    return next(each for each in figures if each.name == name)


# ------------------------------------------------------------------------------------------------------ what it says


def test_the_page_says_what_the_run_is(made: Made, page: str) -> None:
    header = [text_of(title) for title in re.findall(r"<th[^>]*>(.*?)</th>", page.split("</tr>")[0])]
    assert header[:5] == ["phase", "steps", "learning rate", "pruned", "zero weights"]
    found = {phase.name: dict(zip(header, cells(page, phase.name), strict=True)) for phase in made.plan.phases}
    assert found["dense"]["steps"] == "0–20"
    assert found["sparse-1"]["pruned"] == "50–75 % of 2 layers"
    assert found["sparse-1"]["zero weights"] == f"{100 * 1696 / 2368:.4g} %"
    assert found["redense-1"]["learning rate"] == "0.01"
    for phase in made.plan.phases:
        row = found[phase.name]
        assert (row["test/accuracy"], row["eval/accuracy"]) == ("0.8750", f"{1 - 1 / phase.last_step:.4f}")
        assert (row["computed by"], row["fingerprint"], row["training time"]) == (
            *("this run", phase.fingerprint[:10], "1.5 s"),
        )
    assert f"Complete, step 50 of 50 · MLflow run <code>{RUN_ID}</code>" in page
    assert known(page)["status"] == "complete; 3 of 3 phases complete"
    assert (known(page)["accuracy"], known(page)["training time"]) == ("0.8750", "4.5 s")
    assert cells(page, "computed by this run") == ["computed by this run", "4.5 s", "50", "3,200"]
    assert cells(page, "saved by reuse") == ["saved by reuse", "0.00 s", "0", "0"]
    assert f"temper train {made.folder / 'job.yaml'}" in page
    assert "ray job submit --address" in page
    assert Page(page).figures == list(FIGURES)


def test_the_page_has_a_row_for_each_layer(made: Made, page: str) -> None:
    redense = read_run(made.folder).phases[2]
    for name, title in (("1.weight", "1"), ("3.weight", "3")):
        layer = redense.layers[name]
        share = 100 * layer["returned"]["above_threshold"] / layer["pruned"]
        row = cells(page, title)
        assert row[1:3] == [f"{layer['weights']:,}", {"1": "75 %", "3": "50 %"}[title]]
        assert row[3:6] == [f"{layer['threshold']:.4g}", "0 %", {"1": "75 %", "3": "50 %"}[title]]
        assert row[6:8] == [f"{100 * redense.metrics[f'sparsity/{name}']:.4g} %", f"{share:.4g} %"]
    assert cells(page, "all of them")[1:3] == ["2,368", f"{100 * 1696 / 2368:.4g} %"]


def test_the_page_says_who_taught_and_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    facts = replace(FACTS, outputs=(ModuleOutput("2", "ReLU", (32,), 1),))
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(facts))))
    alone = {**JOB, "dsd": None, "storage": str(tmp_path / "runs")}
    for seed, name in enumerate(("wise", "grey")):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**alone, "name": name, "seed": seed}))
    distill = {
        "teacher": [{"source": "wise.yaml", "weight": 2}, "grey.yaml"],
        "temperature": {"start": 8, "end": 1},
        "loss": "decoupled",
        "features": [{"student": "2", "of": 1}],
    }
    plan = plan_job(build_job({**alone, "distill": distill}), local_cluster(), tmp_path)
    assert plan.distill is not None
    wise, grey = (teacher.fingerprint[:10] for teacher in plan.distill.teachers)
    plan.run_folder.mkdir(parents=True)
    (plan.run_folder / "job.yaml").write_text(job_to_yaml(plan.job))
    write_json(plan.run_folder / "plan.json", plan.to_dict())
    page = page_of(plan.run_folder)
    assert [text_of(value) for value in re.findall(r"<dt>taught by</dt><dd>(.*?)</dd>", page)] == [
        f"wise, {wise}, weight 2",
        f"grey, {grey}, weight 1",
    ]
    assert known(page)["soft targets"] == "T 8 → 1 (linear), alpha 0.9, decoupled (non_target_weight 8)"
    assert known(page)["level"] == "2 32 → 2 of teacher 1 32, mse, weight 1"
    assert "teacher on the test split" not in page

    metrics = {"train/loss": 2.0, "teacher/accuracy": 0.9375, "teacher/loss": 0.25, "teacher/class_accuracy/1": 0.5}
    folder = plan.phase_folder(plan.phases[0])
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text(json.dumps({"step": 1, "time_ms": 0, "metrics": metrics}) + "\n")
    assert known(page_of(plan.run_folder))["teacher on the test split"] == "accuracy 0.9375, loss 0.2500"


def test_a_run_that_reuses_a_phase_says_whose_it_is_and_what_it_saved(own: Made, undrawn: None) -> None:
    computing = read_json(own.phases["dense"] / "plan.json")
    write_json(own.phases["dense"] / "plan.json", {**computing, "run_folder": "/elsewhere/other-0123456789"})
    other = own.folder.parent / "other-0123456789"
    other.mkdir()
    write_json(other / "run.json", {"run_id": "f" * 32, "uri": ""})
    page = page_of(own.folder)
    assert cells(page, "dense")[-2] == "reused from other-0123456789ffffffffff"
    assert "this run" in cells(page, "sparse-1")
    assert cells(page, "computed by this run")[1:] == ["3.0 s", "30", "1,920"]
    assert cells(page, "saved by reuse")[1:] == ["1.5 s", "20", "1,280"]
    timeline = timeline_figure(read_run(own.folder))
    assert timeline is not None and timeline.plotly is not None
    assert [(trace["base"], trace["x"]) for trace in timeline.plotly["data"]] == [
        ([-1.5], [1.5]),
        ([0.0], [10.0]),
        ([10.0], [5.0]),
    ]


def test_a_run_that_has_not_ended_is_shown_as_far_as_it_is(own: Made, undrawn: None) -> None:
    (own.phases["sparse-1"] / "phase.json").unlink()
    (own.phases["sparse-1"] / "weights.json").unlink()
    shutil.rmtree(own.phases["redense-1"])
    failure = {"time_ms": START_MS + 9000, "rank": 1, "kind": "lost peer", "type": "a.B", "message": "gone\nby now"}
    (own.folder / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    page = page_of(own.folder)
    assert "1 of 3 phases complete, step 40 of 50" in page
    assert known(page)["status"] == "stopped before its end; 1 of 3 phases complete"
    assert known(page)["failures"] == "1 of workers, 0 of them errors of their own"
    assert cells(page, "2023-11-14 22:13:29 UTC")[1:] == ["1", "lost peer", "B", "gone"]
    assert "not complete" in cells(page, "sparse-1")
    assert "not begun" in cells(page, "redense-1")
    assert set(FIGURES) - set(Page(page).figures) == {"weights-1", "returned-1"}
    write_json(own.folder / "run.json", {"run_id": RUN_ID, "uri": "", "open": True})
    assert known(page_of(own.folder))["status"].startswith("running, or killed while it ran")


def test_a_job_of_one_phase_has_a_report_too(own: Made, undrawn: None) -> None:
    plan = read_json(own.folder / "plan.json")
    values = yaml.safe_load((own.folder / "job.yaml").read_text())
    write_json(own.folder / "plan.json", {**plan, "phases": plan["phases"][:1], "steps": 20})
    (own.folder / "job.yaml").write_text(yaml.safe_dump({**values, "dsd": None}))
    page = page_of(own.folder)
    assert "Complete, step 20 of 20" in page
    assert set(FIGURES) - set(Page(page).figures) == {"sparsity", "weights-1", "returned-1"}
    assert "Round" not in page


def test_the_whole_data_section_is_shown(own: Made, undrawn: None) -> None:
    values = yaml.safe_load((own.folder / "job.yaml").read_text())
    plan = read_json(own.folder / "plan.json")
    plan["data"] |= {"train_examples": 50, "left_out_examples": 950}
    write_json(own.folder / "plan.json", plan)
    values["data"] |= {"labels": 0.05, "omit_classes": [3]}
    (own.folder / "job.yaml").write_text(yaml.safe_dump(values))
    data = known(page_of(own.folder))["data"]
    assert "labels: 0.05" in data and "omit_classes: [3]" in data
    assert "50 examples, 50 of 1,000 labelled" in data


def test_a_job_that_was_named_from_some_folder_is_repeated_from_its_copy(own: Made, undrawn: None) -> None:
    record = read_json(own.folder / "run.json")
    write_json(own.folder / "run.json", {**record, "command": "temper train README.md seed=3"})
    page = page_of(own.folder)
    assert f"<code>temper train {own.folder / 'job.yaml'}</code>" in page
    assert known(page)["command as it was typed"] == "temper train README.md seed=3"


# ------------------------------------------------------------------------------------- what MLflow has, and is given


@dataclass(frozen=True)
class Delivered:
    made: Made
    uri: str
    run_id: str


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """A run that a real store was given, as the driver does at a run's end, with its report."""
    folder = tmp_path_factory.mktemp("delivered")
    made, uri = make_once(folder), f"sqlite:///{folder}/mlflow.db"
    run = TrackedRun(uri, made.plan, "temper train job.yaml")
    run.open()
    assert replay(uri, run.run_id, phase_histories(made.plan)) and run.end("FINISHED")
    assert log_report(uri, run.run_id, made.folder)
    return Delivered(made, uri, run.run_id)


def test_every_number_of_a_run_is_in_mlflow(delivered: Delivered) -> None:
    client = build_client(delivered.uri)
    found = Page(page_of(delivered.made.folder)).traced
    assert {attributes["data-metric"] for attributes, _ in found} >= {
        *("test/accuracy", "test/loss", "eval/accuracy", "sparsity", "sparsity/1.weight", "sparsity/3.weight"),
        *("cost/seconds", "cost/steps", "cost/examples", "cost/seconds_saved", "cost/steps_saved"),
    }
    for attributes, text in found:
        assert attributes["data-run"] == delivered.run_id
        points = client.get_metric_history(delivered.run_id, attributes["data-metric"])
        step = int(attributes["data-step"]) if "data-step" in attributes else points[-1].step
        (value,) = [point.value for point in points if point.step == step]
        assert value == float(attributes["data-value"]), attributes
        shown = float(re.sub(r"[^0-9.]", "", text)) / (100 if "%" in text else 1)
        assert shown == pytest.approx(value, rel=2e-3, abs=1e-9), attributes


def test_a_run_in_mlflow_has_its_report_and_figures(delivered: Delivered) -> None:
    client = build_client(delivered.uri)
    files = {item.path for item in client.list_artifacts(delivered.run_id)}
    assert {"report.html", "plots", "weights"} <= files
    plots = {item.path for item in client.list_artifacts(delivered.run_id, "plots")}
    assert plots == {f"plots/{name}.png" for name in FIGURES}
    place = Path(client.download_artifacts(delivered.run_id, ""))
    assert (place / "report.html").read_text() == page_of(delivered.made.folder)
    for name, folder in delivered.made.phases.items():
        if name != "dense":
            assert read_json(place / "weights" / f"{name}.json") == read_json(folder / "weights.json")


def test_the_page_on_a_sweep_goes_on_with_its_winner(
    delivered: Delivered, made: Made, undrawn: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    swept = MadeSweep(temperatures=(1.0,), sparsities=(0.5, 0.7), seeds=(0,))
    write_sweep(Path(delivered.uri.removeprefix("sqlite:///")), swept, "swept")
    monkeypatch.setattr(report, "find_run", lambda run_id, storage: made.folder)
    found = sweep_report(delivered.uri, swept.id, tmp_path)
    assert "Winner: what was asked" in found.page and "Winner: round 1" in found.page
    names = [figure.name for figure in found.figures]
    assert names[-len(FIGURES) :] == [f"winner-{name}" for name in FIGURES]
    assert Page(found.page).figures == names
    monkeypatch.setattr(report, "find_run", lambda run_id, storage: None)
    assert "Winner: " not in sweep_report(delivered.uri, swept.id, tmp_path).page


def test_a_report_that_fails_is_a_line_in_the_log(
    own: Made, undrawn: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not log_report("nonsense://x", RUN_ID, own.folder)
    assert f"`temper report {RUN_ID}` writes it" in caplog.text
    monkeypatch.setattr(report, "build_page", lambda *_, **__: 1 / 0)
    assert not log_report("sqlite:///x", RUN_ID, own.folder)
    assert "no report in MLflow: division by zero" in caplog.text


# ------------------------------------------------------------------------------------------------ alone, and harmless


def test_the_page_needs_nothing_beside_itself(page: str) -> None:
    parsed = Page(page)
    assert {"iframe", "object", "base", "img"} & set(parsed.tags) == set()
    assert [link for link in parsed.loads if not link.startswith(("#", "data:image/"))] == []
    assert re.findall(r"url\((?!#)|@import", page.split("<body>")[0]) == []
    assert parsed.policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in parsed.policy and "unsafe-eval" not in parsed.policy
    assert "showSendToCloud: false" in page  # plotly's button that uploads a figure


def test_only_its_own_scripts_are_allowed_to_run(page: str) -> None:
    parsed = Page(page)
    running = [text for attributes, text in parsed.scripts if "type" not in attributes]
    (packed,) = [text for attributes, text in parsed.scripts if attributes.get("id") == "plotly"]
    library = gzip.decompress(base64.b64decode(packed)).decode()
    assert library.lstrip().startswith("/**\n* plotly.js")
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (*running, library)]
    assert re.findall(r"'sha256-(.*?)'", parsed.policy) == digests
    assert len(running) == 2
    assert len(page) < 3_000_000


def test_a_page_without_interactive_figures_carries_no_library() -> None:
    assert len(build_page("plain", "", [Section("Words", Html("<p>only</p>"))])) < 40_000


def test_what_users_write_is_escaped(own: Made, undrawn: None) -> None:
    odd = "</script><script>alert(1)</script>"
    values = yaml.safe_load((own.folder / "job.yaml").read_text())
    values["tracking"]["uri"] = f"http://me:hunter2@host/{odd}"
    values["dsd"]["exclude"] = ["<b>&"]
    (own.folder / "job.yaml").write_text(yaml.safe_dump(values))
    history = own.phases["dense"] / "history.jsonl"
    history.write_text(history.read_text().replace("cross_entropy", odd.replace("/", "\\/")))
    weights = own.phases["sparse-1"] / "weights.json"
    weights.write_text(weights.read_text().replace("1.weight", "<i>"))
    (own.phases["redense-1"] / "weights.json").unlink()
    write_json(own.folder / "git.json", {"commit": odd, "branch": odd, "dirty": True})
    page = page_of(own.folder)
    assert len([script for script, _ in Page(page).scripts if "type" not in script]) == 2
    assert escape("<b>&") in page
    assert "<b>" not in page and "<i>" not in page and "alert(1)</script>" not in page
    assert "hunter2" not in page


# ---------------------------------------------------------------------------------------------------------- pieces


def test_numbers_are_shown_and_traced() -> None:
    assert [say(-0.5, ".2f"), say(0.12345, ".4g%"), say(12345.0, ",.0f")] == ["−0.50", "12.35 %", "12,345"]
    assert [duration(seconds) for seconds in (0.424, 12.34, 245)] == ["0.42 s", "12.3 s", "4 min 05 s"]
    assert duration(11220) == "3 h 07 min"
    cell = table(["name", "accuracy"], [["a", traced(0.5, ".4f", "r<", "test/accuracy", 7)]])
    assert '<td class="number" data-sort="0.5"><span class="traced" data-run="r&lt;"' in cell
    assert 'data-metric="test/accuracy" data-step="7" data-value="0.5"' in cell
    assert ">0.5000</span>" in cell
    assert traced(None, ".4f", "r", "test/accuracy") == Number(-math.inf, "")


def panels() -> ReportFigure:
    loss = Line("training", "--series-8", [([1, 2], [100.0, 0.0]), ([3, 4], [2.0, 1.0])])
    test = Line("<b>", "--series-2", [([2], [3.0]), ([4], [math.nan])], "diamonds")
    rate = Line("rate", "--series-1", [([1, 4], [0.5, 0.5])], "stairs")
    return panel_figure(
        "one",
        "One",
        "All.",
        [Panel("loss", [loss, test], log=True), Panel("rate", [rate]), Panel("nothing", [Line("none", "--ink", [])])],
        [Band("dense", 0, 2, "--dense"), Band("sparse-1", 2, 4, "--sparse")],
    )


def test_a_panel_is_the_same_in_both_forms() -> None:
    made = panels()
    assert made.plotly is not None
    data, layout = made.plotly["data"], made.plotly["layout"]
    assert [(trace["name"], trace["x"], trace["y"], trace["showlegend"]) for trace in data[:2]] == [
        ("training", [1, 2, None, 3, 4], [100.0, None, None, 2.0, 1.0], True),
        ("&lt;b&gt;", [2, None, 4], [3.0, None, pytest.approx(math.nan, nan_ok=True)], True),
    ]
    assert (data[2]["yaxis"], data[2]["showlegend"], layout["yaxis2"]["range"]) == ("y2", False, (0.0, 0.5625))
    assert (layout["yaxis"]["type"], "yaxis3" in layout) == ("log", False)
    assert layout["yaxis2"]["domain"][1] < layout["yaxis"]["domain"][0]
    assert [note["text"] for note in layout["annotations"]] == ["dense", "sparse-1"]
    static = made.draw()
    assert [axes.get_ylabel() for axes in static.axes] == ["loss", "rate"]
    assert [axes.get_yscale() for axes in static.axes] == ["log", "linear"]
    assert static.axes[1].get_ylim() == (0.0, 0.5625)
    assert [line.get_ydata().tolist() for line in static.axes[0].lines[:2]] == [[100.0, 0.0], [2.0, 1.0]]
    assert [text.get_text() for text in static.legends[0].get_texts()] == ["training", "<b>"]


def test_colours_are_the_pages(made: Made, page: str) -> None:
    svg = figure_svg(panels())
    assert "var(--ink)" in svg and "var(--dense)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
    shown = set(re.findall(r'"(--[a-z0-9-]+)"', page))
    assert {"--dense", "--series-1"} <= shown <= set(PALETTE)


def test_a_gap_is_no_json_number(made: Made, undrawn: None) -> None:
    run = read_run(made.folder)
    dense = run.phases[0]
    diverged = [{**item, "metrics": {**item["metrics"], "train/loss": math.inf}} for item in dense.records[10:]]
    found = training_figure([replace(dense, records=[*dense.records[:10], *diverged])])
    assert found is not None
    page = build_page("gap", "", [Section("Training", figures=(found,))])
    (data,) = [json.loads(text) for attributes, text in Page(page).scripts if '"data"' in text]
    losses = next(trace for trace in data["data"] if trace["name"] == "training")
    assert losses["y"] == [*(2.0 / step for step in range(1, 11)), *[None] * 10]
    assert "svg" in figure_svg(found)


def test_curves_say_what_the_records_say(made: Made) -> None:
    run = read_run(made.folder)
    by_name = {each.name: each for each in run_report(run).figures}
    traces = {trace["name"]: trace for trace in data_of(by_name["training"])}
    steps = [5, 10, 15, 20, None, 25, 30, 35, 40, None, 45, 50]
    assert traces["evaluation"]["x"] == steps
    losses = [trace for trace in data_of(by_name["training"]) if trace["yaxis"] == "y2"]
    assert losses[0]["y"][:3] == [2.0, 1.0, pytest.approx(2 / 3)]
    assert [trace["name"] for trace in data_of(by_name["terms"])] == ["cross entropy", "soft targets"]
    assert data_of(by_name["precision"])[1]["y"][:5] == [0.0, 0.0, 0.0, 1.0, 1.0]
    bars = data_of(by_name["classes"])
    assert [(bar["name"], bar["y"][9]) for bar in bars] == [
        ("dense", pytest.approx(1 - 9 / 30)),
        ("sparse-1", pytest.approx(1 - 9 / 50)),
        ("redense-1", pytest.approx(1 - 9 / 60)),
    ]
    layers = [trace for trace in data_of(by_name["sparsity"]) if trace["type"] == "heatmap"]
    assert [(trace["x"], trace["y"]) for trace in layers] == [
        ([20, 25, 30, 35, 40], ["1", "3"]),
        ([40, 45, 50], ["1", "3"]),
    ]
    assert layers[0]["z"] == [[75.0] * 4, [50.0] * 4]


def data_of(figure: ReportFigure) -> list[dict[str, Any]]:
    assert figure.plotly is not None
    return figure.plotly["data"]


def test_of_many_classes_the_worst_are_shown(made: Made) -> None:
    redense = read_run(made.folder).phases[2]
    assert redense.state is not None
    accuracies = {f"test/class_accuracy/{number:02}": number / 100 for number in range(60)}
    found = classes_figure([replace(redense, state=replace(redense.state, metrics=accuracies))])
    assert found is not None
    assert data_of(found)[0]["x"] == [f"{number:02}" for number in range(40)]
    assert found.caption.endswith("Of 60 classes the 40 with the lowest.")


def test_no_bar_begins_above_zero(made: Made) -> None:
    redense = read_run(made.folder).phases[2]
    assert redense.state is not None
    accuracies = {"test/class_accuracy/0": 0.97, "test/class_accuracy/1": 0.99}
    found = classes_figure([replace(redense, state=replace(redense.state, metrics=accuracies))])
    assert found is not None and found.plotly is not None
    assert (data_of(found)[0]["mode"], found.plotly["layout"]["yaxis"]["range"]) == ("markers", [0.9, 1.0])
    assert found.caption.endswith("The axis begins at 0.9.")


def test_the_caption_says_which_losses_stand_on_one_axis(made: Made) -> None:
    dense = read_run(made.folder).phases[0]
    keys = ("train/loss", "eval/loss", "train/loss/soft", "train/loss/hard")

    def caption(*names: str) -> str:
        found = training_figure(
            [replace(dense, records=[{"step": 1, "time_ms": 0, "metrics": dict.fromkeys(names, 1.0)}])]
        )
        assert found is not None
        return found.caption

    assert "Training: the sum of all terms" in caption(*keys) and "Diamonds" not in caption(*keys)
    assert "sum of all terms" not in caption(*keys[:2])
    assert "Diamonds" in caption("train/loss", "test/loss")


def test_the_use_of_each_node_is_a_line() -> None:
    samples = [
        {
            "step": step,
            "time_ms": START_MS + 5000 * step,
            "metrics": {
                f"system/{node}/{name}": 10.0 * step
                for node in ("one", "two")
                for name in ("cpu_utilization_percentage", "gpu_0_utilization_percentage")
            },
        }
        for step in (1, 2)
    ]
    found = system_figure(samples)
    assert found is not None
    assert [(trace["name"], trace["x"], trace["y"], trace["yaxis"]) for trace in data_of(found)] == [
        (node, [0.0, 5.0], [10.0, 20.0], axis) for axis in ("y1", "y2") for node in ("one", "two")
    ]
    assert system_figure([]) is None


# --------------------------------------------------------------------------------------------------------- the command

Temper = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Temper:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_command_writes_the_page_and_its_figures(run: Temper, own: Made, undrawn: None, tmp_path: Path) -> None:
    code, out, err = run("report", RUN_ID, "--storage", own.folder.parent, "--json")
    assert (code, json.loads(out)["file"]) == (0, str(own.folder / "report.html"))
    assert err == f"report in {own.folder / 'report.html'}\n"
    page = (own.folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert {path.stem for path in (own.folder / "report_plots").iterdir()} == set(FIGURES)
    code, _, err = run("report", own.folder, "--to", tmp_path / "new" / "page.html")
    assert (code, err) == (0, f"report in {tmp_path / 'new' / 'page.html'}\n")
    assert (tmp_path / "new" / "page.html").read_text() == page
    assert (tmp_path / "new" / "page_plots" / "training.png").exists()


def test_the_command_refuses_what_is_no_run(run: Temper, own: Made, undrawn: None, tmp_path: Path) -> None:
    code, _, err = run("report", "nothing", "--storage", tmp_path)
    assert (code, err.splitlines()[1].split(" and ")[0]) == (2, "  RUN|SWEEP: nothing is no folder,")
    for folder in (tmp_path, own.phases["dense"]):
        code, _, err = run("report", folder)
        assert (code, "give one in the storage, or a run's id" in err or "is not a run's folder" in err) == (2, True)
    (tmp_path / "file").touch()
    code, _, err = run("report", own.folder, "--to", tmp_path / "file" / "page.html")
    assert (code, err.count("\n")) == (1, 1)
    with pytest.raises(JobError, match="is not a run's folder"):
        read_run(tmp_path)
