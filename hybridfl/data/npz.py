"""Data sets in one npz file: arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``, read without executing anything."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridfl.data.dataset import Examples, checked, readable
from hybridfl.errors import DataError

PARTS = ("train", "test")
CONTENT = "with the arrays x_train, y_train, x_test and y_test"
"""For advice about a missing or broken file."""


def read_npz(file: Path, channels: int, classes: int, todo: str) -> tuple[Examples, Examples]:
    """Train and test part; further arrays in the file are not read.

    Args:
        file: where it is; images in it are uint8, ``(N, H, W)`` with one channel, else ``(N, H, W, channels)``.
        channels: 1 or 3.
        classes: labels must lie in ``0 … classes - 1``.
        todo: what the user can do, put at the end of messages.

    Raises:
        DataError: the file is missing, truncated, no npz file, or holds other arrays or Python objects.
    """
    arrays = _arrays(file, todo)
    train, test = (_part(arrays[f"x_{part}"], arrays[f"y_{part}"], channels, classes, file) for part in PARTS)
    if train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(f"{file}: train images are {train.x.shape[1:]}, test images {test.x.shape[1:]}. {todo}")
    return train, test


def inverted(examples: Examples) -> Examples:
    """The negative of uint8 images."""
    return Examples(255 - examples.x, examples.y, examples.domain)


def _arrays(file: Path, todo: str) -> dict[str, NDArray[Any]]:
    with readable(file, todo):
        content = file.read_bytes()
    if not content.startswith(b"PK"):
        raise DataError(f"{file}: no npz file. {todo}")
    wanted = [f"{axis}_{part}" for part in PARTS for axis in "xy"]
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            missing = [name for name in wanted if name not in archive]
            found = {name: archive[name] for name in wanted if not missing}
    except Exception as error:  # a broken archive can raise nearly anything: BadZipFile, LZMAError, MemoryError, …
        raise DataError(f"{file}: truncated or damaged ({type(error).__name__}: {error}). {todo}") from error
    if missing:
        raise DataError(f"{file}: has no array {', '.join(missing)}. {todo}")
    return found


def _part(x: NDArray[Any], y: NDArray[Any], channels: int, classes: int, file: Path) -> Examples:
    if channels == 1 and x.ndim == 3:
        return checked(x[:, None], y, classes, file)
    if channels > 1 and x.ndim == 4 and x.shape[-1] == channels:
        return checked(x.transpose(0, 3, 1, 2), y, classes, file)
    wanted = "(examples, height, width)" if channels == 1 else f"(examples, height, width, {channels})"
    raise DataError(f"{file}: images have shape {x.shape}, expected {wanted}. Put the original back.")
