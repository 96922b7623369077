"""What every reader returns: two labelled parts with a fixed boundary between them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hybridfl.errors import ConfigError, DataError

IntArray = NDArray[np.int64]


def int_array(values: ArrayLike) -> IntArray:
    """The values as whole numbers of 64 bits, such as indices; a copy only where they are not that already."""
    return np.asarray(values, dtype=np.int64)


def _nothing() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled images.

    Attributes:
        x: ``(N, C, H, W)``, uint8 or float32, raw values as stored.
        y: ``(N,)``, int64, labels ``0 … classes - 1``.
        domain: ``(N,)``, int64, where each comes from, a number into the data set's ``domains``; 0 for all if left out.
    """

    x: NDArray[Any]
    y: IntArray
    domain: IntArray = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        if not len(self.domain):
            object.__setattr__(self, "domain", np.zeros(len(self.y), dtype=np.int64))
        # A reader may give whole numbers of any width, and arithmetic on those of 8 bits wraps around.
        for name in ("y", "domain"):
            values = np.asarray(getattr(self, name))
            object.__setattr__(self, name, values.astype(np.int64, copy=False) if values.dtype.kind in "iu" else values)

    def __len__(self) -> int:
        return len(self.y)

    def at(self, index: NDArray[Any] | slice) -> Examples:
        """The examples at these positions."""
        return Examples(self.x[index], self.y[index], self.domain[index])

    def followed_by(self, other: Examples) -> Examples:
        """These examples, then the others."""
        pairs = ((self.x, other.x), (self.y, other.y), (self.domain, other.domain))
        return Examples(*(np.concatenate(pair) for pair in pairs))

    def first(self, limit: int | None) -> Examples:
        """The first ``limit`` examples in the stored order; all of them for ``None``.

        Raises:
            ConfigError: there are fewer; key ``limit``.
        """
        if limit is None:
            return self
        if limit > len(self):
            raise ConfigError(
                "limit", f"got {limit}: there are {len(self)} examples; nearest valid value: {len(self)}."
            )
        return self.at(slice(limit))


@dataclass(frozen=True, eq=False)
class Labels:
    """What may decide who owns an example: its class and its domain, both ``(N,)``."""

    y: IntArray
    domain: IntArray = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        if not len(self.domain):
            object.__setattr__(self, "domain", np.zeros(len(self.y), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.y)

    def at(self, index: NDArray[Any]) -> Labels:
        return Labels(self.y[index], self.domain[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its own train and test parts.

    Attributes:
        name: for messages and tables.
        train, test: the two parts; test is never trained or selected on.
        classes: number of classes.
        mean, std: one number per channel, in units of the *raw* values of ``x``: a model is fed ``(x - mean) / std``,
            so a uint8 set with values 0 … 255 has a mean such as 0.2860 * 255. They belong to the data set, not to the
            files found: a subset of a set is standardised as the whole is.
        domains: names of the domains; one, named as the set, if left out.
        white: raw value of full intensity, 0 being none; ``None`` where values are no intensities.
    """

    name: str
    train: Examples
    test: Examples
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    domains: tuple[str, ...] = ()
    white: float | None = 255.0

    def __post_init__(self) -> None:
        if not self.domains:
            object.__setattr__(self, "domains", (self.name,))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over shapes, types and bytes of all examples: the same name may hold another subset."""
        digest = hashlib.sha256()
        arrays = [self.train.x, self.train.y, self.test.x, self.test.y]
        if len(self.domains) > 1:
            digest.update("\x1f".join(self.domains).encode())
            arrays += [self.train.domain, self.test.domain]
        for array in arrays:
            digest.update(f"{array.shape}{array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()[:16]


class Reader(Protocol):
    """A config node of the group ``dataset``: its fields are the options, ``load`` reads the files.

    What it may state besides, such as a licence and downloads, is in :mod:`hybridfl.data.downloads`.
    """

    def load(self, root: Path) -> Dataset:
        """The data set below ``root``.

        Raises:
            DataError: a file is missing, truncated or not what it claims to be.
            ConfigError: an option does not fit the files; its key is the option's name.
        """
        ...


@contextmanager
def readable(file: Path, todo: str) -> Iterator[None]:
    """What goes wrong while a file is read, said of the file, with what to do.

    Raises:
        DataError: it is missing, ends too early, or cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file}: not found. {todo}") from None
    except EOFError:
        raise DataError(f"{file}: truncated, the packed stream ends too early. {todo}") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}). {todo}") from error


def checked(x: NDArray[Any], y: NDArray[Any], classes: int, file: Path | str) -> Examples:
    """Examples of which the structure is sure.

    Args:
        x: ``(N, C, H, W)``, uint8 or float32.
        y: ``(N,)``, any whole numbers.
        classes: labels must lie in ``0 … classes - 1``.
        file: where they were read, for the message.

    Raises:
        DataError: a shape, type, length or label is wrong.
    """
    problem = _problem(x, y, classes)
    if problem:
        raise DataError(f"{file}: {problem}. The file is damaged or another data set: put the original back.")
    return Examples(np.ascontiguousarray(x), np.ascontiguousarray(y, dtype=np.int64))


def sound(dataset: Any, node: Mapping[str, Any]) -> Dataset:
    """What a reader gave, if it is a data set as described; readers may come from outside the package.

    Args:
        dataset: what ``load`` gave.
        node: the config the reader was built from, for the message.

    Raises:
        ConfigError: it is none; key ``_target_``.
    """
    name = node.get("_target_", "the reader")
    if not isinstance(dataset, Dataset):
        problem = f"{name}.load gave a {type(dataset).__name__}, expected a hybridfl.data.dataset.Dataset."
        raise ConfigError("_target_", problem)
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        problem_found = problem_of(examples, dataset.classes, len(dataset.domains))
        if problem_found:
            raise ConfigError("_target_", f"{name}.load gave a {part} part whose {problem_found}.")
    return dataset


def problem_of(examples: Examples, classes: int, domains: int) -> str | None:
    """What is wrong with the structure of examples, if anything; a sentence without its end."""
    domain = np.asarray(examples.domain)
    if domain.shape != (len(examples),) or domain.dtype.kind not in "iu":
        kind = f"shape {domain.shape} and type {domain.dtype}"
        return f"domains have {kind}, expected a whole number for each of the {len(examples)} examples"
    if domain.min(initial=0) < 0 or domain.max(initial=0) >= domains:
        wrong = domain[(domain < 0) | (domain >= domains)][0]
        return f"domain {wrong} is out of range, expected 0 to {domains - 1}"
    return _problem(np.asarray(examples.x), np.asarray(examples.y), classes)


def _problem(x: NDArray[Any], y: NDArray[Any], classes: int) -> str | None:
    if x.ndim != 4:
        return f"images have shape {x.shape}, expected four axes (examples, channels, height, width)"
    if x.dtype not in (np.uint8, np.float32):
        return f"images have type {x.dtype}, expected uint8 or float32"
    if y.ndim != 1 or y.dtype.kind not in "iu":
        return f"labels have shape {y.shape} and type {y.dtype}, expected one axis of whole numbers"
    if len(x) != len(y):
        return f"{len(x)} images but {len(y)} labels"
    if not x.size:
        return "there are no images"
    if y.min() < 0 or y.max() >= classes:
        wrong = y[(y < 0) | (y >= classes)][0]
        return f"label {wrong} is out of range, expected 0 to {classes - 1}"
    return None


def advice(what: str, root: Path, folder: str) -> str:
    """The sentence that ends a message about a missing or broken file: what belongs where."""
    return (
        f"Put {what} in {root / folder}, or set data_root or the environment variable HYBRIDFL_DATA "
        f"to the folder that holds {folder}/."
    )
