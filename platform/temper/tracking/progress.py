"""What people see of a run, on standard error: a live panel in a terminal, lines elsewhere.

`Progress` is what the records say so far and is a pure function of them; the displays only print it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

from temper.plan.metric_names import without_classes
from temper.tracking.history import Record

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable, Group
    from rich.table import Table

    from temper.plan.build import Plan

DisplayMode = Literal["live", "plain", "quiet"]

_SMOOTHING = 0.9  # weight of the past in the mean of the step time, so that the time left does not jump
_LINES = 10  # plain lines over a whole run, besides evaluations


# ---------------------------------------------------------------------------------------------------- what is known


@dataclass(frozen=True)
class Progress:
    """The run after its newest record. Times in seconds; `evaluation` by metric name without `eval/`."""

    step: int = 0
    loss: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    examples_per_s: float | None = None
    step_s: float | None = None
    loss_scale: float | None = None
    skipped_steps: int = 0


def follow(progress: Progress, record: Record) -> Progress:
    """The progress after one more record; what the record does not mention stays as it was."""
    metrics = without_classes(record["metrics"])
    evaluation = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}
    step_s = metrics.get("time/step_s", progress.step_s)
    if step_s is not None and progress.step_s is not None:
        step_s = _SMOOTHING * progress.step_s + (1 - _SMOOTHING) * step_s
    return replace(
        progress,
        step=record["step"],
        loss=metrics.get("train/loss", progress.loss),
        evaluation=evaluation or progress.evaluation,
        examples_per_s=metrics.get("time/examples_per_s", progress.examples_per_s),
        step_s=step_s,
        loss_scale=metrics.get("precision/loss_scale", progress.loss_scale),
        skipped_steps=int(metrics.get("precision/skipped_steps", progress.skipped_steps)),
    )


def new_events(records: Sequence[Record], shown: set[str]) -> list[str]:
    """`step 12: loss scale 65536: …` for each event that is not in `shown` yet, which it then is.

    What happens again at another scale is no news.
    """
    texts = []
    for record in records:
        for event in record.get("events", []):
            what = event.rpartition(": ")[2]
            if what not in shown:
                shown.add(what)
                texts.append(f"step {record['step']}: {event}")
    return texts


def time_left_s(progress: Progress, steps: int) -> float | None:
    """Seconds that the steps that are left will take, evaluations not counted; None before the first step."""
    return None if progress.step_s is None else max(0, steps - progress.step) * progress.step_s


def phase_name(plan: Plan, step: int) -> str:
    """The phase that step `step`, 1-based, belongs to; before the first step, the first phase."""
    begun = [phase.name for phase in plan.phases if phase.first_step < max(step, 1)]
    return begun[-1]


def result_texts(progress: Progress) -> list[str]:
    """`loss 0.0312`, then the newest evaluation: `accuracy 0.9812`."""
    texts = [] if progress.loss is None else [f"loss {_number(progress.loss)}"]
    return texts + [
        f"{'evaluation loss' if name == 'loss' else name} {_number(value)}"
        for name, value in progress.evaluation.items()
    ]


def speed_texts(progress: Progress, plan: Plan) -> list[str]:
    """`1,204 examples/s`, `0:42 left`, and with fp16 the loss scale and the steps that it cost."""
    texts = []
    if progress.examples_per_s is not None:
        texts.append(f"{progress.examples_per_s:,.0f} examples/s")
    left_s = time_left_s(progress, plan.steps)
    if left_s is not None and progress.step < plan.steps:
        texts.append(f"{_duration(left_s)} left")
    if plan.job.precision.dtype == "fp16" and progress.loss_scale is not None:
        texts.append(f"loss scale {progress.loss_scale:,.6g}")
        texts.append(f"{progress.skipped_steps} skipped")
    return texts


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.001 <= abs(value) < 10_000 or value == 0 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --------------------------------------------------------------------------------------------------------- displays


class Display(Protocol):
    """The driver's view of a run, for people."""

    def stage(self, text: str) -> None:
        """A stage of the start-up begins, e.g. `starting 2 workers`; the one before it is over."""

    def records(self, records: Sequence[Record]) -> None:
        """Steps were finished."""

    def note(self, text: str) -> None:
        """Something that people should know now, e.g. that a worker is being replaced."""

    def close(self, summary: str = "") -> None:
        """The end; nothing is shown afterwards but `summary`."""


def build_display(mode: DisplayMode, plan: Plan, title: str = "") -> Display:
    """`live` falls back to `plain` where standard error is no terminal; `quiet` shows notes and the summary only.

    Every line begins with the `title`, of a run that is a part of another command's.
    """
    if mode == "live":
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            return LiveDisplay(plan, console, title=title)
    return PlainDisplay(plan, sys.stderr, notes_only=mode == "quiet", title=title)


class PlainDisplay:
    """Lines without control characters: each stage, about ten steps of the run, every evaluation."""

    def __init__(
        self,
        plan: Plan,
        stream: TextIO,
        *,
        notes_only: bool = False,
        title: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._title = title
        self._stream = stream
        self._notes_only = notes_only
        self._clock = clock
        self._started_s = clock()
        self._progress = Progress()
        self._shown_tenth = -1
        self._shown_events: set[str] = set()

    def stage(self, text: str) -> None:
        if not self._notes_only:
            self._print(text)

    def records(self, records: Sequence[Record]) -> None:
        for record in records:
            self._progress = follow(self._progress, record)
            tenth = self._progress.step * _LINES // self._plan.steps
            evaluated = any(name.startswith("eval/") for name in record["metrics"])
            if not self._notes_only and (tenth > self._shown_tenth or evaluated):
                self._shown_tenth = tenth
                self._print(self._step_line(evaluated))
        for text in new_events(records, self._shown_events):
            self.note(text)

    def note(self, text: str) -> None:
        self._print(text)

    def close(self, summary: str = "") -> None:
        for line in summary.splitlines():
            self._write(line)

    def _step_line(self, evaluated: bool) -> str:
        plan, progress = self._plan, self._progress
        width = len(str(plan.steps))
        phase = f"{phase_name(plan, progress.step)}  " if len(plan.phases) > 1 else ""
        # An evaluation is printed where it was made, not again on every line after it.
        shown = progress if evaluated else replace(progress, evaluation={})
        texts = [*result_texts(shown), *speed_texts(progress, plan)]
        return f"{phase}step {progress.step:>{width}}/{plan.steps}  " + "  ".join(texts)

    def _print(self, text: str) -> None:
        self._write(f"{self._clock() - self._started_s:5.0f} s  {self._title}{text}")

    def _write(self, line: str) -> None:
        # A reader that went away must not end the training.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line.rstrip() + "\n")
            self._stream.flush()


class LiveDisplay:
    """A panel that is redrawn in place; finished stages and notes scroll by above it."""

    def __init__(
        self, plan: Plan, console: Console, *, title: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.live import Live

        self._plan = plan
        self._title = title
        self._console = console
        self._clock = clock
        self._progress = Progress()
        self._stage = ""
        self._stage_started_s = clock()
        self._shown_events: set[str] = set()
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=5, transient=True)
        self._live.start()

    def stage(self, text: str) -> None:
        self._finish_stage()
        self._stage, self._stage_started_s = f"{self._title}{text}", self._clock()

    def records(self, records: Sequence[Record]) -> None:
        if records:
            self._finish_stage()
        for record in records:
            self._progress = follow(self._progress, record)
        for text in new_events(records, self._shown_events):
            self.note(text)

    def note(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(f"{self._title}{text}", style="yellow"))

    def close(self, summary: str = "") -> None:
        self._finish_stage()
        self._live.stop()
        if self._progress.step:
            self._console.print(self.render())
        if summary:
            self._console.print(summary, markup=False, highlight=False)

    def render(self) -> Group:
        """The panel: the current stage with a spinner, or the bar with what the last steps brought."""
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.text import Text

        rows: list[ConsoleRenderable] = []
        if self._progress.step:
            rows += [self._bar(), Text("  " + "   ".join(result_texts(self._progress)))]
            rows += [Text("  " + "   ".join(speed_texts(self._progress, self._plan)), style="dim")]
        if self._stage:
            rows += [Spinner("dots", text=Text(f"{self._stage} …"))]
        return Group(*rows)

    def _bar(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        plan, step = self._plan, self._progress.step
        row = Table.grid(padding=(0, 1))
        title = f"{plan.job.name}  {phase_name(plan, step)}"
        share = f"{step}/{plan.steps}  {step * 100 // plan.steps} %"
        row.add_row(Text(title, style="bold"), ProgressBar(total=plan.steps, completed=step, width=40), Text(share))
        return row

    def _finish_stage(self) -> None:
        from rich.text import Text

        if self._stage:
            took = f"{self._clock() - self._stage_started_s:.1f} s"
            self._console.print(Text.assemble(("✓ ", "green"), self._stage, ("  " + took, "dim")))
        self._stage = ""
