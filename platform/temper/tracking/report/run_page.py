"""The page on a run: what was asked, what happened, what came of it, what it cost, and how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from temper.plan.distill import FeaturePair
from temper.plan.facts import labelled_examples
from temper.plan.metric_names import without_classes
from temper.plan.show import describe_level, describe_soft_targets
from temper.products import run_name
from temper.run_folder import JOB
from temper.techniques.dsd.histogram import LEVELS
from temper.tracking.description import metric_name
from temper.tracking.redact import redact_text, redact_values
from temper.tracking.report.figure import ReportFigure, Section
from temper.tracking.report.page import (
    Content,
    Html,
    Number,
    Tile,
    bullets,
    code,
    duration,
    fold,
    key_table,
    markup,
    note,
    say,
    short_id,
    table,
    traced,
)
from temper.tracking.report.phase_figures import begin_ms, classes_figure, sparsity_figure, timeline_figure
from temper.tracking.report.run_data import PhaseData, Round, RunData, rounds, short_name
from temper.tracking.report.run_figures import (
    agreement_figure,
    precision_figure,
    speed_figure,
    system_figure,
    terms_figure,
    training_figure,
)
from temper.tracking.report.weight_figures import weight_figures
from temper.tracking.sweep_progress import winner_lines
from temper.tracking.tree import costs_of

_TEACHER = "teacher/"  # what the names of the teacher's metrics on the student's test split begin with
_PAIRS = TypeAdapter(list[FeaturePair])
_SHOWN_FAILURES = 50
_TIMES = "Training time leaves out start-up and the first step."


def run_subtitle(run: RunData) -> Html:
    """Whether the run is complete, how far it came, and which run of MLflow it is."""
    done = sum(phase.is_complete for phase in run.phases)
    state = "Complete" if run.is_complete else f"{done} of {len(run.phases)} phases complete"
    came = f"{state}, step {run.step:,} of {run.plan['steps']:,}"
    mlflow = f" · MLflow run <code>{markup(run.run_id)}</code>" if run.run_id else ""
    return Html(f"{markup(came)}{mlflow}")


def run_tiles(run: RunData) -> list[Tile]:
    """What the last complete phase came to on the test split, and what the run cost."""
    complete = [phase for phase in run.phases if phase.is_complete]
    tested = [name for name in without_classes(complete[-1].metrics) if name.startswith("test/")] if complete else []
    tiles = [
        Tile(_words(name), _measured(run, complete[-1], name), f"test split, end of {complete[-1].name}")
        for name in sorted(tested, key=lambda name: name == "test/loss")[:3]
    ]
    costs = costs_of(run.began, run.plan["batch"]["global_batch"])
    tiles.append(Tile("training time", _cost(run, costs, "cost/seconds"), f"{costs['cost/steps']:,.0f} steps"))
    if costs["cost/steps_saved"]:
        note = f"{costs['cost/steps_saved']:,.0f} steps reused"
        tiles.append(Tile("saved", _cost(run, costs, "cost/seconds_saved"), note))
    tiles.append(Tile("parameters", f"{run.plan['model']['num_parameters']:,}", run.job.model.kind))
    return tiles


def run_sections(run: RunData) -> list[Section]:
    """All sections on a run; those that have nothing to say are empty."""
    phases = run.phases
    return [
        Section("What was asked", key_table(_asked(run)), details=bullets(run.plan.get("notes", []))),
        Section(
            "What happened",
            key_table(_happened(run)),
            _some(timeline_figure(run)),
            _phase_table(run) + _failure_table(run),
        ),
        Section("Training", "", _some(training_figure(phases), terms_figure(phases))),
        Section("Classes", "", _some(classes_figure(phases))),
        Section("Teacher", "", _some(agreement_figure(phases))),
        Section("Precision", "", _some(precision_figure(phases))),
        Section("Sparsity", "", _some(sparsity_figure(phases))),
        *(_round(run, item) for item in rounds(phases)),
        Section("Speed and machines", "", _some(speed_figure(phases), system_figure(run.system))),
        Section("Costs", _costs(run)),
        Section("Repeat it", _repeat(run)),
    ]


def _some(*figures: ReportFigure | None) -> tuple[ReportFigure, ...]:
    return tuple(figure for figure in figures if figure is not None)


def _measured(run: RunData, phase: PhaseData, metric: str, spec: str = ".4f") -> Number:
    """A metric of the end of a phase, as the run in MLflow has it."""
    return traced(phase.metrics.get(metric), spec, run.run_id, metric_name(metric), phase.last_step)


def _words(metric: str) -> str:
    return metric.partition("/")[2].replace("_", " ")


# ------------------------------------------------------------------------------------------------------------- asked


def _asked(run: RunData) -> list[tuple[str, Content]]:
    job, plan = run.job, run.plan
    data, mesh, batch = plan["data"], plan["mesh"], plan["batch"]
    held_out = f" + {data['validation_examples']:,} held out" if data["validation_examples"] else ""
    return [
        ("model", f"{_flow(job.model)}; {plan['model']['num_parameters']:,} parameters"),
        (
            "data",
            f"{_flow(job.data)}; {data['train_examples']:,} examples{_labelled(run)}{held_out}, "
            f"{data['test_examples']:,} for the test",
        ),
        ("loss", _flow(job.loss)),
        ("optimizer", _flow(job.optimizer)),
        ("budget", _flow(job.budget)),
        *([] if job.dsd is None else [("dense-sparse-dense", _flow(job.dsd))]),
        *_teaching(run),
        ("precision", job.precision.dtype),
        (
            "ranks",
            f"data {mesh['data']} × pipeline {mesh['pipeline']} × tensor {mesh['tensor']} on {mesh['device']}, "
            f"{job.parallel.mode.replace('_', ' ')}, ZeRO stage {job.parallel.zero}",
        ),
        ("batch", f"{batch['global_batch']:,} examples, in micro-batches of {batch['micro_batch']:,}"),
        ("seed", str(job.seed)),
    ]


def _labelled(run: RunData) -> str:
    """How many of the examples have a label, where not all of them have one."""
    data, share = run.plan["data"], run.job.data.labels
    every = data["train_examples"] + data.get("left_out_examples", 0)
    return f", {labelled_examples(share, every):,} of {every:,} labelled" if share < 1 else ""


def _teaching(run: RunData) -> list[tuple[str, Content]]:
    distill, plan = run.job.distill, run.plan.get("distill")
    if distill is None or plan is None:
        return []
    teachers, pairs = plan["teachers"], _PAIRS.validate_python(plan["pairs"])
    return [
        *[("taught by", _teacher(teacher, len(teachers) > 1)) for teacher in teachers],
        *_teacher_test(run),
        *([] if distill.alpha == 0 else [("soft targets", describe_soft_targets(distill))]),
        *[("level", describe_level(pair, len(teachers))) for pair in pairs],
    ]


def _teacher(teacher: Mapping[str, Any], of_several: bool) -> str:
    weight = f", weight {teacher['weight']:g}" if of_several else ""
    return f"{teacher['name']}, {teacher['fingerprint'][:10]}{weight}"


def _teacher_test(run: RunData) -> list[tuple[str, Content]]:
    """What the teacher came to on the student's test split, which the first record of all says."""
    first = next((record for phase in run.phases for record in phase.records[:1]), None)
    if first is None:
        return []
    found = sorted(name for name in without_classes(first["metrics"]) if name.startswith(_TEACHER))
    values = [
        f"{name.removeprefix(_TEACHER)} "
        + markup(traced(first["metrics"][name], ".4f", run.run_id, metric_name(name), first["step"]))
        for name in found
    ]
    return [("teacher on the test split", Html(", ".join(values)))] if values else []


def _flow(section: Any) -> str:
    """What a section of the job says beside its defaults, on one line, without secrets."""
    values = redact_values(section.model_dump(mode="json", exclude_defaults=True))
    text = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10**6).strip()
    return text[1:-1] if text != "{}" else "all defaults"


# ---------------------------------------------------------------------------------------------------------- happened


def _happened(run: RunData) -> list[tuple[str, Content]]:
    done = sum(phase.is_complete for phase in run.phases)
    if run.is_complete:
        state = "complete"
    elif run.record.get("open"):
        state = "running, or killed while it ran"
    else:
        state = "stopped before its end"
    begin, end = begin_ms(run), max((state.ended_ms for state in run.began), default=0)
    errors = [failure for failure in run.failures if failure["kind"] == "error"]
    failed = f"{len(run.failures)} of workers, {len(errors)} of them errors of their own" if run.failures else "none"
    return [
        ("status", f"{state}; {done} of {len(run.phases)} phases complete"),
        ("step", f"{run.step:,} of {run.plan['steps']:,}"),
        *([("began", _when(begin))] if begin else [("began", "nothing had to be computed")]),
        *([("last record", _when(end))] if end else []),
        ("failures", failed),
        ("folder", Html(f"<code>{markup(str(run.folder))}</code>")),
    ]


def _when(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _phase_table(run: RunData) -> Html:
    ended = [name for phase in run.phases for name in without_classes(phase.metrics)]
    metrics = [name for name in dict.fromkeys(ended) if name.startswith(("eval/", "test/"))]
    header = ["phase", "steps", "learning rate", "pruned", "zero weights", *metrics]
    header += ["training time", "computed by", "fingerprint"]
    rows = [
        [
            Html(f'<span class="mark" style="background:var(--{phase.kind})"></span>{markup(phase.name)}'),
            Number(phase.first_step, f"{phase.first_step:,}–{phase.last_step:,}"),
            Number(phase.plan["lr"], f"{phase.plan['lr']:g}"),
            _pruning(phase.plan["pruning"]),
            _measured(run, phase, "sparsity", ".4g%"),
            *(_measured(run, phase, name) for name in metrics),
            _seconds(phase),
            _computed_by(run, phase),
            short_id(phase.plan["fingerprint"]),
        ]
        for phase in run.phases
    ]
    return table(header, rows, _TIMES)


def _seconds(phase: PhaseData) -> Content:
    if phase.state is None:
        return "not begun"
    return Number(phase.state.seconds, duration(phase.state.seconds) if phase.is_complete else "not complete")


def _computed_by(run: RunData, phase: PhaseData) -> Content:
    if phase.state is None:
        return ""
    if not phase.state.is_reused:
        return "this run"
    name, by = markup(phase.owner), short_id(phase.state.computed_by or "")
    return Html(f'<span class="wraps">reused from {name}<br>{by}</span>')


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


def _failure_table(run: RunData) -> Html:
    """What the workers failed with, the newest last; after each that is not the last they were started again."""
    if not run.failures:
        return Html("")
    rows: list[list[Content]] = [
        [
            Number(failure["time_ms"], _when(failure["time_ms"])),
            Number(failure["rank"], str(failure["rank"])),
            failure["kind"],
            failure["type"].rpartition(".")[2],
            redact_text(failure["message"].partition("\n")[0])[:200],
        ]
        for failure in run.failures[-_SHOWN_FAILURES:]
    ]
    return table(["when", "rank", "kind", "type", "message"], rows, "Failures of workers")


# ------------------------------------------------------------------------------------------------------------ weights


def _round(run: RunData, item: Round) -> Section:
    """Figures and table of one round of dense-sparse-dense training; it may have neither yet."""
    title = f"Round {item.number}"
    if not item.sparse.layers:
        return Section(title, note("No weights were pruned, or not yet."))
    return Section(title, "", tuple(weight_figures(item)), _layer_table(run, item))


def _layer_table(run: RunData, item: Round) -> Html:
    """What each layer came to in the sparse phase and, where there is one, in the re-dense phase."""
    sparse, redense = item.sparse, item.redense if item.redense is not None and item.redense.weights else None
    header = ["layer", "weights", "pruned", "threshold", f"zero, end of {item.before.name}", f"end of {sparse.name}"]
    if redense is not None:
        header += [f"end of {redense.name}", "came back above the threshold", "their median magnitude (kept: 1)"]
    rows = []
    for name in (None, *sparse.layers):
        row: list[Content] = ["all of them" if name is None else short_name(name), *_sparse_cells(run, sparse, name)]
        rows.append([*row, *_redense_cells(run, redense, name)] if redense is not None else row)
    return table(header, rows)


def _layer(phase: PhaseData, name: str | None) -> Mapping[str, Any]:
    """What came of one layer, or of all together."""
    assert phase.weights is not None
    return phase.weights["total"] if name is None else phase.layers[name]


def _sparse_cells(run: RunData, phase: PhaseData, name: str | None) -> list[Content]:
    layer = _layer(phase, name)
    threshold = layer.get("threshold")
    return [
        Number(layer["weights"], f"{layer['weights']:,}"),
        _share(layer["pruned"], layer["weights"]),
        Number(-1, "") if threshold is None else Number(threshold, f"{threshold:.4g}"),
        _share(layer["zeros"]["before"], layer["weights"]),
        _zeros(run, phase, name),
    ]


def _redense_cells(run: RunData, phase: PhaseData, name: str | None) -> list[Content]:
    layer = _layer(phase, name)
    returned = layer["returned"] or {}
    above, quantiles = returned.get("above_threshold"), returned.get("quantiles")
    median = quantiles[LEVELS.index(0.5)] if quantiles else None
    return [
        _zeros(run, phase, name),
        _share(above, layer["pruned"]) if above is not None and layer["pruned"] else Number(-1, ""),
        Number(-1, "") if median is None else Number(median, f"{median:.3g}"),
    ]


def _zeros(run: RunData, phase: PhaseData, name: str | None) -> Number:
    """The share of zeros at the end of a phase: a metric, where it was evaluated."""
    metric = "sparsity" if name is None else f"sparsity/{name}"
    if metric in phase.metrics:
        return _measured(run, phase, metric, ".4g%")
    layer = _layer(phase, name)
    return _share(layer["zeros"]["end"], layer["weights"])


def _share(part: int, whole: int) -> Number:
    return Number(part / whole, say(part / whole, ".4g%"))


# -------------------------------------------------------------------------------------------------------------- costs


def _cost(run: RunData, costs: Mapping[str, float], name: str) -> Number:
    value = costs[name]
    return Number(value, duration(value) if "seconds" in name else f"{value:,.0f}", run.run_id, name)


def _costs(run: RunData) -> Html:
    costs = costs_of(run.began, run.plan["batch"]["global_batch"])
    rows: list[list[Content]] = [
        [label, *(_cost(run, costs, f"cost/{unit}{suffix}") for unit in ("seconds", "steps", "examples"))]
        for label, suffix in (("computed by this run", ""), ("saved by reuse", "_saved"))
    ]
    return table(["", "training time", "steps", "examples"], rows, _TIMES)


# ----------------------------------------------------------------------------------------------------------- repeating


def _repeat(run: RunData) -> Html:
    train, submit = _lines(run)
    text = yaml.safe_dump(redact_values(run.job.model_dump(mode="json")), sort_keys=False)
    parts = [
        code(train),
        note("The same through Ray's job API:"),
        code(submit),
        key_table(_origin(run)),
        fold(f"{JOB}, all defaults written out", code(redact_text(text))),
        *([fold("Environment", code(run.environment))] if run.environment else []),
    ]
    return Html("\n".join(parts))


def _lines(run: RunData) -> tuple[str, str]:
    """`temper train …` and the same through Ray's job API: of the job's own file where the command says where that is,
    wherever it was typed, else of its copy."""
    words = shlex.split(run.record.get("command", ""))
    job = Path(words[2]) if words[:2] == ["temper", "train"] and len(words) > 2 else None
    if job is not None and job.is_absolute() and job.is_file():
        return winner_lines(job, words[3:], run.job.storage)
    return winner_lines(run.folder / JOB, [], run.job.storage)


def _origin(run: RunData) -> Iterable[tuple[str, Content]]:
    git = run.git
    if git:
        dirty = ", with changes that are not committed" if git.get("dirty") else ""
        yield "git", Html(f"<code>{markup(git['commit'])}</code> on {markup(git['branch'])}{dirty}")
    yield "fingerprint", Html(f"<code>{markup(run.plan['fingerprint'])}</code>")
    yield "run's folder", run_name(run.plan)
    if run.record.get("command"):
        yield "command as it was typed", Html(f"<code>{markup(redact_text(run.record['command']))}</code>")
