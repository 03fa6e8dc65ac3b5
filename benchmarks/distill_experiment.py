"""Distillation (Hinton et al. 2015) beside its controls, at equal compute of the student, paired by seed.

    python benchmarks/distill_experiment.py [--seeds 6] [--arms plain soft_t4 …] [--jobs 2] [--storage runs]
                                            [--out docs/distill_experiment]

Every arm is a shipped job, `jobs/distill/<arm>.yaml`, and every result that of a real command,
`temper train jobs/distill/<arm>.yaml seed=<seed> --json`. The arms, all of one tiny CNN on Fashion-MNIST, taught by the
network of `jobs/fashion_teacher.yaml`:

    plain                  no teacher
    label_smoothing        no teacher, and targets with the mean entropy that the teacher's have at T = 4
    soft_t1 … soft_t20     soft targets at temperatures 1 to 20, from the cache of what the teacher says
    live_t4                soft_t4 with a live teacher, in a storage of its own: must end with the same bits
    hints                  labels and the teacher's maps at two levels (FitNets)
    attention              labels and attention transfer at two levels
    both                   soft_t4 and attention transfer
    omitted                no example of one class, and no labels; control: omitted_plain, with labels
    few                    3 % of the labels; control: few_plain

The arms of a seed have the same first weights and, but for the last four, the same batches. Before them the teacher is
trained and asked, once each; what this costs is listed apart. `--jobs` commands run at a time, each on one core. What
is finished is not computed again, so the same command goes on after a stop. `--shorten 40` makes all of it 40 times
shorter, to try it out.

Printed are the test errors, and the mean paired differences to the controls with their 95 % intervals (Student's t),
each interval for itself. The temperature is picked by the error on held-out training examples, as the recipe was, with
other seeds; the test set is looked at once at the end of an arm. The student of `omitted` is looked at twice: as it is,
and with the omitted class's bias set so that on the held-out examples its share of the predictions is that which it has
there. The last line is JSON; `--out` writes it to a file, too, beside a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import optimize, special
from torch import Tensor

from dsd_experiment import paired_difference
from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.data.batches import eval_batches
from temper.data.sources import SplitName, load_split
from temper.export import Product, find_product, load_model
from temper.files import read_json, write_json
from temper.launch.cluster import cluster_shape
from temper.launch.teachers import plan_job
from temper.outputs import logits_of
from temper.plan.build import Plan
from temper.plan.distill import CachePlan
from temper.techniques.distill.cache import CachedSignals
from temper.techniques.distill.cache_files import open_manifest

ROOT = Path(__file__).parent.parent
TEACHER = Path("jobs/fashion_teacher.yaml")
TEMPERATURES = {"soft_t1": 1, "soft_t2": 2, "soft_t4": 4, "soft_t8": 8, "soft_t20": 20}
LIVE, CACHED = "live_t4", "soft_t4"  # two ways to one student
OMITTED = ("omitted", "omitted_plain")
ARMS = (
    "plain",
    "label_smoothing",
    *TEMPERATURES,
    LIVE,
    "hints",
    "attention",
    "both",
    *OMITTED,
    "few",
    "few_plain",
)
CONTROLS = {
    "plain": (),
    "label_smoothing": ("plain",),
    "omitted": ("omitted_plain",),
    "omitted_plain": ("plain",),
    "few": ("few_plain",),
    "few_plain": ("plain",),
}
"""What an arm is compared with; every other one with the first two."""
SMOOTHED_AS = "soft_t4"


# ---------------------------------------------------------------------------------------------------- equal entropy


def mean_entropy(logits: Tensor, temperature: float) -> float:
    """Of softmax(logits / temperature), in nats, the mean over all but the last dim."""
    log_probabilities = (logits.double() / temperature).log_softmax(-1)
    return float(-(log_probabilities.exp() * log_probabilities).sum(-1).mean())


def smoothed_entropy(smoothing: float, num_classes: int) -> float:
    """In nats, of a label that was smoothed: 1 − smoothing + smoothing/K for its class, smoothing/K for each other."""
    other = smoothing / num_classes
    return float(special.entr(1 - smoothing + other) + (num_classes - 1) * special.entr(other))


def smoothing_of(entropy: float, num_classes: int) -> float:
    """The label smoothing of this entropy in nats, to four digits. Raises ValueError where none has it."""
    return round(optimize.brentq(lambda value: smoothed_entropy(value, num_classes) - entropy, 0.0, 1.0), 4)


# ------------------------------------------------------------------------------------------------- the omitted class


@dataclass(frozen=True)
class Readout:
    """A network's test error and the recall of one class, in per cent, before and after `bias` was added to it."""

    bias: float
    error: float
    recall: float
    fixed_error: float
    fixed_recall: float


def bias_of_share(logits: Tensor, label: int, count: int) -> float:
    """What to add to the logit of `label` so that it is predicted for `count` of the examples (examples, classes).

    Raises ValueError where that is none or all of them.
    """
    if not 0 < count < len(logits):
        raise ValueError(f"{count} of {len(logits)} examples are no share to be set")
    others = logits.clone()
    others[:, label] = -torch.inf
    missing = (others.amax(1) - logits[:, label]).double().sort().values
    return float(missing[count - 1 : count + 1].mean())


def read_out(held_out: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], label: int) -> Readout:
    """From logits and targets of both: the bias is set on the held-out examples, and judged on the test set."""
    bias = bias_of_share(held_out[0], label, int((held_out[1] == label).sum()))
    fixed = test[0].clone()
    fixed[:, label] += bias
    return Readout(bias, *_error_and_recall(*test, label), *_error_and_recall(fixed, test[1], label))


def _error_and_recall(logits: Tensor, targets: Tensor, label: int) -> tuple[float, float]:
    right = (logits.argmax(1) == targets).double()
    return per_cent_off(float(right.mean())), round(100 * float(right[targets == label].mean()), 3)


def read_out_product(product: Product) -> Readout:
    model, facts = load_model(product)
    job = product.job
    (label,) = job.data.omit_classes

    def on(split: SplitName) -> tuple[Tensor, Tensor]:
        examples = load_split(job.data, split, Path(job.storage), facts)
        batches = list(eval_batches(job.data, examples, facts, rank=0, world_size=1, batch=job.evaluation.batch))
        with torch.no_grad():
            logits = [logits_of(model(batch.inputs))[:valid] for batch, valid in batches]
        return torch.cat(logits), torch.cat([batch.targets[:valid] for batch, valid in batches])

    return read_out(on("validation"), on("test"), label)


# --------------------------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Outcome:
    """One arm with one seed: per cent of errors on the test set and on the held-out examples, and the seconds of its
    training alone."""

    run_id: str
    fingerprint: str
    teacher: str
    steps: int
    error: float
    held_out: float
    seconds: float


def outcome(result: Mapping[str, Any]) -> Outcome:
    """What `temper train --json` printed, as far as it counts here."""
    last = result["phases"][-1]
    return Outcome(
        run_id=result["run_id"],
        fingerprint=last["fingerprint"],
        teacher="".join(teacher["fingerprint"] for teacher in result["teachers"]),
        steps=sum(phase["steps"] for phase in result["phases"]),
        error=per_cent_off(last["metrics"]["test/accuracy"]),
        held_out=per_cent_off(last["metrics"]["eval/accuracy"]),
        seconds=sum(phase["seconds"] for phase in result["phases"]),
    )


def per_cent_off(accuracy: float) -> float:
    """The error, free of the noise of fp32: one of 10,000 examples is 0.01."""
    return round(100 * (1 - accuracy), 3)


def train(job: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The result of the command. Raises RuntimeError with what it said where it failed."""
    command = [sys.executable, "-m", "temper", "train", str(job), *keys, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def job_of(arm: str) -> Path:
    return Path("jobs/distill") / f"{arm}.yaml"


@dataclass(frozen=True)
class Setting:
    """Where and how the commands run; `teacher` is the folder of its phase, `smoothing` the value for
    `label_smoothing`, by default that of its file."""

    storage: Path
    shorten: int
    teacher: Path
    smoothing: float | None = None

    @property
    def live_storage(self) -> Path:
        """Of the arm whose fingerprint another one has, too."""
        return self.storage / "live"

    def keys(self, arm: str, seed: int) -> list[str]:
        """What the command of an arm sets beside what its file says."""
        job = load_job(ROOT / job_of(arm))
        storage = self.live_storage if arm == LIVE else self.storage
        keys = [f"seed={seed}", f"storage={storage}"]
        if job.distill is not None and (arm == LIVE or self.shorten > 1):
            keys.append(f"distill.teacher={self.teacher}")
        if arm == "label_smoothing" and self.smoothing is not None:
            keys.append(f"loss.label_smoothing={self.smoothing}")
        return keys + shortened(job, self.shorten)

    def plan(self, arm: str, seed: int) -> Plan:
        job = load_job(ROOT / job_of(arm), self.keys(arm, seed))
        return plan_job(job, cluster_shape("local"), ROOT / job_of(arm).parent)


def shortened(job: JobConfig, times: int) -> list[str]:
    """The keys that make a job so many times shorter."""
    if times == 1:
        return []
    keys = [f"optimizer.schedule.warmup_steps={job.optimizer.schedule.warmup_steps // times}"]
    if job.budget.epochs is not None:
        keys.append(f"budget.epochs={job.budget.epochs / times}")
    if job.budget.steps is not None:
        keys.append(f"budget.steps={job.budget.steps // times}")
    return keys


def train_teacher(storage: Path, shorten: int) -> tuple[Path, dict[str, Any]]:
    """The folder of the trained teacher, and its errors and cost."""
    result = train(TEACHER, [f"storage={storage}", *shortened(load_job(ROOT / TEACHER), shorten)])
    found = asdict(outcome(result))
    del found["teacher"]
    return Path(result["checkpoint"]).parent.parent, found


def run_arms(arms: Sequence[str], seeds: Sequence[int], setting: Setting, jobs: int) -> dict[str, list[Outcome]]:
    """Every arm with every seed, `jobs` commands at a time."""

    def run(task: tuple[int, str]) -> Outcome:
        seed, arm = task
        found = outcome(train(job_of(arm), setting.keys(arm, seed)))
        say(f"seed {seed}  {arm:<15}  test error {found.error:6.2f} %  {found.seconds:5.0f} s")
        return found

    tasks = [(seed, arm) for seed in seeds for arm in arms]
    with ThreadPoolExecutor(jobs) as executor:
        found = dict(zip(tasks, executor.map(run, tasks), strict=True))
    return {arm: [found[seed, arm] for seed in seeds] for arm in arms}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- the caches


def make_caches(arms: Sequence[str], setting: Setting, costs: Path) -> dict[str, dict[str, Any]]:
    """By its key, each cache of the arms: who reads it, of how many examples the teacher was asked for it, and what
    that cost: the seconds by which a command that trains one step is longer with it to be made than without.

    A cost is measured when the cache is made, and kept in the file `costs`; it is None of a cache that was there, and
    where the machine was too busy with other things for it to show.
    """
    known = read_json(costs) or {}
    plans = {arm: setting.plan(arm, 0).distill for arm in arms}
    cached = {arm: plan.cache for arm, plan in plans.items() if plan is not None and plan.cache is not None}
    caches: dict[str, dict[str, Any]] = {}
    for arm, cache in cached.items():
        if cache.key in caches:
            caches[cache.key]["arms"].append(arm)
            continue
        if not (cache.folder / "manifest.json").exists():
            first, second = (_seconds_of_a_step(arm, seed, setting) for seed in (0, 1))
            known[cache.key] = first - second if first > second else None
            write_json(costs, known)
        examples = open_manifest(cache)["teacher_examples"]
        caches[cache.key] = {"arms": [arm], "teacher_examples": examples, "seconds": known.get(cache.key)}
        say(f"{arm}: the teacher was asked of {examples:,} examples")
    return caches


def _seconds_of_a_step(arm: str, seed: int, setting: Setting) -> float:
    keys = [*setting.keys(arm, seed), "budget.steps=1", "optimizer.schedule.warmup_steps=0"]
    return float(train(job_of(arm), keys)["seconds"])


def check_caches(caches: Mapping[str, Mapping[str, Any]], examples: int) -> None:
    """Raises RuntimeError where the temperatures have not one cache, of one pass over the `examples`."""
    of_temperatures = [cache for cache in caches.values() if set(cache["arms"]) & set(TEMPERATURES)]
    asked = sum(cache["teacher_examples"] for cache in of_temperatures)
    if len(of_temperatures) > 1 or asked not in (0, examples):
        raise RuntimeError(f"the temperatures took {asked:,} examples of the teacher, and there are {examples:,}")


def measured_smoothing(setting: Setting) -> dict[str, float]:
    """The label smoothing of the entropy that the teacher's soft targets have over the training examples."""
    plan = setting.plan(SMOOTHED_AS, 0)
    assert plan.distill is not None and plan.distill.cache is not None, "the arm reads a cache"
    logits = cached_logits(plan.distill.cache, plan.data.train_examples)
    entropy = mean_entropy(logits, TEMPERATURES[SMOOTHED_AS])
    return {"entropy": entropy, "value": smoothing_of(entropy, logits.shape[-1])}


def cached_logits(cache: CachePlan, examples: int) -> Tensor:
    """Of all training examples, (examples, classes)."""
    signals = CachedSignals(cache).signals(torch.arange(examples), torch.zeros(examples, dtype=torch.int64))
    return signals.logits


# ----------------------------------------------------------------------------------------------------------- the checks


def check_arms(outcomes: Mapping[str, Sequence[Outcome]], teacher: str) -> None:
    """Raises RuntimeError where arms are not comparable: another teacher, or another number of steps."""
    others = {found.teacher for of_arm in outcomes.values() for found in of_arm} - {"", teacher}
    if others:
        raise RuntimeError(f"not all arms have the teacher {teacher}: {', '.join(others)}")
    steps = {arm: {found.steps for found in of_arm} for arm, of_arm in outcomes.items()}
    if len(set.union(*steps.values())) > 1:
        raise RuntimeError(f"these do not take equally many steps: {steps}")


def weights_of(run_id: str, storage: Path) -> dict[str, Tensor]:
    return load_model(find_product(run_id, storage))[0].state_dict()


def same_bits(ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


def check_live(outcomes: Mapping[str, Sequence[Outcome]], setting: Setting) -> int:
    """Of how many seeds the student of the live teacher has the bits of that of the cache; raises RuntimeError where
    one has not."""
    pairs = list(zip(outcomes.get(LIVE, []), outcomes.get(CACHED, []), strict=False))
    for seed, (live, cached) in enumerate(pairs):
        ours, others = weights_of(live.run_id, setting.live_storage), weights_of(cached.run_id, setting.storage)
        if not same_bits(ours, others):
            raise RuntimeError(f"seed {seed}: {LIVE} and {CACHED} end with different weights")
    return len(pairs)


# ----------------------------------------------------------------------------------------------------------- reporting


def summarize(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """By arm: all outcomes, means, and the differences to those of its controls that ran."""
    errors = {arm: [found.error for found in of_arm] for arm, of_arm in outcomes.items()}
    return {
        arm: {
            "mean_error": statistics.mean(errors[arm]),
            "sd": statistics.stdev(errors[arm]),
            "mean_held_out": statistics.mean(found.held_out for found in of_arm),
            "errors": errors[arm],
            "seconds": statistics.mean(found.seconds for found in of_arm),
            "differences": {
                control: {**asdict(difference), "verdict": difference.verdict}
                for control in CONTROLS.get(arm, ("plain", "label_smoothing"))
                if control in errors
                for difference in [paired_difference(errors[arm], errors[control])]
            },
            "outcomes": [asdict(found) for found in of_arm],
        }
        for arm, of_arm in outcomes.items()
    }


def pick_temperature(summary: Mapping[str, Any]) -> str | None:
    """The arm of the temperature with the smallest held-out error; of equal ones the lowest."""
    return min((arm for arm in TEMPERATURES if arm in summary), key=lambda arm: _held_out(summary, arm), default=None)


def _held_out(summary: Mapping[str, Any], arm: str) -> float:
    return float(summary[arm]["mean_held_out"])


def print_tables(report: Mapping[str, Any]) -> None:
    teacher, summary = report["teacher"], report["arms"]
    errors = f"test error {teacher['error']:.2f} %, held out {teacher['held_out']:.2f} %"
    print(f"Teacher: {errors}, {teacher['seconds']:.0f} s")
    for cache in report["caches"].values():
        cost = "made before" if cache["seconds"] is None else f"{cache['seconds']:.0f} s"
        print(f"Asked of {cache['teacher_examples']:,} examples, {cost}, for {', '.join(cache['arms'])}")
    print("\nError, %: mean on the test set, deviation, mean on the held-out examples; seconds of training; each seed")
    print(f"{'arm':<15}  {'mean':>6}  {'sd':>5}  {'held':>6}  {'s':>4}  seeds")
    for arm, found in summary.items():
        seeds = "  ".join(f"{error:.2f}" for error in found["errors"])
        means = f"{found['mean_error']:6.2f}  {found['sd']:5.2f}  {found['mean_held_out']:6.2f}"
        print(f"{arm:<15}  {means}  {found['seconds']:4.0f}  {seeds}")
    print("\nPaired difference, points of error: mean, 95 % interval")
    for arm, found in summary.items():
        for control, row in found["differences"].items():
            interval = f"{row['low']:+.3f} … {row['high']:+.3f}"
            print(f"{arm:<15}  to {control:<15}  {row['mean']:+7.3f}  {interval}  {row['verdict']}")
    _print_readouts(report["omitted"])
    if report["temperature"] is not None:
        print(f"\nThe temperature with the smallest held-out error: {report['temperature']}")


def _print_readouts(readouts: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    if readouts:
        print("\nThe omitted class, means over the seeds: recall and error, %, as trained → with its bias set")
    for arm, found in readouts.items():
        bias, error, recall, fixed_error, fixed_recall = (
            statistics.mean(item[key] for item in found) for key in Readout.__dataclass_fields__
        )
        print(f"{arm:<15}  {recall:5.1f} → {fixed_recall:5.1f}  {error:5.2f} → {fixed_error:5.2f}  bias {bias:+.2f}")


def plot(report: Mapping[str, Any], path: Path) -> None:
    """The error by temperature on the left, the differences to the controls with their intervals on the right."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "temper", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6))
    _plot_temperatures(left, report)
    _plot_differences(right, report["arms"])
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _plot_temperatures(axes: Any, report: Mapping[str, Any]) -> None:
    summary = report["arms"]
    arms = [arm for arm in TEMPERATURES if arm in summary]
    places = [TEMPERATURES[arm] for arm in arms]
    for place, arm in zip(places, arms, strict=True):
        errors = summary[arm]["errors"]
        axes.plot([place] * len(errors), errors, "o", color="#1f77b4", alpha=0.35, markersize=4)
    axes.plot(places, [summary[arm]["mean_error"] for arm in arms], "-o", color="#1f77b4", label="soft targets, test")
    held_out = [_held_out(summary, arm) for arm in arms]
    axes.plot(places, held_out, "--", color="#ff7f0e", label="soft targets, held out")
    for control, color in (("plain", "black"), ("label_smoothing", "#7f7f7f")):
        if control in summary:
            axes.axhline(summary[control]["mean_error"], color=color, linewidth=1, label=f"{control}, test")
    axes.axhline(report["teacher"]["error"], color="#2ca02c", linestyle=":", label="the teacher, test")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.set(title="Error by temperature: means and each seed", xlabel="temperature", ylabel="%")
    axes.grid(color="#eeeeee")
    axes.legend(loc="best", fontsize=8)


def _plot_differences(axes: Any, summary: Mapping[str, Any]) -> None:
    arms = [arm for arm in summary if arm not in CONTROLS or arm == "label_smoothing"]
    for shift, control, color in ((-0.12, "plain", "#1f77b4"), (0.12, "label_smoothing", "#ff7f0e")):
        rows = [(place + shift, summary[arm]["differences"].get(control)) for place, arm in enumerate(arms)]
        shown = [(place, row) for place, row in rows if row]
        means = [row["mean"] for _, row in shown]
        halves = [row["high"] - row["mean"] for _, row in shown]
        places = [place for place, _ in shown]
        axes.errorbar(means, places, xerr=halves, fmt="o", color=color, markersize=4, capsize=3, label=f"to {control}")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(title="Paired difference, 95 % interval (left of 0: better)", xlabel="points of error")
    axes.set(yticks=range(len(arms)), yticklabels=arms)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#eeeeee")
    axes.legend(loc="best", fontsize=9)


# --------------------------------------------------------------------------------------------------------- all together


def run_experiment(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the last line has."""
    seeds, storage = list(range(options.seeds)), options.storage
    place, teacher = train_teacher(storage, options.shorten)
    setting = Setting(storage, options.shorten, place)
    needed = {*options.arms, *([SMOOTHED_AS] if "label_smoothing" in options.arms else [])}
    caches = make_caches([arm for arm in ARMS if arm in needed], setting, storage / "distill_experiment.json")
    facts = setting.plan("plain", 0).data
    check_caches(caches, facts.train_examples + facts.test_examples)
    smoothing = measured_smoothing(setting) if "label_smoothing" in options.arms else None
    if smoothing is not None:
        setting = replace(setting, smoothing=smoothing["value"])
        say(f"label smoothing: {smoothing['value']} has the teacher's mean entropy of {smoothing['entropy']:.3f} nats")
    outcomes = run_arms(options.arms, seeds, setting, options.jobs)
    check_arms(outcomes, teacher["fingerprint"])
    summary = summarize(outcomes)
    readouts = {
        arm: [asdict(read_out_product(find_product(found.run_id, storage))) for found in outcomes[arm]]
        for arm in OMITTED
        if arm in outcomes
    }
    return {
        "seeds": seeds,
        "shorten": options.shorten,
        "teacher": teacher,
        "caches": caches,
        "label_smoothing": smoothing,
        "live_equal_to_cached": check_live(outcomes, setting),
        "temperature": pick_temperature(summary),
        "omitted": readouts,
        "arms": summary,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=6, help="how many, counted from 0; at least 2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time, one core each")
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--shorten", type=int, default=1, help="how many times shorter each training is")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.svg")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds: one seed gives no interval")
    options.storage = options.storage.absolute()
    options.out = None if options.out is None else options.out.absolute()
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    report = run_experiment(options)
    print_tables(report)
    text = json.dumps(report)
    if options.out is not None:
        options.out.with_suffix(".json").write_text(text + "\n")
        plot(report, options.out.with_suffix(".svg"))
    print(text)


if __name__ == "__main__":
    main()
