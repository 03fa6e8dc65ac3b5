"""Writes a user's images into Arrow files: one part after the other, each a pure function of its share of the source.

What runs where is not decided here, and no torch is imported: a part may be written on any node. Parts are numbered
in the order of the source (image folders by class, then path; shards by name, then row), so that the order of
examples does not depend on which part was written first.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.config.schema import ImageFolderData, ParquetData, WebDatasetData
from temper.files import describe_file
from temper.plan.facts import DataFacts
from temper.plan.user_files import SPLITS, FileData, list_class_files, list_samples, list_shards
from temper.remote_store import fetch_parts, publish

MANIFEST = "manifest.json"

_FILES_IN_PART = 1024
_ROWS_IN_BATCH = 256

Example = tuple[str, Any, Any]  # where it comes from, for messages; encoded image; label


class BadExample(ValueError):
    """An example that cannot be stored; the message says which and why."""


def store_folder(storage: Path, facts: DataFacts) -> Path:
    """Where ingested examples lie: `<split>/*.arrow` and, written last, `manifest.json`."""
    return storage / "data" / facts.fingerprint


def fetch_stored(folder: Path) -> None:
    """Where the storage is a bucket: brings what this machine lacks of ingested data, if they are there."""
    fetch_parts(folder / MANIFEST, stored_digests)


def stored_digests(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """The SHA-256 of each file that the manifest names, by its path beside it."""
    splits = manifest["splits"].items()
    return {f"{split}/{entry['name']}": entry.get("sha256") for split, listed in splits for entry in listed["files"]}


def plan_parts(config: FileData, source: Path, target: Path) -> list[dict[str, Any]]:
    """All parts of the data set in `source`, as JSON-able work for `write_part`; their files go below `target`."""
    parts = []
    for split in SPLITS:
        for number, share in enumerate(_SHARES[config.kind](config, source / split)):
            name = f"part-{number:06d}.arrow"
            parts.append({"split": split, "name": name, "file": str(target / split / name), **share})
    return parts


def write_part(part: dict[str, Any], config: FileData, num_classes: int) -> dict[str, Any]:
    """Write one part and return its `split`, `name`, `rows`, `size`, `sha256` and `problem`, empty if all went well.

    The file appears whole or not at all. A problem is returned and not raised because it crosses processes.
    """
    import pyarrow as pa

    schema = pa.schema([("image", pa.large_binary()), ("label", pa.int64())])
    file = Path(part["file"])
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"split": part["split"], "name": part["name"], "rows": 0, "size": 0, "sha256": "", "problem": ""}
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for chunk in _chunks(_checked(_READERS[config.kind](config, part), num_classes), _ROWS_IN_BATCH):
                columns = [
                    pa.array(column, field.type) for column, field in zip(zip(*chunk, strict=True), schema, strict=True)
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                result["rows"] += len(chunk)
        os.replace(unfinished, file)
        described = describe_file(file)
        result["size"], result["sha256"] = described["bytes"], described["sha256"]
        publish([file])
    except (BadExample, OSError, tarfile.TarError, pa.ArrowException) as error:
        result["problem"] = str(error) or type(error).__name__
    finally:
        unfinished.unlink(missing_ok=True)
    return result


def _chunks(examples: Iterable[tuple[bytes, int]], size: int) -> Iterator[list[tuple[bytes, int]]]:
    chunk: list[tuple[bytes, int]] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _checked(examples: Iterable[Example], num_classes: int) -> Iterator[tuple[bytes, int]]:
    from PIL import Image, UnidentifiedImageError

    for where, content, label in examples:
        if not isinstance(content, bytes):
            raise BadExample(f"{where} has no image")
        try:
            # Reads the header; a picture that is broken further on is named when it is decoded.
            Image.open(io.BytesIO(content)).close()
        except (UnidentifiedImageError, OSError, ValueError):
            raise BadExample(f"{where} is not an image that Pillow reads") from None
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise BadExample(f"{where} has the label {label!r}, not one of 0 … {num_classes - 1}")
        yield content, label


# ---------------------------------------------------------------------------------------- what a part holds, by kind


def _folder_shares(config: ImageFolderData, folder: Path) -> list[dict[str, Any]]:
    classes = list_class_files(folder)
    files = [(str(file), label) for label, name in enumerate(classes) for file in classes[name]]
    starts = range(0, len(files), _FILES_IN_PART)
    return [{"files": files[start : start + _FILES_IN_PART]} for start in starts]


def _read_folder(config: ImageFolderData, part: dict[str, Any]) -> Iterator[Example]:
    for file, label in part["files"]:
        yield file, Path(file).read_bytes(), int(label)


def _parquet_shares(config: ParquetData, folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [
        {"source": str(file), "row_group": group}
        for file in list_shards(folder, ".parquet")
        for group in range(pq.read_metadata(file).num_row_groups)
    ]


def _read_parquet(config: ParquetData, part: dict[str, Any]) -> Iterator[Example]:
    import pyarrow.parquet as pq

    columns = [config.image_column, config.label_column]
    row = 0
    with pq.ParquetFile(part["source"]) as parquet:
        for batch in parquet.iter_batches(_ROWS_IN_BATCH, row_groups=[part["row_group"]], columns=columns):
            images, labels = batch.column(config.image_column), batch.column(config.label_column)
            for image, label in zip(images, labels, strict=True):
                content = image.as_py()
                content = content.get("bytes") if isinstance(content, dict) else content
                yield f"row {row} of row group {part['row_group']} in {part['source']}", content, label.as_py()
                row += 1


def _tar_shares(config: WebDatasetData, folder: Path) -> list[dict[str, Any]]:
    return [{"source": str(file)} for file in list_shards(folder, ".tar")]


def _read_tar(config: WebDatasetData, part: dict[str, Any]) -> Iterator[Example]:
    samples = list_samples(Path(part["source"]), config.image_key, config.label_key)
    with tarfile.open(part["source"], "r:") as tar:
        members = tar.getmembers()
        for name, image, label in samples:
            where = f"{name} in {part['source']}"
            yield where, _content(tar, members[image]), _as_label(_content(tar, members[label]), where)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    return b"" if content is None else content.read()


def _as_label(content: bytes, where: str) -> int:
    try:
        return int(content)
    except ValueError:
        raise BadExample(f"{where} has the label {content[:20]!r}, not a whole number") from None


_SHARES: dict[str, Callable[[Any, Path], Sequence[dict[str, Any]]]] = {
    "image_folder": _folder_shares,
    "parquet": _parquet_shares,
    "webdataset": _tar_shares,
}
_READERS: dict[str, Callable[[Any, dict[str, Any]], Iterator[Example]]] = {
    "image_folder": _read_folder,
    "parquet": _read_parquet,
    "webdataset": _read_tar,
}
