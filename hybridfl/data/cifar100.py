"""CIFAR-100 from its python pickles, read as those of CIFAR-10. Krizhevsky 2009, technical report, Toronto."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hybridfl.build import PositiveInt
from hybridfl.data.cifar import read_batch
from hybridfl.data.dataset import Dataset, advice
from hybridfl.data.downloads import Download

FOLDER = "cifar100/cifar-100-python"
TRAIN, TEST = "train", "test"
CLASSES = {"fine": 100, "coarse": 20}
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@dataclass(frozen=True)
class CIFAR100:
    """Photographs 3x32x32 (red, green, blue), uint8; 50,000 and 10,000, or the subset that the two files hold.

    Args:
        label: ``fine``, 100 classes, or ``coarse``, the 20 groups of five that they form.
        limit: keep the first so many training examples; ``None`` keeps all.
    """

    licence: ClassVar[str] = "none stated; cite Krizhevsky 2009"
    downloads: ClassVar[tuple[Download, ...]] = (
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            "cifar100",
            {
                "cifar-100-python/train": "md5:16019d7e3df5f24257cddd939b257f8d",
                "cifar-100-python/test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
            },
        ),
    )

    label: Literal["fine", "coarse"] = "fine"
    limit: PositiveInt | None = None

    def load(self, root: Path) -> Dataset:
        """Reads the two files in ``root/cifar100/cifar-100-python``; errors as in
        :class:`~hybridfl.data.dataset.Reader`.
        """
        todo = advice("the files train and test of the CIFAR-100 python version", root, FOLDER)
        classes = CLASSES[self.label]
        train, test = (
            read_batch(root / FOLDER / name, todo, f"{self.label}_labels", classes) for name in (TRAIN, TEST)
        )
        mean, std = (tuple(255 * value for value in values) for values in (MEAN, STD))
        return Dataset("cifar100", train.first(self.limit), test, classes, mean, std)
