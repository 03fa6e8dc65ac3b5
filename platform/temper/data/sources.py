"""Where examples come from: `load_split` gives one split of a job's data with random access.

Adding a kind: a section in `config/schema.py`, its facts in `plan/facts.py`, a loader here and one line in `KINDS`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from temper.config.schema import DataConfig, JobConfig, PythonData, SyntheticData
from temper.data.download import data_root, has_mosaics, read_file
from temper.data.formats import (
    read_cifar10_archive,
    read_cifar10_mosaics,
    read_digits,
    read_idx_pair,
)
from temper.data.store import MANIFEST, fetch_stored, store_folder
from temper.errors import JobError, Problem, RunError
from temper.plan.built_in import BUILT_INS, DIGITS_DIGEST
from temper.plan.facts import NO_LABEL, DataFacts, labelled_examples
from temper.targets import load_target

SplitName = Literal["train", "validation", "test"]

# SHA-256 of the canonical pixels followed by the labels as bytes: the mosaics have no publisher's checksum.
_CIFAR10_MOSAIC_DIGESTS = {
    "train": "d5c33a0afd72fe35251e959af302dfef966350024637730d8058215e180322e3",
    "test": "925c51da8e6370f27c9a4f605722e4eef262a69c1b6b4b322b14461b3bd95faf",
}
_LARGEST_IN_MEMORY = 512 * 2**20  # bytes of a synthetic split that is made at once; a larger one is made as it is read
_HOLDOUT_KEY = 0x686F6C64
_DIGITS_KEY = 0x64696769
_LABELS_KEY = 0x6C6162656C73  # above every seed, which is the key of the order of an epoch


class Split(Protocol):
    """Examples of one split, by row. Safe to read from several processes."""

    def __len__(self) -> int: ...

    def examples(self, rows: Tensor) -> tuple[Tensor | Sequence[Tensor], Tensor]:
        """Inputs and targets of `rows` (int64). Inputs are one tensor, or a list where they may differ in size.

        Images are uint8 in 0…255 or float32 in 0…1, (channels, height, width).
        """
        ...

    def targets_of(self, rows: Tensor) -> Tensor:
        """The targets of `rows` alone; decodes no image."""
        ...


@dataclass(frozen=True)
class ArraySplit:
    """A split held in memory: `inputs` (examples, …) and `targets` (examples, …)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[rows], self.targets[rows]

    def targets_of(self, rows: Tensor) -> Tensor:
        return self.targets[rows]


@dataclass(frozen=True)
class PartSplit:
    """Some rows of another split: row i here is `source_rows[i]` there."""

    source: Split
    source_rows: Tensor

    def __len__(self) -> int:
        return len(self.source_rows)

    def examples(self, rows: Tensor) -> tuple[Tensor | Sequence[Tensor], Tensor]:
        return self.source.examples(self.source_rows[rows])

    def targets_of(self, rows: Tensor) -> Tensor:
        return self.source.targets_of(self.source_rows[rows])


@dataclass(frozen=True)
class PartlyLabelledSplit:
    """Another split of which only the `labelled` rows (a mask) have a label: the targets of the others are NO_LABEL.

    The first `header` numbers of a target are no label and stay.
    """

    source: Split
    labelled: Tensor
    header: int

    def __len__(self) -> int:
        return len(self.source)

    def examples(self, rows: Tensor) -> tuple[Tensor | Sequence[Tensor], Tensor]:
        inputs, targets = self.source.examples(rows)
        return inputs, self._without_labels(rows, targets)

    def targets_of(self, rows: Tensor) -> Tensor:
        return self._without_labels(rows, self.source.targets_of(rows))

    def _without_labels(self, rows: Tensor, targets: Tensor) -> Tensor:
        numbers = targets.clone().reshape(len(targets), -1)
        numbers[~self.labelled[rows], self.header :] = NO_LABEL
        return numbers.reshape(targets.shape)


@dataclass(frozen=True)
class Labelling:
    """Which training examples keep their label, where `data.labels` is less than 1, and what becomes of the others.

    `seed` draws them. `taught`: the others are trained on as well, by what a teacher says of them; else they are left
    out. `header` numbers at the beginning of a target are no label.
    """

    seed: int
    taught: bool
    header: int = 0


def labelling_of(job: JobConfig) -> Labelling:
    """The job's."""
    return Labelling(job.seed, job.distill is not None, header=1 if job.loss.kind == "ctc" else 0)


def load_splits(
    config: DataConfig, storage: Path, facts: DataFacts, labelling: Labelling | None = None
) -> dict[SplitName, Split]:
    """Load all three splits of the job's data.

    `validation` is `data.holdout` examples of the training data, chosen at random but alike for every seed, because a
    user's files usually lie class by class; `train` is the rest in its order, without `data.omit_classes` and with
    `data.labels` of its labels, for which a `labelling` must be given. Kinds that are ingested are read from `storage`.
    Raises RunError where files are missing or damaged, JobError where the job is wrong.
    """
    train, validation = _load_training(config, storage, facts)
    train = _with_labels(_without_classes(train, config.omit_classes), config.labels, labelling)
    return {"train": train, "validation": validation, "test": KINDS[config.kind](config, "test", storage, facts)}


def load_split(
    config: DataConfig, split: SplitName, storage: Path, facts: DataFacts, labelling: Labelling | None = None
) -> Split:
    """Load one of the splits that `load_splits` describes."""
    if split == "test":
        return KINDS[config.kind](config, "test", storage, facts)
    train, validation = _load_training(config, storage, facts)
    if split == "validation":
        return validation
    return _with_labels(_without_classes(train, config.omit_classes), config.labels, labelling)


def _load_training(config: DataConfig, storage: Path, facts: DataFacts) -> tuple[Split, Split]:
    return _hold_out(KINDS[config.kind](config, "train", storage, facts), config.holdout)


def _hold_out(whole: Split, count: int) -> tuple[Split, Split]:
    """`whole` without `count` of its examples, and those."""
    order = random_order(len(whole), _HOLDOUT_KEY, 0)
    kept, held_out = np.sort(order[: len(whole) - count]), np.sort(order[len(whole) - count :])
    train = PartSplit(whole, torch.from_numpy(kept)) if count else whole
    return train, PartSplit(whole, torch.from_numpy(held_out))


def _without_classes(split: Split, classes: Sequence[int]) -> Split:
    """`split` without the examples of `classes`. A user's own function is asked for all of its examples for it."""
    if not classes:
        return split
    targets = split.targets_of(torch.arange(len(split)))
    if targets.dim() != 1:
        raise RunError(f"data.omit_classes: a target has the shape {list(targets.shape[1:])}, and is no class")
    rows = torch.nonzero(~torch.isin(targets, torch.tensor(classes)))[:, 0]
    if not len(rows):
        raise RunError(f"data.omit_classes: every one of the {len(split)} training examples is of one of {classes}")
    return PartSplit(split, rows)


def _with_labels(split: Split, share: float, labelling: Labelling | None) -> Split:
    """`split` with the labels of `share` of its examples."""
    if share == 1:
        return split
    if labelling is None:
        raise ValueError(f"who is to say which examples are the {share:g} that have a label?")
    count = labelled_examples(share, len(split))
    if not count and not labelling.taught:
        raise RunError(f"data.labels: {share:g} leaves none of the {len(split)} training examples; use more")
    rows = torch.from_numpy(np.sort(random_order(len(split), _LABELS_KEY, labelling.seed)[:count]))
    if not labelling.taught:
        return PartSplit(split, rows)
    labelled = torch.zeros(len(split), dtype=torch.bool)
    labelled[rows] = True
    return PartlyLabelledSplit(split, labelled, labelling.header)


def random_order(count: int, key: int, subkey: int) -> npt.NDArray[np.int64]:
    """A permutation of 0 … count-1 that only the two keys (below 2**64) decide.

    Sorting Philox's raw numbers, which NumPy keeps stable over versions, as it does not the output of `permutation`.
    """
    numbers = np.random.Philox(key=np.array([key, subkey], np.uint64)).random_raw(count)
    return np.argsort(numbers, kind="stable").astype(np.int64, copy=False)


# -------------------------------------------------------------------------------------------------------- built-in sets


def _load_digits(config: DataConfig, split: str, storage: Path, facts: DataFacts) -> ArraySplit:
    images, labels = read_digits(DIGITS_DIGEST)
    is_test = np.zeros(len(labels), bool)
    is_test[_digits_test_rows(labels, BUILT_INS["digits"].test_examples)] = True
    rows = np.flatnonzero(is_test if split == "test" else ~is_test)
    return ArraySplit(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]))


def _digits_test_rows(labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """`count` rows with the same share of every class (largest remainders), alike for every job."""
    quotas = np.bincount(labels) * count / len(labels)
    sizes = np.floor(quotas).astype(int)
    sizes[np.argsort(sizes - quotas, kind="stable")[: count - sizes.sum()]] += 1
    order = random_order(len(labels), _DIGITS_KEY, 0)
    return np.concatenate([order[labels[order] == label][:size] for label, size in enumerate(sizes)])


def _load_idx(config: DataConfig, split: str, storage: Path, facts: DataFacts) -> ArraySplit:
    files = BUILT_INS[config.kind].files
    images, labels = files[:2] if split == "train" else files[2:]
    pixels, classes = read_idx_pair(read_file(images), read_file(labels), (images.name, labels.name))
    return _array_split(pixels, classes)


def _load_cifar10(config: DataConfig, split: str, storage: Path, facts: DataFacts) -> ArraySplit:
    if not has_mosaics("cifar10"):
        (archive,) = BUILT_INS["cifar10"].files
        return _array_split(*read_cifar10_archive(read_file(archive), archive.name, split))
    folder = data_root() / "cifar10"
    images, labels = read_cifar10_mosaics(folder, split)
    found = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    if found != _CIFAR10_MOSAIC_DIGESTS[split]:
        expected = _CIFAR10_MOSAIC_DIGESTS[split]
        raise RunError(
            f"the mosaics in {folder} are not CIFAR-10's {split} split: checksum {found}, expected {expected}"
        )
    return _array_split(images, labels)


def _array_split(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> ArraySplit:
    # Copied, because torch wants memory that it may write to.
    return ArraySplit(torch.from_numpy(np.array(images)), torch.from_numpy(np.array(labels)))


# ------------------------------------------------------------------------------------------------------------ synthetic


@dataclass(frozen=True)
class SyntheticSplit:
    """Class prototypes plus noise; example i is of class i mod num_classes and depends on nothing but i."""

    prototypes: npt.NDArray[np.float32]
    count: int
    noise: float
    key: int

    def __len__(self) -> int:
        return self.count

    def examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        targets = rows % len(self.prototypes)
        inputs = self.prototypes[targets.numpy()]
        for place, row in enumerate(rows.tolist()):
            inputs[place] += np.float32(self.noise) * _normal(inputs.shape[1:], self.key, row)
        return torch.from_numpy(inputs), targets

    def targets_of(self, rows: Tensor) -> Tensor:
        return rows % len(self.prototypes)


def _normal(shape: Sequence[int], key: int, row: int) -> npt.NDArray[np.float32]:
    # Each row has 2**128 numbers of its own: Philox counts through four words, the row is the third.
    counter = np.array([0, 0, row, 0], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=np.array([key, 0], np.uint64), counter=counter))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def _load_synthetic(config: SyntheticData, split: str, storage: Path, facts: DataFacts) -> Split:
    prototypes = _normal((config.num_classes, *config.shape), 0, 0)
    count, key = (config.train_examples, 1) if split == "train" else (config.test_examples, 2)
    source = SyntheticSplit(prototypes, count, config.noise, key)
    if count * prototypes[0].nbytes > _LARGEST_IN_MEMORY:
        return source
    return ArraySplit(*source.examples(torch.arange(count)))


# ------------------------------------------------------------------------------------------------ a user's own function


@dataclass(frozen=True)
class MapSplit:
    """A user's map-style data set; each item is `(input, target)`."""

    items: Any
    count: int

    def __len__(self) -> int:
        return self.count

    def examples(self, rows: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        pairs = [self.items[row] for row in rows.tolist()]
        return [as_tensor(pair[0]) for pair in pairs], torch.stack([as_target(pair[1]) for pair in pairs])

    def targets_of(self, rows: Tensor) -> Tensor:
        return torch.stack([as_target(self.items[row][1]) for row in rows.tolist()])


def as_tensor(value: Any) -> Tensor:
    """A user's input: uint8 stays (an image), other integers become int64 (token ids), the rest float32."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.uint8 else tensor.long()


def as_target(value: Any) -> Tensor:
    """A user's target: integers become int64, the rest float32."""
    tensor = as_tensor(value)
    return tensor if tensor.is_floating_point() else tensor.long()


def _load_python(config: PythonData, split: str, storage: Path, facts: DataFacts) -> MapSplit:
    target, expected = config.target, config.train_examples if split == "train" else config.test_examples
    try:
        items = load_target(target, "data.target")(split, **config.args)
        count, first = len(items), items[0]
        shape = tuple(as_tensor(first[0]).shape)
        as_target(first[1])
    except JobError:
        raise
    except Exception as error:
        # The user's function and data set may fail in any way.
        rule = f"is no data set of (input, target) pairs for split `{split}`: {type(error).__name__}: {error}"
        raise JobError(
            [Problem("data.target", target, rule, "return an object with __len__ and __getitem__")]
        ) from error
    problems = []
    if count != expected:
        rule = f"differs from the {count} that {target} returns for `{split}`"
        problems.append(Problem(f"data.{split}_examples", expected, rule, f"write {count}"))
    if shape != tuple(config.shape):
        rule = f"differs from the shape {list(shape)} of an input that {target} returns"
        problems.append(Problem("data.shape", config.shape, rule, f"write {list(shape)}"))
    if problems:
        raise JobError(problems)
    return MapSplit(items, count)


# ------------------------------------------------------------------------------------------------------- ingested files


class StoredSplit:
    """Encoded images in memory-mapped Arrow files, decoded as they are read.

    Columns: `image` (encoded bytes), `label` (int64). Processes that read the same files share their pages.
    """

    def __init__(self, files: Sequence[Path], channels: int) -> None:
        import pyarrow as pa

        self._files, self._mode = tuple(files), "L" if channels == 1 else "RGB"
        readers = [pa.ipc.open_file(pa.memory_map(str(file))) for file in files]
        self._batches = [reader.get_batch(index) for reader in readers for index in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        labels = [batch.column("label").to_numpy() for batch in self._batches]
        self._labels = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *labels]))

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader process that does not inherit memory maps the files itself.
        return StoredSplit, (self._files, 1 if self._mode == "L" else 3)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def examples(self, rows: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        return [self._decode(row) for row in rows.tolist()], self._labels[rows]

    def targets_of(self, rows: Tensor) -> Tensor:
        return self._labels[rows]

    def _decode(self, row: int) -> Tensor:
        from PIL import Image

        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        content = self._batches[number].column("image")[row - int(self._starts[number])].as_buffer()
        try:
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.array(image.convert(self._mode))
        except (OSError, ValueError) as error:
            raise RunError(f"example {row} of {self._files[0].parent} cannot be decoded: {error}") from error
        return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


def _load_stored(config: DataConfig, split: str, storage: Path, facts: DataFacts) -> StoredSplit:
    folder = store_folder(storage, facts)
    fetch_stored(folder)
    try:
        listed = json.loads((folder / MANIFEST).read_text())["splits"][split]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"the data has not been ingested into {folder} ({type(error).__name__}); run the job again"
        ) from error
    files = [folder / split / entry["name"] for entry in listed["files"]]
    for file, entry in zip(files, listed["files"], strict=True):
        if not file.is_file() or file.stat().st_size != entry["size"]:
            raise RunError(f"{file} is missing or damaged; delete {folder} and run the job again")
    return StoredSplit(files, facts.shape[0])


KINDS: dict[str, Callable[[Any, str, Path, DataFacts], Split]] = {
    "digits": _load_digits,
    "mnist": _load_idx,
    "fashion_mnist": _load_idx,
    "cifar10": _load_cifar10,
    "synthetic": _load_synthetic,
    "python": _load_python,
    "image_folder": _load_stored,
    "parquet": _load_stored,
    "webdataset": _load_stored,
}
