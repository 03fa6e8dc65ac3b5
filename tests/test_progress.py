"""What people see: lines and panel rendered to text."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from temper.tracking.history import Record
from temper.tracking.progress import (
    LiveDisplay,
    PlainDisplay,
    Progress,
    build_display,
    follow,
    phase_name,
    result_texts,
    speed_texts,
    time_left_s,
)


def plan(dtype: str = "fp32", steps: int = 200, phases: tuple[tuple[str, int], ...] = (("dense", 0),)) -> Any:
    return SimpleNamespace(
        job=SimpleNamespace(name="digits", precision=SimpleNamespace(dtype=dtype)),
        steps=steps,
        phases=tuple(SimpleNamespace(name=name, first_step=first) for name, first in phases),
    )


def record(step: int, **metrics: float) -> Record:
    times = {"time/step_s": 0.5, "time/examples_per_s": 1234.5}
    return {"step": step, "time_ms": step, "metrics": {"train/loss": 1.0 / step, **times, **metrics}}


class Clock:
    """Advances by a second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


# ------------------------------------------------------------------------------------------------ what is known


def test_progress_keeps_what_a_record_does_not_mention() -> None:
    first = follow(Progress(), record(1, **{"eval/accuracy": 0.5, "precision/loss_scale": 65536.0}))
    second = follow(first, {"step": 2, "time_ms": 2, "metrics": {"train/loss": 0.25, "precision/skipped_steps": 1.0}})
    assert second == Progress(
        step=2, loss=0.25, evaluation={"accuracy": 0.5}, examples_per_s=1234.5, step_s=0.5, loss_scale=65536.0,
        skipped_steps=1,
    )  # fmt: skip


def test_time_left_follows_the_smoothed_step_time() -> None:
    progress = follow(Progress(), record(50))
    assert time_left_s(progress, 200) == 75.0
    slower = follow(progress, record(51, **{"time/step_s": 1.5}))
    assert slower.step_s == pytest.approx(0.9 * 0.5 + 0.1 * 1.5)
    assert time_left_s(slower, 51) == 0.0
    assert time_left_s(Progress(), 200) is None


def test_phase_of_a_step() -> None:
    chain = plan(phases=(("dense", 0), ("sparse-1", 100), ("redense-1", 150)))
    assert [phase_name(chain, step) for step in (0, 1, 100, 101, 150, 151)] == [
        "dense", "dense", "dense", "sparse-1", "sparse-1", "redense-1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step_s", "text"), [(0.001, "0:00 left"), (0.5, "1:15 left"), (30.0, "1:15:00 left"), (0.3966, "0:59 left")]
)
def test_time_left_reads_as_a_clock(step_s: float, text: str) -> None:
    assert text in speed_texts(follow(Progress(), record(50, **{"time/step_s": step_s})), plan())


def test_numbers_keep_their_meaning_at_every_size() -> None:
    texts = [result_texts(Progress(loss=loss))[0] for loss in (0.0, 2.3025851, 0.00012345, 123456.0, float("nan"))]
    assert texts == ["loss 0.0000", "loss 2.3026", "loss 0.000123", "loss 1.23e+05", "loss nan"]


def test_loss_scale_is_shown_for_fp16_only() -> None:
    progress = follow(Progress(), record(200, **{"precision/loss_scale": 32768.0, "precision/skipped_steps": 2.0}))
    assert speed_texts(progress, plan("fp16")) == ["1,234 examples/s", "loss scale 32,768", "2 skipped"]
    assert speed_texts(progress, plan("bf16")) == ["1,234 examples/s"]


# --------------------------------------------------------------------------------------------------------- plain


def test_plain_lines_of_a_whole_run() -> None:
    stream = io.StringIO()
    display = PlainDisplay(plan("fp16", steps=20), stream, clock=Clock())
    display.stage("starting Ray")
    display.stage("starting 2 workers")
    scale = {"precision/loss_scale": 65536.0, "precision/skipped_steps": 0.0}
    display.records([record(step, **scale) for step in range(1, 5)])
    display.records([record(5, **{**scale, "eval/accuracy": 0.98125, "eval/loss": 0.5})])
    display.note("rank 1 was lost; starting again from step 4")
    display.records([record(step, **scale) for step in range(6, 21)])
    display.close("done: test accuracy 0.9861\nrun 1234")
    lines = stream.getvalue().splitlines()
    speed = "1,234 examples/s"
    assert lines[:6] == [
        "    1 s  starting Ray",
        "    2 s  starting 2 workers",
        f"    3 s  step  1/20  loss 1.0000  {speed}  0:10 left  loss scale 65,536  0 skipped",
        f"    4 s  step  2/20  loss 0.5000  {speed}  0:09 left  loss scale 65,536  0 skipped",
        f"    5 s  step  4/20  loss 0.2500  {speed}  0:08 left  loss scale 65,536  0 skipped",
        f"    6 s  step  5/20  loss 0.2000  accuracy 0.9812  evaluation loss 0.5000  {speed}  0:08 left"
        "  loss scale 65,536  0 skipped",
    ]
    assert lines[6] == "    7 s  rank 1 was lost; starting again from step 4"
    assert [line.split("/20")[0][-2:] for line in lines[7:-2]] == [" 6", " 8", "10", "12", "14", "16", "18", "20"]
    assert lines[-3] == f"   15 s  step 20/20  loss 0.0500  {speed}  loss scale 65,536  0 skipped"
    assert lines[-2:] == ["done: test accuracy 0.9861", "run 1234"]
    assert all(line.isprintable() for line in lines)


def test_plain_lines_name_the_phase_where_there_are_several() -> None:
    stream = io.StringIO()
    chain = plan(steps=20, phases=(("dense", 0), ("sparse-1", 10)))
    PlainDisplay(chain, stream, clock=Clock()).records([record(11)])
    assert stream.getvalue() == "    1 s  sparse-1  step 11/20  loss 0.0909  1,234 examples/s  0:04 left\n"


def test_plain_lines_go_on_after_phases_that_are_reused() -> None:
    stream = io.StringIO()
    chain = plan(steps=20, phases=(("dense", 0), ("sparse-1", 10), ("redense-1", 15)))
    display = PlainDisplay(chain, stream, clock=Clock())
    display.stage("reusing dense, steps 1 to 10")
    display.records([record(step) for step in range(11, 15)])
    display.records([record(15, **{"eval/accuracy": 0.5})])
    display.stage("redense-1: all weights are trained again")
    display.records([record(step) for step in range(16, 21)])
    speed = "1,234 examples/s"
    assert stream.getvalue().splitlines() == [
        "    1 s  reusing dense, steps 1 to 10",
        f"    2 s  sparse-1  step 11/20  loss 0.0909  {speed}  0:04 left",
        f"    3 s  sparse-1  step 12/20  loss 0.0833  {speed}  0:04 left",
        f"    4 s  sparse-1  step 14/20  loss 0.0714  {speed}  0:03 left",
        f"    5 s  sparse-1  step 15/20  loss 0.0667  accuracy 0.5000  {speed}  0:02 left",
        "    6 s  redense-1: all weights are trained again",
        f"    7 s  redense-1  step 16/20  loss 0.0625  {speed}  0:02 left",
        f"    8 s  redense-1  step 18/20  loss 0.0556  {speed}  0:01 left",
        f"    9 s  redense-1  step 20/20  loss 0.0500  {speed}",
    ]


def test_quiet_shows_notes_and_the_summary_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = build_display("quiet", plan())
    display.stage("starting Ray")
    display.records([record(200, **{"eval/accuracy": 1.0})])
    display.note("rank 1 was lost")
    display.close("done")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(" s  ")[-1] for line in captured.err.splitlines()] == ["rank 1 was lost", "done"]


def test_a_reader_that_went_away_does_not_end_the_run() -> None:
    stream = io.StringIO()
    display = PlainDisplay(plan(), stream)
    stream.close()
    display.stage("starting Ray")
    display.records([record(1)])


def test_live_without_a_terminal_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    assert isinstance(build_display("live", plan()), PlainDisplay)


# ---------------------------------------------------------------------------------------------------------- live


def live(shown: Any) -> tuple[LiveDisplay, Console]:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    return LiveDisplay(shown, console, clock=Clock()), console


def rendered(display: LiveDisplay) -> list[str]:
    console = Console(record=True, width=100, file=io.StringIO(), color_system=None)
    console.print(display.render())
    return console.export_text().splitlines()


def test_live_panel() -> None:
    display, console = live(plan("fp16"))
    display.stage("starting 2 workers")
    assert rendered(display)[0].endswith("starting 2 workers …")
    scale = {"precision/loss_scale": 65536.0, "precision/skipped_steps": 3.0}
    display.records([record(49, **{**scale, "eval/accuracy": 0.98}), record(50, **scale)])
    bar, results, speed = rendered(display)
    assert bar.startswith("digits  dense ━━━━━━━━━━")
    assert bar.rstrip().endswith(" 50/200  25 %")
    assert bar.count("━") + bar.count("╸") in (10, 40)  # without colour rich leaves the rest of the bar blank
    assert results == "  loss 0.0200   accuracy 0.9800"
    assert speed == "  1,234 examples/s   1:15 left   loss scale 65,536   3 skipped"
    display.note("rank 1 was lost")
    display.close("done")
    text = console.export_text()
    assert "✓ starting 2 workers  1.0 s" in text
    assert text.index("rank 1 was lost") < text.rindex("50/200") < text.index("done")


def test_live_panel_names_the_current_phase() -> None:
    display, _ = live(plan(phases=(("dense", 0), ("sparse-1", 100))))
    display.records([record(150)])
    assert rendered(display)[0].startswith("digits  sparse-1 ━")
    display.close()


def test_live_panel_between_phases_shows_the_stage_below_the_bar_of_all_steps() -> None:
    display, console = live(plan(phases=(("dense", 0), ("sparse-1", 100), ("redense-1", 150))))
    display.stage("reusing dense, steps 1 to 100")
    display.records([record(150)])
    display.stage("redense-1: all weights are trained again")
    bar, _, speed, stage = rendered(display)
    assert bar.startswith("digits  sparse-1 ━")
    assert bar.rstrip().endswith("150/200  75 %")
    assert speed.strip() == "1,234 examples/s   0:25 left"
    assert stage.endswith("redense-1: all weights are trained again …")
    display.records([record(151)])
    assert rendered(display)[0].startswith("digits  redense-1 ━")
    display.close()
    text = console.export_text()
    assert text.index("✓ reusing dense, steps 1 to 100") < text.index(
        "✓ redense-1: all weights are trained again  1.0 s"
    )


def test_live_shows_brackets_in_texts_as_they_are() -> None:
    display, console = live(plan())
    display.stage("loading [bold]data[/bold]")
    display.note("see [red]")
    display.close("done [/x]")
    text = console.export_text()
    assert "loading [bold]data[/bold]" in text
    assert "see [red]" in text
    assert "done [/x]" in text
