"""What people see of a sweep: lines, the live table and the table at the end, rendered to text; lines to copy."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group

import temper
from temper import cli
from temper.tracking.sweep_progress import (
    LiveSweepDisplay,
    PlainSweepDisplay,
    SweepView,
    TrialStatus,
    TrialView,
    best_trial,
    build_sweep_display,
    duration,
    live_table,
    number,
    params_text,
    ranked,
    summary_table,
    time_left_s,
    winner_lines,
)

ACCURACY = ("eval/accuracy", "max")
SIZE = ("parameters_left", "min")
CHECKOUT = Path(temper.__file__).parents[2]


def trial(index: int, status: TrialStatus = "running", accuracy: float | None = None, **changes: Any) -> TrialView:
    given = TrialView(
        id=f"t{index:03d}",
        params={"distill.temperature": str(index), "dsd.rounds.0.sparsity": "0.5"},
        status=status,
        phase="sparse-1",
        step=200 if status == "finished" else 120,
        steps=200,
        rung=0,
        rungs=4,
        metrics={} if accuracy is None else {"eval/accuracy": accuracy},
        phases_run=2,
        phases_reused=1,
        seconds=12.34,
        reason="",
    )
    return replace(given, **changes)


def view(*trials: TrialView, **changes: Any) -> SweepView:
    given = SweepView(
        name="digits_sweep",
        objectives=(ACCURACY,),
        trials=trials,
        num_trials=24,
        phases_run=20,
        phases_reused=28,
        steps_run=4000,
        steps_saved=1000,
        elapsed_s=100.0,
        groups=2,
    )
    return replace(given, **changes)


class Clock:
    """Advances by a second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


# ------------------------------------------------------------------------------------------------------ what is known


def test_time_left_is_that_of_the_steps_still_to_be_run() -> None:
    # 80 steps of the one that runs; the one that has no step yet and the two that are not there yet reuse a fifth.
    trials = [trial(0, "finished"), trial(1), trial(2, "waiting", step=0)]
    assert time_left_s(view(*trials, num_trials=5)) == pytest.approx((80 + 3 * 200 * 0.8) * 100 / 4000)
    assert time_left_s(view(trial(0, "finished"), trial(1, "stopped"), num_trials=2)) == 0.0


@pytest.mark.parametrize("unknown", [{"num_trials": None}, {"steps_run": 0}, {"trials": ()}])
def test_no_time_left_is_named_where_it_is_unknown(unknown: dict[str, Any]) -> None:
    assert time_left_s(replace(view(trial(0)), **unknown)) is None


def test_the_best_is_one_that_finished_if_there_is_any() -> None:
    running, stopped, finished = trial(0, "running", 0.99), trial(1, "stopped", 0.995), trial(2, "finished", 0.9)
    assert best_trial(view(running, stopped, finished), ACCURACY) == finished
    assert best_trial(view(running, stopped), ACCURACY) == stopped
    assert best_trial(view(trial(0, "failed", 1.0), trial(1, "diverged", float("inf"))), ACCURACY) is None
    small, large = (trial(i, "finished", metrics={"parameters_left": size}) for i, size in enumerate((10.0, 20.0)))
    assert best_trial(view(large, small), SIZE) == small


def test_trials_are_ranked_by_how_they_ended_and_then_by_the_objective() -> None:
    trials = [
        trial(0, "failed", 0.9),
        trial(1, "finished", 0.5),
        trial(2, "finished", float("nan")),
        trial(3, "finished", 0.7),
        trial(4, "stopped", 0.99),
        trial(5, "running", 0.6),
        trial(6, "diverged"),
        trial(7, "finished", 0.7),
    ]
    assert " ".join(each.id for each in ranked(trials, ACCURACY)) == "t003 t007 t001 t002 t004 t005 t006 t000"


def test_params_are_called_by_their_last_word_where_that_tells_them_apart() -> None:
    assert params_text({"distill.temperature": "4", "recipe": "both"}) == "temperature 4, recipe both"
    first, second = "dsd.rounds.0.sparsity", "dsd.rounds.1.sparsity"
    assert params_text({first: "0.3", second: "0.5", "seed": "1"}) == f"{first} 0.3, {second} 0.5, seed 1"


def test_numbers_and_times_read_well_at_every_size() -> None:
    values = (0.0, 1.0, 0.98125, 85.0, 12345.0, 12345.6, 0.00012345, float("nan"), float("-inf"))
    assert list(map(number, values)) == [
        "0.0000", "1.0000", "0.9812", "85", "12,345", "1.23e+04", "0.000123", "nan", "-inf",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.2, 250, 93784)] == ["0:00:00", "0:04:10", "1 day, 2:03:04"]


# -------------------------------------------------------------------------------------------------------------- plain


def plain(*views: SweepView, **options: Any) -> list[str]:
    stream = io.StringIO()
    display = PlainSweepDisplay(stream, clock=Clock(), **options)
    for each in views:
        display.show(each)
    display.close()
    return stream.getvalue().splitlines()


def test_plain_lines_of_a_whole_sweep() -> None:
    stream = io.StringIO()
    display = PlainSweepDisplay(stream, clock=Clock())
    display.stage("starting 2 worker groups")
    waiting = trial(1, "waiting", step=0)
    display.show(view(trial(0, step=0), waiting, trial(2, "pending", step=0), num_trials=4))
    display.show(view(trial(0, step=0), waiting, trial(2, "pending", step=0), num_trials=4))
    display.show(view(trial(0, rung=1, accuracy=0.91), trial(1), trial(2, "pending"), num_trials=4))
    display.note("a worker group was lost, and is started again")
    done = trial(0, "finished", rung=4, accuracy=0.98)
    display.show(view(done, trial(1, "stopped", rung=2, accuracy=0.8), trial(2), num_trials=4))
    broken = trial(2, "diverged", reason="the loss is nan\nat step 12")
    late = trial(3, "failed", phase="dense", reason="out of memory")
    display.show(view(done, trial(1, "stopped", rung=2, accuracy=0.8), broken, late, num_trials=4))
    display.close()
    assert stream.getvalue().splitlines() == [
        "    1 s  starting 2 worker groups",
        "    2 s  t000 (temperature 0, sparsity 0.5) begins",
        "    3 s  t001 (temperature 1, sparsity 0.5) begins",
        "    4 s  t000 reaches rung 1/4 in sparse-1: eval/accuracy 0.9100",
        "    5 s  a worker group was lost, and is started again",
        "    6 s  t000 (temperature 0, sparsity 0.5) finished in 12.3 s: eval/accuracy 0.9800  phases 2 run, 1 reused",
        "    7 s  t001 (temperature 1, sparsity 0.5) stopped in sparse-1 (rung 2/4) after 12.3 s: eval/accuracy 0.8000",
        "    8 s  t002 (temperature 2, sparsity 0.5) begins",
        "    9 s  2 of 4 trials ended  best eval/accuracy 0.9800: t000  phases 20 run, 28 reused  "
        "steps 4,000 run, 1,000 saved  0:00:06 left",
        "   10 s  t002 (temperature 2, sparsity 0.5) diverged in sparse-1 after 12.3 s: the loss is nan at step 12",
        "   11 s  t003 (temperature 3, sparsity 0.5) failed in dense after 12.3 s: out of memory",
        "   12 s  4 of 4 trials ended  best eval/accuracy 0.9800: t000  phases 20 run, 28 reused  "
        "steps 4,000 run, 1,000 saved",
    ]


def test_plain_says_how_the_whole_sweep_stands_some_ten_times() -> None:
    trials = [trial(i, "finished") for i in range(200)]
    lines = plain(*(view(*trials[: i + 1], num_trials=200) for i in range(200)))
    assert len(lines) == 200 + 10
    assert [re.findall(r"\d+ of 200 trials ended", line)[0] for line in lines if "ended" in line] == [
        f"{ended} of 200 trials ended" for ended in range(20, 201, 20)
    ]
    unlimited = plain(*(view(*trials[: i + 1], num_trials=None) for i in range(25)))
    assert [re.findall(r"s  (\d+) trials ended", line)[0] for line in unlimited if "ended" in line] == ["10", "20"]


def test_plain_prints_a_note_of_the_view_once_as_long_as_it_holds() -> None:
    one, none = view(trial(0, "pending"), notes=("MLflow is away",)), view(trial(0, "pending"))
    assert plain(one, one, none, one) == ["    1 s  MLflow is away", "    2 s  MLflow is away"]


def test_quiet_shows_notes_and_broken_trials_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = build_sweep_display("quiet", "digits_sweep")
    display.stage("starting Ray")
    display.show(view(trial(0), trial(1), num_trials=2))
    display.note("MLflow is away")
    display.show(view(trial(0, "finished", 0.9), trial(1, "failed", reason="out of memory"), num_trials=2))
    display.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(" s  ")[-1] for line in captured.err.splitlines()] == [
        "MLflow is away",
        "t001 (temperature 1, sparsity 0.5) failed in sparse-1 after 12.3 s: out of memory",
    ]


def test_a_reader_that_went_away_does_not_end_the_sweep() -> None:
    stream = io.StringIO()
    display = PlainSweepDisplay(stream)
    stream.close()
    display.stage("starting Ray")
    display.show(view(trial(0, "finished")))


def test_live_without_a_terminal_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    assert isinstance(build_sweep_display("live", "digits_sweep"), PlainSweepDisplay)


# --------------------------------------------------------------------------------------------------------------- live


def rendered(shown: SweepView, width: int = 100, height: int = 30) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO(), color_system=None)
    console.print(Group(*live_table(shown, width, height)))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_live_table() -> None:
    trials = [
        trial(0, "finished", 0.95),
        trial(1, "failed", reason="out of memory"),
        trial(2, "running", 0.91, rung=1),
        trial(3, "waiting", step=0),
        trial(4, "finished", 0.97, rung=4),
    ]
    assert rendered(view(*trials, num_trials=6, notes=("MLflow is away",))) == [
        "digits_sweep  3 of 6 trials ended  0:00:10 left  1 running, 1 waiting, 2 finished, 1 failed",
        "best eval/accuracy 0.9700: t004 (temperature 4, sparsity 0.5)",
        "phases 20 run, 28 reused  steps 4,000 run, 1,000 saved  2 worker groups  0:01:40",
        "trial  status    phase     step     rung  accuracy  params",
        "t002   running   sparse-1  120/200  1/4   0.9100    temperature 2, sparsity 0.5",
        "t004   finished  sparse-1  200/200  4/4   0.9700    temperature 4, sparsity 0.5",
        "t000   finished  sparse-1  200/200  0/4   0.9500    temperature 0, sparsity 0.5",
        "… and 2 more: 1 waiting, 1 failed",
        "MLflow is away",
    ]


def many() -> SweepView:
    statuses: tuple[TrialStatus, ...] = ("finished", "stopped", "failed", "waiting", "running")
    trials = [trial(i, statuses[i % 5], i / 200) for i in range(200)]
    return view(*trials, num_trials=240, objectives=(ACCURACY, SIZE), notes=tuple("abcde"))


@pytest.mark.parametrize(("width", "height"), [(120, 24), (80, 50), (60, 24), (40, 12)])
def test_live_table_of_many_trials_fits_into_the_terminal(width: int, height: int) -> None:
    lines = rendered(many(), width, height)
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    heads = [line.split()[0] for line in lines]
    assert "t004" in heads  # the first that runs
    assert "t195" in heads  # the best that has ended
    shown = sum(head.startswith("t") and head[1:].isdigit() for head in heads)
    assert f"… and {200 - shown} more: " in "\n".join(lines)
    assert lines[-3:] == ["c", "d", "e"]


def test_live_table_in_a_narrow_terminal_keeps_the_objective() -> None:
    assert rendered(view(trial(0, "running", 0.9), num_trials=1), width=40) == [
        "digits_sweep  0 of 1 trials ended  0:00…",
        "best eval/accuracy 0.9000: t000 (temper…",
        "phases 20 run, 28 reused  steps 4,000 r…",
        "trial  status   accuracy  params",
        "t000   running  0.9000    temperature 0…",
    ]


def live() -> tuple[LiveSweepDisplay, Console]:
    console = Console(record=True, width=100, height=30, file=io.StringIO(), force_terminal=True, color_system=None)
    return LiveSweepDisplay(console, "digits_sweep", clock=Clock()), console


def test_live_shows_stages_above_and_a_broken_trial_once() -> None:
    display, console = live()
    display.stage("starting Ray")
    display.show(view())
    broken = trial(1, "diverged", reason="the loss is nan")
    display.show(view(trial(0), broken))
    display.show(view(trial(0), broken))
    display.note("MLflow is away")
    display.stage("exporting t000")
    display.close()
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    whole = "t001 (temperature 1, sparsity 0.5) diverged in sparse-1 after 12.3 s: the loss is nan"
    told = ["✓ starting Ray  1.0 s", whole, "MLflow is away", "✓ exporting t000  1.0 s"]
    assert [line for line in lines if line in told] == told
    assert "digits_sweep: exporting t000 …" not in lines[-1]


def test_live_shows_brackets_in_texts_as_they_are() -> None:
    display, console = live()
    display.stage("loading [bold]data[/bold]")
    shown = trial(0, params={"recipe": "[red]both[/red]"}, phase="[x]", metrics={"[m]": 1.0})
    display.show(view(shown, objectives=(("[m]", "max"),), notes=("see [blue]",)))
    display.note("note [/x]")
    console.print(display.render())
    display.close()
    text = console.export_text()
    for part in ("[bold]data[/bold]", "recipe [red]both[/red]", "[x]", "best [m] 1.0000", "see [blue]", "note [/x]"):
        assert part in text


# --------------------------------------------------------------------------------------------------------- at the end


def test_summary_of_a_sweep_with_one_objective() -> None:
    trials = [
        trial(0, "failed", reason="ValueError:\n" + "many words " * 20, phases_run=0, phases_reused=0, seconds=3.2),
        trial(1, "finished", 0.95),
        trial(2, "stopped", 0.99, params={"distill.temperature": "2", "recipe": "dsd"}),
        trial(3, "finished", 0.97, phases_run=0, phases_reused=3, seconds=0.04),
    ]
    assert summary_table(view(*trials)).splitlines() == [
        "trial  status    temperature  sparsity  recipe  eval/accuracy  run  reused  time",
        "t003   finished  3            0.5               0.9700         0    3       0.0 s",
        "t001   finished  1            0.5               0.9500         2    1       12.3 s",
        "t002   stopped   2                      dsd     0.9900         2    1       12.3 s",
        "t000   failed    0            0.5                              0    0       3.2 s   ValueError: many words "
        "many words many words many words many words many words many words many …",
        "2 finished, 1 stopped, 1 failed  phases 20 run, 28 reused  steps 4,000 run, 1,000 saved  0:01:40",
    ]


def test_summary_marks_the_pareto_front_and_puts_it_first() -> None:
    sizes = (5000.0, 1000.0, 3000.0)
    trials = [
        trial(i, "finished", params={"seed": str(i)}, metrics={"eval/accuracy": accuracy, "parameters_left": size})
        for i, (accuracy, size) in enumerate(zip((0.98, 0.9, 0.89), sizes, strict=True))
    ]
    assert summary_table(view(*trials, objectives=(ACCURACY, SIZE)), front=["t000", "t001"]).splitlines() == [
        "   trial  status    seed  eval/accuracy  parameters_left  run  reused  time",
        "*  t000   finished  0     0.9800         5,000            2    1       12.3 s",
        "*  t001   finished  1     0.9000         1,000            2    1       12.3 s",
        "   t002   finished  2     0.8900         3,000            2    1       12.3 s",
        "* on the Pareto front of eval/accuracy (max) and parameters_left (min)",
        "3 finished  phases 20 run, 28 reused  steps 4,000 run, 1,000 saved  0:01:40",
    ]


def test_summary_of_many_trials_has_thirty_of_them_some_broken_ones_included() -> None:
    lines = summary_table(many()).splitlines()
    assert len(lines) == 1 + 30 + 1 + 1
    assert [line.split()[:2] for line in lines[1:3]] == [["t195", "finished"], ["t190", "finished"]]
    assert [line.split()[:2] for line in lines[26:31]] == [[f"t{i}", "failed"] for i in (197, 192, 187, 182, 177)]
    assert lines[31] == "… and 170 more: 40 running, 40 waiting, 15 finished, 40 stopped, 35 failed"


# ------------------------------------------------------------------------------------------------- the winner's lines

OVERRIDES = ["model={kind: mlp, hidden: [64]}", "name=it's $HOME", "distill.temperature=4", 'data.path="a b"; rm *']


def as_a_shell_reads(line: str) -> list[str]:
    """The arguments that a command gets."""
    output = subprocess.run(f"printf '%s\\0' {line}", shell=True, check=True, capture_output=True, text=True).stdout
    return output.split("\0")[:-1]


def test_lines_that_repeat_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    train, submit = winner_lines(Path("tune_spaces/../jobs/digits.yaml"), ["seed=1"], "./runs", "http://head:8265")
    assert train == "temper train jobs/digits.yaml seed=1"
    assert submit == (
        "ray job submit --address http://head:8265 --working-dir . --runtime-env-json "
        """'{"env_vars": {"PYTHONPATH": "platform"}}' -- python -m temper train jobs/digits.yaml seed=1 """
        f"storage={CHECKOUT / 'runs'} --address auto"
    )


def test_the_lines_hold_whatever_values_a_shell_would_read_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    train, submit = winner_lines(Path("jobs/digits.yaml"), OVERRIDES, "s3://bucket/runs")
    assert as_a_shell_reads(train) == ["temper", "train", "jobs/digits.yaml", *OVERRIDES]
    words = as_a_shell_reads(submit)
    entry = words[words.index("--") + 1 :]
    expected = [*OVERRIDES, "storage=s3://bucket/runs"]
    assert entry == ["python", "-m", "temper", "train", "jobs/digits.yaml", *expected, "--address", "auto"]
    assert as_a_shell_reads(shlex.join(entry)) == entry  # as Ray hands it to the cluster's shell
    options = cli._parse(entry[3:])
    assert (options.job, options.overrides, options.address) == ("jobs/digits.yaml", expected, "auto")


def test_from_another_folder_the_job_and_the_source_are_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT / "jobs")
    train, submit = winner_lines(Path("digits.yaml"), [], "runs")
    assert train == "temper train digits.yaml"
    assert "--working-dir .. " in submit
    assert submit.endswith(f" jobs/digits.yaml storage={CHECKOUT / 'jobs' / 'runs'} --address auto")

    monkeypatch.chdir(tmp_path)
    train, submit = winner_lines(Path("mine/job.yaml"), [], "runs")
    assert train == "temper train mine/job.yaml"
    package = CHECKOUT / "platform" / "temper"
    assert submit == (
        "ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env-json "
        f"""'{{"py_modules": ["{package}"]}}' -- python -m temper train mine/job.yaml storage={tmp_path / "runs"} """
        "--address auto"
    )

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train, submit = winner_lines(tmp_path / "job.yaml", [], "/runs")
    assert train == f"temper train {tmp_path / 'job.yaml'}"
    assert "--working-dir .. " in submit
    assert submit.endswith(" -- python -m temper train job.yaml storage=/runs --address auto")
