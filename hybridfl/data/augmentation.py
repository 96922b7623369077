"""Augmentation: what the steps of local work see instead of the examples themselves.

Every job with steps is augmented, the server's too: local work, fine-tuning, ``start=server``, and Feddle's search by
gradient. Nothing else is: no measurement or probe (a teacher's logits, Feddle's search by evolution or in closed form), no
validation and no test.

Inputs are standardised batches on any device. All random numbers are drawn by numpy from the job's own stream, so they
depend neither on the device nor on what ran before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hybridfl.build import Fraction, NonNegativeFloat, NonNegativeInt
from hybridfl.data.dataset import Dataset, IntArray
from hybridfl.errors import ConfigError

ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = (0.3, 1 / 0.3)


class Augmented(NamedTuple):
    """A batch of b examples as a step sees it.

    Attributes:
        x: ``(b, …)`` inputs.
        partners: ``(b,)``, positions in the batch of those whose targets count as well; ``None``: nobody's do.
        share: λ of an example's own targets in its loss; those of its partner have 1 - λ.
    """

    x: Tensor
    partners: Tensor | None = None
    share: float = 1.0


class Augment(Protocol):
    """A pure function of standardised inputs ``(b, …)``, which it leaves as they are, and a stream of random numbers."""

    def __call__(self, x: Tensor, rng: np.random.Generator, /) -> Augmented: ...


class Augmenter(Protocol):
    """A config node of the group ``augmentation``."""

    def fitted(self, dataset: Dataset) -> Augment | None:
        """The augmentation of this data set's examples; ``None`` changes none of them and draws nothing.

        Raises:
            ConfigError: an option does not fit them; its key is the option's name.
        """
        ...


@dataclass(frozen=True)
class Augmentation:
    """Crop, flip, erase and mix, in this order; zeros leave everything as it is.

    Attributes:
        crop: pixels of padding on every side, of which a window of the image's size is cut anew in every step, as for
            CIFAR (He, Zhang, Ren, Sun 2016, arXiv 1512.03385, section 4.2). The padding is black: a raw 0, standardised.
        flip: probability that left and right are swapped.
        erase: probability that a rectangle is erased (Zhong, Zheng, Kang, Li, Yang 2020, arXiv 1708.04896): its area is
            uniform in 2 to 33 % of the image and its height uniform in 0.3 to 1 / 0.3 times its width, both up to rounding
            to pixels; a side longer than the image's is cut (the paper draws again). Erased is what the data set's mean
            is, a standardised 0 (the paper's RE-M).
        mixup: α of Zhang, Cisse, Dauphin, Lopez-Paz 2018, arXiv 1710.09412: with λ from Beta(α, α), one a batch, each
            example is λ of itself and 1 - λ of another of the batch, and so is its loss.
    """

    crop: NonNegativeInt = 0
    flip: Fraction = 0.0
    erase: Fraction = 0.0
    mixup: NonNegativeFloat = 0.0

    def fitted(self, dataset: Dataset) -> Augment | None:
        """As :class:`Augmenter` says; all but ``mixup`` want images."""
        shape = dataset.train.x.shape[1:]
        for option in ("crop", "flip", "erase"):
            value = getattr(self, option)
            if value and len(shape) != 3:
                problem = f"got {value:g}: examples are no images (channels, height, width) but of shape {shape}"
                raise ConfigError(option, f"{problem}; nearest valid value: 0.")
        if self.crop and self.crop >= min(shape[1:]):
            problem = f"got {self.crop}: of images of {shape[1]} × {shape[2]} pixels nothing might be left"
            raise ConfigError("crop", f"{problem}; nearest valid value: {min(shape[1:]) - 1}.")
        return None if self == Augmentation() else _Fitted(self, dataset.mean, dataset.std)


@dataclass(frozen=True)
class _Fitted:
    """An augmentation of examples that were standardised with these numbers."""

    options: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor, rng: np.random.Generator, /) -> Augmented:
        wanted, number = self.options, len(x)
        if wanted.crop:
            down, right = rng.integers(0, 2 * wanted.crop + 1, size=(2, number))
            x = cropped(x, wanted.crop, down, right, self.black(x))
        if wanted.flip:
            x = torch.where(_like(rng.random(number) < wanted.flip, x), x.flip(-1), x)
        if wanted.erase:
            chosen = rng.random(number) < wanted.erase
            x = erased(x, *rectangles(number, x.shape[2], x.shape[3], rng), chosen)
        if not wanted.mixup:
            return Augmented(x)
        share = float(rng.beta(wanted.mixup, wanted.mixup))
        partners = torch.from_numpy(rng.permutation(number)).to(x.device)
        return Augmented(share * x + (1 - share) * x[partners], partners, share)

    def black(self, x: Tensor) -> Tensor:
        """What a raw 0 became, ``(channels, 1, 1)``; reckoned as the examples were, to the bit."""
        mean, std = (x.new_tensor(numbers).reshape(-1, 1, 1) for numbers in (self.mean, self.std))
        return (0 - mean) / std


def cropped(x: Tensor, padding: int, down: IntArray, right: IntArray, black: Tensor) -> Tensor:
    """Windows of the padded images, of their own size.

    Args:
        x: ``(b, c, h, w)``.
        down, right: ``(b,)``, where each window begins in its padded image, 0 … 2 · padding.
        black: ``(c, 1, 1)``, what the padding is filled with.
    """
    number, channels, height, width = x.shape
    padded = black.expand(number, channels, height + 2 * padding, width + 2 * padding).clone()
    padded[:, :, padding:-padding, padding:-padding] = x
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    example, row, column = (torch.from_numpy(index).to(x.device) for index in (np.arange(number), down, right))
    return windows[example, :, row, column]


def rectangles(
    number: int, height: int, width: int, rng: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Random rectangles within an image: first rows, first columns, heights and widths, ``(number,)`` each."""
    area = rng.uniform(*ERASED_AREA, number) * height * width
    aspect = rng.uniform(*ERASED_ASPECT, number)
    tall = np.rint(np.sqrt(area * aspect)).clip(1, height).astype(np.int64)
    wide = np.rint(np.sqrt(area / aspect)).clip(1, width).astype(np.int64)
    return rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1), tall, wide


def erased(x: Tensor, top: IntArray, left: IntArray, tall: IntArray, wide: IntArray, chosen: np.ndarray) -> Tensor:
    """The chosen images, ``(b,)`` booleans, with a rectangle of zeros in each."""
    rows, columns = np.arange(x.shape[2]), np.arange(x.shape[3])
    across = (rows >= top[:, None]) & (rows < (top + tall)[:, None]) & chosen[:, None]
    along = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    inside = (
        torch.from_numpy(across).to(x.device)[:, None, :, None] & torch.from_numpy(along).to(x.device)[:, None, None]
    )
    return x.masked_fill(inside, 0.0)


def _like(flags: np.ndarray, x: Tensor) -> Tensor:
    """One flag an example, on the device and with the axes of ``x``."""
    return torch.from_numpy(flags).to(x.device).reshape(-1, *[1] * (x.dim() - 1))
