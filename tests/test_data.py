"""Data: facts, files and their checks, the stream of batches, augmentation, ingestion."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from temper.config.schema import CTCLoss, DataConfig, DistillConfig, JobConfig
from temper.data import download
from temper.data.augment import build_transforms
from temper.data.batches import (
    Batch,
    DataState,
    data_state,
    eval_batches,
    rank_offsets,
    stream,
    train_batches,
    view_batch,
)
from temper.data.download import check_files, read_file
from temper.data.formats import in_canonical_order, read_cifar10_archive, read_idx, read_idx_pair
from temper.data.sources import Labelling, Split, labelling_of, load_split, load_splits
from temper.data.store import store_folder
from temper.errors import JobError, RunError
from temper.launch.ingest import ingest
from temper.plan.built_in import BUILT_INS, RemoteFile
from temper.plan.facts import NO_LABEL, DataFacts, data_facts
from temper.plan.mesh import BatchPlan

HERE = Path(__file__).parent


def data(**section: Any) -> DataConfig:
    return TypeAdapter(DataConfig).validate_python({"global_batch": 12, **section})


def synthetic(**section: Any) -> DataConfig:
    sizes = {"shape": [3, 8, 8], "num_classes": 3, "train_examples": 50, "test_examples": 10}
    return data(**{"kind": "synthetic", **sizes, **section})


def loaded(
    config: DataConfig, storage: Path = HERE, labelling: Labelling | None = None
) -> tuple[DataFacts, dict[Any, Split]]:
    facts = data_facts(config, HERE, taught=labelling is not None and labelling.taught)
    return facts, load_splits(config, storage, facts, labelling)


def problems(config: DataConfig, folder: Path = HERE) -> list[tuple[str, str]]:
    with pytest.raises(JobError) as raised:
        data_facts(config, folder)
    return [(problem.key, str(problem)) for problem in raised.value.problems]


# ------------------------------------------------------------------------------------------------------------- facts


def test_planning_the_data_imports_nothing_heavy() -> None:
    script = (
        "import sys; from pathlib import Path; from temper.config.schema import DigitsData; "
        "from temper.plan.facts import data_facts; import temper.data.download; "
        "data_facts(DigitsData(kind='digits', global_batch=1), Path('.')); "
        "print([m for m in ('torch', 'numpy', 'pandas', 'sklearn', 'pyarrow', 'PIL', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "train", "test", "shape"),
    [
        ("digits", 1437, 360, (1, 8, 8)),
        ("mnist", 60_000, 10_000, (1, 28, 28)),
        ("fashion_mnist", 60_000, 10_000, (1, 28, 28)),
        ("cifar10", 50_000, 10_000, (3, 32, 32)),
    ],
)
def test_facts_of_built_in_sets(kind: str, train: int, test: int, shape: tuple[int, ...]) -> None:
    facts = data_facts(data(kind=kind, holdout=100), HERE)
    assert (facts.train_examples, facts.validation_examples, facts.test_examples) == (train - 100, 100, test)
    assert (facts.shape, facts.num_classes, len(facts.mean), len(facts.std)) == (shape, 10, shape[0], shape[0])


def test_fingerprint_is_of_the_examples_and_not_of_their_use() -> None:
    plain = data_facts(synthetic(), HERE).fingerprint
    assert data_facts(synthetic(holdout=5, global_batch=3, loader_processes=1), HERE).fingerprint == plain
    others = [synthetic(noise=2.0), synthetic(num_classes=4), synthetic(test_examples=11), data(kind="digits")]
    assert len({plain, *(data_facts(other, HERE).fingerprint for other in others)}) == 5


def test_every_problem_of_the_data_is_found_at_once() -> None:
    config = synthetic(
        holdout=50,
        shape=[2, 8, 8],
        augment=[{"kind": "trivial_augment"}, {"kind": "random_crop", "size": 12, "padding": 1}],
        normalize={"mean": [0.5], "std": [0.5, 0.5]},
    )
    assert [key for key, _ in problems(config)] == [
        "data.augment.0.kind",
        "data.augment.1.size",
        "data.eval_transforms",
        "data.normalize.mean",
        "data.holdout",
    ]


def test_transforms_decide_the_shape() -> None:
    crop, center = {"kind": "random_resized_crop", "size": 6}, {"kind": "center_crop", "size": 6}
    assert data_facts(synthetic(augment=[crop], eval_transforms=[center]), HERE).shape == (3, 6, 6)
    assert problems(synthetic(augment=[crop])) == [
        (
            "data.eval_transforms",
            "data.eval_transforms: makes images of 8×8, but data.augment makes 6×6; use one size in both",
        )
    ]
    assert problems(synthetic(shape=[5], augment=[crop]))[0][0] == "data.augment"


@pytest.mark.parametrize("size", [(10, 7), (7, 10), (13, 13), (31, 17)])
def test_planned_size_of_a_resize_is_the_real_one(size: tuple[int, int]) -> None:
    config = synthetic(shape=[1, *size], augment=[{"kind": "resize", "size": 5}])
    config = config.model_copy(update={"eval_transforms": config.augment})
    facts, splits = loaded(config)
    (batch, _), *_ = eval_batches(config, splits["test"], facts, rank=0, world_size=1, batch=4)
    assert batch.inputs.shape[1:] == facts.shape


# ---------------------------------------------------------------------------------------------------- built-in sources


def test_digits_are_split_by_class_with_nothing_lost() -> None:
    facts, splits = loaded(data(kind="digits"))
    train, train_labels = splits["train"].examples(torch.arange(facts.train_examples))
    test, test_labels = splits["test"].examples(torch.arange(facts.test_examples))
    assert torch.bincount(test_labels).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    total = torch.bincount(torch.cat([train_labels, test_labels]))
    assert total.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert isinstance(train, torch.Tensor)
    assert isinstance(test, torch.Tensor)
    assert (float(train.min()), float(train.max())) == (0.0, 1.0)
    assert float(train.mean()) == pytest.approx(facts.mean[0], abs=1e-5)
    assert float(train.std()) == pytest.approx(facts.std[0], abs=1e-3)
    seen = {image.numpy().tobytes() for image in train}
    assert sum(image.numpy().tobytes() in seen for image in test) == 0


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of real data sets beside the repository or in TEMPER_DATA; skips where there is none."""
    folder = Path(os.environ.get("TEMPER_DATA") or HERE.parent.parent / "shared" / "data")
    monkeypatch.setenv("TEMPER_DATA", str(folder))
    return folder


def test_fashion_mnist_is_the_published_one(real_data: Path) -> None:
    if check_files("fashion_mnist"):
        pytest.skip(f"no Fashion-MNIST in {real_data}")
    config = data(kind="fashion_mnist", holdout=1000)
    facts, splits = loaded(config)
    assert {name: len(split) for name, split in splits.items()} == {"train": 59_000, "validation": 1000, "test": 10_000}
    whole = load_split(data(kind="fashion_mnist"), "train", HERE, facts)
    images, labels = whole.examples(torch.arange(60_000))
    assert isinstance(images, torch.Tensor)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert float(images.double().mean() / 255) == pytest.approx(facts.mean[0], abs=1e-5)
    assert float(images.double().std() / 255) == pytest.approx(facts.std[0], abs=1e-5)


def test_cifar10_test_split_from_mosaics(real_data: Path) -> None:
    if not download.has_mosaics("cifar10"):
        pytest.skip(f"no CIFAR-10 mosaics in {real_data}")
    config = data(kind="cifar10")
    split = load_split(config, "test", HERE, data_facts(config, HERE))
    images, labels = split.examples(torch.arange(10_000))
    assert isinstance(images, torch.Tensor)
    assert images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(labels).tolist() == [1000] * 10
    # The order is not the file's, which goes by class.
    assert len(set(labels[:50].tolist())) == 10


def test_cifar10_archive_and_order_free_of_layout() -> None:
    generator = np.random.default_rng(0)
    records = generator.integers(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    packed = _tar_gz({"cifar-10-batches-bin/test_batch.bin": records.tobytes()})
    images, labels = read_cifar10_archive(packed, "cifar.tar.gz", "test")
    shuffled = generator.permutation(len(labels))
    again, again_labels = in_canonical_order(images[shuffled], labels[shuffled])
    assert np.array_equal(images, again)
    assert np.array_equal(labels, again_labels)
    by_pixels = {record[1:].tobytes(): record[0] for record in records}
    assert all(by_pixels[image.tobytes()] == label for image, label in zip(images[:100], labels[:100], strict=True))
    short = _tar_gz({"cifar-10-batches-bin/test_batch.bin": records.tobytes()[:-1]})
    with pytest.raises(RunError, match=r"test_batch.bin should have 30730000 bytes, has 30729999"):
        read_cifar10_archive(short, "cifar.tar.gz", "test")
    with pytest.raises(RunError, match=r"cifar.tar.gz is damaged"):
        read_cifar10_archive(packed[: len(packed) // 2], "cifar.tar.gz", "test")


def _tar_gz(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_idx_is_read_and_a_truncated_one_is_refused() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = _idx(pixels)
    assert np.array_equal(read_idx(content, "images"), pixels)
    for length in (0, 3, 4, 10, len(content) - 1):
        with pytest.raises(RunError, match="images is"):
            read_idx(content[:length], "images")
    with pytest.raises(RunError, match="announces 40 bytes, it has 41"):
        read_idx(content + b"\0", "images")
    with pytest.raises(RunError, match="do not belong together"):
        read_idx_pair(content, _idx(np.zeros(3, np.uint8)), ("images", "labels"))


def _file(folder: Path, content: bytes, name: str = "set/a.gz", of: Any = "content") -> RemoteFile:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content))
    hashed = content if of == "content" else path.read_bytes()
    return RemoteFile(name, path.as_uri(), f"sha256:{hashlib.sha256(hashed).hexdigest()}", of)


@pytest.mark.parametrize("of", ["content", "file"])
def test_a_missing_file_is_fetched_and_checked(of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _file(tmp_path / "publisher", b"examples", of=of)
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path / "data"))
    assert read_file(file) == b"examples"
    (tmp_path / "publisher" / file.name).unlink()
    assert read_file(file) == b"examples"
    assert [path.name for path in (tmp_path / "data" / "set").iterdir() if path.suffix == ".part"] == []


def test_a_wrong_checksum_names_file_expected_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    file = _file(tmp_path, b"examples")
    (tmp_path / file.name).write_bytes(gzip.compress(b"exemples"))
    with pytest.raises(RunError) as raised:
        read_file(file)
    expected, found = hashlib.sha256(b"examples").hexdigest(), hashlib.sha256(b"exemples").hexdigest()
    assert all(text in str(raised.value) for text in (str(tmp_path / file.name), expected, found, file.url))
    (tmp_path / file.name).write_bytes(gzip.compress(b"examples")[:-9])
    with pytest.raises(RunError, match=r"a\.gz is damaged"):
        read_file(file)


def test_a_bad_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _file(tmp_path / "publisher", b"examples")
    (tmp_path / "publisher" / file.name).write_bytes(gzip.compress(b"an error page"))
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path / "data"))
    with pytest.raises(RunError, match="is not the published file"):
        read_file(file)
    assert not (tmp_path / "data" / file.name).exists()


def test_offline_names_file_address_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path / "data"))

    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    missing = check_files("mnist")
    assert missing == list(BUILT_INS["mnist"].files)
    config = data(kind="mnist")
    with pytest.raises(RunError) as raised:
        load_split(config, "test", HERE, data_facts(config, HERE))
    told = ("t10k-images-idx3-ubyte.gz", missing[2].url, str(tmp_path / "data" / "mnist"), "Network is unreachable")
    assert all(text in str(raised.value) for text in told)


def test_synthetic_examples_depend_on_their_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = synthetic()
    facts, splits = loaded(config)
    rows = torch.tensor([7, 3, 49])
    inputs, targets = splits["train"].examples(rows)
    assert targets.tolist() == [1, 0, 1]
    monkeypatch.setattr("temper.data.sources._LARGEST_IN_MEMORY", 0)
    unheld = load_split(config, "train", HERE, facts)
    again, _ = unheld.examples(rows)
    assert isinstance(inputs, torch.Tensor)
    assert isinstance(again, torch.Tensor)
    assert torch.equal(inputs, again)
    longer = load_split(synthetic(train_examples=80), "train", HERE, facts).examples(rows)[0]
    assert torch.equal(inputs, longer)  # type: ignore[arg-type]
    quiet = load_split(synthetic(noise=0.0), "train", HERE, facts)
    of_class = quiet.examples(torch.tensor([0, 3, 1]))[0]
    assert torch.equal(of_class[0], of_class[1])
    assert not torch.equal(of_class[0], of_class[2])


def test_holdout_is_disjoint_random_and_free_of_the_seed() -> None:
    config = synthetic(holdout=12)
    _, splits = loaded(config)
    _, whole = loaded(synthetic())
    parts = [_fingerprints(splits[name]) for name in ("train", "validation")]
    assert [len(part) for part in parts] == [38, 12]
    assert sorted(parts[0] + parts[1]) == sorted(_fingerprints(whole["train"]))
    assert len(whole["validation"]) == 0


def _fingerprints(split: Split) -> list[float]:
    inputs, _ = split.examples(torch.arange(len(split)))
    return [float(image.sum()) for image in inputs]


# ------------------------------------------------------------------------------- labels and classes that are taken away


def rows_and_targets(split: Split) -> tuple[list[float], list[Any]]:
    inputs, targets = split.examples(torch.arange(len(split)))
    assert torch.equal(split.targets_of(torch.arange(len(split))), targets)
    return [float(image.sum()) for image in inputs], targets.tolist()


@pytest.mark.parametrize(("share", "count"), [(0.5, 19), (0.03, 1), (1 / 3, 13), (0.99, 38), (0.98, 37)])
def test_a_share_of_the_labels_is_kept(share: float, count: int) -> None:
    whole, labels = rows_and_targets(loaded(synthetic(holdout=12))[1]["train"])
    config = synthetic(holdout=12, labels=share)
    facts, splits = loaded(config, labelling=Labelling(7, taught=True))
    rows, targets = rows_and_targets(splits["train"])
    assert rows == whole
    kept = [row for row, target in enumerate(targets) if target != NO_LABEL]
    assert [targets[row] for row in kept] == [labels[row] for row in kept]
    assert len(kept) == count
    assert (facts.train_examples, facts.left_out_examples) == (38, 0)

    facts, splits = loaded(config, labelling=Labelling(7, taught=False))
    assert rows_and_targets(splits["train"]) == ([whole[row] for row in kept], [labels[row] for row in kept])
    assert (facts.train_examples, facts.left_out_examples) == (count, 38 - count)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [count, 12, 10]
    assert facts.validation_examples == 12
    alone = load_split(config, "train", HERE, facts, Labelling(7, taught=False))
    assert rows_and_targets(alone) == rows_and_targets(splits["train"])


def test_which_labels_are_kept_is_the_seed_s_and_of_no_class() -> None:
    def kept(seed: int) -> set[int]:
        config = synthetic(train_examples=300, labels=0.3)
        split = loaded(config, labelling=Labelling(seed, taught=True))[1]["train"]
        return set(torch.nonzero(split.targets_of(torch.arange(300)) != NO_LABEL)[:, 0].tolist())

    assert kept(1) == kept(1) != kept(2)
    assert 15 < len(kept(1) & kept(2)) < 45, "27 expected where the draws are independent"
    assert min(np.bincount([row % 3 for row in kept(1)])) > 20
    assert kept(1) != set(range(90))


def test_no_labels_at_all_are_for_teachers_only() -> None:
    _, splits = loaded(synthetic(labels=0.0), labelling=Labelling(0, taught=True))
    assert rows_and_targets(splits["train"])[1] == [NO_LABEL] * 50
    assert NO_LABEL not in rows_and_targets(splits["test"])[1]
    assert problems(synthetic(labels=0.0))[0][1].startswith("data.labels: 0.0 leaves nothing to train on")
    assert problems(synthetic(labels=0.009)) == [
        ("data.labels", "data.labels: 0.009 is less than half of one of the 50 training examples; use at least 0.02")
    ]
    with pytest.raises(ValueError, match=r"which examples are the 0\.5"):
        loaded(synthetic(labels=0.5))


def test_the_job_says_how_its_data_are_labelled() -> None:
    base = {"name": "job", "model": {"kind": "cnn"}, "data": {"kind": "digits", "global_batch": 8}, "seed": 3}
    job = JobConfig.model_validate({**base, "optimizer": {"kind": "sgd", "lr": 0.1}, "budget": {"steps": 1}})
    assert labelling_of(job) == Labelling(3, taught=False)
    distill = DistillConfig(teacher="a.yaml")
    ctc = CTCLoss(kind="ctc")
    assert labelling_of(job.model_copy(update={"distill": distill})) == Labelling(3, taught=True)
    assert labelling_of(job.model_copy(update={"loss": ctc})) == Labelling(3, taught=False, header=1)


def test_omitted_classes_are_left_out_of_the_training_split_alone() -> None:
    config = synthetic(holdout=12, omit_classes=[2, 0])
    facts, splits = loaded(config)
    whole, labels = rows_and_targets(loaded(synthetic(holdout=12))[1]["train"])
    ones = [row for row, label in enumerate(labels) if label == 1]
    assert rows_and_targets(splits["train"]) == ([whole[row] for row in ones], [1] * len(ones))
    assert facts.train_examples == 38, "the plan counts all of them"
    assert set(rows_and_targets(splits["validation"])[1]) == set(rows_and_targets(splits["test"])[1]) == {0, 1, 2}
    batches, states = run_ranks(config, 2, 1, last_step=4)
    assert {int(target) for batch in batches for target in batch.targets} == {1}
    assert states[-1] == data_state(4, len(ones), 12)
    with pytest.raises(RunError, match=r"every one of the 50 training examples is of one of \[0, 1, 2\]"):
        loaded(synthetic(omit_classes=[0, 1, 2]))


def test_labels_are_a_share_of_what_omission_leaves() -> None:
    config = synthetic(labels=0.5, omit_classes=[0])
    _, splits = loaded(config, labelling=Labelling(0, taught=True))
    _, targets = rows_and_targets(splits["train"])
    assert (len(targets), targets.count(NO_LABEL)) == (33, 17)
    assert set(targets) == {1, 2, NO_LABEL}


# ------------------------------------------------------------------------------------------------ a user's own function

PYTHON_SOURCE = """
import numpy as np

class Rows:
    def __init__(self, count, kind):
        self.count, self.kind = count, kind
    def __len__(self):
        return self.count
    def __getitem__(self, row):
        value = np.full(3, row, self.kind)
        return value, float(row)

def rows(split, kind="float64"):
    return Rows({"train": 6, "test": 2}[split], kind)

class Sequences(Rows):
    def __getitem__(self, row):
        return np.full(3, row, np.float32), np.array([3, row + 1, row + 2, -1])

def sequences(split):
    return Sequences({"train": 6, "test": 2}[split], None)

def broken(split):
    raise RuntimeError("no such table")

constant = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_rows.py").write_text(PYTHON_SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("user_rows", None)
    return "user_rows"


def python(target: str, **section: Any) -> DataConfig:
    return data(
        **{"kind": "python", "target": target, "train_examples": 6, "test_examples": 2, "shape": [3], **section}
    )


@pytest.mark.parametrize(("kind", "dtype"), [("float64", torch.float32), ("int32", torch.int64)])
def test_python_data(user_module: str, kind: str, dtype: torch.dtype) -> None:
    config = python(f"{user_module}:rows", args={"kind": kind})
    facts, splits = loaded(config)
    (batch, valid), *_ = eval_batches(config, splits["test"], facts, rank=0, world_size=1, batch=8)
    assert (valid, batch.inputs.dtype, batch.targets.dtype) == (2, dtype, torch.float32)
    assert batch.inputs.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert batch.targets.tolist() == [0.0, 1.0]


def test_rows_of_labels_lose_them_and_keep_their_header(user_module: str) -> None:
    config = python(f"{user_module}:sequences", labels=0.5)
    _, splits = loaded(config, labelling=Labelling(0, taught=True, header=1))
    rows = torch.tensor([4, 0, 1, 2, 3, 5])
    _, targets = splits["train"].examples(rows)
    hidden = [index for index, target in enumerate(targets.tolist()) if target[1:] == [NO_LABEL] * 3]
    kept = [index for index in range(6) if index not in hidden]
    assert (len(hidden), len(kept)) == (3, 3)
    assert targets[:, 0].tolist() == [3] * 6
    assert [targets[index].tolist() for index in kept] == [[3, int(rows[i]) + 1, int(rows[i]) + 2, -1] for i in kept]
    with pytest.raises(RunError, match=r"a target has the shape \[4\], and is no class"):
        loaded(python(f"{user_module}:sequences", omit_classes=[1]))


def test_omission_asks_a_function_for_its_targets(user_module: str) -> None:
    _, splits = loaded(python(f"{user_module}:rows", omit_classes=[1, 4]))
    assert splits["train"].targets_of(torch.arange(4)).tolist() == [0.0, 2.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ({"target": "user_rows:absent"}, "data.target", "`absent` does not exist"),
        ({"target": "user_rows:constant"}, "data.target", "`constant` is not a function"),
        ({"target": "user_columns:rows"}, "data.target", "module `user_columns` is not found"),
        ({"target": "user_rows:broken"}, "data.target", "RuntimeError: no such table"),
        ({"train_examples": 7}, "data.train_examples", "write 6"),
        ({"shape": [4]}, "data.shape", "write [3]"),
    ],
)
def test_python_data_that_is_wrong(user_module: str, change: dict[str, Any], key: str, said: str) -> None:
    config = python(**{"target": f"{user_module}:rows", **change})
    with pytest.raises(JobError) as raised:
        load_split(config, "train", HERE, data_facts(config, HERE))
    assert [problem.key for problem in raised.value.problems] == [key]
    assert said in str(raised.value)


# ---------------------------------------------------------------------------------------------------------- the stream


def plan_of(global_batch: int, world_size: int, accumulation: int) -> BatchPlan:
    rank_batch = global_batch // world_size
    return BatchPlan(global_batch, rank_batch, rank_batch // accumulation, accumulation)


def run_ranks(
    config: DataConfig,
    world_size: int,
    accumulation: int,
    first_step: int = 0,
    last_step: int = 9,
    seed: int = 5,
    views: int | None = None,
) -> tuple[list[Batch], list[DataState]]:
    """The global batches put together from what all ranks get, and rank 0's states."""
    facts, splits = loaded(config)
    plan = plan_of(config.global_batch, world_size, accumulation)
    streams = [
        list(
            train_batches(
                config,
                splits["train"],
                facts,
                seed=seed,
                batch=plan,
                rank=rank,
                world_size=world_size,
                first_step=first_step,
                last_step=last_step,
                views=views,
            )
        )
        for rank in range(world_size)
    ]
    whole = [_together([batch for batch, _ in parts], plan) for parts in zip(*streams, strict=True)]
    return whole, [state for _, state in streams[0]]


def _together(parts: list[Batch], plan: BatchPlan) -> Batch:
    def join(name: str) -> torch.Tensor:
        chunks = [getattr(part, name).split(plan.micro_batch) for part in parts]
        return torch.cat([chunk[number] for number in range(plan.accumulation) for chunk in chunks])

    return Batch(join("inputs"), join("targets"), join("indices"), join("views"))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in ("inputs", "targets", "indices", "views")
    )


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 3), (2, 1), (2, 3), (4, 1), (4, 3)])
def test_global_batches_do_not_depend_on_the_topology(world_size: int, accumulation: int) -> None:
    alone, states = run_ranks(synthetic(), 1, 1)
    dealt, dealt_states = run_ranks(synthetic(), world_size, accumulation)
    assert same(alone, dealt)
    assert states == dealt_states


def test_a_micro_batch_of_all_ranks_is_one_chunk_of_the_global_batch() -> None:
    offsets = [rank_offsets(plan_of(12, 2, 3), rank, 2).tolist() for rank in range(2)]
    assert offsets == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_every_example_is_seen_once_an_epoch_in_a_new_order() -> None:
    batches, states = run_ranks(synthetic(), 2, 1, last_step=25)  # 25 × 12 = 6 epochs of 50, and 12 does not divide 50
    rows = torch.cat([batch.indices for batch in batches]).reshape(6, 50)
    assert all(sorted(epoch.tolist()) == list(range(50)) for epoch in rows)
    assert len({tuple(epoch.tolist()) for epoch in rows}) == 6
    assert states[-1] == DataState(step=25, epoch=6, position=0)
    other, _ = run_ranks(synthetic(), 2, 1, last_step=25, seed=6)
    assert not same(batches, other)


def test_a_batch_larger_than_the_data_runs_over_several_epochs() -> None:
    (batch,), (state,) = run_ranks(synthetic(train_examples=5), 1, 1, last_step=1)
    assert sorted(batch.indices[:5].tolist()) == sorted(batch.indices[5:10].tolist()) == list(range(5))
    assert state == DataState(step=1, epoch=2, position=2)


def test_resuming_in_mid_epoch_sees_exactly_what_was_not_seen() -> None:
    whole, states = run_ranks(synthetic(), 1, 1)
    resumed, later = run_ranks(synthetic(), 2, 3, first_step=3)
    assert same(whole[3:], resumed)
    assert states[3:] == later
    assert data_state(3, 50, 12) == states[2] == DataState(step=3, epoch=0, position=36)
    seen = torch.cat([batch.indices for batch in whole[:3]]).tolist()
    unseen = torch.cat([batch.indices for batch in resumed]).tolist()[:14]
    assert sorted(seen + unseen) == list(range(50))


def test_the_targets_and_inputs_belong_to_the_indices() -> None:
    config = synthetic(normalize={"mean": [1.0, 2.0, 3.0], "std": [1.0, 2.0, 4.0]})
    _, splits = loaded(config)
    (batch,), _ = run_ranks(config, 2, 1, last_step=1)
    inputs, targets = splits["train"].examples(batch.indices)
    assert torch.equal(batch.targets, targets)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]))
    assert torch.equal(batch.inputs, (inputs - mean) / std)


AUGMENT = [
    {"kind": "random_crop", "padding": 2},
    {"kind": "random_horizontal_flip"},
    {"kind": "random_rotation", "degrees": 20.0},
    {"kind": "random_affine", "degrees": 5.0, "translate": 0.1, "scale": 0.1},
    {"kind": "color_jitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
    {"kind": "trivial_augment"},
    {"kind": "random_resized_crop", "size": 8},
    {"kind": "random_erasing"},
]


@pytest.mark.parametrize(("world_size", "accumulation", "loader_processes"), [(2, 3, 0), (4, 1, 0), (2, 1, 2)])
def test_augmentation_depends_on_nothing_but_the_example(
    world_size: int, accumulation: int, loader_processes: int
) -> None:
    alone, _ = run_ranks(synthetic(augment=AUGMENT), 1, 1, last_step=2)
    config = synthetic(augment=AUGMENT, loader_processes=loader_processes)
    dealt, _ = run_ranks(config, world_size, accumulation, last_step=2)
    assert same(alone, dealt)


def test_augmentation_differs_by_epoch_and_seed_and_leaves_the_random_state() -> None:
    config = synthetic(train_examples=12, augment=AUGMENT[:2])
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    (first, second), _ = run_ranks(config, 1, 1, last_step=2)
    (other,), _ = run_ranks(config, 1, 1, last_step=1, seed=6)
    run_ranks(synthetic(loader_processes=1), 1, 1, last_step=1)
    assert torch.equal(before, torch.random.get_rng_state())
    images = [batch.inputs[batch.indices.argsort()] for batch in (first, second, other)]
    assert all(not torch.equal(a, b) for a, b in ((images[0], images[1]), (images[0], images[2])))


def test_views_come_again_and_are_those_of_the_first_epochs() -> None:
    config = synthetic(train_examples=18, augment=AUGMENT[:2])  # two batches of 12 are 1 1/3 epochs
    plain, _ = run_ranks(config, 1, 1, last_step=9)
    counted, _ = run_ranks(config, 2, 3, last_step=9, views=2)
    epochs = torch.arange(9 * 12).div(18, rounding_mode="floor")
    assert torch.equal(torch.cat([batch.views for batch in counted]), epochs % 2)
    assert not torch.cat([batch.views for batch in plain]).any()
    assert same([replace(batch, views=epochs[:12] * 0) for batch in counted[:3]], plain[:3]), "epochs 0 and 1"
    by_view: dict[tuple[int, int], torch.Tensor] = {}
    for batch in counted:
        for image, row, view in zip(batch.inputs, batch.indices.tolist(), batch.views.tolist(), strict=True):
            assert torch.equal(by_view.setdefault((row, view), image), image)
    assert len(by_view) == 18 * 2
    assert not any(torch.equal(by_view[row, 0], by_view[row, 1]) for row in range(18))
    assert not same(counted, plain)


def test_a_view_can_be_made_alone() -> None:
    config = synthetic(train_examples=18, augment=AUGMENT[:2])
    facts, splits = loaded(config)
    counted, _ = run_ranks(config, 1, 1, last_step=4, views=3)
    rows, epochs = stream(5, 18, np.arange(48))
    order = np.argsort(rows, kind="stable")
    made = view_batch(splits["train"], facts, build_transforms(config.augment), 5, rows[order], epochs[order] % 3)
    assert torch.equal(made.inputs, torch.cat([batch.inputs for batch in counted])[order])
    assert made.views.tolist() == (epochs[order] % 3).tolist()


def test_crop_and_flip_give_windows_of_the_padded_image() -> None:
    config = synthetic(augment=AUGMENT[:2], noise=0.0, num_classes=1)
    _, splits = loaded(config)
    padded = torch.nn.functional.pad(splits["train"].examples(torch.tensor([0]))[0][0], (2, 2, 2, 2))
    windows = [padded[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    windows += [window.flip(-1) for window in windows]
    batches, _ = run_ranks(config, 1, 1, last_step=25)
    found = [[torch.equal(image, window) for window in windows].index(True) for b in batches for image in b.inputs]
    assert len(set(found)) == 50  # every offset and both directions turn up among 300 draws


@pytest.mark.parametrize(("world_size", "batch"), [(1, 4), (2, 4), (3, 100), (4, 3), (4, 1)])
def test_evaluation_covers_the_split_once_in_order(world_size: int, batch: int) -> None:
    config = synthetic(test_examples=11)
    facts, splits = loaded(config)
    ranks = [
        list(eval_batches(config, splits["test"], facts, rank=rank, world_size=world_size, batch=batch))
        for rank in range(world_size)
    ]
    assert len({len(part) for part in ranks}) == 1
    assert len({len(made.inputs) for part in ranks for made, _ in part}) == 1
    assert all(len(made.inputs) <= batch for part in ranks for made, _ in part)
    assert [row for part in ranks for made, valid in part for row in made.indices[:valid].tolist()] == list(range(11))


def test_more_ranks_than_examples() -> None:
    config = synthetic(test_examples=1)
    facts, splits = loaded(config)
    ranks = [list(eval_batches(config, splits["test"], facts, rank=r, world_size=3, batch=4)) for r in range(3)]
    assert [[valid for _, valid in part] for part in ranks] == [[1], [0], [0]]
    empty = eval_batches(config, splits["validation"], facts, rank=0, world_size=1, batch=4)
    assert list(empty) == []


# ------------------------------------------------------------------------------------------------- a user's own files


def image_bytes(value: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> bytes:
    packed = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value)).save(packed, "png")
    return packed.getvalue()


def write_folder(root: Path, classes: tuple[str, ...] = ("ant", "bee"), count: int = 3) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(image_bytes(100 * label + number))
    (root / "train" / "notes.txt").write_text("not a class")
    (root / "train" / classes[0] / ".hidden.png").write_bytes(b"")


def write_parquet(root: Path, nested: bool = False) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, files in (("train", 2), ("test", 1)):
        (root / split).mkdir(parents=True)
        for file in range(files):
            images: list[Any] = [image_bytes(100 * file + row) for row in range(4)]
            images = [{"bytes": image, "path": None} for image in images] if nested else images
            table = pa.table({"image": images, "label": [row % 2 for row in range(4)]})
            pq.write_table(table, root / split / f"{file}.parquet", row_group_size=3)


def write_shards(root: Path, labels: tuple[bytes, ...] = (b"0", b"1", b"0")) -> None:
    for split, shards in (("train", 2), ("test", 1)):
        (root / split).mkdir(parents=True)
        for shard in range(shards):
            with tarfile.open(root / split / f"{shard}.tar", "w") as tar:
                for row, label in enumerate(labels):
                    for key, content in (("cls", label), ("jpg", image_bytes(100 * shard + row))):
                        member = tarfile.TarInfo(f"photos/{row:03d}.{key}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


WRITERS = {"image_folder": write_folder, "parquet": write_parquet, "webdataset": write_shards}
SIZES = {"image_folder": (6, 6), "parquet": (8, 4), "webdataset": (6, 3)}


def file_data(kind: str, root: Path, **section: Any) -> DataConfig:
    classes = {} if kind == "image_folder" else {"num_classes": 2}
    return data(**{"kind": kind, "path": str(root), "global_batch": 2, **classes, **section})


@pytest.mark.parametrize("kind", WRITERS)
def test_facts_of_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[kind](tmp_path / "job" / "set")
    monkeypatch.chdir(tmp_path)
    facts = data_facts(file_data(kind, Path("set")), tmp_path / "job")
    assert (facts.train_examples, facts.test_examples) == SIZES[kind]
    assert (facts.shape, facts.num_classes, facts.mean) == ((3, 5, 6), 2, (0.5, 0.5, 0.5))
    assert facts.folder == str(tmp_path / "job" / "set")
    os.replace(tmp_path / "job" / "set", tmp_path / "job" / "moved")
    assert data_facts(file_data(kind, Path("moved")), tmp_path / "job").fingerprint == facts.fingerprint
    changed = next((tmp_path / "job" / "moved").rglob("0.*"))
    os.utime(changed, ns=(1, 1))
    assert data_facts(file_data(kind, Path("moved")), tmp_path / "job").fingerprint != facts.fingerprint


def test_mistakes_in_an_image_folder(tmp_path: Path) -> None:
    assert problems(file_data("image_folder", tmp_path / "absent"))[0][0] == "data.path"
    assert [key for key, _ in problems(file_data("image_folder", tmp_path))] == ["data.path"] * 2
    write_folder(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    told = [text for _, text in problems(file_data("image_folder", tmp_path))]
    assert [text.partition(": ")[2].partition(" ")[2].partition(";")[0] for text in told] == [
        "has class `cat` in `train` but not in `test`",
        "has no image in `train/cat`",
    ]
    (tmp_path / "test" / "cat").mkdir()
    for split in ("train", "test"):
        (tmp_path / split / "cat" / "0.png").write_bytes(image_bytes(0, (9, 9), "L"))
    config = file_data("image_folder", tmp_path)
    assert [key for key, _ in problems(config)] == ["data.augment", "data.eval_transforms"]
    resize = [{"kind": "resize", "size": 4}, {"kind": "center_crop", "size": 4}]
    assert data_facts(file_data("image_folder", tmp_path, augment=resize, eval_transforms=resize), HERE).shape == (
        3,
        4,
        4,
    )
    (tmp_path / "test" / "cat" / "0.png").write_bytes(b"not an image")
    assert "is not an image" in problems(config)[0][1]


def test_mistakes_in_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    wrong = file_data("parquet", tmp_path, image_column="picture", label_column="image")
    keys = [key for key, _ in problems(wrong)]
    assert keys == ["data.image_column", "data.label_column"] * 3
    assert "they run from 0 to 1" in problems(file_data("parquet", tmp_path, num_classes=1))[0][1]
    (tmp_path / "train" / "0.parquet").write_bytes(b"PAR1 and nothing else")
    assert "is not a readable Parquet file" in problems(file_data("parquet", tmp_path))[0][1]


def test_mistakes_in_webdataset_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    told = problems(file_data("webdataset", tmp_path, image_key="png"))
    assert told[0][0] == "data.image_key"
    assert "is missing from 3 of 3 samples" in told[0][1]
    assert told[0][1].endswith("keys in this file: cls, jpg")
    shard = tmp_path / "train" / "1.tar"
    shard.write_bytes(b"x" * 1024)
    assert [key for key, _ in problems(file_data("webdataset", tmp_path))] == ["data.path"]


@pytest.fixture(scope="module")
def embedded_ray() -> Any:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.ray
def test_files_go_through_the_store_and_come_back(embedded_ray: Any, tmp_path: Path) -> None:
    for kind, write in WRITERS.items():
        write(tmp_path / kind)
        config = file_data(kind, tmp_path / kind)
        facts = data_facts(config, HERE)
        few = config.model_copy(update={"labels": 0.5})
        ingest(few, data_facts(few, HERE), tmp_path / "storage")  # stores all of them
        manifest = store_folder(tmp_path / "storage", facts) / "manifest.json"
        written = manifest.stat().st_mtime_ns
        ingest(config, facts, tmp_path / "storage")
        assert manifest.stat().st_mtime_ns == written
        splits = load_splits(config, tmp_path / "storage", facts)
        assert (len(splits["train"]), len(splits["test"])) == SIZES[kind]
        images, labels = splits["train"].examples(torch.arange(facts.train_examples))
        reds = [int(image[0, 0, 0]) for image in images]
        by_kind = {
            "image_folder": ([0, 1, 2, 100, 101, 102], [0, 0, 0, 1, 1, 1]),
            "parquet": ([0, 1, 2, 3, 100, 101, 102, 103], [0, 1] * 4),
            "webdataset": ([0, 1, 2, 100, 101, 102], [0, 1, 0] * 2),
        }
        assert (reds, labels.tolist()) == by_kind[kind]
        (batch, valid), *_ = eval_batches(config, splits["test"], facts, rank=0, world_size=1, batch=8)
        assert batch.inputs.shape[1:] == (3, 5, 6)
        assert batch.inputs[0, 1].unique().tolist() == [-1.0]
        assert valid == SIZES[kind][1]
        again = pickle.loads(pickle.dumps(splits["train"])).examples(torch.arange(2))[0]
        assert all(torch.equal(left, right) for left, right in zip(images[:2], again, strict=True))
        part = next(manifest.parent.rglob("*.arrow"))
        part.write_bytes(part.read_bytes()[:-1])
        with pytest.raises(RunError, match=rf"{part.name} is missing or damaged"):
            load_splits(config, tmp_path / "storage", facts)


@pytest.mark.ray
def test_bad_examples_are_named_and_nothing_is_stored(embedded_ray: Any, tmp_path: Path) -> None:
    write_shards(tmp_path / "set", (b"0", b"2", b"cat"))
    config = file_data("webdataset", tmp_path / "set")
    facts = data_facts(config, HERE)
    with pytest.raises(JobError) as raised:
        ingest(config, facts, tmp_path)
    assert len(raised.value.problems) == 3
    assert "photos/001 in" in str(raised.value)
    assert "has the label 2, not one of 0 … 1" in str(raised.value)
    with pytest.raises(RunError, match="has not been ingested"):
        load_split(config, "train", tmp_path, facts)


def test_parquet_with_nested_images(tmp_path: Path) -> None:
    write_parquet(tmp_path, nested=True)
    facts = data_facts(file_data("parquet", tmp_path), HERE)
    assert (facts.train_examples, facts.shape) == (8, (3, 5, 6))
