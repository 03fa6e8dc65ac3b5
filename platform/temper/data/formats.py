"""Readers of published formats into NumPy: idx, CIFAR's binary records, mosaics of tiles, scikit-learn's digits.

Each returns `(inputs, labels)`: images as (examples, channels, height, width), labels as int64. What is truncated or
malformed raises RunError with the file's name.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from temper.errors import RunError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

_IDX_UINT8 = 0x08
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_TRAIN = tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6))
_CIFAR_TEST = ("cifar-10-batches-bin/test_batch.bin",)


def read_idx(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    """The array in an idx file (yann.lecun.com/exdb/mnist) of unsigned bytes."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _IDX_UINT8:
        raise RunError(f"{name} is not an idx file of unsigned bytes: it starts with {content[:4].hex() or 'nothing'}")
    num_dims = content[3]
    start = 4 + 4 * num_dims
    shape = tuple(int(size) for size in np.frombuffer(content[4:start].ljust(4 * num_dims, b"\0"), ">u4"))
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise RunError(f"{name} is damaged: its header announces {expected} bytes, it has {len(content)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_idx_pair(images: bytes, labels: bytes, names: tuple[str, str]) -> tuple[Images, Labels]:
    """Images and labels of two idx files that belong together."""
    pixels, classes = read_idx(images, names[0]), read_idx(labels, names[1])
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise RunError(f"{names[0]} {pixels.shape} and {names[1]} {classes.shape} do not belong together")
    return pixels[:, None], classes.astype(np.int64)


def read_cifar10_archive(content: bytes, name: str, split: str) -> tuple[Images, Labels]:
    """One split of cifar-10-binary.tar.gz: records of one label byte and 3×32×32 pixel bytes."""
    wanted = _CIFAR_TRAIN if split == "train" else _CIFAR_TEST
    size = 1 + math.prod(_CIFAR_SHAPE)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            found = {member.name: _member_bytes(tar, member) for member in tar if member.name in wanted}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise RunError(f"{name} is damaged: {error}") from error
    for part in wanted:
        if len(found.get(part, b"")) != 10_000 * size:
            raise RunError(
                f"{name} is damaged: {part} should have {10_000 * size} bytes, has {len(found.get(part, b''))}"
            )
    records = np.frombuffer(b"".join(found[part] for part in wanted), np.uint8).reshape(-1, size)
    return in_canonical_order(records[:, 1:].reshape(-1, *_CIFAR_SHAPE), records[:, 0].astype(np.int64))


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    return b"" if content is None else content.read()


def read_cifar10_mosaics(folder: Path, split: str) -> tuple[Images, Labels]:
    """One split of CIFAR-10 as lossless mosaics of tiles, described by `index.json.gz`."""
    try:
        index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
        shards = {name: shard for name, shard in index["shards"].items() if name.startswith(f"{split}_")}
        parts = [
            _read_tiles(folder / name, index["tile"], len(shard["names"])) for name, shard in sorted(shards.items())
        ]
        labels = [
            np.broadcast_to(np.asarray(shard["labels"], np.int64), len(shard["names"]))
            for _, shard in sorted(shards.items())
        ]
        return in_canonical_order(np.concatenate(parts), np.concatenate(labels))
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise RunError(f"the CIFAR-10 mosaics in {folder} are damaged: {type(error).__name__}: {error}") from error


def _read_tiles(file: Path, tile: int, count: int) -> Images:
    from PIL import Image

    with Image.open(file) as image:
        mosaic = np.asarray(image.convert("RGB"))
    rows, columns = mosaic.shape[0] // tile, mosaic.shape[1] // tile
    tiles = mosaic.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
    if len(tiles) < count:
        raise ValueError(f"{file.name} has {len(tiles)} tiles, not {count}")
    return tiles[:count]


def in_canonical_order(images: Images, labels: Labels) -> tuple[Images, Labels]:
    """The examples sorted by the SHA-256 of their pixels, then by label.

    The layouts of CIFAR-10 differ in their order, one even goes by class. In this order they are the same data set, so
    that a run started from one may go on from the other.
    """
    keys = [(hashlib.sha256(image.tobytes()).digest(), int(label)) for image, label in zip(images, labels, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.ascontiguousarray(images[order]), labels[order]


def read_digits(digest: str) -> tuple[npt.NDArray[np.float32], Labels]:
    """All 1,797 of scikit-learn's digits, scaled to 0…1, from the file it bundles; importing it would take a second."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise RunError(
            "the digits data set comes with scikit-learn, which is not installed; `pip install scikit-learn`"
        )
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise RunError(f"{file} cannot be read ({error}); install scikit-learn again") from error
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if found != digest:
        raise RunError(f"{file} should have the checksum {digest} and has {found}; install scikit-learn again")
    table = np.array([[float(value) for value in row] for row in csv.reader(io.StringIO(content.decode()))], np.float32)
    return table[:, :64].reshape(-1, 1, 8, 8) / np.float32(16), table[:, 64].astype(np.int64)
