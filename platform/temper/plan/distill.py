"""Distillation, decided: who teaches, which levels are matched and how, what is cached.

Finding a teacher needs files, and training one needs a cluster, so that both are done before: see
:mod:`temper.launch.teachers`. Here a teacher is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from temper.config.schema import DistillConfig, ModelConfig, RampConfig
from temper.schedules import build_ramp

if TYPE_CHECKING:
    from temper.plan.build import Plan
    from temper.plan.probe import ModelFacts

CONNECTORS = "distill.connectors"
"""What the names of the connectors' parameters begin with in a checkpoint, e.g. `distill.connectors.0.weight`."""


@dataclass(frozen=True)
class Teacher:
    """A trained network, found or, as a job's last phase, yet to be trained.

    `place` is where its weights are, and `kind` what that is: the folder of a phase or of a checkpoint, or a file of
    safetensors. `shape`, `num_classes`, `mean` and `std` are those of the data that it was trained on, None where only
    the network is known; an empty `mean` is that of inputs that are used as they are. `fingerprint` is over everything
    that decides its weights. `import_folders` are searched for the `kind: python` target of its model. `plan` is that
    of its job where it is one, to train it by, and `is_trained` whether that had come to its end when it was planned.
    `weight_shapes` are those of the tensors in a file of weights, by their names.
    """

    name: str
    source: str
    kind: Literal["phase", "checkpoint", "weights"]
    place: Path
    model: ModelConfig
    fingerprint: str
    shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    precision: str = "fp32"
    weight: float = 1.0
    import_folders: tuple[str, ...] = ()
    plan: Plan | None = None
    is_trained: bool = True
    weight_shapes: Mapping[str, tuple[int, ...]] | None = None

    def to_dict(self) -> dict[str, Any]:
        left_out = ("plan", "model", "place", "is_trained", "weight_shapes")
        values = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in left_out}
        return {**values, "place": str(self.place), "model": self.model.model_dump(mode="json")}


@dataclass(frozen=True)
class Connector:
    """What makes a level of the student comparable with the teacher's: `kind` maps `inputs` features to `outputs`;
    `pool` says that maps are averaged to vectors before, `size` to which (height, width) or (tokens,) they are brought
    after it, by adaptive pooling where that is smaller, else by interpolation. `none` maps nothing.
    """

    kind: Literal["none", "conv1x1", "linear"]
    inputs: int
    outputs: int
    pool: bool = False
    size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FeaturePair:
    """A level of the student and the level of teacher `of` that it learns to give. Shapes are those of one example.

    `last` is, where `student` is an nn.Sequential, the module that gives its output: a pipeline cuts a sequence.
    """

    student: str
    teacher: str
    of: int
    loss: Literal["mse", "attention_transfer", "cosine", "gram"]
    weight: float
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    connector: Connector
    last: str | None = None

    @property
    def tap(self) -> str:
        """The module of the student at which the level is seen wherever the student is cut."""
        return self.last or self.student

    @property
    def term(self) -> str:
        """The name of its term of the loss; pairs of one level share it."""
        return f"features/{self.student}"


@dataclass(frozen=True)
class CachePlan:
    """What the teacher says of the training split, `views` times each example, and of those that the student is
    evaluated on, on disk.

    `recipe` is everything that decides it, by name, and `key` its hash, the folder's name. `features` says whether the
    features of the pairs are there, too.
    """

    key: str
    folder: Path
    recipe: Mapping[str, Any]
    views: int
    top_k: int | None
    features: bool


@dataclass(frozen=True)
class DistillPlan:
    """`rows` is the number of examples in every forward pass of the teacher, the last of which is filled up: so what it
    says of an example depends on no batch. `cache` is None where the teacher is live. `evaluation` is the file that
    has, or will have, the teacher's metrics on the student's test split, and `answers` are, by the splits that the
    student is evaluated on, those with its most probable classes, where outputs are classes."""

    teachers: tuple[Teacher, ...]
    facts: tuple[ModelFacts, ...]
    pairs: tuple[FeaturePair, ...]
    rows: int
    cache: CachePlan | None
    evaluation: Path
    answers: Mapping[str, Path] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        cache = None if self.cache is None else {**asdict(self.cache), "folder": str(self.cache.folder)}
        return {
            "teachers": [teacher.to_dict() for teacher in self.teachers],
            "pairs": [asdict(pair) for pair in self.pairs],
            "rows": self.rows,
            "cache": cache,
            "evaluation": str(self.evaluation),
            "answers": {split: str(file) for split, file in self.answers.items()},
        }


def ramp_values(config: DistillConfig, dense_steps: int, step: int) -> dict[str, float]:
    """What the ramps are at the job's step `step` (0-based), to be recorded with it; empty where nothing changes. They
    go over the `dense_steps` of the dense phase and stay at their ends in later phases."""
    ramps = {"temperature": config.temperature, "alpha": config.alpha}
    return {
        f"distill/{name}": build_ramp(ramp, dense_steps)(step)
        for name, ramp in ramps.items()
        if isinstance(ramp, RampConfig)
    }
