"""Which modules of a network the tensor ranks share, and how: `parallel.split` read against the model, and applied.

The kinds of split are in `_KINDS`. Adding one: a line there, one in `SplitKind` of the schema, and a branch of
`apply_split`.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from temper.errors import JobError, Problem
from temper.parallel.blocks import compute_on_blocks
from temper.parallel.groups import MeshGroups
from temper.parallel.layers import (
    apply_dropout_split,
    apply_head_split,
    apply_input_split,
    apply_output_split,
    is_stacked_attention,
    is_torch_attention,
    output_parts,
    output_units,
)


@dataclass(frozen=True)
class _Kind:
    """What a kind of split applies to, in words; the units that it deals out; how many of them a module has, 0 where
    the kind does not fit."""

    fits: str
    units: str
    count: Callable[[Any], float]


def _count_heads(module: Any) -> float:
    return module.num_heads if is_torch_attention(module) or is_stacked_attention(module) else 0


def _is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Of one of the types itself, whose weight is a parameter and not computed anew (weight norm, pruning)."""
    return type(module) in types and "weight" in dict(module.named_parameters(recurse=False))


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_KINDS: dict[str, _Kind] = {
    "output_activations": _Kind(
        "nn.Linear", "output features", lambda module: output_units(module) if _is_plain(module, nn.Linear) else 0
    ),
    "input_activations": _Kind(
        "nn.Linear", "input features", lambda module: module.in_features if _is_plain(module, nn.Linear) else 0
    ),
    "heads": _Kind(
        "nn.MultiheadAttention with one packed in-projection, and modules with qkv, proj and num_heads",
        "heads",
        _count_heads,
    ),
    "output_maps": _Kind(
        "nn.Conv1d and nn.Conv2d",
        "output maps",
        lambda module: output_units(module) if _is_plain(module, *_CONVOLUTIONS) else 0,
    ),
    "input_maps": _Kind(
        "nn.Conv1d and nn.Conv2d with groups: 1",
        "input maps",
        lambda module: module.in_channels if _is_plain(module, *_CONVOLUTIONS) and module.groups == 1 else 0,
    ),
    # Whether a module can be computed on blocks is a question of its own, which `temper.parallel.blocks` answers.
    "image_blocks": _Kind("any module", "blocks", lambda module: math.inf),
}


# ------------------------------------------------------------------------------------------- what the job's keys mean


def resolve_split(model: nn.Module, patterns: Mapping[str, str], size: int) -> dict[str, str]:
    """The modules that `size` tensor ranks share, by dotted name, each with its kind of split; in the model's order.

    `patterns` are `fnmatch` patterns on those names → kind. The first pattern that matches a module and whose kind fits
    it counts. One with wildcards leaves alone what lies inside a module that it or a pattern before it splits. Without
    patterns: attention by heads, convolutions by output maps, linear layers by output activations, and in an
    nn.Sequential the second of a pair by input activations; what has fewer units than there are ranks stays whole.

    Raises JobError with every problem.
    """
    places = _places(model)
    if not patterns:
        return _default_split(model, places, size)
    modules = dict(model.named_modules())
    taken: dict[str, str] = {}
    problems = []
    for pattern, kind in patterns.items():
        problem = _take(pattern, kind, modules, taken)
        problems += [problem] if problem else []
    for pattern, kind in patterns.items():
        chosen = {name: modules[name] for name, by in taken.items() if by == pattern}
        problems += _check_units(pattern, kind, chosen, size)
        problems += _check_tied(pattern, kind, chosen, places)
        problems += _check_nested(pattern, patterns, taken)
    if problems:
        raise JobError(problems)
    return {name: patterns[taken[name]] for name in modules if name in taken}


def _take(pattern: str, kind: str, modules: Mapping[str, nn.Module], taken: dict[str, str]) -> Problem | None:
    """Notes in `taken` what the pattern splits; the problem where that is nothing."""
    matched = [name for name in modules if fnmatchcase(name, pattern)]
    fitting = [name for name in matched if _KINDS[kind].count(modules[name])]
    before = len(taken)
    for name in fitting:
        if not (_has_wildcards(pattern) and any(outer in taken for outer in _around(name))):
            taken.setdefault(name, pattern)
    if len(taken) > before:
        return None
    if not matched:
        return _problem(pattern, kind, "matches no module", _similar(pattern, modules))
    if not fitting:
        found = f"{_shown(matched[0])} is a {type(modules[matched[0]]).__name__}"
        return _problem(pattern, kind, f"fits no module that it matches ({found})", f"it fits {_KINDS[kind].fits}")
    return _problem(pattern, kind, "matches only what patterns before it split", "remove it or put it before them")


def _check_units(pattern: str, kind: str, chosen: Mapping[str, nn.Module], size: int) -> list[Problem]:
    counts = {name: int(count) for name in chosen if (count := _KINDS[kind].count(chosen[name])) < size}
    if not counts:
        return []
    name = min(counts, key=lambda name: counts[name])
    # The maps of a group stay together.
    units = "groups of maps" if getattr(chosen[name], "groups", 1) > 1 else _KINDS[kind].units
    rule = f"cannot deal {_shown(name)} out to {size} tensor ranks: it has {counts[name]} {units}"
    return [_problem(pattern, kind, rule, f"use parallel.tensor: {counts[name]} or leave it whole")]


def _check_tied(pattern: str, kind: str, chosen: Mapping[str, nn.Module], places: _Places) -> list[Problem]:
    problems = []
    for name, module in chosen.items():
        tied = _tied(module, places)
        if tied:
            rule = f"splits {_shown(name)}, whose weights are shared: {tied[0]} is {tied[1]}"
            problems.append(_problem(pattern, kind, rule, "leave it whole"))
    return problems


def _check_nested(pattern: str, patterns: Mapping[str, str], taken: Mapping[str, str]) -> list[Problem]:
    """The first module of the pattern that lies inside another split module."""
    for name in (name for name, by in taken.items() if by == pattern):
        for outer in (outer for outer in _around(name) if outer in taken):
            kind, around = patterns[pattern], patterns[taken[outer]]
            rule = f"splits {name}, which lies inside {_shown(outer)}, split by {around}"
            swap = f"put {taken[outer]} before {pattern}"
            return [_problem(pattern, kind, rule, swap if _has_wildcards(pattern) else "leave one of the two out")]
    return []


def _problem(pattern: str, kind: str, rule: str, remedy: str) -> Problem:
    return Problem(f"parallel.split.{pattern}", kind, rule, remedy)


def _has_wildcards(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _around(name: str) -> list[str]:
    """The dotted names of all modules that a module lies in; the model itself is ""."""
    parts = name.split(".") if name else []
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _shown(name: str) -> str:
    return name or "the model"


def _similar(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    names = [name for name in modules if name]
    close = difflib.get_close_matches(pattern, names, n=1)
    return f"did you mean {close[0]}?" if close else f"the modules are {', '.join(names[:5])}, …"


_Places = Mapping[nn.Parameter, list[str]]


def _places(model: nn.Module) -> _Places:
    """Each parameter with all its dotted names, of which it has more than one where modules share it."""
    places: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(prefix, recurse=False):
            places.setdefault(param, []).append(name)
    return places


def _tied(module: nn.Module, places: _Places) -> list[str]:
    """The names of the first parameter of the module that has more than one."""
    return next((places[param] for param in module.parameters() if len(places[param]) > 1), [])


# ----------------------------------------------------------------------------------------------------------- by default


def _default_split(model: nn.Module, places: _Places, size: int) -> dict[str, str]:
    modules = dict(model.named_modules())
    splits: dict[str, str] = {}
    most = 1
    for name, module in modules.items():
        if _tied(module, places) or any(outer in splits for outer in _around(name)):
            continue
        for kind in ("heads", "output_maps", "output_activations"):
            count = int(_KINDS[kind].count(module))
            most = max(most, count)
            if count >= size:
                splits[name] = kind
    for pair in _pairs(model):
        second = modules[pair.second]
        fits = _KINDS["input_activations"].count(second) > 0 and not _tied(second, places)
        if splits.get(pair.first) == "output_activations" and fits:
            splits[pair.second] = "input_activations"
    if not splits:
        rule = f"finds nothing to split: no layer has {size} features, maps or heads"
        raise JobError([Problem("parallel.tensor", size, rule, f"use {most}")])
    return {name: splits[name] for name in modules if name in splits}


# --------------------------------------------------------------------------------------------------------------- pairs

_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Identity, nn.Dropout),
)
# These treat each feature map alone.
_BY_MAP = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)
_FUSED = (("output_activations", "input_activations"), ("output_maps", "input_maps"))


@dataclass(frozen=True)
class _Pair:
    """Two layers that follow each other in an nn.Sequential, the second taking what the first gives unit by unit.

    `between` are the names of what stands between them, which treats each unit alone. Split by output and by input the
    two exchange once, after the second.
    """

    first: str
    between: tuple[str, ...]
    second: str


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    """The pairs of the model's sequences in their order; a layer may be the second of one and the first of the next."""
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for prefix, sequence in model.named_modules():
        # A subclass may do anything in its forward.
        if not isinstance(sequence, nn.Sequential) or type(sequence).forward is not nn.Sequential.forward:
            continue
        for pair in _consecutive(sequence):
            modules = [getattr(sequence, name) for name in (pair.first, *pair.between, pair.second)]
            if _belong_together(modules) and all(_is_used_once(module, uses) for module in modules):
                dot = f"{prefix}." if prefix else ""
                yield _Pair(dot + pair.first, tuple(dot + name for name in pair.between), dot + pair.second)


def _consecutive(sequence: nn.Sequential) -> Iterator[_Pair]:
    """Children with nothing but elementwise modules and pooling between them."""
    first, between = "", []
    # Not named_children, which leaves out a module that comes a second time.
    for name, module in sequence._modules.items():
        if type(module) in _ELEMENTWISE + _BY_MAP:
            between.append(name)
        else:
            if first:
                yield _Pair(first, tuple(between), name)
            first, between = name, []


def _belong_together(modules: list[nn.Module]) -> bool:
    first, *between, second = modules
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return first.out_features == second.in_features and all(type(module) in _ELEMENTWISE for module in between)
    if isinstance(first, nn.Conv1d | nn.Conv2d) and isinstance(second, nn.Conv1d | nn.Conv2d):
        return output_units(first) == second.in_channels
    return False


def _is_used_once(module: nn.Module, uses: Counter[int]) -> bool:
    """A module that is used elsewhere, too, must take and give whole activations; an activation function need not."""
    return uses[id(module)] == 1 or (type(module) in _ELEMENTWISE + _BY_MAP and type(module) is not nn.Dropout)


# --------------------------------------------------------------------------------------------------------------- apply


def apply_split(model: nn.Module, splits: Mapping[str, str], groups: MeshGroups) -> None:
    """Turns the modules of `splits`, which :func:`resolve_split` gave, into their sharded twins, in place.

    A parameter that is cut keeps its dotted name, holds this rank's part and carries its `Cut`. Works on the meta
    device and without process groups, too, to see what a rank holds.
    """
    modules = dict(model.named_modules())
    pairs = [pair for pair in _pairs(model) if _is_fused(pair, splits)]
    firsts, seconds = {pair.first for pair in pairs}, {pair.second for pair in pairs}
    for name, kind in splits.items():
        module: Any = modules[name]
        if kind == "image_blocks":
            compute_on_blocks(module, groups)
        elif kind == "heads":
            apply_head_split(module, groups.tensor)
        elif kind in ("output_activations", "output_maps"):
            apply_output_split(module, groups.tensor, gathers=name not in firsts)
        else:
            apply_input_split(module, groups.tensor, scatters=name not in seconds)
    for between in (model.get_submodule(name) for pair in pairs for name in pair.between):
        if isinstance(between, nn.Dropout):
            apply_dropout_split(between, groups.tensor)
    for pair in pairs:
        first: Any = modules[pair.first]
        for name in (pair.first, *pair.between):
            modules[name].temper_parts = output_parts(first)  # type: ignore[assignment]
    if any(isinstance(module, nn.MultiheadAttention) for module in modules.values()):
        # In evaluation torch computes a whole nn.TransformerEncoderLayer from its weights, past its modules.
        torch.backends.mha.set_fastpath_enabled(False)


def _is_fused(pair: _Pair, splits: Mapping[str, str]) -> bool:
    kinds = splits.get(pair.first), splits.get(pair.second)
    return kinds in _FUSED and not any(name in splits for name in pair.between)
