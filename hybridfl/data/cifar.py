"""CIFAR-10 from its python pickles, read without executing anything. Krizhevsky 2009, technical report, Toronto."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hybridfl.build import PositiveInt
from hybridfl.data.dataset import Dataset, Examples, advice, checked, readable
from hybridfl.data.downloads import Download
from hybridfl.errors import DataError

FOLDER = "cifar10/cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
CLASSES = 10
SHAPE = (3, 32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class CIFAR10:
    """Photographs 3x32x32 (red, green, blue), uint8; 50,000 and 10,000, or the subset that the batch files hold.

    Args:
        limit: keep the first so many training examples; ``None`` keeps all.
    """

    licence: ClassVar[str] = "none stated; cite Krizhevsky 2009"
    downloads: ClassVar[tuple[Download, ...]] = (
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            "cifar10",
            {
                "cifar-10-batches-py/data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
                "cifar-10-batches-py/data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
                "cifar-10-batches-py/data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
                "cifar-10-batches-py/data_batch_4": "md5:634d18415352ddfa80567beed471001a",
                "cifar-10-batches-py/data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
                "cifar-10-batches-py/test_batch": "md5:40351d587109b95175f43aff81a1287e",
            },
        ),
    )

    limit: PositiveInt | None = None

    def load(self, root: Path) -> Dataset:
        """Reads the six batches in ``root/cifar10/cifar-10-batches-py``; errors as in
        :class:`~hybridfl.data.dataset.Reader`.
        """
        todo = advice("the six batch files of the CIFAR-10 python version", root, FOLDER)
        batches = [read_batch(root / FOLDER / name, todo) for name in TRAIN]
        train = Examples(np.concatenate([b.x for b in batches]), np.concatenate([b.y for b in batches]))
        test = read_batch(root / FOLDER / TEST, todo)
        mean, std = (tuple(255 * value for value in values) for values in (MEAN, STD))
        return Dataset("cifar10", train.first(self.limit), test, CLASSES, mean, std)


def read_batch(file: Path, todo: str, labels: str = "labels", classes: int = CLASSES) -> Examples:
    """One batch of any size: ``data`` ``(N, 3072)``, planes red, green, blue, row by row; ``labels`` N numbers.

    Args:
        file: where it is.
        todo: what the user can do, put at the end of messages.
        labels: the key of the labels; CIFAR-100 has two.
        classes: labels must lie in ``0 … classes - 1``.

    Raises:
        DataError: the file is missing, truncated, no such batch, or a pickle that asks for more than arrays.
    """
    content = _unpickled(file, todo)
    if not isinstance(content, Mapping):
        raise DataError(f"{file}: holds a {type(content).__name__}, expected a dict with data and labels. {todo}")
    # Python 2 wrote byte strings as keys; a subset saved by Python 3 may have text.
    named = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    x, y = named.get("data"), named.get(labels)
    if type(x) is not np.ndarray or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072:
        raise DataError(f"{file}: 'data' is missing or no uint8 array of 3,072 columns. {todo}")
    if not isinstance(y, list | np.ndarray) or not all(isinstance(v, int | np.integer) for v in y):
        raise DataError(f"{file}: '{labels}' is missing or no list of whole numbers. {todo}")
    return checked(x.reshape(-1, *SHAPE), np.asarray(y), classes, file)


def _unpickled(file: Path, todo: str) -> Any:
    with readable(file, todo):
        content = file.read_bytes()
    try:
        return _ArraysOnly(content, file).load()
    except DataError:
        raise
    except Exception as error:  # a broken pickle can raise nearly anything: EOFError, KeyError, MemoryError, …
        raise DataError(f"{file}: truncated or no pickle ({type(error).__name__}: {error}). {todo}") from error


def _dtype(name: Any, *flags: Any) -> np.dtype[Any]:
    # Old pickles give the flags align and copy as numbers; numpy 2.4 warns unless they are bool.
    plain: np.dtype[Any] = np.dtype(name, *map(bool, flags))
    return plain


# The three names an array of numbers needs, and nothing else; numpy 2 moved one of them.
_RECONSTRUCT: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}


class _ArraysOnly(pickle.Unpickler):
    """A pickle can name any function to call; this one looks names up in a table and imports nothing."""

    def __init__(self, content: bytes, file: Path) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(
                f"{self._file}: refused, the pickle asks for {module}.{name}; only plain numpy arrays are read. "
                "Do not trust the file: get the original. (A subset of your own: save it with pickle protocol 4.)"
            ) from None
