"""The course of a run as figures: its metrics over the steps of all phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from temper.tracking.history import Record
from temper.tracking.report.figure import ReportFigure
from temper.tracking.report.panels import Line, Panel, Style, panel_figure
from temper.tracking.report.phase_figures import bands_of
from temper.tracking.report.run_data import PhaseData, recorded

_POINTS = 600  # most points of one curve in a phase
_AGREEMENT = "teacher_agreement"


def training_figure(phases: Sequence[PhaseData]) -> ReportFigure | None:
    """Evaluations, losses, the learning rate and the norm of the gradient."""
    if not any(phase.records for phase in phases):
        return None
    tested = recorded(_records(phases), "test/")
    names = recorded(_records(phases), "eval/") + [f"eval/{name[5:]}" for name in tested]
    evaluated = [name[5:] for name in dict.fromkeys(names) if name.count("/") == 1 and name != f"eval/{_AGREEMENT}"]
    panels = [
        *(Panel(name.replace("_", " "), _evaluations(phases, name)) for name in evaluated if name != "loss"),
        Panel("loss", [_line(phases, "train/loss", "training"), *_evaluations(phases, "loss")], height=2.0, log=True),
        Panel("learning rate", [_line(phases, "train/lr", "learning rate", "--series-7", "stairs")], 0.8, True),
        Panel("gradient norm", [_line(phases, "train/grad_norm", "gradient norm", "--series-6")], 0.8, log=True),
    ]
    caption = "Where values are many, a point is the mean of some in a row."
    if tested:
        caption += " Diamonds: the test split, at ends of phases."
    if len(_terms(phases)) > 1:
        caption += " Training: the sum of all terms; evaluation and test: the loss on labels alone."
    return panel_figure("training", "Loss and evaluation", caption, panels, bands_of(phases))


def terms_figure(phases: Sequence[PhaseData]) -> ReportFigure | None:
    """The terms of a loss of several."""
    names = _terms(phases)
    if len(names) < 2:
        return None
    lines = [
        _line(phases, name, name.removeprefix("train/loss/").replace("_", " "), f"--series-{1 + index % 8}")
        for index, name in enumerate(names)
    ]
    caption = "Weighted as they are added up to the loss of training."
    return panel_figure("terms", "Terms of the loss", caption, [Panel("loss", lines, 2.2, log=True)], bands_of(phases))


def _terms(phases: Sequence[PhaseData]) -> list[str]:
    return recorded(_records(phases), "train/loss/")


def agreement_figure(phases: Sequence[PhaseData]) -> ReportFigure | None:
    """How often the student says what its teacher says."""
    lines = _evaluations(phases, _AGREEMENT)
    if not any(line.values for line in lines):
        return None
    caption = "Share of the examples of which the student and its teacher say the same class, right or wrong."
    return panel_figure(
        "agreement", "Agreement with the teacher", caption, [Panel("agreement", lines, 1.8)], bands_of(phases)
    )


def precision_figure(phases: Sequence[PhaseData]) -> ReportFigure | None:
    """The loss scale, skipped steps, and whatever else is watched of the arithmetic."""
    names = recorded(_records(phases), "precision/")
    if not names:
        return None
    panels = [
        Panel(
            _words(name),
            [_line(phases, name, _words(name), f"--series-{1 + index % 8}", "stairs")],
            1.1,
            log=name == "precision/loss_scale",
            from_zero=name == "precision/skipped_steps",
        )
        for index, name in enumerate(names)
    ]
    caption = (
        "The factor of the loss that keeps small gradients in fp16; steps that were skipped are counted from the start."
    )
    return panel_figure("precision", "Loss scale and skipped steps", caption, panels, bands_of(phases))


def speed_figure(phases: Sequence[PhaseData]) -> ReportFigure | None:
    """Examples a second, the time of a step, and the utilisation of the devices."""
    units = {
        "time/examples_per_s": "examples/s",
        "time/step_s": "step (s)",
        "time/tflops_per_s": "TFLOP/s",
        "time/mfu": "MFU",
    }
    names = [name for name in units if name in recorded(_records(phases), "time/")]
    if not names:
        return None
    later = [replace(phase, records=phase.records[1:] or phase.records) for phase in phases]
    panels = [
        Panel(units[name], [_line(later, name, units[name], f"--series-{1 + index}")], 1.2, from_zero=True)
        for index, name in enumerate(names)
    ]
    caption = "Without the first record of each phase, in which things start."
    if "time/mfu" in names:
        caption += " MFU: the share of the devices' peak that the model's own FLOPs take."
    return panel_figure("speed", "Speed", caption, panels, bands_of(phases))


def system_figure(system: Sequence[Record]) -> ReportFigure | None:
    """The use of CPU, memory and GPUs, node by node."""
    kinds = {"cpu_utilization_percentage": "CPU (%)", "system_memory_usage_percentage": "memory (%)"}
    names = recorded(system, "system/")
    gpus = {name.rpartition("/")[2] for name in names if "/gpu_" in name and "percentage" in name}
    kinds |= {name: name.replace("_percentage", " (%)").replace("_", " ") for name in sorted(gpus)}
    if not names:
        return None
    begin = system[0]["time_ms"]
    panels = []
    for kind, label in kinds.items():
        found = [name for name in names if name.endswith(f"/{kind}")]
        lines = [
            Line(
                name.removeprefix("system/").removesuffix(kind).strip("/") or "this node",
                f"--series-{1 + index % 8}",
                [_points(system, name, lambda record: (record["time_ms"] - begin) / 1000)],
            )
            for index, name in enumerate(found)
        ]
        panels.append(Panel(label, lines, 1.0, from_zero=True))
    caption = "Of the whole machines that the workers ran on, whoever else used them."
    return panel_figure("system", "Use of the machines", caption, panels, axis="seconds from the first sample")


def _words(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")


def _records(phases: Sequence[PhaseData]) -> list[Record]:
    return [record for phase in phases for record in phase.records]


def _evaluations(phases: Sequence[PhaseData], name: str) -> list[Line]:
    return [
        _line(phases, f"eval/{name}", "evaluation", "--series-1", "dotted"),
        _line(phases, f"test/{name}", "test", "--series-2", "diamonds"),
    ]


def _line(
    phases: Sequence[PhaseData], metric: str, label: str, shade: str = "--series-8", style: Style = "thin"
) -> Line:
    return Line(label, shade, [_points(phase.records, metric) for phase in phases], style)


def _points(
    records: Sequence[Record], metric: str, at: Callable[[Record], float] = lambda record: record["step"]
) -> tuple[list[float], list[float]]:
    """Where and what a metric was; of many values in a row their mean, at the last one's place."""
    found = [(at(record), record["metrics"][metric]) for record in records if metric in record["metrics"]]
    width = max(1, math.ceil(len(found) / _POINTS))
    parts = [found[begin : begin + width] for begin in range(0, len(found), width)]
    return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]
