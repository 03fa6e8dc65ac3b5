"""Searches beside each other: random, TPE, ASHA by phase and PBT, over a student's distillation and over its pruning.

    python benchmarks/search_experiment.py [--spaces kd dsd] [--searches random asha …] [--seeds 5] [--trials 27]
                                           [--storage runs/search] [--out docs/search_experiment] [--quick]

Every search is a real command, `temper sweep SPACE --json`. The spaces, of a student of scikit-learn's digits with one
hidden layer and every twentieth label, taught by `jobs/digits_teacher.yaml`:

    kd     temperature 1 to 20, weight of the soft targets 0 to 1, learning rate; one phase of 27 epochs
    dsd    sparsity 0.1 to 0.9, the split of the steps between the sparse and the re-dense phase, their learning rates;
           the dense phase is the same for all

and the searches, each of `--trials` trials:

    random    every trial to its end
    tpe       Optuna's, every trial to its end
    asha      the trials of `random`, of which at each rung one in three goes on; by phase: of `dsd` no rung is in the
              phase that the trials share, nor in the first half of one
    pbt       of `dsd`: where a phase ends, the worst quarter goes on from the best

All run on one storage, one after the other, so that what one has trained is there for the next; the same command goes
on after a stop. So steps are counted by the trials, in three ways: `alone`, each trial from its first step, as it would
train without any reuse; `search`, each phase once, as the search would run it in an empty storage; `here`, those that
this command ran.

The objective is the accuracy on held-out examples. The regret after so many steps of `search` is what the best finished
trial so far lacks to the best of all searches of the space. Printed are its means over the sampler's seeds: at the end,
and at equal steps, which are those of the shortest search of the seed, with the 95 % intervals of the paired
differences to `random` (Student's t); and the test accuracy of the picked trial, which decided nothing. The last line
is JSON; `--out` writes it to a file, too, beside a picture. `--quick` is a small one, to try it out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dsd_experiment import paired_difference
from sweep import ROOT, say, temper
from temper.files import read_lines

OBJECTIVE = {"metric": "eval/accuracy", "mode": "max"}
TEST = "test/accuracy"
JOB = ROOT / "jobs" / "digits_student_dsd.yaml"
SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"search": {"kind": "random"}},
    "tpe": {"search": {"kind": "tpe"}},
    "asha": {"search": {"kind": "random"}, "scheduler": {"kind": "asha"}},
    "pbt": {"search": {"kind": "random"}, "scheduler": {"kind": "pbt"}},
}
SEARCHES = {"kd": ("random", "tpe", "asha"), "dsd": ("random", "tpe", "asha", "pbt")}
COLORS = {"random": "#7f7f7f", "tpe": "#1f77b4", "asha": "#d62728", "pbt": "#2ca02c"}
RUNGS = {"kd": [0.25, 0.5, 0.75], "dsd": [0.5, 1.0]}


# ----------------------------------------------------------------------------------------------------------- the spaces


def space_of(name: str, shorten: int = 1) -> dict[str, Any]:
    """A space without its search; `shorten` divides all steps."""
    return {"name": f"search_{name}", "job": str(JOB), "objectives": [OBJECTIVE], **_SPACES[name](shorten)}


def _kd(shorten: int) -> dict[str, Any]:
    return {
        "set": {"dsd": None, "budget.steps": 480 // shorten, "budget.evaluate_every": 40 // shorten},
        "space": {
            "distill.temperature": {"kind": "loguniform", "low": 1.0, "high": 20.0},
            "distill.alpha": {"kind": "uniform", "low": 0.0, "high": 1.0},
            "optimizer.lr": {"kind": "loguniform", "low": 1.0e-3, "high": 1.0e-1},
        },
    }


def _dsd(shorten: int) -> dict[str, Any]:
    splits = {"short": 60, "even": 120, "long": 180}
    return {
        "set": {"budget.steps": 240 // shorten, "budget.evaluate_every": 30 // shorten},
        "space": {
            "dsd.rounds.0.sparsity": {"kind": "uniform", "low": 0.1, "high": 0.9},
            "split": {
                "kind": "choice",
                "settings": {
                    label: {
                        "dsd.rounds.0.sparse_steps": steps // shorten,
                        "dsd.rounds.0.redense_steps": (240 - steps) // shorten,
                    }
                    for label, steps in splits.items()
                },
            },
            "dsd.sparse_lr_factor": {"kind": "loguniform", "low": 0.03, "high": 1.0},
            "dsd.redense_lr_factor": {"kind": "loguniform", "low": 0.01, "high": 1.0},
        },
    }


_SPACES = {"kd": _kd, "dsd": _dsd}


def write_space(folder: Path, name: str, search: str, *, trials: int, seed: int, shorten: int) -> Path:
    settings = dict(SETTINGS[search])
    if search == "asha":
        settings["scheduler"] = {**settings["scheduler"], "rungs": RUNGS[name]}
    space = {**space_of(name, shorten), **settings, "budget": {"trials": trials}, "seed": seed}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{search}_{seed}.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    return path


# ----------------------------------------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Point:
    """A trial came to its end: steps of the search until then, and what it reached."""

    steps: int
    value: float


@dataclass(frozen=True)
class Steps:
    """See the module."""

    alone: int
    search: int
    here: int


class Meter:
    """Counts the steps of a search with each phase once, from its trials' progress in the order in which it was made.
    A phase that no trial has completed is its trial's own."""

    def __init__(self, phases: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        self._phases = phases
        self._reached: dict[str, int] = {}
        self.steps = 0

    def reach(self, trial: str, step: int) -> None:
        """The trial is at this step of its job."""
        left = step
        for fingerprint, steps in self._phases[trial]:
            self._note(fingerprint, min(left, steps))
            left -= min(left, steps)
        self._note(f"of {trial}", left)

    def _note(self, phase: str, step: int) -> None:
        before = self._reached.get(phase, 0)
        self._reached[phase] = max(before, step)
        self.steps += max(step - before, 0)


def phases_of(trials: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[str, int]]]:
    """Fingerprints and steps of each trial's complete phases, by its id."""
    return {trial["id"]: [(phase["fingerprint"], phase["steps"]) for phase in trial["phases"]] for trial in trials}


def finishes(
    ledger: Iterable[Mapping[str, Any]], phases: Mapping[str, Sequence[tuple[str, int]]], metric: str
) -> tuple[list[Point], int]:
    """The points of a search, in order, and all of its steps."""
    meter, points = Meter(phases), []
    for line in ledger:
        result = line.get("result")
        if result is None:
            continue
        meter.reach(line["trial"], result["step"])
        if result["done"]:
            points.append(Point(meter.steps, result[metric]))
    return points, meter.steps


def steps_alone(trials: Iterable[Mapping[str, Any]]) -> int:
    return sum(trial["steps"] for trial in trials)


def regret(points: Sequence[Point], best: float, steps: float) -> float | None:
    """What the best trial that had finished after so many steps lacks to `best`; None where there was none."""
    values = [point.value for point in points if point.steps <= steps]
    return best - max(values) if values else None


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean; None where a value is."""
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.mean(known) if known and len(known) == len(found) else None


# --------------------------------------------------------------------------------------------------------- the searches


@dataclass(frozen=True)
class Search:
    """One search with one seed of the sampler; `test` is the test accuracy of the trial that it picked."""

    steps: Steps
    points: list[Point]
    statuses: dict[str, int]
    test: float


def read_search(result: Mapping[str, Any], ledger: Sequence[Mapping[str, Any]]) -> Search:
    """From what `temper sweep --json` printed, and its ledger."""
    trials = result["trials"]
    points, steps = finishes(ledger, phases_of(trials), OBJECTIVE["metric"])
    statuses = [trial["status"] for trial in trials]
    return Search(
        steps=Steps(steps_alone(trials), steps, result["steps_run"]),
        points=points,
        statuses={status: statuses.count(status) for status in dict.fromkeys(statuses)},
        test=result["best"]["metrics"][TEST],
    )


def run_search(name: str, search: str, seed: int, options: argparse.Namespace) -> Search:
    path = write_space(
        options.storage / "spaces", name, search, trials=options.trials, seed=seed, shorten=options.shorten
    )
    result, seconds = temper("sweep", str(path), f"storage={options.storage}")
    found = read_search(result, read_lines(Path(result["folder"]) / "trials.jsonl"))
    best = max(point.value for point in found.points)
    say(f"{name} {search:<7} seed {seed}  {found.steps.search:7,} steps  best {best:.4f}  {seconds:4.0f} s")
    return found


# ----------------------------------------------------------------------------------------------------------- reporting


def summarize(searches: Mapping[str, Sequence[Search]]) -> dict[str, Any]:
    """Of one space, by search: each list is by seed."""
    best = max(point.value for of_search in searches.values() for each in of_search for point in each.points)
    equal = [min(each.steps.search for each in of_seed) for of_seed in zip(*searches.values(), strict=True)]
    summary = {name: _summary(of_search, best, equal) for name, of_search in searches.items()}
    for row in summary.values():
        row["to_random"] = _difference(row["regret_at_equal_steps"], summary["random"]["regret_at_equal_steps"])
    return {"best": best, "equal_steps": equal, "searches": summary}


def _summary(searches: Sequence[Search], best: float, equal: Sequence[int]) -> dict[str, Any]:
    at_equal = [regret(each.points, best, steps) for each, steps in zip(searches, equal, strict=True)]
    at_end = [regret(each.points, best, each.steps.search) for each in searches]
    return {
        "steps": [asdict(each.steps) for each in searches],
        "mean_steps": {
            kind: statistics.mean(getattr(each.steps, kind) for each in searches)
            for kind in ("alone", "search", "here")
        },
        "statuses": [each.statuses for each in searches],
        "regret": at_end,
        "mean_regret": mean_known(at_end),
        "regret_at_equal_steps": at_equal,
        "mean_regret_at_equal_steps": mean_known(at_equal),
        "test": [each.test for each in searches],
        "mean_test": statistics.mean(each.test for each in searches),
        "points": [[asdict(point) for point in each.points] for each in searches],
    }


def _difference(ours: Sequence[float | None], others: Sequence[float | None]) -> dict[str, Any] | None:
    """Pairs in which both had a finished trial; None where there are not two of them, or all are of one search."""
    pairs = [(mine, other) for mine, other in zip(ours, others, strict=True) if mine is not None and other is not None]
    if ours is others or len(pairs) < 2:
        return None
    found = paired_difference([mine for mine, _ in pairs], [other for _, other in pairs])
    return {**asdict(found), "verdict": found.verdict}


def table(name: str, report: Mapping[str, Any]) -> str:
    lines = [
        f"\n{name}: best held-out accuracy {report['best']:.4f}; means over the seeds; regret in points",
        f"{'':<8}{'alone':>9}{'search':>9}{'here':>9}{'regret':>9}{'at equal steps':>16}"
        f"{'to random, 95 % interval':>34}{'test':>8}",
    ]
    for search, row in report["searches"].items():
        steps = "".join(f"{row['mean_steps'][kind]:>9,.0f}" for kind in ("alone", "search", "here"))
        regrets = f"{_points(row['mean_regret']):>9}{_points(row['mean_regret_at_equal_steps']):>16}"
        lines.append(f"{search:<8}{steps}{regrets}{_interval(row['to_random']):>34}{row['mean_test']:>8.4f}")
    return "\n".join(lines)


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _interval(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['low']:+.2f} … {100 * row['high']:+.2f}, {row['verdict']}"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """The mean regret by steps, a panel for each space, with each seed behind it."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "temper", "svg.fonttype": "none"})
    from matplotlib import pyplot

    spaces = report["spaces"]
    figure, panels = pyplot.subplots(1, len(spaces), figsize=(6 * len(spaces), 4.6), squeeze=False)
    for axes, (name, of_space) in zip(panels[0], spaces.items(), strict=True):
        _plot_space(axes, name, of_space)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _plot_space(axes: Any, name: str, report: Mapping[str, Any]) -> None:
    for search, row in report["searches"].items():
        curves = [[Point(**point) for point in points] for points in row["points"]]
        last = max(steps["search"] for steps in row["steps"])
        places = sorted({point.steps for points in curves for point in points} | {last})
        for points in curves:
            own = [(place, regret(points, report["best"], place)) for place in places]
            shown = [(place, 100 * value) for place, value in own if value is not None]
            axes.step(*zip(*shown, strict=True), where="post", color=COLORS[search], alpha=0.2, linewidth=0.8)
        means = [(place, mean_known(regret(points, report["best"], place) for points in curves)) for place in places]
        known = [(place, 100 * value) for place, value in means if value is not None]
        if known:
            axes.step(*zip(*known, strict=True), where="post", color=COLORS[search], linewidth=1.8, label=search)
    axes.set(title=f"{name}: regret, mean and each seed", xlabel="optimizer steps, each phase once", ylabel="points")
    axes.set_ylim(bottom=0)
    axes.grid(color="#eeeeee")
    axes.legend(loc="best", fontsize=9)


# --------------------------------------------------------------------------------------------------------- all together


def run_experiment(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the last line has."""
    spaces = {}
    for name in options.spaces:
        searches: dict[str, list[Search]] = {
            search: [] for search in SEARCHES[name] if search in (*options.searches, "random")
        }
        for seed in range(options.seeds):
            for search, found in searches.items():
                found.append(run_search(name, search, seed, options))
        spaces[name] = summarize(searches)
    return {"trials": options.trials, "seeds": options.seeds, "shorten": options.shorten, "spaces": spaces}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--spaces", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--searches", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="random always runs")
    parser.add_argument("--seeds", type=int, default=5, help="of the sampler, counted from 0")
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--storage", type=Path, default=Path("runs/search"))
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.svg")
    parser.add_argument("--quick", action="store_true", help="9 trials, 2 seeds, a quarter of the steps")
    options = parser.parse_args(arguments)
    options.shorten = 1
    if options.quick:
        options.trials, options.seeds, options.shorten = 9, 2, 4
    options.storage = options.storage.absolute()
    options.out = None if options.out is None else options.out.absolute()
    return options


def main() -> None:
    options = parse()
    report = run_experiment(options)
    for name, of_space in report["spaces"].items():
        print(table(name, of_space))
    text = json.dumps(report)
    if options.out is not None:
        options.out.with_suffix(".json").write_text(text + "\n")
        plot(report, options.out.with_suffix(".svg"))
    print(text)


if __name__ == "__main__":
    main()
