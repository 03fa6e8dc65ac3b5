"""Which level of the student learns to give which level of a teacher, and through what: `distill.features`.

A level is what a module gives for one example: maps `(channels, height, width)`, a sequence `(tokens, features)` or a
vector `(features,)`; what has two dimensions counts as a sequence. A connector brings the student's level into the
shape of the teacher's. It has a weight and no bias (Romero et al. 2015, section 2.2; Jiao et al. 2020, equation 8).

| loss                     | maps → maps              | sequence → sequence | vector → vector | → vector           |
|--------------------------|--------------------------|---------------------|-----------------|--------------------|
| mse, cosine              | 1×1 convolution, resized | linear, resized     | linear          | mean, then linear  |
| attention_transfer       | resized                  | resized             | –               | –                  |
| gram                     | 1×1 convolution          | linear              | –               | –                  |

Each only where the shapes differ. Attention sums over the channels, a Gram matrix over the positions.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from temper.config.schema import DistillConfig, FeatureConfig
from temper.errors import JobError, Problem
from temper.plan.distill import Connector, FeaturePair
from temper.plan.levels import pair_levels
from temper.plan.probe import LayerFacts, ModelFacts, ModuleOutput, Weights, join_weights

Shape = tuple[int, ...]

_NAMES_SHOWN = 5
_KINDS = {1: "a vector", 2: "a sequence", 3: "maps"}
_BY_POSITION = ("attention_transfer", "gram")


def resolve_pairs(
    config: DistillConfig, student: ModelFacts, teachers: Sequence[ModelFacts], names: Sequence[str]
) -> tuple[FeaturePair, ...]:
    """The pairs of `config.features` in their order, or those of `auto`, for each of the teachers, which are `names`.

    Raises JobError with every problem: a module that is not there or gives no level, shapes that no connector joins.
    """
    if config.features == "auto":
        return _automatic(config, student, teachers, names)
    pairs: list[FeaturePair] = []
    problems: list[Problem] = []
    for index, feature in enumerate(config.features):
        key = f"distill.features.{index}"
        found = _check_feature(key, feature, student, teachers, names)
        if not found:
            theirs = feature.teacher or feature.student
            pair = _pair(config, feature, _outputs(student)[feature.student], _outputs(teachers[feature.of])[theirs])
            found = [*_check_twice(key, pair, pairs), *_check_shapes(key, pair)]
            pairs.append(pair)
        problems += found
    if problems:
        raise JobError(problems)
    return tuple(_connected(pair) for pair in pairs)


def _automatic(
    config: DistillConfig, student: ModelFacts, teachers: Sequence[ModelFacts], names: Sequence[str]
) -> tuple[FeaturePair, ...]:
    pairs: list[FeaturePair] = []
    problems: list[Problem] = []
    for index, (teacher, name) in enumerate(zip(teachers, names, strict=True)):
        levels = [
            _pair(config, FeatureConfig(student=ours, of=index), _outputs(student)[ours], _outputs(teacher)[theirs])
            for ours, theirs in pair_levels(student, teacher)
        ]
        usable = [pair for pair in levels if not _check_shapes("", pair)]
        if not usable:
            rule = f"finds no level of the student that could learn {config.feature_loss} from one of {name}"
            remedy = "name the pairs, e.g. features: [{student: layer2, teacher: layer3}], or leave features out"
            problems.append(Problem("distill.features", "auto", rule, remedy))
        pairs += usable
    if problems:
        raise JobError(problems)
    return tuple(_connected(pair) for pair in pairs)


def _pair(config: DistillConfig, feature: FeatureConfig, ours: ModuleOutput, theirs: ModuleOutput) -> FeaturePair:
    """The pair as asked for, yet without a connector."""
    assert ours.shape is not None and theirs.shape is not None, "what has no shape is no level"
    return FeaturePair(
        student=ours.name,
        teacher=theirs.name,
        of=feature.of,
        loss=feature.loss or config.feature_loss,
        weight=feature.weight or config.feature_weight,
        student_shape=ours.shape,
        teacher_shape=theirs.shape,
        connector=Connector("none", _channels(ours.shape), _channels(ours.shape)),
        last=ours.last,
    )


# -------------------------------------------------------------------------------------------------------------- checks


def _check_feature(
    key: str, feature: FeatureConfig, student: ModelFacts, teachers: Sequence[ModelFacts], names: Sequence[str]
) -> list[Problem]:
    problems = _check_level(f"{key}.student", feature.student, student, "the student")
    if feature.of >= len(teachers):
        known = "there is one, 0" if len(teachers) == 1 else f"there are {len(teachers)}, counted from 0"
        return [*problems, Problem(f"{key}.of", feature.of, f"is no teacher: {known}", f"use {len(teachers) - 1}")]
    theirs = feature.teacher or feature.student
    return [*problems, *_check_level(f"{key}.teacher", theirs, teachers[feature.of], names[feature.of])]


def _check_level(key: str, name: str, facts: ModelFacts, whose: str) -> list[Problem]:
    outputs = _outputs(facts)
    level = outputs.get(name)
    if level is None:
        levels = [output.name for output in facts.outputs if output.shape]
        close = difflib.get_close_matches(name, levels, n=1)
        shown = ", ".join(levels[:_NAMES_SHOWN]) + (", …" if len(levels) > _NAMES_SHOWN else "")
        remedy = f"did you mean {close[0]}?" if close else f"its modules are {shown}"
        return [Problem(key, name, f"is no module that the forward pass of {whose} calls", remedy)]
    last = outputs.get(level.tap, level)
    if last.calls > 1:
        called = "is" if last is level else f"ends with {last.name}, which is"
        rule = f"{called} called {last.calls} times in a forward pass of {whose}"
        return [Problem(key, name, rule, "use a module around it")]
    if level.shape is None:
        rule = f"({level.kind}) does not give one tensor of floats, with the examples first, in {whose}"
        return [Problem(key, name, rule, "use a module inside it or around it")]
    return []


def _check_twice(key: str, pair: FeaturePair, before: Sequence[FeaturePair]) -> list[Problem]:
    def identity(pair: FeaturePair) -> tuple[str, str, int, str]:
        return pair.student, pair.teacher, pair.of, pair.loss

    if not any(identity(other) == identity(pair) for other in before):
        return []
    return [Problem(key, _shown(pair), f"is there twice with the loss {pair.loss}", "remove one and raise the weight")]


def _check_shapes(key: str, pair: FeaturePair) -> list[Problem]:
    """What of the pair no connector joins or its loss cannot compare."""
    ours, theirs = pair.student_shape, pair.teacher_shape
    shapes = f"{_described(ours)} and {_described(theirs)}"
    if pair.loss in _BY_POSITION:
        if len(ours) != len(theirs) or len(ours) not in (2, 3):
            rule = f"has {shapes}, and {pair.loss} compares maps with maps or sequences with sequences"
            return [Problem(key, _shown(pair), rule, "use other levels, or loss: mse")]
        if pair.loss == "attention_transfer" and 1 in (math.prod(_positions(ours)), math.prod(_positions(theirs))):
            rule = f"has {shapes}, and the attention to a single position is always 1"
            return [Problem(key, _shown(pair), rule, "use levels with more positions, or loss: mse")]
        return []
    joined = len(ours) in _KINDS and (len(ours) == len(theirs) or len(theirs) == 1)
    rule = f"has {shapes}, which no connector joins"
    remedy = "pair maps with maps, sequences with sequences, and anything with a vector of the teacher's"
    return [] if joined else [Problem(key, _shown(pair), rule, remedy)]


def check_cut(config: DistillConfig, student: ModelFacts, pairs: Sequence[FeaturePair]) -> list[Problem]:
    """What pipeline stages would not have: levels that a module around several of the student's layers gives."""
    return [
        Problem(
            "distill.features" if config.features == "auto" else f"distill.features.{index}.student",
            pair.student,
            "is cut by the pipeline: it lies in no single layer of the student",
            "use a module inside it, or parallel.pipeline: 1",
        )
        for index, pair in enumerate(pairs)
        if _layer_of(pair.tap, student.layers) is None
    ]


def _outputs(facts: ModelFacts) -> Mapping[str, ModuleOutput]:
    return {output.name: output for output in facts.outputs}


def _shown(pair: FeaturePair) -> str:
    return f"{pair.student} → {pair.teacher}"


def _described(shape: Shape) -> str:
    kind = _KINDS.get(len(shape), f"features of {len(shape)} dimensions")
    return f"{kind} {'×'.join(map(str, shape))}"


# ---------------------------------------------------------------------------------------------------------- connectors


def _channels(shape: Shape) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def _positions(shape: Shape) -> Shape:
    """Height and width of maps, tokens of a sequence, nothing of a vector."""
    return shape[1:] if len(shape) == 3 else shape[:-1]


def _connected(pair: FeaturePair) -> FeaturePair:
    """The pair with the connector that its shapes and its loss need."""
    ours, theirs = pair.student_shape, pair.teacher_shape
    inputs, outputs = _channels(ours), _channels(theirs)
    pool = len(theirs) < len(ours)
    resized = pair.loss != "gram" and not pool and _positions(ours) != _positions(theirs)
    size = _positions(theirs) if resized else None
    if inputs == outputs or pair.loss == "attention_transfer":
        return replace(pair, connector=Connector("none", inputs, inputs, pool, size))
    return replace(pair, connector=Connector("conv1x1" if len(theirs) == 3 else "linear", inputs, outputs, pool, size))


def connector_sizes(connector: Connector) -> tuple[int, ...]:
    """The elements of each parameter of a connector: of its weight, where it has one."""
    return () if connector.kind == "none" else (connector.inputs * connector.outputs,)


def with_connectors(facts: ModelFacts, pairs: Sequence[FeaturePair]) -> ModelFacts:
    """The facts of the student together with its connectors, which lie in the layer whose level they connect; tensor
    ranks all hold them whole."""
    sizes: dict[LayerFacts | None, list[int]] = {}
    for pair in pairs:
        sizes.setdefault(_layer_of(pair.tap, facts.layers), []).extend(connector_sizes(pair.connector))
    layers = tuple(
        replace(
            layer, weights=_joined(layer.weights, sizes.get(layer, ())), part=_part(layer.part, sizes.get(layer, ()))
        )
        for layer in facts.layers
    )
    every = [size for pair in pairs for size in connector_sizes(pair.connector)]
    return replace(
        facts,
        num_parameters=facts.num_parameters + sum(every),
        num_trainable=facts.num_trainable + sum(every),
        parameter_sizes=(*facts.parameter_sizes, *every),
        layers=layers,
        part=_part(facts.part, every),
    )


def _layer_of(module: str, layers: Sequence[LayerFacts]) -> LayerFacts | None:
    """The layer that the module is or lies in."""
    return next((layer for layer in layers if module == layer.name or module.startswith(f"{layer.name}.")), None)


def _part(part: Weights | None, sizes: Sequence[int]) -> Weights | None:
    return None if part is None else _joined(part, sizes)


def _joined(weights: Weights, sizes: Sequence[int]) -> Weights:
    return join_weights([weights, Weights(sum(sizes), tuple(sizes), 0)])
