"""`temper phases diff`: why a phase was computed again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from temper.config.load import job_folder, load_job
from temper.errors import JobError, Problem, RunError
from temper.files import read_json
from temper.launch.phases.inventory import SHORT, Chain, chain_to, find_fingerprint
from temper.launch.teachers import plan_job
from temper.plan.mesh import local_cluster
from temper.products import find_runs
from temper.remote_store import fetch_outlines
from temper.run_folder import PHASES, PLAN

_ABSENT = "\0"  # no value of a job


@dataclass(frozen=True)
class PhaseDifference:
    """How two phases at one place of their chains differ in themselves: by the dotted key of an ingredient, the values
    under `a` and `b`, of which one may lack it. None but the phase before differs where there is no key."""

    name: str
    a: str
    b: str
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """`a` and `b` are the fingerprints of two phases, and `phases` the places of their chains that differ, from the
    first on. `beyond` names the phases that only the longer chain has, whose end is `a` or `b` as `longer` says."""

    a: str
    b: str
    phases: tuple[PhaseDifference, ...]
    beyond: tuple[str, ...]
    longer: Literal["a", "b", ""]

    def to_dict(self) -> dict[str, Any]:
        return {"same": self.a == self.b, **asdict(self)}


def diff_phases(reference: str, other: str, overrides: Sequence[str], storage: Path) -> Comparison:
    """Compares two phases that were computed, or one with a job that is planned now: `other` is the beginning of a
    fingerprint, or a job's file, to which `overrides` are applied and of which the phase of the same name is compared.

    Phases that were removed are found in the plans of the runs that are there. Raises JobError where a phase is not
    found or the job is wrong, RunError where the ingredients of one that differs were not kept.
    """
    fetch_outlines(storage)
    plans = [read_json(path) or {} for path in sorted((storage / PHASES).glob(f"*/{PLAN}"))]
    plans += [read_json(folder / PLAN) or {} for folder in find_runs(storage)]
    chain = find_chain(reference, plans, storage)
    if Path(other).suffix in (".yaml", ".yml"):
        return compare_chains(chain, _nearest(chain, _plan_phases(other, overrides, storage)))
    if overrides:
        rule = f"changes a job, and {other} is the fingerprint of a phase"
        raise JobError([Problem(overrides[0], None, rule, "give a job's file")])
    return compare_chains(chain, find_chain(other, plans, storage))


def find_chain(reference: str, plans: Sequence[Mapping[str, Any]], storage: Path) -> Chain:
    """The chain of the phase whose fingerprint begins with `reference`, from a plan that has its ingredients if any
    has. Raises JobError unless there is exactly one."""
    chains: dict[str, Chain] = {}
    for plan in plans:
        for phase in plan.get("phases", ()):
            known = chains.get(phase["fingerprint"])
            if known is None or not known[-1].get("ingredients"):
                chains[phase["fingerprint"]] = chain_to(plan, phase["fingerprint"])
    return chains[find_fingerprint(reference, chains, storage)]


def _plan_phases(file: str, overrides: Sequence[str], storage: Path) -> Chain:
    job = load_job(file, overrides).model_copy(update={"storage": str(storage)})
    plan = plan_job(job, local_cluster(), job_folder(file))
    phases: Chain = json.loads(json.dumps([asdict(phase) for phase in plan.phases]))
    return phases


def _nearest(chain: Chain, phases: Chain) -> Chain:
    """`phases` up to the one that is most like the chain's end: it itself, or one of the same name, or the last."""
    end = chain[-1]
    same = [index for index, phase in enumerate(phases) if phase["fingerprint"] == end["fingerprint"]]
    alike = [index for index, phase in enumerate(phases) if phase["name"] == end["name"]]
    return phases[: [*same, *alike, len(phases) - 1][0] + 1]


def compare_chains(a: Chain, b: Chain) -> Comparison:
    """Raises RunError where the ingredients of a phase that differs are not there."""
    pairs = [(one, other) for one, other in zip(a, b, strict=False) if one["fingerprint"] != other["fingerprint"]]
    common = min(len(a), len(b))
    return Comparison(
        a=a[-1]["fingerprint"],
        b=b[-1]["fingerprint"],
        phases=tuple(_compare(one, other) for one, other in pairs),
        beyond=tuple(phase["name"] for phase in (*a[common:], *b[common:])),
        longer="a" if len(a) > common else "b" if len(b) > common else "",
    )


def _compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> PhaseDifference:
    for phase in (one, other):
        if not phase.get("ingredients"):
            raise RunError(
                f"{phase['name']} {phase['fingerprint'][:SHORT]} was computed by a temper that did not keep what it is "
                "made of; computed anew (--fresh), it can be compared"
            )
    sides = {"a": dict(_flatten(one["ingredients"])), "b": dict(_flatten(other["ingredients"]))}
    keys = {
        key: {side: values[key] for side, values in sides.items() if key in values}
        for key in {**sides["a"], **sides["b"]}
        if len({json.dumps(values.get(key, _ABSENT)) for values in sides.values()}) > 1  # 1 is not 1.0 in a hash
    }
    name = one["name"] if one["name"] == other["name"] else f"{one['name']} and {other['name']}"
    return PhaseDifference(name, one["fingerprint"], other["fingerprint"], keys)


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; a list of single values is one."""
    if isinstance(value, dict) and value:
        parts = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        parts = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield key, value
        return
    for name, part in parts:
        yield from _flatten(part, f"{key}.{name}" if key else name)


def comparison_text(comparison: Comparison) -> str:
    """For people: the first phase that differs, and those after it as far as they differ in themselves."""
    a, b = comparison.a[:SHORT], comparison.b[:SHORT]
    if comparison.a == comparison.b:
        return f"{a} and {b} are the same phase: nothing is computed again"
    lines = []
    for phase in comparison.phases:
        head = f"{phase.name}: {phase.a[:SHORT]} and {phase.b[:SHORT]}"
        if not phase.keys:
            lines.append(f"{head} differ in the phase before only")
            continue
        lines += [f"{head} differ in", *(f"  {_change(key, sides)}" for key, sides in phase.keys.items())]
    if comparison.beyond:
        more, fewer = (a, b) if comparison.longer == "a" else (b, a)
        lines.append(f"{more} goes on where {fewer} ends: {', '.join(comparison.beyond)}")
    return "\n".join(lines)


def _change(key: str, sides: Mapping[str, Any]) -> str:
    before, now = (_spelt(sides[side]) if side in sides else "nothing" for side in ("a", "b"))
    return f"{key}: {before} → {now}"


def _spelt(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
