"""`temper report`: one HTML page on a run that needs nothing beside itself; and the same figures for MLflow.

The page is made from the run's folder and the phases in its storage, without MLflow. Its figures are inline SVG, and it
forbids the browser to load anything. Whatever comes from users is escaped.
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter

import temper
from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.errors import JobError, Problem, RunError
from temper.files import read_json
from temper.plan.distill import FeaturePair
from temper.plan.phases import library_versions
from temper.plan.show import describe_level, describe_soft_targets
from temper.products import find_storage, run_name
from temper.remote_store import fetch_place
from temper.run_folder import HISTORY, JOB, PHASE_MANIFEST, PHASES, PLAN, RUN, WEIGHTS
from temper.techniques.dsd.summary import LEVELS
from temper.tracking.figures import PhaseData, Round, draw_figures, rounds, short_name
from temper.tracking.history import read_history
from temper.tracking.mlflow_store import log_texts
from temper.tracking.redact import redact_text, redact_values

if TYPE_CHECKING:
    from temper.plan.build import Plan

log = logging.getLogger(__name__)

REPORT = "report.html"

_TEACHER = "teacher/"  # what the names of the teacher's metrics on the student's test split begin with
_PAIRS = TypeAdapter(list[FeaturePair])
_CAPTIONS = {
    "training": "Evaluation, losses and learning rate. Where losses are many, a point is the mean of some in a row.",
    "sparsity": "Share of the weights that are exactly zero, as each evaluation found it.",
    "weights": "Weights before, at the end of the sparse and at the end of the re-dense phase: all that can be pruned, "
    "and the largest layers. Arrow: a peak that does not fit in.",
    "returned": "What the weights that had been pruned are at the end of the re-dense phase. Threshold: the largest "
    "magnitude that was pruned. Magnitudes are in units of the median magnitude of the layer's other weights.",
}
_STYLE = """
body { font: 15px/1.45 sans-serif; color: #222; background: #fff; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; } .wide td { white-space: nowrap; }
th, td { text-align: left; padding: 0.2em 0.8em 0.2em 0; border-bottom: 1px solid #eee; vertical-align: bottom; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.2em 0; } figcaption { color: #555; font-size: 13px; } svg { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 0.7em; overflow-x: auto; } .quiet { color: #555; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class _Run:
    """All that a page says, as it lies in the folders."""

    folder: Path
    plan: Mapping[str, Any]
    job: JobConfig
    run_id: str
    phases: Sequence[PhaseData]
    manifests: Sequence[Mapping[str, Any]]
    computed_by: Sequence[str]


def write_report(folder: Path, to: Path | None = None) -> Path:
    """Writes the page on the run in `folder` to `to`, by default `report.html` in that folder; returns its path.

    A run that has not ended is shown as far as it is. Raises JobError where the folder is no run, and RunError where
    the file cannot be written.
    """
    page = build_page(folder)
    path = to or folder / REPORT
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def build_page(folder: Path) -> str:
    """The page on the run in `folder`, as HTML. Raises JobError where it is no run."""
    run = _read_run(folder)
    figures = draw_figures(run.phases)
    shown = [name for name in ("training", "sparsity") if name in figures]
    parts = [
        f"<h1>{escape(run.job.name)}</h1>",
        f'<p class="quiet">{escape(_status(run))}</p>',
        _section("Job", _key_table(_job_rows(run))),
        _section("Phases", _phase_table(run)),
        *(_section(name.capitalize(), _figure(name, figures)) for name in shown),
        *(_section(f"Round {item.number}", _round(item, figures)) for item in rounds(run.phases)),
        _section("Repeat it", _repeat(run)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(run.job.name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def log_plots(uri: str, run_id: str, plan: Plan) -> bool:
    """Puts the figures and the summaries of the weights into an MLflow run: `plots/<figure>.svg` and
    `weights/<phase>.json`.

    Never raises: no result depends on them. False, with a line in the log, where they are not in the run.
    """
    try:
        phases = [_read_phase(asdict(phase), plan.phase_folder(phase)) for phase in plan.phases]
        texts = {f"plots/{name}.svg": svg for name, svg in draw_figures(phases).items()}
        texts |= {f"weights/{phase.name}.json": json.dumps(phase.weights) for phase in phases if phase.weights}
        log_texts(uri, run_id, texts)
    except Exception as error:
        log.warning("the run has no plots in MLflow: %s; `temper report %s` draws them", error, run_id)
        return False
    return True


# ------------------------------------------------------------------------------------------------------------ reading


def _read_run(folder: Path) -> _Run:
    plan = read_json(folder / PLAN)
    if plan is None or folder.parent.name == PHASES:
        remedy = "give a run's id, or its folder in the storage"
        raise JobError([Problem("RUN", str(folder), "is not a run's folder", remedy)])
    folders = [find_storage(folder) / PHASES / phase["fingerprint"] for phase in plan["phases"]]
    for place in folders:
        fetch_place(place)
    return _Run(
        folder=folder,
        plan=plan,
        job=load_job(folder / JOB),
        run_id=(read_json(folder / RUN) or {}).get("run_id", ""),
        phases=[_read_phase(phase, place) for phase, place in zip(plan["phases"], folders, strict=True)],
        manifests=[read_json(place / PHASE_MANIFEST) or {} for place in folders],
        computed_by=[run_name(read_json(place / PLAN) or plan) for place in folders],
    )


def _read_phase(phase: Mapping[str, Any], folder: Path) -> PhaseData:
    """A phase of a plan, as JSON has it, with what its folder holds so far."""
    return PhaseData(
        name=phase["name"],
        kind=phase["kind"],
        first_step=phase["first_step"],
        last_step=phase["first_step"] + phase["steps"],
        records=read_history(folder / HISTORY),
        metrics=(read_json(folder / PHASE_MANIFEST) or {}).get("metrics", {}),
        weights=read_json(folder / WEIGHTS),
    )


# ------------------------------------------------------------------------------------------------------------- saying


def _status(run: _Run) -> str:
    done = sum(bool(manifest) for manifest in run.manifests)
    reached = max((phase.records[-1]["step"] for phase in run.phases if phase.records), default=0)
    state = "complete" if done == len(run.phases) else f"{done} of {len(run.phases)} phases complete"
    run_id = f"; MLflow run {run.run_id}" if run.run_id else ""
    return f"{state}, step {reached:,} of {run.plan['steps']:,}{run_id}"


def _job_rows(run: _Run) -> list[tuple[str, str]]:
    job, plan = run.job, run.plan
    data, mesh, batch = plan["data"], plan["mesh"], plan["batch"]
    held_out = f" + {data['validation_examples']:,} held out" if data["validation_examples"] else ""
    dsd = [] if job.dsd is None else [("dense-sparse-dense", _flow(job.dsd))]
    return [
        ("model", f"{_flow(job.model)}; {plan['model']['num_parameters']:,} parameters"),
        (
            "data",
            f"{job.data.kind}: {data['train_examples']:,} examples{held_out}, {data['test_examples']:,} for the test",
        ),
        ("loss", _flow(job.loss)),
        ("optimizer", _flow(job.optimizer)),
        *dsd,
        *_teaching_rows(run),
        ("precision", job.precision.dtype),
        (
            "ranks",
            f"data {mesh['data']} × pipeline {mesh['pipeline']} × tensor {mesh['tensor']} on {mesh['device']}, "
            f"{job.parallel.mode}, ZeRO stage {job.parallel.zero}",
        ),
        ("batch", f"{batch['global_batch']:,} examples, in micro-batches of {batch['micro_batch']:,}"),
        ("seed", str(job.seed)),
    ]


def _teaching_rows(run: _Run) -> list[tuple[str, str]]:
    distill, plan = run.job.distill, run.plan.get("distill")
    if distill is None or plan is None:
        return []
    teachers, pairs = plan["teachers"], _PAIRS.validate_python(plan["pairs"])
    first = run.phases[0].records[0]["metrics"] if run.phases[0].records else {}
    measured = {name.removeprefix(_TEACHER): value for name, value in first.items() if name.startswith(_TEACHER)}
    return [
        *[("taught by", _teacher(teacher, len(teachers) > 1)) for teacher in teachers],
        *([("teacher on the test split", _metrics(measured))] if measured else []),
        *([] if distill.alpha == 0 else [("soft targets", describe_soft_targets(distill))]),
        *[("level", describe_level(pair, len(teachers))) for pair in pairs],
    ]


def _teacher(teacher: Mapping[str, Any], of_several: bool) -> str:
    weight = f", weight {teacher['weight']:g}" if of_several else ""
    return f"{teacher['name']}, {teacher['fingerprint'][:10]}{weight}"


def _metrics(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(values.items()))


def _flow(section: Any) -> str:
    """What a section of the job says beside its defaults, on one line, without secrets."""
    values = redact_values(section.model_dump(mode="json", exclude_defaults=True))
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10**6).strip()


def _phase_table(run: _Run) -> str:
    ended = [name for phase in run.phases for name in phase.metrics]
    metrics = [name for name in dict.fromkeys(ended) if name.startswith(("eval/", "test/"))]
    header = [
        "phase",
        "steps",
        "learning rate",
        "pruned",
        "zero weights",
        *metrics,
        "seconds",
        "computed by",
        "fingerprint",
    ]
    plans = run.plan["phases"]
    rows = []
    for index, phase in enumerate(run.phases):
        manifest, item = run.manifests[index], plans[index]
        own = run.computed_by[index] == run_name(run.plan)
        values = [phase.metrics.get(name) for name in metrics]
        rows.append(
            [
                phase.name,
                f"{phase.first_step:,}–{phase.last_step:,}",
                f"{item['lr']:g}",
                _pruning(item["pruning"]),
                _percent(phase.metrics.get("sparsity")),
                *("" if value is None else f"{value:.4f}" for value in values),
                f"{manifest['seconds']:,.1f}" if manifest else "not complete",
                "this run" if own else f"reused from {run.computed_by[index]}",
                item["fingerprint"][:10],
            ]
        )
    return _table(header, rows)


def _pruning(pruning: Mapping[str, Any] | None) -> str:
    """`30–50 % of 7 layers`, and how, where that is not by magnitude and one by one."""
    if pruning is None:
        return ""
    if not pruning["layers"]:
        return "nothing"
    least, most = min(pruning["layers"].values()), max(pruning["layers"].values())
    share = f"{100 * least:g} %" if least == most else f"{100 * least:g}–{100 * most:g} %"
    special = [pruning["structure"]] * (pruning["structure"] != "weights")
    special += [pruning["criterion"]] * (pruning["criterion"] != "magnitude")
    return ", ".join([f"{share} of {len(pruning['layers'])} layers", *special])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.4g} %"


def _round(item: Round, figures: Mapping[str, str]) -> str:
    """Figures and table of one round of dense-sparse-dense training; it may have neither yet."""
    parts = [_figure(f"{kind}-{item.number}", figures) for kind in ("weights", "returned")]
    if item.sparse.weights and item.sparse.weights["layers"]:
        parts.append(_layer_table(item, item.sparse.weights))
    return "\n".join(parts) if any(parts) else '<p class="quiet">No weights were pruned, or not yet.</p>'


def _layer_table(item: Round, sparse: Mapping[str, Any]) -> str:
    """What each layer came to in the sparse phase and, where there is one, in the re-dense phase."""
    header = ["layer", "weights", "pruned", "threshold", f"zero, end of {item.sparse.name}"]
    rows = [("all of them", sparse["total"]), *((short_name(name), layer) for name, layer in sparse["layers"].items())]
    cells = [[name, *_sparse_cells(layer)] for name, layer in rows]
    if item.redense is not None and item.redense.weights is not None:
        redense = item.redense.weights
        header += [
            f"zero, end of {item.redense.name}",
            "came back above the threshold",
            "their median magnitude (kept: 1)",
        ]
        returned = [redense["total"], *(redense["layers"][name] for name in sparse["layers"])]
        cells = [[*row, *_redense_cells(layer)] for row, layer in zip(cells, returned, strict=True)]
    return _table(header, cells)


def _sparse_cells(layer: Mapping[str, Any]) -> list[str]:
    threshold = layer.get("threshold")
    return [
        f"{layer['weights']:,}",
        _percent(layer["pruned"] / layer["weights"]),
        "" if threshold is None else f"{threshold:.4g}",
        _percent(layer["zeros"]["end"] / layer["weights"]),
    ]


def _redense_cells(layer: Mapping[str, Any]) -> list[str]:
    returned = layer["returned"] or {}
    above, quantiles = returned.get("above_threshold"), returned.get("quantiles")
    return [
        _percent(layer["zeros"]["end"] / layer["weights"]),
        _percent(above / layer["pruned"]) if above is not None and layer["pruned"] else "",
        f"{quantiles[LEVELS.index(0.5)]:.3g}" if quantiles else "",
    ]


def _repeat(run: _Run) -> str:
    versions = {"Python": platform.python_version(), "temper": temper.__version__, **library_versions(run.job)}
    text = yaml.safe_dump(redact_values(run.job.model_dump(mode="json")), sort_keys=False)
    return "\n".join(
        [
            f"<pre>{escape(shlex.join(['temper', 'train', str(run.folder / JOB)]))}</pre>",
            f'<p class="quiet">Fingerprint {escape(run.plan["fingerprint"])}. Installed where this page was written: '
            f"{escape(', '.join(f'{name} {version}' for name, version in versions.items()))}.</p>",
            f"<details><summary>{JOB}, all defaults written out</summary>",
            f"<pre>{escape(redact_text(text))}</pre></details>",
        ]
    )


# --------------------------------------------------------------------------------------------------------------- HTML


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _figure(name: str, figures: Mapping[str, str]) -> str:
    """A figure with its caption; nothing where there is none of this name."""
    if name not in figures:
        return ""
    caption = _CAPTIONS[name.partition("-")[0]]
    return f"<figure>\n{figures[name]}<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _key_table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column holds names; elsewhere what begins with a digit is a number and stands to the right."""
    lines = ["<tr>" + "".join(f"<th>{escape(title)}</th>" for title in header) + "</tr>"]
    lines += [f"<tr><td>{escape(name)}</td>{''.join(map(_cell, values))}</tr>" for name, *values in rows]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(text: str) -> str:
    kind = ' class="number"' if text[:1].isdigit() else ""
    return f"<td{kind}>{escape(text)}</td>"
