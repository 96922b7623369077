"""Generated examples of any size: one Gaussian cloud per class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from hybridfl.build import NonNegativeFloat, PositiveInt, Range
from hybridfl.data.dataset import Dataset, Examples, IntArray, checked
from hybridfl.errors import ConfigError
from hybridfl.rng import stream


@dataclass(frozen=True)
class Synthetic:
    """``x = prototype of the class + unit Gaussian noise``, float32; classes as equally frequent as can be.

    Prototypes are Gaussian, scaled so that two of them are ``separation`` apart on average (root mean square); with two
    classes the best possible error is then about Φ(-separation / 2), whatever the shape.

    Args:
        train, test: numbers of examples.
        classes: number of classes.
        shape: channels, height, width.
        separation: distance of two prototypes in standard deviations of the noise; 0 cannot be learnt.
        seed: of the data, apart from the run's.
    """

    licence: ClassVar[str] = "none needed"
    files: ClassVar[tuple[str, ...]] = ()

    train: PositiveInt = 2000
    test: PositiveInt = 500
    classes: Annotated[int, Range(low=2)] = 10
    shape: tuple[PositiveInt, ...] = (1, 8, 8)
    separation: NonNegativeFloat = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != 3:
            raise ConfigError("shape", f"got {list(self.shape)}: expected channels, height, width, such as [1, 8, 8].")

    def load(self, root: Path) -> Dataset:
        """Draws the examples; ``root`` is not used. The first n training examples depend on ``train`` too."""
        channels, size = self.shape[0], math.prod(self.shape)
        # The squared distance of two prototypes has mean 2 * size * scale**2.
        scale = self.separation / math.sqrt(2 * size)
        prototypes = scale * stream(self.seed, "synthetic", "prototypes").standard_normal((self.classes, *self.shape))
        train, test = (self._part(part, prototypes) for part in ("train", "test"))
        std = math.sqrt(1 + scale**2)
        mean, deviation = (0.0,) * channels, (std,) * channels
        return Dataset("synthetic", train, test, self.classes, mean, deviation, white=None)

    def _part(self, part: str, prototypes: np.ndarray) -> Examples:
        rng = stream(self.seed, "synthetic", part)
        y: IntArray = rng.permutation(np.arange(self.train if part == "train" else self.test) % self.classes)
        x = prototypes[y].astype(np.float32)
        x += rng.standard_normal(x.shape, dtype=np.float32)
        return checked(x, y, self.classes, "synthetic")
