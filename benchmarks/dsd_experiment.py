"""Dense-sparse-dense (Han et al., ICLR 2017) beside its controls, at equal compute, paired by seed.

    python benchmarks/dsd_experiment.py [--seeds 6] [--parallel 2] [--storage runs] [--out docs/dsd_experiment]

Every arm is a shipped job, `jobs/dsd/<arm>.yaml`, and every result that of a real command,
`temper train jobs/dsd/<arm>.yaml seed=<seed> --json`. The arms, all of one small CNN on Fashion-MNIST:

    dsd_d                 the dense phase alone: a third of the others' compute
    dsd_long              one dense phase as long as three, its schedule stretched: the one arm that shares nothing
    dsd_llr               on from the dense phase at its lowest learning rate: the paper's control
    dsd_ddd               the learning rate's restarts without a mask: the control that the paper lacks
    dsd_random            30 % pruned at random
    dsd_25 … dsd_70       dense-sparse-dense with so many per cent pruned

The arms of a seed begin with the same dense phase, bit for bit, because the phase store has it; they run one after the
other, `--parallel` seeds at a time. What is finished is not computed again, so the same command goes on after a stop.
`--shorten 40` makes all phases 40 times shorter, to try it out.

Printed are the test errors at the end of each arm and the mean paired differences to D, LLR and D-D-D with their 95 %
intervals (Student's t), each interval for itself. The test set decided nothing: it is looked at once at the end of a
phase, and the recipe was chosen on held-out training examples with other seeds. The last line is JSON; `--out` writes
it to a file, too, beside a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from temper.config.load import load_job

ROOT = Path(__file__).parent.parent
ARMS = (
    "dsd_d",
    "dsd_long",
    "dsd_llr",
    "dsd_ddd",
    "dsd_random",
    "dsd_25",
    "dsd_30",
    "dsd_50",
    "dsd_70",
)
REFERENCES = {"dsd_d": "D", "dsd_llr": "LLR", "dsd_ddd": "D-D-D"}
CONFIDENCE = 0.95


# --------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What differences of errors say; less is better."""
        if self.low <= 0 <= self.high:
            return "no effect seen"
        return "better" if self.mean < 0 else "worse"


def paired_difference(ours: Sequence[float], others: Sequence[float]) -> Difference:
    """`ours` − `others`, pair by pair (at least two), with the 95 % interval of Student's t with n − 1 degrees of
    freedom."""
    differences = [mine - other for mine, other in zip(ours, others, strict=True)]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    return Difference(mean, mean - half, mean + half)


# --------------------------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Outcome:
    """One arm with one seed. `errors` and `held_out` are per cent at the end of each phase, on the test set and on the
    held-out examples; `sparsity` is the share of prunable weights that were zero at the end of the sparse phase."""

    run_id: str
    dense: str
    steps: int
    errors: dict[str, float]
    held_out: dict[str, float]
    sparsity: float

    @property
    def error(self) -> float:
        """The test error of the arm."""
        return list(self.errors.values())[-1]


def outcome(result: Mapping[str, Any]) -> Outcome:
    """What `temper train --json` printed, as far as it counts here."""
    phases = result["phases"]
    sparse = [phase["metrics"].get("sparsity", 0.0) for phase in phases if phase["name"].startswith("sparse")]
    return Outcome(
        run_id=result["run_id"],
        dense=phases[0]["fingerprint"],
        steps=sum(phase["steps"] for phase in phases),
        errors={phase["name"]: _per_cent(phase["metrics"]["test/accuracy"]) for phase in phases},
        held_out={phase["name"]: _per_cent(phase["metrics"]["eval/accuracy"]) for phase in phases},
        sparsity=max(sparse, default=0.0),
    )


def _per_cent(accuracy: float) -> float:
    """The error, free of the noise of fp32: one of 10,000 examples is 0.01."""
    return round(100 * (1 - accuracy), 3)


def overrides(arm: str, seed: int, storage: Path, shorten: int) -> list[str]:
    """The keys of the job that the command sets; `shorten` divides the steps of each phase."""
    keys = [f"seed={seed}", f"storage={storage}"]
    if shorten == 1:
        return keys
    job = load_job(ROOT / "jobs" / "dsd" / f"{arm}.yaml")
    assert job.budget.steps is not None, "the shipped jobs count in steps"
    keys.append(f"budget.steps={job.budget.steps // shorten}")
    for index, round_ in enumerate(job.dsd.rounds if job.dsd else ()):
        for kind in ("sparse_steps", "redense_steps"):
            keys.append(f"dsd.rounds.{index}.{kind}={getattr(round_, kind) // shorten}")
    return keys


def train(arm: str, keys: list[str]) -> dict[str, Any]:
    """The result of the command. Raises RuntimeError with what it said where it failed."""
    command = [sys.executable, "-m", "temper", "train", f"jobs/dsd/{arm}.yaml", *keys, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_seed(arms: Sequence[str], seed: int, storage: Path, shorten: int) -> dict[str, Outcome]:
    """All arms of a seed, one after the other, so that only the first computes the dense phase."""
    outcomes = {}
    for arm in arms:
        result = train(arm, overrides(arm, seed, storage, shorten))
        outcomes[arm] = outcome(result)
        say = f"seed {seed}  {arm:<10}  test error {outcomes[arm].error:6.2f} %  {result['seconds']:5.0f} s"
        print(say, file=sys.stderr, flush=True)
    return outcomes


def check_pairs(outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """Raises RuntimeError where arms are no pairs: another dense phase, or another number of steps."""
    sharing = {arm: found for arm, found in outcomes.items() if arm != "dsd_long"}
    if len({tuple(found.dense for found in arm) for arm in sharing.values()}) > 1:
        raise RuntimeError(f"these do not begin with one dense phase a seed: {', '.join(sharing)}")
    steps = {arm: [found.steps for found in of_arm] for arm, of_arm in outcomes.items() if arm != "dsd_d"}
    if len({number for numbers in steps.values() for number in numbers}) > 1:
        raise RuntimeError(f"these do not take equally many steps: {steps}")


# ----------------------------------------------------------------------------------------------------------- reporting


def summarize(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """By arm: all outcomes, means, and the differences to those of the references that ran."""
    errors = {arm: [found.error for found in of_arm] for arm, of_arm in outcomes.items()}
    return {
        arm: {
            "mean_error": statistics.mean(errors[arm]),
            "errors": errors[arm],
            "sparse_errors": [found.errors["sparse-1"] for found in of_arm if "sparse-1" in found.errors],
            "sparsity": statistics.mean(found.sparsity for found in of_arm),
            "differences": {
                name: {**asdict(difference), "verdict": difference.verdict}
                for reference, name in REFERENCES.items()
                if reference in errors and reference != arm
                for difference in [paired_difference(errors[arm], errors[reference])]
            },
            "outcomes": [asdict(found) for found in of_arm],
        }
        for arm, of_arm in outcomes.items()
    }


def print_tables(summary: Mapping[str, Any]) -> None:
    print("Test error, %: mean of the seeds, after the sparse phase, and each seed")
    print(f"{'arm':<10}  {'mean':>6}  {'sparse':>6}  {'sparsity':>8}  seeds")
    for arm, found in summary.items():
        sparse = f"{statistics.mean(found['sparse_errors']):6.2f}" if found["sparse_errors"] else " " * 6
        seeds = "  ".join(f"{error:.2f}" for error in found["errors"])
        print(f"{arm:<10}  {found['mean_error']:6.2f}  {sparse}  {found['sparsity']:8.0%}  {seeds}")
    for name in REFERENCES.values():
        rows = {arm: found["differences"].get(name) for arm, found in summary.items()}
        if any(rows.values()):
            print(f"\nDifference to {name}, points of error: mean, 95 % interval")
        for arm, row in rows.items():
            if row:
                interval = f"{row['low']:+.3f} … {row['high']:+.3f}"
                print(f"{arm:<10}  {row['mean']:+7.3f}  {interval}  {row['verdict']}")


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """All errors on the left, the differences to the references with their intervals on the right."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "temper", "svg.fonttype": "none"})
    from matplotlib import pyplot

    arms = list(summary)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.6 * len(arms) + 1.6), sharey=True)
    for place, found in enumerate(summary.values()):
        errors = found["errors"]
        left.plot(errors, [place] * len(errors), "o", color="#1f77b4", alpha=0.45, markersize=5)
        left.plot(found["mean_error"], place, "|", color="black", markersize=16, markeredgewidth=2)
    left.set(title="Test error of each seed, and their mean", xlabel="%", yticks=range(len(arms)), yticklabels=arms)
    left.invert_yaxis()
    for number, (name, color) in enumerate(zip(REFERENCES.values(), ("#1f77b4", "#ff7f0e", "#2ca02c"), strict=True)):
        rows = [(place, summary[arm]["differences"].get(name)) for place, arm in enumerate(arms)]
        shown = [(place + 0.22 * (number - 1), row) for place, row in rows if row]
        means = [row["mean"] for _, row in shown]
        halves = [row["high"] - row["mean"] for _, row in shown]
        places = [place for place, _ in shown]
        right.errorbar(means, places, xerr=halves, fmt="o", color=color, markersize=4, capsize=3, label=f"to {name}")
    right.axvline(0, color="black", linewidth=0.8)
    right.set(title="Paired difference, 95 % interval (left of 0: better)", xlabel="points of error")
    right.legend(loc="best", fontsize=9)
    for axes in (left, right):
        axes.grid(axis="x", color="#eeeeee")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=6, help="how many, counted from 0; at least 2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--parallel", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument(
        "--shorten", type=int, default=1, help="how many times shorter each phase is; a divisor of its steps"
    )
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.svg")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds: one seed gives no interval")
    return options


def main() -> None:
    options = parse()
    seeds, storage = range(options.seeds), options.storage.absolute()
    with ThreadPoolExecutor(options.parallel) as executor:
        by_seed = list(executor.map(lambda seed: run_seed(options.arms, seed, storage, options.shorten), seeds))
    outcomes = {arm: [of_seed[arm] for of_seed in by_seed] for arm in options.arms}
    check_pairs(outcomes)
    summary = summarize(outcomes)
    print_tables(summary)
    text = json.dumps({"seeds": list(seeds), "shorten": options.shorten, "arms": summary})
    if options.out is not None:
        options.out.with_suffix(".json").write_text(text + "\n")
        plot(summary, options.out.with_suffix(".svg"))
    print(text)


if __name__ == "__main__":
    main()
