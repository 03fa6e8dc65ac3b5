"""The published data sets that temper knows: sizes, statistics, files with addresses and checksums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RemoteFile:
    """A file of a publisher's: its place under the data folder, its address and its checksum.

    `digest` is `algorithm:hexadecimal`; it is of the decompressed `content` where copies are packed differently, else
    of the `file` as it lies on disk.
    """

    name: str
    url: str
    digest: str
    of: Literal["content", "file"]


@dataclass(frozen=True)
class BuiltIn:
    """A published data set: sizes, and mean and deviation of its training inputs scaled to 0…1. `class_names` are empty
    where classes are called by their numbers."""

    train_examples: int
    test_examples: int
    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digests: tuple[str, ...]
    files: tuple[RemoteFile, ...] = ()
    class_names: tuple[str, ...] = ()


def _idx_files(
    folder: str, address: str, of: Literal["content", "file"], digests: Sequence[str]
) -> tuple[RemoteFile, ...]:
    names = (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )
    files = zip(names, digests, strict=True)
    return tuple(RemoteFile(f"{folder}/{name}", f"{address}/{name}", digest, of) for name, digest in files)


# Digests as torchvision's `datasets/mnist.py` lists them.
_MNIST_FILES = _idx_files(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "file",
    (
        "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "md5:d53e105ee54ea40749a09fcbcd1e9432",
        "md5:9fb629c4189551a2d022fa330f9573f3",
        "md5:ec29112dd5afa0611ce80d1b7f02629c",
    ),
)
# Digests of the unpacked files: copies in circulation are compressed differently.
_FASHION_MNIST_FILES = _idx_files(
    "fashion-mnist",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "content",
    (
        "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
# The publisher's binary version; the one for Python is a pickle, which temper never loads.
_CIFAR10_FILES = (
    RemoteFile(
        "cifar10/cifar-10-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
        "file",
    ),
)
# As the publishers write them.
_FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# SHA-256 of the text of scikit-learn's `datasets/data/digits.csv.gz`.
DIGITS_DIGEST = "sha256:6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"


def _digests(files: tuple[RemoteFile, ...]) -> tuple[str, ...]:
    return tuple(file.digest for file in files)


BUILT_INS: dict[str, BuiltIn] = {
    "digits": BuiltIn(1437, 360, (1, 8, 8), 10, (0.30538,), (0.37606,), (DIGITS_DIGEST,)),
    "mnist": BuiltIn(60_000, 10_000, (1, 28, 28), 10, (0.1307,), (0.3081,), _digests(_MNIST_FILES), _MNIST_FILES),
    "fashion_mnist": BuiltIn(
        60_000,
        10_000,
        (1, 28, 28),
        10,
        (0.28604,),
        (0.35302,),
        _digests(_FASHION_MNIST_FILES),
        _FASHION_MNIST_FILES,
        _FASHION_MNIST_CLASSES,
    ),
    "cifar10": BuiltIn(
        50_000,
        10_000,
        (3, 32, 32),
        10,
        (0.49139968, 0.48215841, 0.44653091),
        (0.24703223, 0.24348513, 0.26158784),
        _digests(_CIFAR10_FILES),
        _CIFAR10_FILES,
        _CIFAR10_CLASSES,
    ),
}
