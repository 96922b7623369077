"""Small images and augmentations of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridfl.data.augmentation import Augment, Augmentation
from hybridfl.data.dataset import Dataset, Examples
from hybridfl.rng import stream

MEAN, STD = (100.0, 130.0, 90.0), (50.0, 60.0, 70.0)


def images(number: int, height: int = 6, width: int = 9, channels: int = 3) -> Dataset:
    """Random pixels, no two of which are likely to be alike, and none black."""
    x = np.random.default_rng(1).integers(1, 256, (number, channels, height, width)).astype(np.uint8)
    examples = Examples(x, np.zeros(number, dtype=np.int64))
    return Dataset("random", examples, examples, 2, MEAN[:channels], STD[:channels])


def standardised(raw: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    """As the federation does it."""
    mean, std = (torch.tensor(v[: raw.shape[1]], dtype=dtype).reshape(1, -1, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(raw).to(dtype) - mean) / std


def fitted(dataset: Dataset, **options: Any) -> Augment:
    augment = Augmentation(**options).fitted(dataset)
    assert augment is not None
    return augment


def rng(seed: int = 0) -> np.random.Generator:
    return stream(seed, "test")
