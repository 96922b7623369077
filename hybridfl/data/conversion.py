"""Images of one set in the form of another: size, channels, polarity, range. Needs numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybridfl.data.dataset import Dataset, Examples
from hybridfl.errors import DataError

LUMA = (0.299, 0.587, 0.114)
"""Grey from red, green and blue: ITU-R BT.601, as Pillow and most tools do."""


def converted(dataset: Dataset, shape: tuple[int, int, int], invert: bool = False) -> tuple[Examples, Examples]:
    """Train and test part of ``dataset`` as uint8 images of ``shape`` ``(channels, height, width)``, 0 … 255.

    Args:
        shape: with 1 or 3 channels.
        invert: give the negative.

    Raises:
        DataError: the set's values are no intensities (``Dataset.white`` is ``None``), or its images are neither grey nor
            red, green and blue.
    """
    if dataset.white is None:
        raise DataError(f"{dataset.name}: its values are no intensities of images, so they cannot be converted.")
    if dataset.train.x.shape[1] not in (1, 3):
        raise DataError(f"{dataset.name}: images have {dataset.train.x.shape[1]} channels, expected 1 or 3.")
    train, test = (
        Examples(_converted(part.x, shape, dataset.white, invert), part.y, part.domain)
        for part in (dataset.train, dataset.test)
    )
    return train, test


def _converted(
    x: NDArray[np.generic], shape: tuple[int, int, int], white: float, invert: bool, chunk: int = 4096
) -> NDArray[np.uint8]:
    out = np.empty((len(x), *shape), dtype=np.uint8)
    for start in range(0, len(x), chunk):
        piece = x[start : start + chunk].astype(np.float32) * np.float32(255 / white)
        piece = resized(coloured(piece, shape[0]), shape[1:])
        piece = np.rint(np.clip(piece, 0, 255))
        out[start : start + chunk] = (255 - piece if invert else piece).astype(np.uint8)
    return out


def coloured(x: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """``(n, c, h, w)`` with 1 or 3 channels: grey is repeated, colours become their luma."""
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return np.repeat(x, channels, axis=1)
    grey: NDArray[np.float32] = np.einsum("nchw,c->nhw", x, np.array(LUMA, dtype=np.float32))
    return grey[:, None]


def resized(x: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """``(n, c, h, w)`` at another height and width, by a triangle filter: bilinear, and without aliasing when smaller."""
    if x.shape[2:] == size:
        return x
    rows, columns = _filter(x.shape[2], size[0]), _filter(x.shape[3], size[1])
    return np.asarray(rows @ x @ columns.T, dtype=np.float32)


def _filter(old: int, new: int) -> NDArray[np.float32]:
    """``(new, old)``: the weights of the old pixels in each new one."""
    scale = old / new
    support = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(old)[None] - centres[:, None]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    normalised: NDArray[np.float32] = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return normalised
