"""`temper sweep` beside the sweep as Ray's guide has it, with the same training loop, and its trials beside themselves.

    python benchmarks/sweep.py [SPACE] [--trials N] [--alone 4] [--storage FOLDER] [--out docs/sweep] [key=value …]
    python benchmarks/sweep.py --many 200 [--storage FOLDER] [--out docs/sweep_many]

The first compares, for a space of grids (by default `tune_spaces/temperature_sparsity.yaml`):

    guide     benchmarks/ray_guide_sweep.py: a Tune trial is a function that calls `trainer.fit()`
    temper    temper sweep SPACE --json
    alone     temper train JOB key=value … --json for `--alone` of the trials, evenly from the grid, each in a storage
              of its own; nothing of it is timed

The teacher is trained before all of them, once, and named to all. Wall time is that of the whole command. Counted are
the optimizer steps that were run; of temper they must be those of the distinct phases of its trials, because the
storage was empty. The last metrics of each trial must be the same bits, but for the times. `--trials` runs the first N
of the grid in the guide's way: then its seconds and steps are those of fewer trials, and ratios are of seconds and
steps per trial.

The second runs so many trials of a few steps in one sweep, and reads from outside what its processes take meanwhile:
resident and private memory, threads, file descriptors (a process group left behind keeps some). Printed is by how much
each grows in 100 trials, from a line through all samples after the first quarter of the trials.

The last line is JSON; `--out` writes it to a file, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from process_tree import Growth, Sample, growths, usage_by_role
from ray_guide_sweep import Trial, grid_trials
from temper.config.load import load_job
from temper.config.space_load import base_job, load_space
from temper.files import read_lines

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "tune_spaces" / "temperature_sparsity.yaml"
MOST_TIME, MOST_STEPS, MOST_START_S = 1 / 5, 1 / 2, 1.0
FLAT = 0.02  # of its median: what a figure may grow in 100 trials
SAMPLE_EVERY_S = 2.0


# -------------------------------------------------------------------------------------------------------- the commands


def run_command(*arguments: str) -> tuple[dict[str, Any], float]:
    """The last line of a Python command, and its seconds. Raises RuntimeError with what it said where it failed."""
    command = [sys.executable, *arguments]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]), seconds


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def temper(*arguments: str) -> tuple[dict[str, Any], float]:
    return run_command("-m", "temper", *arguments, "--json")


def train_teacher(job: Path, storage: Path) -> list[str]:
    """The override that names the job's teacher, trained; none where it has none."""
    distill = load_job(job).distill
    if distill is None:
        return []
    assert isinstance(distill.teacher, str), "a job taught by one job"
    result, _ = temper("train", str(job.parent / distill.teacher), f"storage={storage}")
    return [f"distill.teacher={Path(result['checkpoint']).parent.parent}"]


def run_alone(job: Path, trials: Sequence[Trial], storage: Path) -> list[dict[str, Any]]:
    """What `temper train` says of each trial; as many commands at a time as there are cores."""

    def run(trial: Trial) -> dict[str, Any]:
        result, _ = temper("train", str(job), *trial.overrides, f"storage={storage / str(trial.number)}")
        say(f"alone: {trial.params}")
        return result

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return list(executor.map(run, trials))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Side:
    """One way to run the sweep; `start_s` is the median time from a trial's start to its first step, None where no
    trial took one."""

    trials: int
    seconds: float
    steps: int
    start_s: float | None


def guide_side(report: Mapping[str, Any], seconds: float) -> Side:
    trials = report["trials"]
    return Side(len(trials), seconds, report["steps"], median(trial["time_to_first_step_s"] for trial in trials))


def temper_side(report: Mapping[str, Any], seconds: float) -> Side:
    """Raises RuntimeError where the sweep ran other phases or steps than the distinct ones of its trials."""
    trials = report["trials"]
    phases = distinct_phases(trials)
    ran, distinct = (report["phases_run"], report["steps_run"]), (len(phases), sum(phases.values()))
    if ran != distinct:
        raise RuntimeError(f"phases and steps that were run: {ran}; distinct ones of the trials: {distinct}")
    return Side(len(trials), seconds, report["steps_run"], median(trial["time_to_first_step_s"] for trial in trials))


def distinct_phases(trials: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The steps of every phase of the trials by its fingerprint."""
    return {phase["fingerprint"]: phase["steps"] for trial in trials for phase in trial["phases"]}


def median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratios(ours: Side, others: Side) -> dict[str, float]:
    """Of seconds and steps per trial; where both ran the same trials these are those of the whole."""
    return {
        "time": ours.seconds / ours.trials / (others.seconds / others.trials),
        "steps": ours.steps / ours.trials / (others.steps / others.trials),
    }


def met(ratio: Mapping[str, float], start_s: float | None) -> dict[str, bool]:
    """Which targets are."""
    return {
        "time": ratio["time"] <= MOST_TIME,
        "steps": ratio["steps"] <= MOST_STEPS,
        "start": start_s is not None and start_s <= MOST_START_S,
    }


def differing(ours: Mapping[str, float], others: Mapping[str, float]) -> dict[str, list[float | None]]:
    """The metrics of `others`, but for times, that are not bit for bit in `ours`: both values by name. What `ours` has
    beside them does not count."""
    return {
        name: [ours.get(name), value]
        for name, value in others.items()
        if not name.startswith("time/") and not same_bits(ours.get(name), value)
    }


def same_bits(one: float | None, other: float | None) -> bool:
    """Whether two numbers are one; not-a-number is itself."""
    return repr(one) == repr(other)


def by_params(trials: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {params_key(trial["params"]): trial for trial in trials}


def params_key(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def compare(
    ours: Mapping[str, Mapping[str, Any]], others: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, list[float | None]]]:
    """By params, of the trials in `others` those whose metrics differ from those in `ours`."""
    found = {key: differing(ours[key]["metrics"], trial["metrics"]) for key, trial in others.items()}
    return {key: names for key, names in found.items() if names}


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, or all where there are fewer, the first and the last among them."""
    if count >= len(items):
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def run_comparison(options: argparse.Namespace, storage: Path) -> dict[str, Any]:
    space, of_job = load_space(options.space, options.overrides)
    job = base_job(options.space, space)
    taught = train_teacher(job, storage / "teacher")
    say("teacher trained; now the guide's way")
    fixed = [*options.overrides, *taught]
    guide_trials = ["--trials", str(options.trials)] if options.trials else []
    live = ["distill.cache=none"] if taught else []
    script = str(Path(__file__).with_name("ray_guide_sweep.py"))
    guide, guide_s = run_command(
        script, str(options.space), *guide_trials, "--storage", str(storage / "guide"), *fixed, *live
    )
    say(f"{guide_s:.0f} s; now temper sweep")
    sweep, sweep_s = temper("sweep", str(options.space), *fixed, f"storage={storage / 'temper'}")
    say(f"{sweep_s:.0f} s; now trials alone")
    checked = evenly(grid_trials(space, (*of_job, *taught)), options.alone)
    alone = [
        {"params": trial.params, "metrics": result["metrics"]}
        for trial, result in zip(checked, run_alone(job, checked, storage / "alone"), strict=True)
    ]
    ours, others = temper_side(sweep, sweep_s), guide_side(guide, guide_s)
    ratio = ratios(ours, others)
    return {
        "space": options.space.name,
        "overrides": options.overrides,
        "cores": os.cpu_count(),
        "guide": asdict(others),
        "temper": {**asdict(ours), "phases_run": sweep["phases_run"], "phases_reused": sweep["phases_reused"]},
        "ratios": ratio,
        "targets": {"time": MOST_TIME, "steps": MOST_STEPS, "start_s": MOST_START_S},
        "met": met(ratio, ours.start_s),
        "checked_alone": len(alone),
        "differing_from_alone": compare(by_params(sweep["trials"]), by_params(alone)),
        "checked_guide": len(guide["trials"]),
        "differing_from_guide": compare(by_params(sweep["trials"]), by_params(guide["trials"])),
    }


def comparison_table(report: Mapping[str, Any]) -> str:
    guide, ours, targets = report["guide"], report["temper"], report["targets"]
    marks = {name: "met" if reached else "MISSED" for name, reached in report["met"].items()}
    lines = [
        f"{report['space']}: trials: {guide['trials']} in the guide's way, {ours['trials']} of temper sweep; "
        f"{report['cores']} cores",
        f"{'':<26}{'guide':>10}{'temper':>10}{'ratio':>8}  target",
        f"{'wall time, s':<26}{guide['seconds']:>10.1f}{ours['seconds']:>10.1f}{report['ratios']['time']:>8.3f}"
        f"  ≤ {targets['time']:g}, {marks['time']}",
        f"{'optimizer steps':<26}{guide['steps']:>10,}{ours['steps']:>10,}{report['ratios']['steps']:>8.3f}"
        f"  ≤ {targets['steps']:g}, {marks['steps']}",
        f"{'start to first step, s':<26}{shown(guide['start_s'])}{shown(ours['start_s'])}{'':>8}"
        f"  ≤ {targets['start_s']:g}, {marks['start']}",
        _bits("alone by temper train", report["checked_alone"], report["differing_from_alone"]),
        _bits("in the guide's way", report["checked_guide"], report["differing_from_guide"]),
    ]
    if guide["trials"] != ours["trials"]:
        lines.append("The ratios are per trial: the guide's way ran fewer of them.")
    return "\n".join(lines)


def shown(seconds: float | None) -> str:
    return f"{'–':>10}" if seconds is None else f"{seconds:>10.2f}"


def _bits(how: str, checked: int, differing: Mapping[str, Any]) -> str:
    same = f"the same bits as {how}: {checked - len(differing)} of {checked} trials"
    rows = [
        f"  {params}: {name} {ours!r}, {how} {other!r}"
        for params, names in differing.items()
        for name, (ours, other) in itertools.islice(names.items(), 3)
    ]
    return "\n".join([same, *rows])


# ---------------------------------------------------------------------------------------------------------- many trials


def write_many(folder: Path, trials: int) -> Path:
    """A job of a few steps, and a space of so many seeds of it."""
    job = {
        "name": "many",
        "model": {"kind": "mlp", "hidden": [16]},
        "data": {"kind": "digits", "global_batch": 64},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "parallel": {"workers": 1},
        "budget": {"steps": 10},
    }
    space = {
        "name": "many",
        "job": "job.yaml",
        "space": {"seed": {"kind": "grid", "values": list(range(trials))}},
        "objectives": [{"metric": "eval/accuracy", "mode": "max"}],
        "search": {"kind": "grid"},
    }
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder / "space.yaml"


def run_many(trials: int, storage: Path) -> dict[str, Any]:
    """Raises RuntimeError where the command fails, or a trial did not finish."""
    space = write_many(storage / "space", trials)
    command = [sys.executable, "-m", "temper", "sweep", str(space), f"storage={storage / 'runs'}", "--json"]
    samples = []
    with tempfile.TemporaryFile("w+") as out, (storage / "stderr.txt").open("w") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=errors)
        while process.poll() is None:
            samples.append(Sample(ended_trials(storage / "runs"), usage_by_role(process.pid)))
            time.sleep(SAMPLE_EVERY_S)
        seconds = time.perf_counter() - began
        out.seek(0)
        lines = out.read().splitlines()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}\n{(storage / 'stderr.txt').read_text()[-4000:]}")
    report = json.loads(lines[-1])
    starts = [trial["time_to_first_step_s"] for trial in report["trials"]]
    # At the end processes go.
    found = growths([sample for sample in samples if sample.trials < trials], trials // 4)
    return {
        "trials": len(report["trials"]),
        "seconds": seconds,
        "start_s": median(starts),
        "growth": {role: {name: asdict(each) for name, each in rows.items()} for role, rows in found.items()},
        "flat": is_flat(found["all"]),
        "samples": [{"trials": sample.trials, **asdict(sample.total)} for sample in samples],
    }


def ended_trials(storage: Path) -> int:
    """By the ledger of the one sweep in the storage."""
    return sum("end" in line for ledger in storage.glob("sweeps/*/trials.jsonl") for line in read_lines(ledger))


def is_flat(rows: Mapping[str, Growth]) -> bool:
    return all(each.share <= FLAT for each in rows.values())


def many_table(report: Mapping[str, Any]) -> str:
    lines = [
        f"{report['trials']} trials in {report['seconds']:.0f} s, start to first step {report['start_s'] or 0:.2f} s; "
        f"growth of all processes in 100 trials at most {FLAT:.0%}: {'yes' if report['flat'] else 'NO'}",
        f"{'median, + in 100 trials':<26}{'processes':>14}{'resident, MiB':>18}{'private, MiB':>18}"
        f"{'threads':>16}{'descriptors':>16}",
    ]
    for role, rows in report["growth"].items():
        widths = {"processes": 14, "resident_mib": 18, "private_mib": 18, "threads": 16, "descriptors": 16}
        cells = [
            f"{rows[name]['median']:.0f} {rows[name]['per_100_trials']:+.2f}".rjust(width)
            for name, width in widths.items()
        ]
        lines.append(f"{role:<26}{''.join(cells)}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- all together


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("space", nargs="?", type=Path, default=SPACE, metavar="SPACE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the space's job, for all sides")
    parser.add_argument("--trials", type=int, help="only the first N of the grid in the guide's way")
    parser.add_argument("--alone", type=int, default=4, help="how many trials are trained alone, too")
    parser.add_argument("--many", type=int, metavar="N", help="instead: N trials, and what the processes take")
    parser.add_argument("--storage", type=Path, help="a folder that is not there; by default a temporary one")
    parser.add_argument("--out", type=Path, help="writes OUT.json")
    options = parser.parse_intermixed_args(arguments)
    options.space = options.space.absolute()
    options.out = None if options.out is None else options.out.absolute()
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        storage = Path(temporary) / "sweep" if options.storage is None else options.storage.absolute()
        storage.mkdir(parents=True)
        if options.many is None:
            report = run_comparison(options, storage)
            print(comparison_table(report))
        else:
            report = run_many(options.many, storage)
            print(many_table(report))
    text = json.dumps(report)
    if options.out is not None:
        options.out.with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
