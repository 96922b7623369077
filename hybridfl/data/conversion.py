"""Images of one set in the form of another: size, channels, polarity, range, type. Needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridfl.data.dataset import Dataset, Examples
from hybridfl.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)
"""Grey from red, green and blue: ITU-R BT.601, as Pillow and most tools do."""


@dataclass(frozen=True)
class Form:
    """What the images of a data set are like.

    Attributes:
        shape: ``(channels, height, width)``.
        white: raw value of full intensity; ``None`` where values are no intensities.
        dtype: ``"uint8"`` or ``"float32"``.
    """

    shape: tuple[int, ...]
    white: float | None = 255.0
    dtype: str = "uint8"

    @classmethod
    def of(cls, dataset: Dataset) -> Form:
        x = dataset.train.x
        return cls(tuple(x.shape[1:]), dataset.white, x.dtype.name)


def converted(dataset: Dataset, examples: Examples, form: Form, invert: bool = False) -> Examples:
    """Examples of ``dataset`` with images of another form: 0 stays 0, white becomes white.

    Args:
        examples: any of the data set's.
        form: what is wanted. Images that have it already are given back as they are.
        invert: give the negative.

    Raises:
        ConfigError: values are no intensities, or images are neither grey nor red, green and blue; its key is empty.
    """
    old = Form.of(dataset)
    if old == form and not invert:
        return examples
    for what, side in ((f"{dataset.name} has", old), ("the form wanted has", form)):
        if side.white is None or side.shape[0] not in (1, 3):
            which = "values that are no intensities" if side.white is None else f"{side.shape[0]} channels"
            problem = f"got {dataset.name}, which cannot be brought into another form: {what} {which}"
            raise ConfigError("", f"{problem}; only grey or colour images can (1 or 3 channels).")
    return Examples(_converted(examples.x, old, form, invert), examples.y, examples.domain)


def _converted(x: NDArray[Any], old: Form, new: Form, invert: bool, chunk: int = 4096) -> NDArray[Any]:
    assert old.white is not None
    assert new.white is not None
    out = np.empty((len(x), *new.shape), dtype=new.dtype)
    for start in range(0, len(x), chunk):
        piece = x[start : start + chunk].astype(np.float32) * np.float32(new.white / old.white)
        piece = resized(coloured(piece, new.shape[0]), (new.shape[1], new.shape[2]))
        out[start : start + chunk] = fitted(piece, new.white, new.dtype)
    return (new.white - out).astype(new.dtype) if invert else out


def fitted(x: NDArray[np.float32], white: float, dtype: str) -> NDArray[Any]:
    """Values within 0 … ``white``; rounded if the type is one of whole numbers."""
    clipped = np.clip(x, 0, white)
    return (np.rint(clipped) if dtype == "uint8" else clipped).astype(dtype)


def coloured(x: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """``(n, c, h, w)`` with 1 or 3 channels: grey is repeated, colours become their luma."""
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return np.repeat(x, channels, axis=1)
    grey: NDArray[np.float32] = np.einsum("nchw,c->nhw", x, np.array(LUMA, dtype=np.float32))
    return grey[:, None]


def resized(x: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """``(n, c, h, w)`` at another height and width, by a triangle filter: bilinear, and not aliased when smaller."""
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
