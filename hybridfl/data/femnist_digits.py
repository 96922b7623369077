"""The digits of FEMNIST, NIST's handwriting shared out to clients. Caldas et al. 2018 (LEAF), arXiv 1812.01097."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hybridfl.data.dataset import Dataset, advice
from hybridfl.data.npz import CONTENT, inverted, read_npz

FOLDER, FILE = "femnist_digits", "femnist_digits.npz"
CLASSES = 10
MEAN, STD = 0.9631, 0.1609  # of the train part, not inverted


@dataclass(frozen=True)
class FEMNISTDigits:
    """Handwritten digits 1x28x28, uint8, as many as the file holds; in NIST's scale, smaller than MNIST's.

    Who wrote what is not read: ``partitioning`` decides who owns which example. The stored order may be by client and
    class.

    Args:
        invert: white on black, as MNIST is; ``False`` keeps the files' black on white.
    """

    licence: ClassVar[str] = "public domain (NIST)"
    files: ClassVar[tuple[str, ...]] = (f"{FOLDER}/{FILE}",)
    by_hand: ClassVar[str] = (
        "LEAF (github.com/TalwalkarLab/leaf) makes FEMNIST from NIST's files, as JSON by writer, of which the digits must "
        "be packed as arrays."
    )

    invert: bool = False

    def load(self, root: Path) -> Dataset:
        """Reads ``root/femnist_digits/femnist_digits.npz``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        todo = advice(f"{FILE} {CONTENT}, images (N, 28, 28) uint8,", root, FOLDER)
        train, test = read_npz(root / FOLDER / FILE, channels=1, classes=CLASSES, todo=todo)
        mean = MEAN
        if self.invert:
            train, test, mean = inverted(train), inverted(test), 1 - mean
        return Dataset("femnist_digits", train, test, CLASSES, mean=(mean * 255,), std=(STD * 255,))
