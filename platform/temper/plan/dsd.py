"""Dense-sparse-dense training (Han et al. 2017), decided: the layers that each sparse phase prunes, and the phases.

Patterns of layer names, in `dsd.exclude` and as keys of a round's `sparsity`, are `fnmatch` patterns. They match a
weight by its own name in the model, such as `layer1.0.conv1.weight`, or by its module's, `layer1.0.conv1`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from temper.config.schema import DSDConfig, JobConfig, RoundConfig
from temper.errors import Problem
from temper.plan.facts import DataFacts
from temper.plan.phases import PhaseKind, PhasePlan, Pruning, fingerprint, phase_schedule, phase_steps
from temper.plan.probe import PrunableWeight

Weights = Sequence[PrunableWeight]

_NAMES_SHOWN = 8


# -------------------------------------------------------------------------------------------------------------- phases


def expand_phases(job: JobConfig, data: DataFacts, prunable: Weights, dense: PhasePlan) -> tuple[PhasePlan, ...]:
    """`dense` and, for each round of `job.dsd`, its sparse phase and its re-dense phase, if it has one.

    The fingerprint of such a phase is over that of the phase before it and what acts in it alone, so that jobs share
    their phases as far as they are alike: patterns that mean the same layers are the same.
    """
    phases = [dense]
    for index, round_ in enumerate(job.dsd.rounds if job.dsd else ()):
        assert job.dsd is not None, "it has the rounds"
        factor = round_.sparse_lr_factor or job.dsd.sparse_lr_factor
        steps = phase_steps(round_.sparse_steps, round_.sparse_epochs, job, data)
        layers = resolve_layers(job.dsd, round_, prunable)
        # Another seed in each round, whatever the others are.
        pruning = Pruning(round_.structure, round_.criterion, layers, seed=64 * job.seed + index)
        phases.append(_phase_after(phases[-1], job, f"sparse-{index + 1}", "sparse", steps, factor, pruning))
        if round_.redense_steps != 0:
            factor = round_.redense_lr_factor or job.dsd.redense_lr_factor
            steps = phase_steps(round_.redense_steps, round_.redense_epochs, job, data)
            phases.append(_phase_after(phases[-1], job, f"redense-{index + 1}", "redense", steps, factor, None))
    return tuple(phases)


def _phase_after(
    before: PhasePlan,
    job: JobConfig,
    name: str,
    kind: PhaseKind,
    steps: int,
    lr_factor: float,
    pruning: Pruning | None,
) -> PhasePlan:
    assert job.dsd is not None, "only its rounds have phases after the first"
    lr = lr_factor * job.optimizer.lr
    recipe = {
        "kind": kind,
        "steps": steps,
        "lr": lr,
        "schedule": phase_schedule(job, kind).model_dump(mode="json"),
        "optimizer_state": job.dsd.optimizer_state,
        "pruning": _pruning_recipe(pruning),
    }
    return PhasePlan(
        name=name,
        kind=kind,
        first_step=before.last_step,
        steps=steps,
        lr=lr,
        fingerprint=fingerprint(recipe, before.fingerprint),
        deepspeed=before.deepspeed,
        pruning=pruning,
        fresh=job.dsd.optimizer_state == "fresh",
        ingredients=recipe,
        before=before.fingerprint,
    )


def _pruning_recipe(pruning: Pruning | None) -> dict[str, Any]:
    """What decides the masks; nothing where there are none."""
    if pruning is None or not pruning.layers:
        return {}
    recipe = {"layers": pruning.layers, "structure": pruning.structure, "criterion": pruning.criterion}
    return recipe | ({"seed": pruning.seed} if pruning.criterion == "random" else {})


# -------------------------------------------------------------------------------------------------------------- layers


def resolve_layers(dsd: DSDConfig, round_: RoundConfig, prunable: Weights) -> dict[str, float]:
    """The share that the round prunes of each layer, by the name of its weight; layers that stay dense are left out."""
    shares = {weight.name: _share(round_, weight) for weight in candidates(dsd, prunable)}
    weights = {weight.name: weight for weight in prunable}
    return {name: share for name, share in shares.items() if count_pruned(weights[name], share, round_.structure)}


def candidates(dsd: DSDConfig, prunable: Weights) -> list[PrunableWeight]:
    """What of the prunable weights `dsd.exclude` and `dsd.exclude_first_conv` leave."""
    first = _first_conv(prunable) if dsd.exclude_first_conv else None
    return [
        weight
        for weight in prunable
        if weight != first and not any(matches(pattern, weight) for pattern in dsd.exclude)
    ]


def _first_conv(prunable: Weights) -> PrunableWeight | None:
    return next((weight for weight in prunable if weight.kind == "convolution"), None)


def matches(pattern: str, weight: PrunableWeight) -> bool:
    """Whether the pattern names the weight or its module."""
    return fnmatchcase(weight.name, pattern) or fnmatchcase(weight.module, pattern)


def _share(round_: RoundConfig, weight: PrunableWeight) -> float:
    if _is_turned(round_, weight):
        return 0.0
    if ":" in round_.structure:
        kept, group = groups_of(round_.structure)
        return 1 - kept / group if weight.shape[1] % group == 0 else 0.0
    if isinstance(round_.sparsity, dict):
        return next((share for pattern, share in round_.sparsity.items() if matches(pattern, weight)), 0.0)
    assert round_.sparsity is not None, "check_job lets no round through that has none"
    return round_.sparsity


def _is_turned(round_: RoundConfig, weight: PrunableWeight) -> bool:
    """Whether the round's structure is along outputs or inputs, and the weight has them the other way round."""
    return round_.structure != "weights" and weight.kind == "transposed"


def groups_of(structure: str) -> tuple[int, int]:
    """N and M of the structure N:M: so many weights are kept of every group of so many."""
    kept, group = map(int, structure.split(":"))
    return kept, group


def num_pruned(total: int, share: float) -> int:
    """How many of `total` things a share of them is."""
    return round(total * share)


def count_pruned(weight: PrunableWeight, share: float, structure: str) -> int:
    """How many elements of the weight are pruned."""
    if structure == "channels":
        return num_pruned(weight.shape[0], share) * (weight.numel // weight.shape[0])
    return num_pruned(weight.numel, share)


# -------------------------------------------------------------------------------------------------------------- checks


def check_layers(job: JobConfig, prunable: Weights) -> list[Problem]:
    """What of `job.dsd` the model's layers cannot give: patterns without a layer, nothing to prune, a layer pruned
    whole."""
    dsd = job.dsd
    if dsd is None:
        return []
    if not prunable:
        rule = "finds nothing to prune: but for biases, norms and embeddings the model has no trainable weight"
        return [Problem("dsd", job.model.kind, rule, "leave dsd out")]
    problems = _check_exclude(dsd, prunable)
    if not problems and not candidates(dsd, prunable):
        key, value = ("dsd.exclude", dsd.exclude) if dsd.exclude else ("dsd.exclude_first_conv", True)
        rule = f"leaves nothing to prune: it excludes {_shown(prunable)}"
        problems.append(Problem(key, value, rule, "leave one of these in"))
    if problems:
        return problems
    return [
        problem
        for index, round_ in enumerate(dsd.rounds)
        for problem in _check_round(f"dsd.rounds.{index}", dsd, round_, prunable)
    ]


def _check_exclude(dsd: DSDConfig, prunable: Weights) -> list[Problem]:
    problems = [
        _no_match(f"dsd.exclude.{index}", pattern, pattern, prunable)
        for index, pattern in enumerate(dsd.exclude)
        if not any(matches(pattern, weight) for weight in prunable)
    ]
    if dsd.exclude_first_conv and _first_conv(prunable) is None:
        rule = f"finds no convolution; the prunable layers are {_shown(prunable)}"
        problems.append(Problem("dsd.exclude_first_conv", True, rule, "leave it out"))
    return problems


def _check_round(key: str, dsd: DSDConfig, round_: RoundConfig, prunable: Weights) -> list[Problem]:
    if ":" in round_.structure:
        return _check_groups(f"{key}.structure", dsd, round_, prunable)
    if isinstance(round_.sparsity, dict):
        problems = _check_patterns(f"{key}.sparsity", dsd, round_.sparsity, prunable)
        if problems:
            return problems
    return _check_whole(f"{key}.sparsity", dsd, round_, prunable)


def _check_groups(key: str, dsd: DSDConfig, round_: RoundConfig, prunable: Weights) -> list[Problem]:
    if resolve_layers(dsd, round_, prunable):
        return []
    group = groups_of(round_.structure)[1]
    sizes = [f"{weight.name} {weight.shape[1]}" for weight in candidates(dsd, prunable) if weight.kind != "transposed"]
    if not sizes:
        rule = f"fits no layer: {_shown(candidates(dsd, prunable))} have their inputs first"
        return [Problem(key, round_.structure, rule, "use structure: weights")]
    rule = f"fits no layer: {group} does not divide the inputs of any ({_shortened(sizes)})"
    return [Problem(key, round_.structure, rule, "use another M or structure: weights")]


def _check_patterns(key: str, dsd: DSDConfig, sparsity: dict[str, float], prunable: Weights) -> list[Problem]:
    left, problems = candidates(dsd, prunable), []
    for pattern, share in sparsity.items():
        matched = [weight for weight in prunable if matches(pattern, weight)]
        taken = [weight for weight in left if matches(pattern, weight)]
        left = [weight for weight in left if weight not in taken]
        if not matched:
            problems.append(_no_match(f"{key}.{pattern}", share, pattern, prunable))
        elif not taken:
            rule = f"decides nothing: dsd excludes {_shown(matched)}, or a pattern before it comes first"
            problems.append(Problem(f"{key}.{pattern}", share, rule, "remove it or put it before that pattern"))
    return problems


def _check_whole(key: str, dsd: DSDConfig, round_: RoundConfig, prunable: Weights) -> list[Problem]:
    """The first layer of each share of which nothing would be left."""
    problems: dict[str, Problem] = {}
    layers = resolve_layers(dsd, round_, prunable)
    for weight in prunable:
        share = layers.get(weight.name, 0.0)
        if count_pruned(weight, share, round_.structure) < weight.numel:
            continue
        channels = round_.structure == "channels"
        units = weight.shape[0] if channels else weight.numel
        most = math.floor(1000 * (units - 1) / units) / 1000
        rule = f"prunes all {units} {'channels' if channels else 'weights'} of {weight.name}"
        place = f"{key}.{_pattern_of(round_, weight)}" if isinstance(round_.sparsity, dict) else key
        problems.setdefault(place, Problem(place, share, rule, f"use at most {most:g} or exclude the layer"))
    return list(problems.values())


def _pattern_of(round_: RoundConfig, weight: PrunableWeight) -> str:
    assert isinstance(round_.sparsity, dict), "only a mapping has patterns"
    return next(pattern for pattern in round_.sparsity if matches(pattern, weight))


def _no_match(key: str, value: Any, pattern: str, prunable: Weights) -> Problem:
    names = [name for weight in prunable for name in (weight.module, weight.name) if name]
    close = difflib.get_close_matches(pattern, names, n=1)
    rule = f"matches no layer that can be pruned; these are {_shown(prunable)}"
    return Problem(key, value, rule, f"did you mean {close[0]}?" if close else "name some of these")


def _shown(weights: Weights) -> str:
    return _shortened([weight.name for weight in weights])


def _shortened(names: Sequence[str]) -> str:
    """e.g. `conv1.weight, conv2.weight, fc.weight`; of many the first ones and their number."""
    if len(names) <= _NAMES_SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMES_SHOWN])}, … ({len(names)})"


# -------------------------------------------------------------------------------------------------------- what is left


def parameters_left(num_parameters: int, shapes: Mapping[str, Sequence[int]], metrics: Mapping[str, float]) -> float:
    """Parameters of the model less those that are exactly zero in the layers that the newest sparse phase pruned.
    `shapes` are those of the prunable weights, by name; `metrics` have `sparsity/<weight>` of the pruned ones."""
    zeros = sum(
        metrics[f"sparsity/{name}"] * math.prod(shape)
        for name, shape in shapes.items()
        if f"sparsity/{name}" in metrics
    )
    return float(num_parameters - round(zeros))


# --------------------------------------------------------------------------------------------------------------- notes


def pruning_notes(job: JobConfig, prunable: Weights) -> list[str]:
    """What of the rounds a user may not expect, in full sentences."""
    return [
        note
        for index, round_ in enumerate(job.dsd.rounds if job.dsd else ())
        if job.dsd is not None
        for note in (
            *_round_notes(f"sparse-{index + 1}", job.dsd, round_, prunable),
            *_regrowth_notes(index, job.dsd, prunable),
        )
    ]


def _regrowth_notes(index: int, dsd: DSDConfig, prunable: Weights) -> list[str]:
    """Where a round follows a sparse phase directly, layers of which it prunes less than that did."""
    if index == 0 or dsd.rounds[index - 1].redense_steps != 0:
        return []
    before, now = (_num_pruned(dsd, round_, prunable) for round_ in dsd.rounds[index - 1 : index + 1])
    fewer = [weight for weight in prunable if now[weight] < before[weight]]
    note = (
        f"sparse-{index + 1} follows sparse-{index} directly and prunes less of {_shown(fewer)}: which zeros are "
        "trained again, their order alone decides"
    )
    return [note] if fewer else []


def _num_pruned(dsd: DSDConfig, round_: RoundConfig, prunable: Weights) -> dict[PrunableWeight, int]:
    layers = resolve_layers(dsd, round_, prunable)
    return {weight: count_pruned(weight, layers.get(weight.name, 0.0), round_.structure) for weight in prunable}


def _round_notes(phase: str, dsd: DSDConfig, round_: RoundConfig, prunable: Weights) -> list[str]:
    turned = [weight for weight in candidates(dsd, prunable) if _is_turned(round_, weight)]
    rule = f"{phase} leaves {_shown(turned)} dense: the first dimension is not that of the outputs"
    return [*([rule] if turned else []), *_share_notes(phase, dsd, round_, prunable)]


def _share_notes(phase: str, dsd: DSDConfig, round_: RoundConfig, prunable: Weights) -> list[str]:
    shares = {item: _share(round_, item) for item in candidates(dsd, prunable) if not _is_turned(round_, item)}
    if ":" in round_.structure:
        dense = [weight for weight, share in shares.items() if not share]
        group = groups_of(round_.structure)[1]
        rule = f"{phase} leaves {_shown(dense)} dense: {group} does not divide the number of inputs"
        return [rule] if dense else []
    if not any(shares.values()):
        return [f"{phase} prunes nothing (sparsity 0): the control, with the same steps and learning rates and no mask"]
    small = [weight for weight, share in shares.items() if share and not count_pruned(weight, share, round_.structure)]
    return [f"{phase} prunes nothing of {_shown(small)}: the share is less than half of one"] if small else []
