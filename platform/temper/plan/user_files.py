"""What a plan learns from a user's own files: image folders, Parquet files, WebDataset shards.

Listings, headers and indices are read, and a few images opened for their size; nothing is decoded. pyarrow and PIL are
imported only where a job needs them.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.config.schema import ImageFolderData, ParquetData, WebDatasetData
from temper.errors import JobError, Problem

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "test")

FileData = ImageFolderData | ParquetData | WebDatasetData


@dataclass(frozen=True)
class FoundData:
    """What an inspector saw: sizes before any transform. `shape` has height and width 0 where images differ in size.
    `class_names` are empty where classes are called by their numbers."""

    train_examples: int
    test_examples: int
    shape: tuple[int, ...]
    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ingredients: Any
    class_names: tuple[str, ...] = ()


def find_data_folder(path: str, job_folder: Path) -> Path:
    """The folder that `data.path` names: in the working directory, else in `job_folder`. JobError if there is none."""
    named = Path(path).expanduser()
    candidates = [Path.cwd() / named, job_folder / named]  # an absolute path stays as it is
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.absolute()
    looked = " or ".join(str(candidate.absolute()) for candidate in dict.fromkeys(candidates))
    raise JobError([Problem("data.path", path, f"is not a folder (looked for {looked})", "name an existing folder")])


def list_class_files(folder: Path) -> dict[str, list[Path]]:
    """Images of each class below `folder`, classes and files in sorted order; hidden and other files are left out."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return {name: sorted(_walk_images(folder / name)) for name in classes}


def _walk_images(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent) / name


def list_shards(folder: Path, suffix: str) -> list[Path]:
    """Files directly in `folder` that end in `suffix`, in sorted order."""
    return sorted(file for file in folder.glob(f"*{suffix}") if file.is_file() and not file.name.startswith("."))


def inspect_image_folder(config: ImageFolderData, job_folder: Path) -> FoundData:
    root = find_data_folder(config.path, job_folder)
    _require_split_folders(config.path, root)
    splits = {split: list_class_files(root / split) for split in SPLITS}
    problems = _check_classes(config.path, splits)
    if problems:
        raise JobError(problems)
    first = [files[0] for classes in splits.values() for files in classes.values()]
    shape = _common_shape([_image_shape(file.read_bytes(), str(file)) for file in first])
    listing = {split: [_identity(file, root) for file in _all_files(splits[split])] for split in SPLITS}
    return FoundData(
        len(listing["train"]),
        len(listing["test"]),
        shape,
        len(splits["train"]),
        *_neutral(shape),
        ingredients=listing,
        class_names=tuple(splits["train"]),
    )


def _all_files(classes: dict[str, list[Path]]) -> list[Path]:
    return [file for files in classes.values() for file in files]


def inspect_parquet(config: ParquetData, job_folder: Path) -> FoundData:
    root = find_data_folder(config.path, job_folder)
    shards = _require_shards(config.path, root, ".parquet")
    problems = [problem for split in SPLITS for file in shards[split] for problem in _check_parquet(config, file)]
    if problems:
        raise JobError(problems)
    counts = {split: sum(_parquet_rows(file) for file in shards[split]) for split in SPLITS}
    shape = _common_shape([_first_parquet_shape(config, file) for file in _first_files(shards)])
    return _found_in_shards(config, root, shards, counts, shape)


def inspect_webdataset(config: WebDatasetData, job_folder: Path) -> FoundData:
    root = find_data_folder(config.path, job_folder)
    shards = _require_shards(config.path, root, ".tar")
    counts = dict.fromkeys(SPLITS, 0)
    problems: list[Problem] = []
    for split in SPLITS:
        for file in shards[split]:
            try:
                counts[split] += len(list_samples(file, config.image_key, config.label_key))
            except JobError as error:
                problems += error.problems
    if problems:
        raise JobError(problems)
    shape = _common_shape([_first_sample_shape(config, file) for file in _first_files(shards)])
    return _found_in_shards(config, root, shards, counts, shape)


def _found_in_shards(
    config: ParquetData | WebDatasetData,
    root: Path,
    shards: dict[str, list[Path]],
    counts: dict[str, int],
    shape: tuple[int, ...],
) -> FoundData:
    columns = config.model_dump(
        mode="json", include={"image_column", "label_column", "image_key", "label_key", "num_classes"}
    )
    listing = {split: [_identity(file, root) for file in shards[split]] for split in SPLITS}
    ingredients = [columns, listing]
    return FoundData(
        counts["train"], counts["test"], shape, config.num_classes, *_neutral(shape), ingredients=ingredients
    )


def _identity(file: Path, root: Path) -> list[str | int]:
    # The time of change is in it because an edited image may keep its size, and hashing a large set takes hours.
    status = file.stat()
    return [file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns]


def _neutral(shape: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # A user's own images are not decoded before the run, so their statistics are not known: 0…1 becomes -1…1.
    return (0.5,) * shape[0], (0.5,) * shape[0]


def _first_files(shards: dict[str, list[Path]]) -> list[Path]:
    return [shards[split][0] for split in SPLITS]


def _require_split_folders(path: str, root: Path) -> None:
    missing = [split for split in SPLITS if not (root / split).is_dir()]
    problems = [Problem("data.path", path, f"has no folder `{split}`", f"make {root / split}") for split in missing]
    if problems:
        raise JobError(problems)


def _require_shards(path: str, root: Path, suffix: str) -> dict[str, list[Path]]:
    _require_split_folders(path, root)
    shards = {split: list_shards(root / split, suffix) for split in SPLITS}
    problems = [
        Problem("data.path", path, f"has no *{suffix} file in `{split}`", f"put them into {root / split}")
        for split in SPLITS
        if not shards[split]
    ]
    if problems:
        raise JobError(problems)
    return shards


def _check_classes(path: str, splits: dict[str, dict[str, list[Path]]]) -> list[Problem]:
    problems = []
    train, test = set(splits["train"]), set(splits["test"])
    if not train | test:
        return [Problem("data.path", path, "has no class folders", "use path/train/<class>/<image>")]
    for name in sorted(train ^ test):
        here, there = ("train", "test") if name in train else ("test", "train")
        problems.append(
            Problem("data.path", path, f"has class `{name}` in `{here}` but not in `{there}`", "use one set of classes")
        )
    for split in SPLITS:
        for name, files in splits[split].items():
            if not files:
                problems.append(
                    Problem("data.path", path, f"has no image in `{split}/{name}`", "add images or remove the folder")
                )
    return problems


# ---------------------------------------------------------------------------------------------------- Parquet, tar


def _check_parquet(config: ParquetData, file: Path) -> list[Problem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowInvalid, OSError) as error:
        return [Problem("data.path", str(file), f"is not a readable Parquet file ({error})", "write it again")]
    wanted = {
        "image_column": (config.image_column, _is_image_type),
        "label_column": (config.label_column, pa.types.is_integer),
    }
    problems = []
    for key, (column, is_right) in wanted.items():
        if column not in schema.names:
            problems.append(
                Problem(f"data.{key}", column, f"is not a column of {file}", f"use one of {', '.join(schema.names)}")
            )
        elif not is_right(schema.field(column).type):
            kind = "encoded images (binary)" if key == "image_column" else "integers"
            problems.append(
                Problem(f"data.{key}", column, f"is {schema.field(column).type} in {file}", f"store {kind}")
            )
    return problems or _check_parquet_labels(config, file, metadata)


def _is_image_type(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):  # as the `datasets` library writes images: {bytes, path}
        return kind.get_field_index("bytes") >= 0 and _is_image_type(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _check_parquet_labels(config: ParquetData, file: Path, metadata: Any) -> list[Problem]:
    """Labels out of range, as far as the file's own statistics tell."""
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == config.label_column)
    groups = [metadata.row_group(i).column(column).statistics for i in range(metadata.num_row_groups)]
    ranges = [(group.min, group.max) for group in groups if group is not None and group.has_min_max]
    if not ranges:
        return []
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    if lowest >= 0 and highest < config.num_classes:
        return []
    rule = f"does not fit the labels in {file}: they run from {lowest} to {highest}"
    return [Problem("data.num_classes", config.num_classes, rule, "labels are 0 … num_classes - 1")]


def _parquet_rows(file: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(file).num_rows)


def _first_parquet_shape(config: ParquetData, file: Path) -> tuple[int, ...]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=1, columns=[config.image_column]):
            value = batch.column(0)[0].as_py()
            return _image_shape(value["bytes"] if isinstance(value, dict) else value, f"the first row of {file}")
    raise JobError([Problem("data.path", str(file), "has no rows", "remove the file or fill it")])


def list_samples(file: Path, image_key: str, label_key: str) -> list[tuple[str, int, int]]:
    """The samples of a WebDataset shard in their order: (name, index of the image's member, index of the label's).

    A member's name up to the first dot of its last part names its sample, the rest its key. Raises JobError where the
    file is no whole tar file or a sample lacks one of the two.
    """
    samples: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for index, member in enumerate(tar):
                folder, _, last = member.name.rpartition("/")
                stem, _, key = last.partition(".")
                if member.isfile() and stem and key:
                    samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[key] = index
    except (tarfile.TarError, OSError) as error:
        raise JobError(
            [Problem("data.path", str(file), f"is not a readable tar file ({error})", "write it again")]
        ) from None
    problems = []
    for key, value in (("data.image_key", image_key), ("data.label_key", label_key)):
        lacking = [name for name, members in samples.items() if value not in members]
        if lacking:
            rule = f"is missing from {len(lacking)} of {len(samples)} samples of {file}, first `{lacking[0]}`"
            keys = sorted({found for members in samples.values() for found in members})
            problems.append(Problem(key, value, rule, f"keys in this file: {', '.join(keys)}"))
    if not samples:
        problems.append(Problem("data.path", str(file), "holds no samples", "remove the file or fill it"))
    if problems:
        raise JobError(problems)
    return [(name, members[image_key], members[label_key]) for name, members in samples.items()]


def _first_sample_shape(config: WebDatasetData, file: Path) -> tuple[int, ...]:
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            if member.isfile() and member.name.rpartition("/")[2].partition(".")[2] == config.image_key:
                content = tar.extractfile(member)
                assert content is not None, "a regular file has content"
                return _image_shape(content.read(), f"{member.name} in {file}")
    raise AssertionError("list_samples found an image in this file")


def _image_shape(content: bytes, where: str) -> tuple[int, int, int]:
    """(channels, height, width) from an encoded image's header: 1 channel for greyscale, else 3."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            return (1 if image.mode in ("1", "L", "I;16") else 3), image.height, image.width
    except (UnidentifiedImageError, OSError, ValueError, TypeError):
        raise JobError(
            [Problem("data.path", where, "is not an image", "use an image format that Pillow reads")]
        ) from None


def _common_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The one shape of all; where sizes differ, height and width are 0; colour wins over grey."""
    channels = max(shape[0] for shape in shapes)
    sizes = {shape[1:] for shape in shapes}
    return (channels, *(sizes.pop() if len(sizes) == 1 else (0, 0)))
