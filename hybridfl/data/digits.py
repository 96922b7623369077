"""Optical recognition of handwritten digits: 8x8 images that come with scikit-learn.

Alpaydin, Kaynak 1998, UCI Machine Learning Repository, doi 10.24432/C50P49. The file is read without importing
scikit-learn, which would take longer than the reading.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hybridfl.data.dataset import Dataset, Examples, checked
from hybridfl.errors import DataError

CLASSES = 10
MEAN, STD = 4.88, 6.02  # of the train part
_REINSTALL = "Reinstall scikit-learn, which ships it: pip install --force-reinstall scikit-learn."


@dataclass(frozen=True)
class Digits:
    """1,797 images 1x8x8, uint8 with values 0 … 16; 1,352 train, 445 test.

    The set has no test part of its own here, so every fourth image of each class, in stored order, is test: fixed and
    stratified. Writers are not known and may be on both sides.
    """

    licence: ClassVar[str] = "CC BY 4.0"
    files: ClassVar[tuple[str, ...]] = ()

    def load(self, root: Path) -> Dataset:
        """Reads scikit-learn's own file; ``root`` is not used.

        Raises:
            DataError: scikit-learn or its file is missing, or the file is damaged.
        """
        everything = _read(_file())
        held_out = _every_fourth_of_each_class(everything.y)
        train, test = everything.at(~held_out), everything.at(held_out)
        return Dataset("digits", train, test, CLASSES, mean=(MEAN,), std=(STD,), white=16.0)


def _file() -> Path:
    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("digits: scikit-learn, which ships the images, is not installed: pip install scikit-learn.")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"


def _read(file: Path) -> Examples:
    try:
        with gzip.open(file, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, delimiter=",", ndmin=2)
    except FileNotFoundError:
        raise DataError(f"{file}: not found. {_REINSTALL}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}). {_REINSTALL}") from error
    if table.shape[1] != 65 or not _is_whole(table, low=0, high=16):
        raise DataError(f"{file}: expected lines of 64 values 0 to 16 and a label. {_REINSTALL}")
    return checked(table[:, :64].astype(np.uint8).reshape(-1, 1, 8, 8), table[:, 64].astype(np.int64), CLASSES, file)


def _is_whole(table: NDArray[Any], low: int, high: int) -> bool:
    return bool(np.all((table >= low) & (table <= high) & (table == np.floor(table))))


def _every_fourth_of_each_class(y: NDArray[Any]) -> NDArray[np.bool_]:
    chosen = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        chosen[np.flatnonzero(y == label)[3::4]] = True
    return chosen
