"""MNIST and Fashion-MNIST: gzipped IDX files.

The format: a big-endian magic number (2051 images, 2049 labels), one 32-bit size per axis, then bytes. LeCun, Bottou,
Bengio, Haffner 1998, Proc. IEEE 86(11); Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hybridfl.build import PositiveInt
from hybridfl.data.dataset import Dataset, Examples, advice, checked, readable
from hybridfl.data.downloads import Download
from hybridfl.errors import DataError

IMAGES, LABELS = 2051, 2049
CLASSES = 10
_AXES = {IMAGES: 3, LABELS: 1}
_KIND = {IMAGES: "images", LABELS: "labels"}
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _originals(address: str, folder: str, *hashes: str) -> tuple[Download, ...]:
    return tuple(Download(address + name, known, f"{folder}/{name}") for name, known in zip(FILES, hashes, strict=True))


@dataclass(frozen=True)
class MNIST:
    """60,000 and 10,000 handwritten digits, 1x28x28, uint8.

    Args:
        limit: keep the first so many training examples; ``None`` keeps all.
    """

    licence: ClassVar[str] = "CC BY-SA 3.0"
    downloads: ClassVar[tuple[Download, ...]] = _originals(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "mnist",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    )

    limit: PositiveInt | None = None

    def load(self, root: Path) -> Dataset:
        """Reads the four files in ``root/mnist``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        return _load("mnist", root, self.limit, mean=0.1307, std=0.3081)


@dataclass(frozen=True)
class FashionMNIST:
    """60,000 and 10,000 pictures of clothes, 1x28x28, uint8.

    Args:
        limit: keep the first so many training examples; ``None`` keeps all.
    """

    licence: ClassVar[str] = "MIT"
    downloads: ClassVar[tuple[Download, ...]] = _originals(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "fashion_mnist",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    )

    limit: PositiveInt | None = None

    def load(self, root: Path) -> Dataset:
        """Reads the four files in ``root/fashion_mnist``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        return _load("fashion_mnist", root, self.limit, mean=0.2860, std=0.3530)


def read_idx(file: Path, magic: int, todo: str) -> NDArray[np.uint8]:
    """The array in a gzipped IDX file: ``(N, H, W)`` for images, ``(N,)`` for labels.

    Args:
        file: where it is.
        magic: the kind expected, :data:`IMAGES` or :data:`LABELS`.
        todo: what the user can do, put at the end of messages.

    Raises:
        DataError: the file is missing, no gzip file, of the wrong kind, too short or too long.
    """
    content = _unzipped(file, todo)
    header = 4 + 4 * _AXES[magic]
    if len(content) < header:
        raise DataError(f"{file}: truncated, {len(content)} bytes are no IDX header. {todo}")
    found, *sizes = struct.unpack(f">{1 + _AXES[magic]}I", content[:header])
    if found != magic:
        raise DataError(f"{file}: magic number {found}, expected {magic} (IDX {_KIND[magic]}). {todo}")
    missing = header + math.prod(sizes) - len(content)
    if missing > 0:
        raise DataError(f"{file}: truncated, {missing} bytes are missing for the sizes {sizes} it states. {todo}")
    if missing < 0:
        raise DataError(f"{file}: {-missing} bytes too many for the sizes {sizes} it states. {todo}")
    # A copy, because an array over `bytes` is read-only and torch warns about those.
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy()


def _unzipped(file: Path, todo: str) -> bytes:
    with readable(file, todo), gzip.open(file) as stream:
        return stream.read()


def _load(folder: str, root: Path, limit: int | None, mean: float, std: float) -> Dataset:
    train, test = _part(root, folder, "train"), _part(root, folder, "t10k")
    if train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(f"{root / folder}: train images are {train.x.shape[1:]}, test images {test.x.shape[1:]}.")
    return Dataset(folder, train.first(limit), test, CLASSES, mean=(mean * 255,), std=(std * 255,))


def _part(root: Path, folder: str, part: str) -> Examples:
    todo = advice("the four original IDX files (.gz)", root, folder)
    labels = root / folder / f"{part}-labels-idx1-ubyte.gz"
    x = read_idx(root / folder / f"{part}-images-idx3-ubyte.gz", IMAGES, todo)
    return checked(x[:, None], read_idx(labels, LABELS, todo), CLASSES, labels)
