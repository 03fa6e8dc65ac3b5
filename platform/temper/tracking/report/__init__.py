"""`temper report`: one HTML page on a run or a sweep that needs nothing beside itself, and its figures for papers.

The page on a run is made from its folder and the phase store, without MLflow, which is given the same histories; that
on a sweep is made from MLflow, and its winner's folder.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from temper.errors import RunError
from temper.products import find_run
from temper.run_folder import REPORT
from temper.tracking.mlflow_store import build_client, first_line
from temper.tracking.report.figure import ReportFigure, Section, figure_png
from temper.tracking.report.page import build_page
from temper.tracking.report.run_data import RunData, read_run
from temper.tracking.report.run_page import run_sections, run_subtitle, run_tiles

log = logging.getLogger(__name__)

PLOTS = "plots"


@dataclass(frozen=True)
class Report:
    """A page, the figures in it, and the `texts` that MLflow is given with it, by their paths."""

    page: str
    figures: Sequence[ReportFigure]
    texts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def plots(self) -> dict[str, bytes]:
        """The figures as files."""
        return {f"{figure.name}.png": figure_png(figure) for figure in self.figures}


def log_report(uri: str, run_id: str, folder: Path) -> bool:
    """:func:`upload` of the page on the run in `folder`; never raises, wherever it fails."""
    return _upload(lambda: run_report(read_run(folder)), uri, run_id)


def log_sweep_report(uri: str, run_id: str, storage: Path) -> bool:
    """:func:`upload` of the page on a sweep into its own run; never raises, wherever it fails."""
    return _upload(lambda: sweep_report(uri, run_id, storage), uri, run_id)


def save(report: Report, path: Path) -> Path:
    """Writes the page to `path`, which it returns, and its figures beside it: those of `report.html` into
    `report_plots/`. Raises RunError where a file cannot be written."""
    plots = path.parent / f"{path.stem}_{PLOTS}"
    try:
        plots.mkdir(parents=True, exist_ok=True)
        path.write_text(report.page, encoding="utf-8")
        for name, image in report.plots.items():
            (plots / name).write_bytes(image)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def upload(report: Report, uri: str, run_id: str) -> bool:
    """Puts the report into a run in MLflow: `report.html`, `plots/<figure>.png`, and its texts.

    Never raises: no result depends on it. False, with a line in the log, where it is not in the run.
    """
    return _upload(lambda: report, uri, run_id)


def _upload(build: Callable[[], Report], uri: str, run_id: str) -> bool:
    try:
        report = build()
        files = {REPORT: report.page.encode(), **{f"{PLOTS}/{name}": image for name, image in report.plots.items()}}
        files |= {path: text.encode() for path, text in report.texts.items()}
        with tempfile.TemporaryDirectory() as folder:
            for path, content in files.items():
                place = Path(folder, path)
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(content)
            build_client(uri).log_artifacts(run_id, folder)
    except Exception as error:
        log.warning("the run has no report in MLflow: %s; `temper report %s` writes it", first_line(error), run_id)
        return False
    return True


def run_report(run: RunData) -> Report:
    """With `weights/<phase>.json`, what came of the weights in a sparse or re-dense phase."""
    sections = run_sections(run)
    page = build_page(run.job.name, run_subtitle(run), sections, tiles=run_tiles(run))
    weights = {f"weights/{phase.name}.json": json.dumps(phase.weights) for phase in run.phases if phase.weights}
    return Report(page, _figures(sections), weights)


def sweep_report(uri: str, run_id: str, storage: Path) -> Report:
    """Raises JobError where `run_id` is no sweep's, and RunError where the store cannot be reached."""
    from temper.tracking.report.sweep_page import read_points, sweep_sections, sweep_subtitle, sweep_tiles
    from temper.tracking.results import read_sweep

    sweep = read_sweep(uri, run_id)
    sections = sweep_sections(sweep, read_points(uri, sweep))
    best = sweep.parent.tags.get("temper.best.run_id")
    winner = find_run(best, storage) if best else None
    if winner is not None:
        sections = [*sections, *map(_of_winner, run_sections(read_run(winner)))]
    page = build_page(sweep.parent.name, sweep_subtitle(sweep), sections, kind="sweep", tiles=sweep_tiles(sweep))
    return Report(page, _figures(sections))


def _of_winner(section: Section) -> Section:
    """A section on the winner by itself, in the page on its sweep."""
    figures = tuple(replace(figure, name=f"winner-{figure.name}") for figure in section.figures)
    return replace(section, title=f"Winner: {section.title[:1].lower()}{section.title[1:]}", figures=figures)


def _figures(sections: Sequence[Section]) -> list[ReportFigure]:
    return [figure for section in sections for figure in section.figures]
