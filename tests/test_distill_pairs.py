"""Which levels are paired, through what, and what connectors weigh."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from pydantic import TypeAdapter

from temper.config.schema import DistillConfig
from temper.errors import JobError
from temper.models.probe import answer
from temper.plan.distill import Connector, FeaturePair
from temper.plan.levels import pair_levels
from temper.plan.pairs import check_cut, connector_sizes, resolve_pairs, with_connectors
from temper.plan.probe import LayerFacts, ModelFacts, ModuleOutput, Weights

Shape = tuple[int, ...]


def outputs(**shapes: Shape | None) -> ModelFacts:
    """A network whose modules give these; `_` stands for a dot."""
    given = (ModuleOutput(name.replace("_", "."), "Conv2d", shape, 1) for name, shape in shapes.items())
    return ModelFacts(0, 0, (), 0, 0, 0, (10,), outputs=tuple(given))


STUDENT = outputs(small=(8, 4, 4), large=(16, 8, 8), tokens=(6, 12), vector=(20,), output=(10,), stack=(2, 3, 4, 4))
TEACHER = outputs(small=(8, 4, 4), deep=(32, 8, 8), tokens=(9, 12), wide=(6, 24), vector=(30,), points=(8, 1, 1))


def config(features: Any, **values: Any) -> DistillConfig:
    return DistillConfig(teacher="t", features=features, **values)


def resolve(*features: dict[str, Any], **values: Any) -> tuple[FeaturePair, ...]:
    return resolve_pairs(config(list(features), **values), STUDENT, [TEACHER], ["teacher"])


def refused(*features: dict[str, Any], **values: Any) -> dict[str, str]:
    with pytest.raises(JobError) as caught:
        resolve(*features, **values)
    return {problem.key: str(problem) for problem in caught.value.problems}


# ----------------------------------------------------------------------------------------------------------- connectors


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize(
    ("student", "teacher", "connector"),
    [
        ("small", "small", Connector("none", 8, 8)),
        ("large", "small", Connector("conv1x1", 16, 8, size=(4, 4))),
        ("large", "deep", Connector("conv1x1", 16, 32)),
        ("small", "points", Connector("none", 8, 8, size=(1, 1))),
        ("tokens", "tokens", Connector("none", 12, 12, size=(9,))),
        ("tokens", "wide", Connector("linear", 12, 24)),
        ("vector", "vector", Connector("linear", 20, 30)),
        ("small", "vector", Connector("linear", 8, 30, pool=True)),
        ("tokens", "vector", Connector("linear", 12, 30, pool=True)),
        ("output", "vector", Connector("linear", 10, 30)),
    ],
)
def test_connectors_bring_the_student_into_the_teachers_shape(
    student: str, teacher: str, connector: Connector, loss: str
) -> None:
    (pair,) = resolve({"student": student, "teacher": teacher, "loss": loss})
    assert pair.connector == connector
    assert connector_sizes(connector) == ((connector.inputs * connector.outputs,) if connector.kind != "none" else ())


@pytest.mark.parametrize(
    ("student", "teacher", "loss", "connector"),
    [
        ("large", "deep", "attention_transfer", Connector("none", 16, 16)),
        ("large", "small", "attention_transfer", Connector("none", 16, 16, size=(4, 4))),
        ("tokens", "wide", "attention_transfer", Connector("none", 12, 12)),
        ("large", "small", "gram", Connector("conv1x1", 16, 8)),
        ("tokens", "tokens", "gram", Connector("none", 12, 12)),
        ("tokens", "wide", "gram", Connector("linear", 12, 24)),
    ],
)
def test_what_attention_and_gram_need(student: str, teacher: str, loss: str, connector: Connector) -> None:
    (pair,) = resolve({"student": student, "teacher": teacher, "loss": loss})
    assert pair.connector == connector


def test_a_pair_as_it_was_asked_for() -> None:
    first, second = resolve(
        {"student": "small"},
        {"student": "large", "teacher": "deep", "loss": "gram", "weight": 2.5},
        feature_loss="cosine",
        feature_weight=0.5,
    )
    assert first == FeaturePair(
        "small", "small", 0, "cosine", 0.5, (8, 4, 4), (8, 4, 4), Connector("none", 8, 8), last=None
    )
    assert (second.loss, second.weight, second.term, second.tap) == ("gram", 2.5, "features/large", "large")
    assert resolve() == ()


# -------------------------------------------------------------------------------------------------------------- refused


def test_all_problems_at_once() -> None:
    said = refused(
        {"student": "smal", "teacher": "nothing.like.it"},
        {"student": "small", "of": 1},
        {"student": "large"},
        {"student": "vector", "teacher": "small"},
        {"student": "small"},
        {"student": "small"},
    )
    assert said == {
        "distill.features.0.student": "distill.features.0.student: smal is no module that the forward pass of the "
        "student calls; did you mean small?",
        "distill.features.0.teacher": "distill.features.0.teacher: nothing.like.it is no module that the forward pass "
        "of teacher calls; its modules are small, deep, tokens, wide, vector, …",
        "distill.features.1.of": "distill.features.1.of: 1 is no teacher: there is one, 0; use 0",
        "distill.features.2.teacher": "distill.features.2.teacher: large is no module that the forward pass of teacher "
        "calls; its modules are small, deep, tokens, wide, vector, …",
        "distill.features.3": "distill.features.3: vector → small has a vector 20 and maps 8×4×4, which no connector "
        "joins; pair maps with maps, sequences with sequences, and anything with a vector of the teacher's",
        "distill.features.5": "distill.features.5: small → small is there twice with the loss mse; remove one and "
        "raise the weight",
    }


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"student": "tokens", "teacher": "small"}, "has a sequence 6×12 and maps 8×4×4, which no connector joins"),
        ({"student": "stack", "teacher": "small"}, "has features of 4 dimensions 2×3×4×4 and maps"),
        (
            {"student": "vector", "loss": "attention_transfer"},
            "attention_transfer compares maps with maps or sequences",
        ),
        ({"student": "vector", "loss": "gram"}, "gram compares maps with maps"),
        ({"student": "small", "teacher": "wide", "loss": "gram"}, "gram compares maps with maps"),
        ({"student": "small", "teacher": "points", "loss": "attention_transfer"}, "to a single position is always 1"),
    ],
)
def test_shapes_that_are_refused(feature: dict[str, Any], said: str) -> None:
    assert said in refused(feature)["distill.features.0"]


def test_one_level_may_learn_in_several_ways() -> None:
    pairs = resolve({"student": "small"}, {"student": "small", "loss": "gram"}, {"student": "large", "teacher": "deep"})
    assert len(pairs) == 3


def test_modules_that_give_no_level() -> None:
    student = ModelFacts(
        *(0, 0, (), 0, 0, 0, (10,)),
        outputs=(
            ModuleOutput("lstm", "LSTM", None, 1),
            ModuleOutput("relu", "ReLU", (4,), 2),
            ModuleOutput("body", "Sequential", (4,), 1, last="relu"),
        ),
    )
    features = [{"student": name, "teacher": "vector"} for name in ("lstm", "relu", "body")]
    with pytest.raises(JobError) as caught:
        resolve_pairs(config(features), student, [TEACHER], ["teacher"])
    assert [f"{problem.value} {problem.rule}" for problem in caught.value.problems] == [
        "lstm (LSTM) does not give one tensor of floats, with the examples first, in the student",
        "relu is called 2 times in a forward pass of the student",
        "body ends with relu, which is called 2 times in a forward pass of the student",
    ]


def test_pairs_of_several_teachers() -> None:
    features = [{"student": "small", "of": 1}, {"student": "small", "teacher": "points"}]
    pairs = resolve_pairs(config(features), STUDENT, [TEACHER, outputs(small=(5, 4, 4))], ["one", "two"])
    assert [(pair.of, pair.teacher, pair.connector.outputs) for pair in pairs] == [(1, "small", 5), (0, "points", 8)]
    with pytest.raises(JobError, match=r"features\.0\.of: 2 is no teacher: there are 2, counted from 0; use 1"):
        resolve_pairs(config([{"student": "small", "of": 2}]), STUDENT, [TEACHER] * 2, ["one", "two"])


# ----------------------------------------------------------------------------------------------------------------- auto

FACTS = TypeAdapter(ModelFacts)


@functools.cache
def facts_of(shape: Shape, kind: str, **section: Any) -> ModelFacts:
    model = {
        "kind": kind,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in section.items()},
    }
    question = {"model": model, "shape": list(shape), "num_classes": 10, "tensor": None, "timing": None}
    return FACTS.validate_python(answer(question)["facts"])


def resnet(depth: int, shape: Shape = (3, 32, 32)) -> ModelFacts:
    return facts_of(shape, "resnet", depth=depth)


def torchvision(name: str) -> ModelFacts:
    return facts_of((3, 32, 32), "torchvision", name=name)


def gpt(layers: int) -> ModelFacts:
    return facts_of((6,), "gpt", layers=layers, heads=2, width=8)


def mlp(*hidden: int, dropout: float = 0.0, shape: Shape = (64,)) -> ModelFacts:
    return facts_of(shape, "mlp", hidden=hidden, dropout=dropout)


def cnn(*channels: int, shape: Shape = (1, 28, 28)) -> ModelFacts:
    return facts_of(shape, "cnn", channels=channels, hidden=32)


AUTO = {
    "resnet-8 resnet-20": (
        *(lambda: resnet(8), lambda: resnet(20)),
        [("layer1_0", "layer1_2"), ("layer2_0", "layer2_2"), ("layer3_0", "layer3_2")],
    ),
    # The maps after the last pooling are learnt nowhere, and the hidden layer has no like.
    "cnn resnet-20": (
        *(lambda: cnn(16, 32), lambda: resnet(20, (1, 28, 28))),
        [("1", "layer1_2"), ("4", "layer2_2")],
    ),
    "resnet-8 cnn": (lambda: resnet(8, (1, 28, 28)), lambda: cnn(16, 32), [("layer1_0", "1"), ("layer2_0", "4")]),
    # As many stages as hidden layers: stages.
    "cnn cnn": (lambda: cnn(8), lambda: cnn(16, 32), [("1", "1")]),
    # After ReLU, and before dropout; of the teacher's two hidden layers the last.
    "mlp mlp": (lambda: mlp(32), lambda: mlp(64, 64, dropout=0.5), [("2", "5")]),
    "mlp deeper mlp": (lambda: mlp(32, 16), lambda: mlp(64, 48, 32), [("2", "4"), ("4", "6")]),
    "deeper mlp mlp": (lambda: mlp(64, 48, 32), lambda: mlp(16), [("6", "2")]),
    "mlp as wide as the classes": (lambda: mlp(10), lambda: mlp(10), [("2", "2")]),
    "cnn mlp": (lambda: cnn(16, shape=(1, 8, 8)), lambda: mlp(64, 64, shape=(1, 8, 8)), [("5", "4")]),
    "gpt gpt": (lambda: gpt(2), lambda: gpt(4), [("block_0", "block_1"), ("block_1", "block_3")]),
    "gpt of one block": (lambda: gpt(1), lambda: gpt(4), [("block_0", "block_3")]),
    "gpt 2 gpt 3": (lambda: gpt(2), lambda: gpt(3), [("block_0", "block_1"), ("block_1", "block_2")]),
    # Without the stem, and never a convolution inside the first block of a stage, whose maps are still large.
    "resnet18 resnet50": (
        *(lambda: torchvision("resnet18"), lambda: torchvision("resnet50")),
        [(name, name) for name in ("layer1", "layer2", "layer3", "layer4")],
    ),
    "vgg11 resnet18": (
        *(lambda: torchvision("vgg11"), lambda: torchvision("resnet18")),
        [("features.9", "layer1"), ("features.14", "layer2"), ("features.19", "layer3")],
    ),
    "resnet18 googlenet": (
        *(lambda: torchvision("resnet18"), lambda: torchvision("googlenet")),
        [("layer1", "conv3"), ("layer2", "inception3b"), ("layer3", "inception4e"), ("layer4", "inception5b")],
    ),
    # No maps of one size: the last with the last.
    "by order": (
        lambda: cnn(16, 32, shape=(3, 36, 36)),
        lambda: torchvision("resnet18"),
        [("1", "layer3"), ("4", "layer4")],
    ),
    "nothing alike": (lambda: mlp(32, shape=(3, 32, 32)), lambda: resnet(8), []),
}


@pytest.mark.parametrize("case", AUTO)
def test_automatic_pairs(case: str) -> None:
    student, teacher, expected = AUTO[case]
    assert list(pair_levels(student(), teacher())) == expected


def test_automatic_pairs_have_connectors() -> None:
    pairs = resolve_pairs(config("auto"), torchvision("resnet18"), [torchvision("resnet50")], ["teacher"])
    assert [(pair.student, pair.last, pair.connector) for pair in pairs] == [
        (f"layer{stage}", f"layer{stage}.1", Connector("conv1x1", maps, 4 * maps))
        for stage, maps in ((1, 64), (2, 128), (3, 256), (4, 512))
    ]
    # At 32×32 pixels the last stage has a single position, to which all attention goes.
    settings = config("auto", feature_loss="attention_transfer", feature_weight=3.0)
    pairs = resolve_pairs(settings, torchvision("resnet18"), [torchvision("resnet50")], ["teacher"])
    assert [(pair.student, pair.loss, pair.weight) for pair in pairs] == [
        (f"layer{stage}", "attention_transfer", 3.0) for stage in (1, 2, 3)
    ]


def test_automatic_pairs_with_each_of_several_teachers() -> None:
    pairs = resolve_pairs(config("auto"), gpt(1), [gpt(2), gpt(4)], ["small", "large"])
    assert [(pair.of, pair.teacher) for pair in pairs] == [(0, "block_1"), (1, "block_3")]


@pytest.mark.parametrize(
    ("student", "teacher", "loss"),
    [
        (lambda: mlp(32, shape=(3, 32, 32)), lambda: resnet(8), "mse"),
        (lambda: mlp(32), lambda: mlp(64), "attention_transfer"),
    ],
)
def test_where_nothing_can_be_paired(student: Any, teacher: Any, loss: str) -> None:
    with pytest.raises(JobError) as caught:
        resolve_pairs(config("auto", feature_loss=loss), student(), [teacher()], ["big_one"])
    assert [str(problem) for problem in caught.value.problems] == [
        f"distill.features: auto finds no level of the student that could learn {loss} from one of big_one; "
        "name the pairs, e.g. features: [{student: layer2, teacher: layer3}], or leave features out"
    ]


# ------------------------------------------------------------------------------------------------ what connectors weigh


def layer(name: str, *sizes: int, part: int | None = None) -> LayerFacts:
    held = None if part is None else Weights(part, (part,), 0)
    return LayerFacts(name, Weights(sum(sizes), sizes, 8), held, 1, 2, 3)


def test_connectors_weigh_where_they_lie() -> None:
    facts = ModelFacts(
        *(90, 80, (30, 50), 16, 5, 6, (10,)),
        layers=(layer("features.0", 30, part=15), layer("features.1", 50, part=25), layer("fc")),
        part=Weights(40, (15, 25), 4),
    )
    shapes = {"of": 0, "loss": "mse", "weight": 1.0, "student_shape": (4,), "teacher_shape": (4,)}
    pairs = [
        FeaturePair("features", "t", connector=Connector("conv1x1", 4, 5), last="features.1.conv", **shapes),
        FeaturePair("features.0", "t", connector=Connector("linear", 2, 3), **shapes),
        FeaturePair("features.0", "t", connector=Connector("none", 2, 2), **shapes),
        FeaturePair("features.1", "t", connector=Connector("linear", 7, 1), **shapes),
    ]
    both = with_connectors(facts, pairs)
    assert (both.num_parameters, both.num_trainable) == (90 + 33, 80 + 33)
    assert both.parameter_sizes == (30, 50, 20, 6, 7)
    assert both.part == Weights(40 + 33, (15, 25, 20, 6, 7), 4)
    assert [item.weights for item in both.layers] == [
        Weights(36, (30, 6), 8),
        Weights(77, (50, 20, 7), 8),
        Weights(0, (), 8),
    ]
    assert [item.part for item in both.layers] == [Weights(21, (15, 6), 0), Weights(52, (25, 20, 7), 0), None]
    assert (both.buffer_bytes, both.forward_flops_per_example) == (16, 6)
    assert with_connectors(facts, []) == facts


def test_a_module_around_several_layers_is_not_there_in_a_pipeline() -> None:
    student = ModelFacts(*(0, 0, (), 0, 0, 0, (10,)), layers=(layer("trunk.a"), layer("trunk.b")))
    shapes = {"of": 0, "loss": "mse", "weight": 1.0, "student_shape": (4,), "teacher_shape": (4,)}
    pairs = [
        FeaturePair(name, "t", connector=Connector("none", 4, 4), last=last, **shapes)
        for name, last in (("trunk.a.conv", None), ("trunk", None), ("trunk", "trunk.b"))
    ]
    (problem,) = check_cut(config([{"student": name} for name in ("trunk.a.conv", "trunk", "trunk")]), student, pairs)
    assert str(problem) == (
        "distill.features.1.student: trunk is cut by the pipeline: it lies in no single layer of the student; "
        "use a module inside it, or parallel.pipeline: 1"
    )
