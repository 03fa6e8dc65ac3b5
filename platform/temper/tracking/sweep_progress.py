"""What people see of a sweep: a live table in a terminal, lines elsewhere, and at its end all trials and the winner.

A `SweepView` is what is known at one moment, and all texts are pure functions of it; the displays only print them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

import temper
from temper.tracking.progress import DisplayMode

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable, Group
    from rich.table import Table
    from rich.text import Text

TrialStatus = Literal["pending", "waiting", "running", "stopped", "finished", "failed", "diverged"]
Objective = tuple[str, str]
"""A metric and `max` or `min`."""

_BROKEN = ("diverged", "failed")
_ENDED = ("finished", "stopped", *_BROKEN)
_SUMMARIES = 10  # plain lines on the whole sweep
_BEST_SHOWN = 3  # trials that have ended, in the live table
_NOTES_SHOWN = 3
_NARROW = 80  # columns below which the live table goes without the place of a trial
_ROWS = 30  # trials in the table at the end
_BROKEN_ROWS = 5  # of them at most for those that failed or diverged
_REASON_LENGTH = 100


# ----------------------------------------------------------------------------------------------------- what is known


@dataclass(frozen=True)
class TrialView:
    """A trial now. `params` as people read them; `step` of `steps` optimizer steps, those of reused phases counted;
    `rung` of `rungs` passed; `metrics` are those of its last result."""

    id: str
    params: Mapping[str, str]
    status: TrialStatus
    phase: str
    step: int
    steps: int
    rung: int
    rungs: int
    metrics: Mapping[str, float]
    phases_run: int
    phases_reused: int
    seconds: float
    reason: str

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


@dataclass(frozen=True)
class SweepView:
    """A sweep now. `num_trials` is None where only time limits them; `groups` counts worker groups; `notes` are on what
    is the case now."""

    name: str
    objectives: tuple[Objective, ...]
    trials: tuple[TrialView, ...]
    num_trials: int | None
    phases_run: int
    phases_reused: int
    steps_run: int
    steps_saved: int
    elapsed_s: float
    groups: int
    notes: tuple[str, ...] = ()


def time_left_s(view: SweepView) -> float | None:
    """Seconds for the steps that are still to be run, at the steps per second so far; None where that is unknown.

    A trial that has no step yet is taken to be as long as those that are known, and to reuse as large a share.
    """
    if view.num_trials is None or not view.trials or not view.steps_run:
        return None
    fresh = [trial for trial in view.trials if not trial.has_ended and trial.step == 0]
    mean_steps = sum(trial.steps for trial in view.trials) / len(view.trials)
    fresh_steps = sum(trial.steps for trial in fresh) + (view.num_trials - len(view.trials)) * mean_steps
    begun_steps = sum(trial.steps - trial.step for trial in view.trials if not trial.has_ended and trial.step)
    share_run = view.steps_run / (view.steps_run + view.steps_saved)
    return (begun_steps + max(fresh_steps, 0) * share_run) * view.elapsed_s / view.steps_run


def ranked(trials: Sequence[TrialView], objective: Objective) -> list[TrialView]:
    """Those that finished first, then those that were stopped, those that go on, and those that broke; in each the best
    first, and those without the metric last."""
    order = ("finished", "stopped", "running", "waiting", "pending", *_BROKEN)
    return sorted(trials, key=lambda trial: (order.index(trial.status), _cost(trial, objective), trial.id))


def best_trial(view: SweepView, objective: Objective) -> TrialView | None:
    """The best of those that finished, or, as long as none has, of the others by their last results."""
    for statuses in (("finished",), ("stopped", "running", "waiting")):
        known = [each for each in view.trials if each.status in statuses and _cost(each, objective) < math.inf]
        if known:
            return min(known, key=lambda trial: (_cost(trial, objective), trial.id))
    return None


def _cost(trial: TrialView, objective: Objective) -> float:
    """Less is better; infinite where the trial does not have the metric."""
    metric, mode = objective
    value = trial.metrics.get(metric, math.nan)
    if not math.isfinite(value):
        return math.inf
    return -value if mode == "max" else value


# ------------------------------------------------------------------------------------------------------------- texts


def counted(trials: Collection[TrialView]) -> str:
    """e.g. `12 finished, 3 stopped, 1 failed`."""
    numbers: Counter[str] = Counter(trial.status for trial in trials)
    order = ("running", "waiting", "pending", "finished", "stopped", *_BROKEN)
    return ", ".join(f"{numbers[status]:,} {status}" for status in order if numbers[status])


def trial_texts(before: TrialView | None, now: TrialView, objectives: Sequence[Objective]) -> list[str]:
    """What is new of a trial: that it begins, that it reached a rung, that it has ended, each a line."""
    if now.has_ended:
        return [] if before is not None and before.has_ended else [_end_text(now, objectives)]
    texts = []
    if now.status in ("waiting", "running") and (before is None or before.status == "pending"):
        texts.append(f"{_title(now)} begins")
    if now.rung > (before.rung if before is not None else 0):
        place = f"reaches rung {now.rung}/{now.rungs} in {now.phase}"
        texts.append(_joined(f"{now.id} {place}", _results(now, objectives)))
    return texts


def _end_text(trial: TrialView, objectives: Sequence[Objective]) -> str:
    took = f"{trial.seconds:.1f} s"
    if trial.status == "finished":
        return _joined(f"{_title(trial)} finished in {took}", [*_results(trial, objectives), _phases(trial)])
    if trial.status == "stopped":
        rung = f" (rung {_rung(trial)})" if trial.rungs else ""
        return _joined(f"{_title(trial)} stopped in {trial.phase}{rung} after {took}", _results(trial, objectives))
    return f"{_title(trial)} {trial.status} in {trial.phase} after {took}: {trial.reason}"


def _title(trial: TrialView) -> str:
    return f"{trial.id} ({params_text(trial.params)})" if trial.params else trial.id


def params_text(params: Mapping[str, str], names: Mapping[str, str] | None = None) -> str:
    """e.g. `temperature 4, sparsity 0.5`; `names` are what the params are called, by default by their last word."""
    names = _short_names([params]) if names is None else names
    return ", ".join(f"{names[name]} {value}" for name, value in params.items())


def _short_names(params: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Each param's name → the last word of its dotted key where no other param has the same, else the whole key."""
    names = list(dict.fromkeys(name for each in params for name in each))
    last = {name: name.rpartition(".")[2] for name in names}
    numbers = Counter(last.values())
    return {name: last[name] if numbers[last[name]] == 1 else name for name in names}


def _results(trial: TrialView, objectives: Sequence[Objective]) -> list[str]:
    return [f"{metric} {number(trial.metrics[metric])}" for metric, _ in objectives if metric in trial.metrics]


def _phases(trial: TrialView) -> str:
    return f"phases {trial.phases_run} run, {trial.phases_reused} reused"


def _joined(what: str, details: Sequence[str]) -> str:
    return f"{what}: {'  '.join(details)}" if details else what


def progress_text(view: SweepView) -> str:
    """e.g. `12 of 24 trials ended`."""
    ended = sum(trial.has_ended for trial in view.trials)
    return f"{ended:,} trials ended" if view.num_trials is None else f"{ended:,} of {view.num_trials:,} trials ended"


def savings_text(view: SweepView) -> str:
    """e.g. `phases 20 run, 28 reused  steps 4,000 run, 3,500 saved`."""
    return (
        f"phases {view.phases_run:,} run, {view.phases_reused:,} reused  "
        f"steps {view.steps_run:,} run, {view.steps_saved:,} saved"
    )


def best_texts(view: SweepView, *, with_params: bool) -> list[str]:
    """The best of each objective, e.g. `best eval/accuracy 0.9812: t007 (temperature 4, sparsity 0.5)`."""
    known = [(metric, best_trial(view, (metric, mode))) for metric, mode in view.objectives]
    return [
        f"best {metric} {number(trial.metrics[metric])}: {_title(trial) if with_params else trial.id}"
        for metric, trial in known
        if trial is not None
    ]


def left_text(view: SweepView) -> list[str]:
    """`0:04:10 left` where that is known and anything is left."""
    left_s = time_left_s(view)
    return [f"{duration(left_s)} left"] if left_s else []


def number(value: float) -> str:
    """Four decimals, but whole numbers from ten on with none, and what is very large or small in powers of ten."""
    if value.is_integer() and abs(value) >= 10:
        return f"{value:,.0f}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 10_000 or value == 0 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`0:04:10`, or with days `1 day, 0:04:10`."""
    return str(timedelta(seconds=round(seconds)))


def _clean(text: str) -> str:
    """One line without control characters, whatever an error's message holds."""
    return "".join(each if each.isprintable() else " " for each in text)


# ---------------------------------------------------------------------------------------------------------- displays


class SweepDisplay(Protocol):
    """The driver's view of a sweep, for people."""

    def stage(self, text: str) -> None:
        """A stage of the start-up begins, e.g. `starting Ray`; the one before it is over."""

    def note(self, text: str) -> None:
        """Something that people should know now."""

    def show(self, view: SweepView) -> None:
        """The sweep has come this far."""

    def close(self) -> None:
        """The end; nothing is shown afterwards."""


def build_sweep_display(mode: DisplayMode, name: str) -> SweepDisplay:
    """`live` falls back to `plain` where standard error is no terminal; `quiet` shows notes and broken trials only."""
    if mode == "live":
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            return LiveSweepDisplay(console, name)
    return PlainSweepDisplay(sys.stderr, notes_only=mode == "quiet")


class PlainSweepDisplay:
    """Lines without control characters: where a trial begins, reaches a rung or ends, and about ten on the whole."""

    def __init__(
        self, stream: TextIO, *, notes_only: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._notes_only = notes_only
        self._clock = clock
        self._started_s = clock()
        self._shown: dict[str, TrialView] = {}
        self._notes: tuple[str, ...] = ()
        self._shown_parts = 0

    def stage(self, text: str) -> None:
        if not self._notes_only:
            self._print(text)

    def note(self, text: str) -> None:
        self._print(text)

    def show(self, view: SweepView) -> None:
        for trial in view.trials:
            is_wanted = not self._notes_only or trial.status in _BROKEN
            for text in trial_texts(self._shown.get(trial.id), trial, view.objectives) if is_wanted else []:
                self._print(text)
            self._shown[trial.id] = trial
        for text in view.notes:
            if text not in self._notes:
                self._print(text)
        self._notes = view.notes
        self._summarize(view)

    def close(self) -> None: ...

    def _summarize(self, view: SweepView) -> None:
        """A line on the whole whenever another tenth of the trials, or where their number is not known another ten,
        have ended."""
        ended = sum(trial.has_ended for trial in view.trials)
        parts = ended // _SUMMARIES if view.num_trials is None else ended * _SUMMARIES // max(view.num_trials, 1)
        if parts > self._shown_parts and not self._notes_only:
            texts = [progress_text(view), *best_texts(view, with_params=False), savings_text(view), *left_text(view)]
            self._print("  ".join(texts))
        self._shown_parts = max(parts, self._shown_parts)

    def _print(self, text: str) -> None:
        # A reader that went away must not end the sweep.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(f"{self._clock() - self._started_s:5.0f} s  {_clean(text)}".rstrip() + "\n")
            self._stream.flush()


class LiveSweepDisplay:
    """A table that is redrawn in place; finished stages, notes and broken trials scroll by above it."""

    def __init__(self, console: Console, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        self._console = console
        self._name = name
        self._clock = clock
        self._view: SweepView | None = None
        self._broken: set[str] = set()
        self._stage = ""
        self._stage_started_s = clock()
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=4, transient=True)
        self._live.start()

    def stage(self, text: str) -> None:
        self._finish_stage()
        self._stage, self._stage_started_s = text, self._clock()

    def note(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(text, style="yellow"))

    def show(self, view: SweepView) -> None:
        if view.trials:
            self._finish_stage()
        for trial in view.trials:
            if trial.status in _BROKEN and trial.id not in self._broken:
                self._broken.add(trial.id)
                self.note(_end_text(trial, view.objectives))
        self._view = view

    def close(self) -> None:
        self._finish_stage()
        self._live.stop()

    def render(self) -> Group:
        """The table as of the last view, and the current stage with a spinner."""
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.text import Text

        rows: list[ConsoleRenderable] = []
        if self._view is not None and self._view.trials:
            rows += live_table(self._view, self._console.width, self._console.height)
        if self._stage:
            rows.append(Spinner("dots", text=Text(f"{self._name}: {self._stage} …")))
        return Group(*rows)

    def _finish_stage(self) -> None:
        from rich.text import Text

        if self._stage:
            took = f"{self._clock() - self._stage_started_s:.1f} s"
            self._console.print(Text.assemble(("✓ ", "green"), self._stage, ("  " + took, "dim")))
        self._stage = ""


def live_table(view: SweepView, width: int, height: int) -> list[ConsoleRenderable]:
    """What fits into `height` lines: how far the sweep is, the trials that run, the best of those that have ended, and
    how many others there are. Where `width` is small, without the trials' places and the further objectives."""
    active = [trial for trial in view.trials if trial.status == "running"]
    ended = [each for each in ranked(view.trials, view.objectives[0]) if each.status in ("finished", "stopped")]
    above = [
        _line("  ".join([view.name, progress_text(view), *left_text(view), counted(view.trials)]), "bold"),
        *[_line(text, "green") for text in best_texts(view, with_params=True)],
        _line(f"{savings_text(view)}  {_count(view.groups, 'worker group')}  {duration(view.elapsed_s)}", "dim"),
    ]
    below = [_line(text, "yellow") for text in view.notes[-_NOTES_SHOWN:]]
    room = max(height - len(above) - len(below) - 4, 2)
    best = ended[: min(_BEST_SHOWN, room // 2)]
    shown = [*active[: room - len(best)], *best]
    others = [trial for trial in view.trials if trial not in shown]
    if others:
        below.insert(0, _line(f"… and {len(others):,} more: {counted(others)}", "dim"))
    return [*above, _trials_table(view, shown, width), *below]


def _line(text: str, style: str) -> Text:
    from rich.text import Text

    return Text(_clean(text), style=style, no_wrap=True, overflow="ellipsis")


def _trials_table(view: SweepView, trials: Sequence[TrialView], width: int) -> Table:
    """One line each; where the terminal is too narrow, the params are cut off, and nothing else."""
    from rich.table import Table

    is_wide = width >= _NARROW
    metrics = [metric for metric, _ in view.objectives][: None if is_wide else 1]
    names = _short_names([trial.params for trial in view.trials])
    places = ["phase", "step", "rung"] if is_wide else []
    rows = [["trial", "status", *places, *(metric.rpartition("/")[2] for metric in metrics), "params"]]
    for trial in trials:
        place = [trial.phase, f"{trial.step:,}/{trial.steps:,}", _rung(trial)] if is_wide else []
        results = [_metric(trial, metric) for metric in metrics]
        rows.append([trial.id, trial.status, *place, *results, params_text(trial.params, names)])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for column in list(zip(*rows, strict=True))[:-1]:
        table.add_column(no_wrap=True, min_width=max(map(len, column)))
    styles = ["bold", *("" if trial.status == "running" else "dim" for trial in trials)]
    for row, style in zip(rows, styles, strict=True):
        # A Text, because rich would read markup in a user's own words.
        table.add_row(*(_line(cell, style) for cell in row))
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _rung(trial: TrialView) -> str:
    return f"{trial.rung}/{trial.rungs}" if trial.rungs else ""


def _metric(trial: TrialView, metric: str) -> str:
    return number(trial.metrics[metric]) if metric in trial.metrics else ""


# --------------------------------------------------------------------------------------------------------- at the end


def summary_table(view: SweepView, front: Collection[str] = ()) -> str:
    """All trials, the best first, up to some thirty, then how many others there are, and what was saved.

    Those whose ids are in `front` are on the Pareto front, are marked, and come first.
    """
    trials = sorted(ranked(view.trials, view.objectives[0]), key=lambda trial: trial.id not in front)
    shown = _shown_at_the_end(trials)
    names = _short_names([trial.params for trial in view.trials])
    metrics = [metric for metric, _ in view.objectives]
    header = ["", "trial", "status", *names.values(), *metrics, "run", "reused", "time", ""]
    rows = [_end_row(trial, list(names), metrics, "*" if trial.id in front else "") for trial in shown]
    lines = _aligned([header, *rows])
    others = [trial for trial in trials if trial not in shown]
    if others:
        lines.append(f"… and {len(others):,} more: {counted(others)}")
    if front:
        lines.append(
            f"* on the Pareto front of {' and '.join(f'{metric} ({mode})' for metric, mode in view.objectives)}"
        )
    return "\n".join([*lines, f"{counted(view.trials)}  {savings_text(view)}  {duration(view.elapsed_s)}"])


def _shown_at_the_end(trials: Sequence[TrialView]) -> list[TrialView]:
    """The first ones; some of those that broke are among them, for their reasons."""
    if len(trials) <= _ROWS:
        return list(trials)
    broken = [trial for trial in trials if trial.status in _BROKEN][:_BROKEN_ROWS]
    whole = [trial for trial in trials if trial.status not in _BROKEN]
    return [*whole[: _ROWS - len(broken)], *broken]


def _end_row(trial: TrialView, params: Sequence[str], metrics: Sequence[str], mark: str) -> list[str]:
    values = [trial.params.get(name, "") for name in params]
    results = [_metric(trial, metric) for metric in metrics]
    phases = [str(trial.phases_run), str(trial.phases_reused)]
    reason = textwrap.shorten(trial.reason, _REASON_LENGTH, placeholder=" …")
    return [mark, trial.id, trial.status, *values, *results, *phases, f"{trial.seconds:.1f} s", reason]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row as a line; columns that are empty in all of them are left out."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([f"{_clean(cell):<{width}}" for cell, width in zip(row, widths, strict=True) if width] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def winner_lines(
    job: Path, overrides: Sequence[str], storage: str | Path, address: str = "http://127.0.0.1:8265"
) -> tuple[str, str]:
    """The shell's lines that repeat a trial, typed where this process runs: `temper train …`, and the same through
    Ray's job API at `address`.

    The second sends the folder with temper's own source along, or, where the job lies elsewhere, the working directory
    or else the job's folder, and temper as a module. There a relative `storage` would be lost with that copy, so that
    it is made absolute.
    """
    job, here = job.resolve(), Path.cwd().resolve()
    package = Path(temper.__file__).resolve().parent
    checkout = package.parents[1]
    root = next(folder for folder in (checkout, here, job.parent) if job.is_relative_to(folder))
    environment = (
        {"env_vars": {"PYTHONPATH": package.parent.name}} if root == checkout else {"py_modules": [str(package)]}
    )
    local = str(job.relative_to(here) if job.is_relative_to(here) else job)
    kept = str(storage) if "://" in str(storage) else str(Path(storage).absolute())
    submit = ["ray", "job", "submit", "--address", address, "--working-dir", os.path.relpath(root, here)]
    submit += ["--runtime-env-json", json.dumps(environment), "--", "python", "-m", "temper", "train"]
    others = [override for override in overrides if not override.startswith("storage=")]
    submit += [str(job.relative_to(root)), *others, f"storage={kept}", "--address", "auto"]
    return shlex.join(["temper", "train", local, *overrides]), shlex.join(submit)
