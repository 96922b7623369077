"""MNIST-M: digits of MNIST blended with patches of photographs.

Ganin, Ustinova, Ajakan, Germain, Larochelle, Laviolette, Marchand, Lempitsky 2016, JMLR 17(59), arXiv 1505.07818.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hybridfl.build import PositiveInt
from hybridfl.data.dataset import Dataset, advice
from hybridfl.data.npz import CONTENT, read_npz

FOLDER, FILE = "mnist_m", "mnist_m.npz"
CLASSES = 10
MEAN, STD = (0.4586, 0.4628, 0.4092), (0.2488, 0.2335, 0.2562)  # of 4,000 train images, 400 of each class


@dataclass(frozen=True)
class MNISTM:
    """Digits on photographs 3x32x32 (red, green, blue), uint8, as many as the file holds.

    The strokes are those of MNIST, train in train and test in test: the two sets are not independent.

    Args:
        limit: keep the first so many training examples; ``None`` keeps all.
    """

    licence: ClassVar[str] = "none stated; of MNIST and BSDS500, research use"
    files: ClassVar[tuple[str, ...]] = (f"{FOLDER}/{FILE}",)
    by_hand: ClassVar[str] = (
        "Its authors offer images and lists of labels (mnist_m.tar.gz, linked from yaroslav.ganin.net), which must be "
        "packed as arrays."
    )

    limit: PositiveInt | None = None

    def load(self, root: Path) -> Dataset:
        """Reads ``root/mnist_m/mnist_m.npz``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        todo = advice(f"{FILE} {CONTENT}, images (N, 32, 32, 3) uint8,", root, FOLDER)
        train, test = read_npz(root / FOLDER / FILE, channels=3, classes=CLASSES, todo=todo)
        mean, std = (tuple(255 * value for value in values) for values in (MEAN, STD))
        return Dataset("mnist_m", train.first(self.limit), test, CLASSES, mean, std)
