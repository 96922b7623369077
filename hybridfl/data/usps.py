"""USPS, digits from envelopes: libsvm text packed by bzip2. Hull 1994, IEEE TPAMI 16(5).

A line is ``label index:value …``: labels 1 … 10 for the digits 0 … 9, indices 1 … 256 row by row in ascending order,
values -1 … 1, and 0 where an index is left out.
"""

from __future__ import annotations

import bz2
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hybridfl.build import PositiveInt
from hybridfl.data.dataset import Dataset, Examples, advice, checked, readable
from hybridfl.data.downloads import Download
from hybridfl.errors import DataError

FOLDER = "usps"
TRAIN, TEST = "usps.bz2", "usps.t.bz2"
CLASSES = 10
SIDE = 16
ADDRESS = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/"
MEAN, STD = 0.2545, 0.3846  # of the train part


@dataclass(frozen=True)
class USPS:
    """7,291 and 2,007 handwritten digits 1x16x16, white on black, uint8. The test part is harder than the train part.

    Args:
        limit: keep the first so many training examples; ``None`` keeps all.
    """

    licence: ClassVar[str] = "none stated; research use"
    downloads: ClassVar[tuple[Download, ...]] = (
        Download(ADDRESS + TRAIN, "md5:ec16c51db3855ca6c91edd34d0e9b197", f"{FOLDER}/{TRAIN}"),
        Download(ADDRESS + TEST, "md5:8ea070ee2aca1ac39742fdd1ef5ed118", f"{FOLDER}/{TEST}"),
    )

    limit: PositiveInt | None = None

    def load(self, root: Path) -> Dataset:
        """Reads the two files in ``root/usps``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        todo = advice("usps.bz2 and usps.t.bz2, as the libsvm pages have them,", root, FOLDER)
        train, test = (_read(root / FOLDER / name, todo, most) for name, most in ((TRAIN, self.limit), (TEST, None)))
        return Dataset("usps", train.first(self.limit), test, CLASSES, mean=(MEAN * 255,), std=(STD * 255,))


def _read(file: Path, todo: str, limit: int | None) -> Examples:
    with readable(file, todo), bz2.open(file) as stream:  # unpacked only as far as is needed
        lines = list(islice(filter(bytes.strip, stream), limit))
    labels = np.zeros(len(lines), dtype=np.int64)
    values = np.zeros((len(lines), SIDE**2))
    for number, line in enumerate(lines):
        try:
            labels[number], columns, given = _parsed(line)
        except ValueError as error:
            raise DataError(f"{file}: example {number + 1}: {error}. {todo}") from None
        values[number, columns] = given
    images = np.rint((values + 1) / 2 * 255).astype(np.uint8).reshape(-1, 1, SIDE, SIDE)
    return checked(images, labels - 1, CLASSES, file)


def _parsed(line: bytes) -> tuple[int, NDArray[np.int64], NDArray[np.float64]]:
    """The label of a line, the columns counted from 0, and their values."""
    label, *pairs = line.split()
    numbers = np.array(b" ".join(pairs).replace(b":", b" ").split(), dtype=np.float64)
    if line.count(b":") != len(pairs) or len(numbers) != 2 * len(pairs):
        raise ValueError("expected a label and pairs index:value")
    index, value = numbers[::2], numbers[1::2]
    if not np.all((index >= 1) & (index <= SIDE**2) & (index == np.floor(index))) or np.any(np.diff(index) <= 0):
        raise ValueError(f"indices are not whole numbers 1 to {SIDE**2} in ascending order")
    if not np.all(np.abs(value) <= 1):
        raise ValueError("values are not all between -1 and 1")
    return int(label), index.astype(np.int64) - 1, value
