"""What a person sees in a browser: MLflow's pages on a real sweep, and the reports on it, in Debian's Chromium.

With TEMPER_PICTURES=docs the pictures that the README shows are made anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from sweep_runs import grid, sweep
from team_server import need

pytestmark = [pytest.mark.ray, pytest.mark.browser]

ROOT = Path(__file__).parent.parent
SPACE = "temperature_sparsity"
SPARSITY = "dsd.rounds.0.sparsity"
SWEPT = {"seed": grid(0, 1), "distill.temperature": grid(1.0, 4.0), SPARSITY: grid(0.5, 0.7, 0.9)}
WINDOW = {"width": 1280, "height": 860}
LARGEST_PICTURE = 300_000  # bytes
PICTURED = {"light": "Over the space", "dark": "Winner: training"}
"""The heading of the report on a sweep where the picture in each theme begins."""
TIMEOUT_MS = 60_000.0

# Without MLflow's panel for chats, and with its pages for training, not for language models. The report that MLflow
# shows in a frame has no storage.
SETTINGS = """
if (location.protocol === "http:") {
  localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
  localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
  localStorage.setItem("mlflow.workflowType_v1", '"machine_learning"');
}
"""
NAMES = "[role=gridcell] a[href*='/runs/']"
CHARTS = """() => [...document.querySelectorAll(".js-plotly-plot")].map(
  (plot) => Object.fromEntries(plot.data.map(({ name, x }) => [name, [...x]])))"""
"""For each chart on the page the steps of its series."""
OUTCOME = """() => ({
  places: document.querySelectorAll(".plot").length,
  drawn: document.querySelectorAll(".plot.js-plotly-plot .main-svg").length > 0
    ? document.querySelectorAll(".plot.js-plotly-plot").length : 0,
  wider: document.documentElement.scrollWidth - innerWidth,
})"""


@dataclass(frozen=True)
class Swept:
    """A finished sweep, its runs in MLflow by their ids, and where MLflow's pages are served."""

    storage: Path
    result: dict[str, Any]
    runs: dict[str, Any]
    address: str

    @property
    def parent(self) -> Any:
        return self.runs[self.result["parent_run_id"]]

    @property
    def best(self) -> Any:
        return self.runs[self.result["best"]["run_id"]]

    def below(self, run: Any) -> list[Any]:
        """The children of a run, the newest first, as MLflow's table has them."""
        children = [
            child for child in self.runs.values() if child.data.tags.get("mlflow.parentRunId") == run.info.run_id
        ]
        return sorted(children, key=lambda child: child.info.start_time, reverse=True)

    def page_of(self, run: Any, tab: str) -> str:
        return f"{self.address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/{tab}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    need(program, "Chromium (Debian's package chromium)")
    with sync_playwright() as playwright:
        expect.set_options(timeout=TIMEOUT_MS)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def swept(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """The shipped sweep with fewer values: twelve trials, their teacher, and the reports on both."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("browser")
    space = yaml.safe_load((ROOT / "tune_spaces" / f"{SPACE}.yaml").read_text())
    space |= {"job": str(ROOT / "jobs" / "digits_student_dsd.yaml"), "space": SWEPT, "concurrency": 2}
    (folder / f"{SPACE}.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    storage = folder / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result, _ = sweep(folder / f"{SPACE}.yaml", f"storage={storage}")
        for run_id in (result["best"]["run_id"], result["parent_run_id"]):
            temper("report", run_id, "--storage", str(storage), "--to", str(folder / f"{run_id}.html"))
        client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
        runs = client.search_runs([client.get_run(result["parent_run_id"]).info.experiment_id], max_results=1000)
        with serving(storage) as address:
            yield Swept(storage, result, {run.info.run_id: run for run in runs}, address)


def temper(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "temper", *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@contextlib.contextmanager
def serving(storage: Path) -> Iterator[str]:
    """The address of `temper ui`."""
    command = [sys.executable, "-m", "temper", "ui", "--storage", str(storage), "--no-browser", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield next(match[1] for line in process.stderr if (match := re.search(r"MLflow: (\S+?)/#", line)))
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a new window, for MLflow."""
    context = browser.new_context(viewport=WINDOW)
    context.add_init_script(SETTINGS)
    context.set_default_timeout(TIMEOUT_MS)
    yield context.new_page()
    context.close()


def take_picture(page: Page, name: str, tmp_path: Path) -> None:
    """What the window shows, without the buttons that lie over it."""
    page.add_style_tag(content="[data-assistant-ui], .modebar { display: none !important }")
    page.mouse.move(0, 0)
    path = Path(os.environ.get("TEMPER_PICTURES", tmp_path)) / name
    page.screenshot(path=path, animations="disabled")
    assert 10_000 < path.stat().st_size < LARGEST_PICTURE


# ------------------------------------------------------------------------------------------------------------- MLflow


def rows(page: Page) -> list[tuple[str, int]]:
    """The runs in MLflow's table from top to bottom, each with how deep in the tree it stands."""
    places = page.locator(NAMES).evaluate_all(
        "links => links.map((link) => [link.getBoundingClientRect().y, link.getBoundingClientRect().x, link.innerText])"
    )
    levels = sorted({x for _, x, _ in places})
    return [(name, levels.index(x)) for _, x, name in sorted(places)]


def open_row(page: Page, name: str) -> None:
    """Unfolds what is below a run."""
    page.locator("[role=gridcell]", has=page.get_by_role("link", name=name, exact=True)).get_by_role("button").click()


def named(runs: list[Any]) -> list[str]:
    return [run.info.run_name for run in runs]


def test_the_table_shows_the_tree(swept: Swept, page: Page, tmp_path: Path) -> None:
    page.goto(f"{swept.address}/#/experiments/{swept.parent.info.experiment_id}/runs")
    best = swept.best.info.run_name
    open_row(page, SPACE)
    expect(page.get_by_role("link", name=best, exact=True)).to_be_visible()
    children = named(swept.below(swept.parent))
    assert rows(page) == [(SPACE, 0), *((name, 1) for name in children)]
    open_row(page, best)
    expect(page.get_by_role("link", name="sparse-1", exact=True)).to_be_visible()
    after = children.index(best) + 2
    phases = [(name, 2) for name in ("redense-1", "sparse-1", "dense")]
    assert rows(page)[after : after + 3] == phases
    assert len(rows(page)) == 1 + len(children) + 3
    show_columns(page, "eval/accuracy", "parameters_left", "sweep.distill.temperature", f"sweep.{SPARSITY}")
    take_picture(page, "mlflow_tree.png", tmp_path)


def show_columns(page: Page, *names: str) -> None:
    """Shows these columns of MLflow's table in the place of some of its own."""
    page.get_by_test_id("column-selection-dropdown").first.click()
    for name in ("Dataset", "Source", "Models", *names):
        page.get_by_placeholder("Search columns").fill(name)
        exactly = re.compile(f"^{re.escape(name)}$")
        page.get_by_test_id("column-selector-tree").locator("[title]").filter(has_text=exactly).first.click()
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    expect(page.locator(f"[role=columnheader][col-id*='{names[-1]}']")).to_be_visible()


def test_the_charts_of_a_trial(swept: Swept, page: Page, tmp_path: Path) -> None:
    page.goto(swept.page_of(swept.best, "model-metrics"))
    filter_charts(page, "^eval/accuracy$")
    wait_for_series(page, 1)
    assert page.evaluate(CHARTS) == [{swept.best.info.run_name: evaluated(1, 400)}]
    filter_charts(page, "")
    expect(page.get_by_text(re.compile(r"^train$"))).to_be_visible()
    groups = dict(re.findall(r"^(\S+)\n\((\d+)\)$", page.inner_text("body"), flags=re.MULTILINE))
    assert {"eval", "eval/class_accuracy", "train", "train/loss", "sparsity", "test", "time"} <= groups.keys()
    assert groups["eval/class_accuracy"] == "10"
    filter_charts(page, "^(eval|train)/[a-z_]+$")
    expect(page.get_by_text(re.compile(r"^test$"))).to_be_hidden()
    expect(page.locator(".js-plotly-plot .scatterlayer .trace").first).to_be_visible()
    take_picture(page, "mlflow_trial.png", tmp_path)


def test_each_phase_is_a_series_on_one_axis_of_steps(swept: Swept, page: Page) -> None:
    best = swept.best.info
    condition = f"tags.mlflow.parentRunId = '{best.run_id}'"
    page.goto(f"{swept.address}/#/experiments/{best.experiment_id}/runs?compareRunsMode=CHART&searchFilter={condition}")
    filter_charts(page, "^eval/accuracy$")
    open_row(page, best.run_name)
    wait_for_series(page, 4)
    (steps,) = page.evaluate(CHARTS)
    assert steps == {
        best.run_name: evaluated(1, 400),
        "dense": evaluated(1, 300),
        "sparse-1": evaluated(301, 350),
        "redense-1": evaluated(351, 400),
    }


def filter_charts(page: Page, expression: str) -> None:
    page.get_by_placeholder("Search metric charts").fill(expression)


def wait_for_series(page: Page, number: int) -> None:
    """Until one chart is left, with this many series that have points."""
    page.wait_for_function(
        f"() => {{ const charts = ({CHARTS})(); return charts.length === 1 && "
        f"Object.values(charts[0]).filter((steps) => steps.length > 1).length === {number}; }}"
    )


def evaluated(first: int, last: int) -> list[int]:
    return [step for step in range(first, last + 1) if step % 25 == 0]


@pytest.mark.parametrize("which", ["best", "parent"])
def test_mlflow_shows_the_report(swept: Swept, page: Page, which: str) -> None:
    run = getattr(swept, which)
    page.goto(swept.page_of(run, "artifacts"))
    page.get_by_text("report.html", exact=True).click()
    report = page.frame_locator("iframe")
    expect(report.locator("html[data-ready]")).to_be_attached()
    expect(report.get_by_text(run.info.run_id).first).to_be_attached()
    assert report.locator(".plot").count() == report.locator(".plot.js-plotly-plot").count() > 5


# ------------------------------------------------------------------------------------------------------------- reports


@dataclass(frozen=True)
class Opened:
    """A report in a window without a network, and everything that went wrong in it or was asked for."""

    page: Page
    errors: list[str]
    requests: list[str]


@contextlib.contextmanager
def opened(browser: Browser, path: Path, **window: Any) -> Iterator[Opened]:
    context = browser.new_context(**{"viewport": WINDOW, "offline": True, "reduced_motion": "reduce", **window})
    context.set_default_timeout(TIMEOUT_MS)
    report = Opened(context.new_page(), [], [])
    said = ("error", "warning")
    report.page.on("console", lambda message: report.errors.append(message.text) if message.type in said else None)
    report.page.on("pageerror", lambda error: report.errors.append(str(error)))
    report.page.on("request", lambda request: report.requests.append(request.url))
    report.page.goto(path.as_uri())
    expect(report.page.locator("html[data-ready]")).to_be_attached()
    yield report
    context.close()


def report_on(swept: Swept, which: str) -> Path:
    return swept.storage.parent / f"{getattr(swept, which).info.run_id}.html"


def brightness(page: Page, what: str) -> float:
    """From 0 to 1, of a colour of the page's body."""
    colour = page.locator("body").evaluate(f"body => getComputedStyle(body).{what}")
    return sum(map(float, re.findall(r"\d+", colour)[:3])) / 3 / 255


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("which", ["best", "parent"])
def test_a_report_in_both_themes(swept: Swept, browser: Browser, which: str, theme: str, tmp_path: Path) -> None:
    path = report_on(swept, which)
    with opened(browser, path, color_scheme=theme) as report:
        assert (report.errors, report.requests) == ([], [path.as_uri()])
        shown = report.page.evaluate(OUTCOME)
        assert (shown["places"], shown["wider"]) == (shown["drawn"], 0)
        assert shown["places"] > 5
        paper, ink = brightness(report.page, "backgroundColor"), brightness(report.page, "color")
        assert (paper > 0.9 and ink < 0.3) if theme == "light" else (paper < 0.2 and ink > 0.7)
        if which == "parent":
            report.page.get_by_role("heading", name=PICTURED[theme]).evaluate("it => it.scrollIntoView()")
            take_picture(report.page, f"report_{theme}.png", tmp_path)


def test_a_report_on_a_phone(swept: Swept, browser: Browser) -> None:
    with opened(browser, report_on(swept, "parent"), viewport={"width": 390, "height": 844}) as report:
        assert report.page.evaluate(OUTCOME)["wider"] == 0


def test_the_reader_chooses_the_theme(swept: Swept, browser: Browser) -> None:
    with opened(browser, report_on(swept, "parent"), color_scheme="light") as report:
        report.page.get_by_role("button", name="Use the dark theme").click()
        assert brightness(report.page, "backgroundColor") < 0.2
        report.page.reload()
        assert brightness(report.page, "backgroundColor") < 0.2
        report.page.get_by_role("button", name="Use the light theme").click()
        assert brightness(report.page, "backgroundColor") > 0.9
        assert report.errors == []


def test_tables_are_sorted(swept: Swept, browser: Browser) -> None:
    trials = sorted(swept.result["trials"], key=lambda trial: trial["id"])
    accuracies = {trial["id"]: trial["metrics"]["eval/accuracy"] for trial in trials}
    with opened(browser, report_on(swept, "parent")) as report:
        table = report.page.locator("table.sortable", has_text="t011").first
        column(table, "eval/accuracy").click()
        rising = first_cells(table)
        assert [accuracies[name] for name in rising] == sorted(accuracies.values())
        column(table, "eval/accuracy").click()
        assert [accuracies[name] for name in first_cells(table)] == sorted(accuracies.values(), reverse=True)
        assert sorted(rising) == list(accuracies)
        assert report.errors == []


def column(table: Locator, name: str) -> Locator:
    return table.locator("th").filter(has_text=name).first.get_by_role("button")


def first_cells(table: Locator) -> list[str]:
    cells = table.locator("tbody tr > :first-child").all_inner_texts()
    return [cell.split()[0] for cell in cells]


@pytest.mark.parametrize("which", ["best", "parent"])
def test_a_report_is_printed_black_on_white(swept: Swept, browser: Browser, which: str, tmp_path: Path) -> None:
    with opened(browser, report_on(swept, which), color_scheme="dark") as report:
        printed = report.page.pdf(path=tmp_path / "report.pdf", format="A4")
        assert printed.startswith(b"%PDF")
        assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 25
        report.page.emulate_media(media="print")
        assert brightness(report.page, "backgroundColor") > 0.9
        assert brightness(report.page, "color") < 0.3
        assert report.errors == []
