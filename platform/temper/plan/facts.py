"""What a plan must know of the data: sizes, shape, classes, normalisation and a fingerprint. Decodes nothing.

Built-in sets are a table. Of a user's own files only listings, headers and indices are read, and at most a few images
are opened for their size. No torch, pandas or scikit-learn is imported; pyarrow and PIL only where a job needs them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.config.schema import DataConfig, PythonData, SyntheticData, Transform
from temper.errors import JobError, Problem
from temper.plan.built_in import BUILT_INS
from temper.plan.user_files import (
    FileData,
    FoundData,
    find_data_folder,
    inspect_image_folder,
    inspect_parquet,
    inspect_webdataset,
)

Size = tuple[int, int]

NO_LABEL = -100
"""The target of an example, or of one of its positions, that has no label."""


@dataclass(frozen=True)
class DataFacts:
    """A data set as the plan sees it.

    `train_examples` already excludes the held-out ones, and the `left_out_examples`, which have no label. `shape` is
    that of one example after the transforms, images as (channels, height, width). `mean` and `std` are what inputs
    scaled to 0…1 are normalised with, per channel; empty: inputs are used as they are. `fingerprint` is over everything
    that decides the stored examples; it leaves out how a job uses them (holdout, transforms, batches). `folder` is
    where a user's own files lie, empty for other kinds. `class_names` are the data set's own, in the order of their
    numbers; empty where it has none.
    """

    train_examples: int
    validation_examples: int
    test_examples: int
    shape: tuple[int, ...]
    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    folder: str = ""
    left_out_examples: int = 0
    class_names: tuple[str, ...] = ()


def data_facts(config: DataConfig, job_folder: Path, *, taught: bool = False) -> DataFacts:
    """Find the facts of `config`'s data. `data.path` is looked for in the working directory, then in `job_folder`.

    `taught`: a teacher has something to say of examples without a label, so that they are trained on as well.
    `data.omit_classes` changes no number, because nothing reads the labels here.

    Reads listings and headers only; a built-in set need not be there yet. Raises JobError with every problem found.
    """
    found = _INSPECTORS[config.kind](config, job_folder)
    shape, problems = _check_transforms(config, found)
    mean, std = found.mean, found.std
    if config.normalize is not None:
        mean, std = tuple(config.normalize.mean), tuple(config.normalize.std)
        problems += _check_normalize(mean, std, shape)
    if config.holdout >= found.train_examples:
        rule = f"leaves no training examples: there are {found.train_examples}"
        problems.append(Problem("data.holdout", config.holdout, rule, f"hold out at most {found.train_examples - 1}"))
    training = found.train_examples - config.holdout
    problems += _check_labels(config.labels, training, taught)
    if problems:
        raise JobError(problems)
    left_out = 0 if taught else training - labelled_examples(config.labels, training)
    return DataFacts(
        train_examples=training - left_out,
        validation_examples=config.holdout,
        test_examples=found.test_examples,
        shape=shape,
        num_classes=found.num_classes,
        mean=mean,
        std=std,
        fingerprint=_fingerprint(config.kind, found.ingredients),
        folder=str(find_data_folder(config.path, job_folder)) if isinstance(config, FileData) else "",
        left_out_examples=left_out,
        class_names=found.class_names,
    )


def labelled_examples(share: float, count: int) -> int:
    """How many of `count` training examples have a label where `data.labels` is `share`."""
    return round(share * count)


def _check_labels(share: float, training: int, taught: bool) -> list[Problem]:
    if training <= 0 or labelled_examples(share, training) > 0 or (share == 0 and taught):
        return []
    if share == 0:
        rule = "leaves nothing to train on: examples without a label are there for distillation only"
        return [Problem("data.labels", share, rule, "use more than 0, or distill from a teacher (distill)")]
    rule = f"is less than half of one of the {training} training examples"
    return [Problem("data.labels", share, rule, f"use at least {1 / training:.2g}")]


def _fingerprint(kind: str, ingredients: Any) -> str:
    text = json.dumps([kind, ingredients], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------- sets that need no files


def _inspect_built_in(config: DataConfig, job_folder: Path) -> FoundData:
    entry = BUILT_INS[config.kind]
    return FoundData(
        entry.train_examples,
        entry.test_examples,
        entry.shape,
        entry.num_classes,
        entry.mean,
        entry.std,
        list(entry.digests),
        entry.class_names,
    )


def _inspect_synthetic(config: SyntheticData, job_folder: Path) -> FoundData:
    # The seed of the examples is fixed, so these values are all that decides them.
    ingredients = [config.shape, config.num_classes, config.train_examples, config.test_examples, config.noise]
    sizes = (config.train_examples, config.test_examples)
    return FoundData(*sizes, tuple(config.shape), config.num_classes, (), (), ingredients)


def _inspect_python(config: PythonData, job_folder: Path) -> FoundData:
    ingredients = [config.target, config.args, config.train_examples, config.test_examples, config.shape]
    sizes = (config.train_examples, config.test_examples)
    return FoundData(*sizes, tuple(config.shape), config.num_classes, (), (), ingredients)


# ---------------------------------------------------------------------------------------------------------- transforms


def _check_transforms(config: DataConfig, found: FoundData) -> tuple[tuple[int, ...], list[Problem]]:
    """The shape of an example after the transforms, and what is wrong with them."""
    if len(found.shape) != 3:
        keys = [key for key in ("augment", "eval_transforms") if getattr(config, key)]
        rule = f"needs images, but an example has the shape {list(found.shape)}"
        return found.shape, [Problem(f"data.{key}", None, rule, "remove it") for key in keys]
    channels, height, width = found.shape
    problems = _check_color(config, channels) + _check_crops(config, (height, width))
    start = (height, width) if height else None
    train, evaluation = _size_after(config.augment, start), _size_after(config.eval_transforms, start)
    for key, size in (("data.augment", train), ("data.eval_transforms", evaluation)):
        if size is None:
            remedy = "end with random_resized_crop or center_crop" if key == "data.augment" else "end with center_crop"
            problems.append(Problem(key, None, "leaves images of different sizes", remedy))
    if train is not None and evaluation is not None and train != evaluation:
        rule = f"makes images of {_by(evaluation)}, but data.augment makes {_by(train)}"
        problems.append(Problem("data.eval_transforms", None, rule, "use one size in both"))
    return (channels, *(evaluation or (0, 0))), problems


def _by(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def _size_after(transforms: Sequence[Transform], size: Size | None) -> Size | None:
    """(height, width) after `transforms`; None where it is not the same for all images."""
    for transform in transforms:
        if transform.kind == "resize":
            size = _resized(size, transform.size) if size is not None else None
        elif transform.kind in ("random_crop", "random_resized_crop", "center_crop"):
            # A random crop without a size keeps the image's own.
            size = (transform.size, transform.size) if transform.size is not None else size
    return size


def _resized(size: Size, shorter: int) -> Size:
    # torchvision truncates the longer side; so does this.
    height, width = size
    longer = math.trunc(shorter * max(size) / min(size))
    return (longer, shorter) if width <= height else (shorter, longer)


def _check_crops(config: DataConfig, size: Size) -> list[Problem]:
    problems: list[Problem] = []
    current: Size | None = size if size[0] else None
    for index, transform in enumerate(config.augment):
        if transform.kind == "random_crop" and transform.size is not None and current is not None:
            largest = min(current) + 2 * transform.padding
            if transform.size > largest:
                rule = f"is larger than the padded image of {_by(current)} + 2×{transform.padding}"
                problems.append(Problem(f"data.augment.{index}.size", transform.size, rule, f"use at most {largest}"))
        current = _size_after([transform], current)
    return problems


def _check_color(config: DataConfig, channels: int) -> list[Problem]:
    if channels in (1, 3):
        return []
    return [
        Problem(
            f"data.augment.{index}.kind", transform.kind, f"needs 1 or 3 channels, the data has {channels}", "remove it"
        )
        for index, transform in enumerate(config.augment)
        if transform.kind in ("color_jitter", "trivial_augment")
    ]


def _check_normalize(mean: Sequence[float], std: Sequence[float], shape: tuple[int, ...]) -> list[Problem]:
    lengths = (("mean", mean), ("std", std))
    return [
        Problem(
            f"data.normalize.{key}",
            list(values),
            f"has {len(values)} values for {shape[0]} channels",
            f"give {shape[0]}",
        )
        for key, values in lengths
        if len(values) != shape[0]
    ]


_INSPECTORS: dict[str, Callable[[Any, Path], FoundData]] = {
    "digits": _inspect_built_in,
    "mnist": _inspect_built_in,
    "fashion_mnist": _inspect_built_in,
    "cifar10": _inspect_built_in,
    "synthetic": _inspect_synthetic,
    "python": _inspect_python,
    "image_folder": inspect_image_folder,
    "parquet": inspect_parquet,
    "webdataset": inspect_webdataset,
}
