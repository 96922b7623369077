"""Digits of Chars74K, drawn by computer fonts or cut from photographs of streets. de Campos, Babu, Varma 2009, VISAPP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hybridfl.build import PositiveInt
from hybridfl.data.dataset import Dataset, advice
from hybridfl.data.npz import CONTENT, inverted, read_npz

FOLDER = "chars74k"
FONTS, STREET = "fonts_digits.npz", "street_digits.npz"
CLASSES = 10
LICENCE = "research use; cite de Campos, Babu, Varma 2009"
ADDRESS = "teodecampos.github.io/chars74k"
FONTS_MEAN, FONTS_STD = 0.8356, 0.3601  # of the train part, not inverted
STREET_MEAN, STREET_STD = (0.5024, 0.4662, 0.3842), (0.2575, 0.2466, 0.2545)  # of the train part


@dataclass(frozen=True)
class Chars74KFonts:
    """Digits of computer fonts 1x28x28, uint8, as many as the file holds.

    Args:
        invert: white on black, as MNIST is; ``False`` keeps the file's black on white.
        limit: keep the first so many training examples; ``None`` keeps all.
    """

    licence: ClassVar[str] = LICENCE
    files: ClassVar[tuple[str, ...]] = (f"{FOLDER}/{FONTS}",)
    by_hand: ClassVar[str] = (
        f"The original (EnglishFnt.tgz, at {ADDRESS}) has images of all characters, of which the digits, Sample001 to "
        "Sample010, must be reduced and packed as arrays."
    )

    invert: bool = False
    limit: PositiveInt | None = None

    def load(self, root: Path) -> Dataset:
        """Reads ``root/chars74k/fonts_digits.npz``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        todo = advice(f"{FONTS} {CONTENT}, images (N, 28, 28) uint8,", root, FOLDER)
        train, test = read_npz(root / FOLDER / FONTS, channels=1, classes=CLASSES, todo=todo)
        train, mean = train.first(self.limit), FONTS_MEAN
        if self.invert:
            train, test, mean = inverted(train), inverted(test), 1 - mean
        return Dataset("chars74k_fonts", train, test, CLASSES, mean=(mean * 255,), std=(FONTS_STD * 255,))


@dataclass(frozen=True)
class Chars74KStreet:
    """Digits cut from photographs 3x32x32 (red, green, blue), uint8: few, of uneven classes, stored class by class."""

    licence: ClassVar[str] = LICENCE
    files: ClassVar[tuple[str, ...]] = (f"{FOLDER}/{STREET}",)
    by_hand: ClassVar[str] = (
        f"The original (EnglishImg.tgz, at {ADDRESS}) has images of all characters, of which the digits, Sample001 to "
        "Sample010, must be reduced and packed as arrays."
    )

    def load(self, root: Path) -> Dataset:
        """Reads ``root/chars74k/street_digits.npz``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        todo = advice(f"{STREET} {CONTENT}, images (N, 32, 32, 3) uint8,", root, FOLDER)
        train, test = read_npz(root / FOLDER / STREET, channels=3, classes=CLASSES, todo=todo)
        mean, std = (tuple(255 * value for value in values) for values in (STREET_MEAN, STREET_STD))
        return Dataset("chars74k_street", train, test, CLASSES, mean, std)
