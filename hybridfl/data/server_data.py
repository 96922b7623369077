"""What the server owns of the training examples; the clients share the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import numpy as np

from hybridfl.build import Fraction, NonNegativeInt, PositiveInt, Range
from hybridfl.data.dataset import IntArray
from hybridfl.errors import ConfigError


class ServerData(Protocol):
    """A config node of the group ``server_data``."""

    @property
    def provides(self) -> frozenset[str]:
        """What a method may require of the federation: ``server_data``, ``server_labels``."""
        ...

    @property
    def validation(self) -> float:
        """Fraction of the share that is kept for validation."""
        ...

    def take(self, y: IntArray, classes: int, rng: np.random.Generator) -> IntArray:
        """Sorted indices of the server's examples among those with labels ``y`` ``(N,)`` in ``0 … classes - 1``.

        Raises:
            ConfigError: it cannot be done; its key is the option's name.
        """
        ...


@dataclass(frozen=True)
class NoServerData:
    """The server owns nothing."""

    provides: ClassVar[frozenset[str]] = frozenset()
    validation: ClassVar[float] = 0.0

    def take(self, y: IntArray, classes: int, rng: np.random.Generator) -> IntArray:
        """Nothing."""
        return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Share:
    """A labelled share of the training examples, balanced over the classes. Zhao et al. 2018, arXiv 1806.00582.

    Args:
        examples: how many. Not read when ``fraction`` is given, so ``server_data.fraction=0.1`` alone is enough.
        fraction: how many, as a fraction of all training examples (of every class); ``None`` reads ``examples``.
        classes: from these classes only; ``None`` is all.
        validation: fraction of the share that is kept for validation.

    A class with too few examples gives all it has, and the others give more in its place.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"server_data", "server_labels"})

    examples: PositiveInt | None = 100
    fraction: Annotated[float, Range(above=0, high=1)] | None = None
    classes: tuple[NonNegativeInt, ...] | None = None
    validation: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.examples is None and self.fraction is None:
            raise ConfigError("examples", "got null, and fraction is null too: give one of them, such as examples=100.")
        if self.classes is not None and not self.classes:
            raise ConfigError("classes", "got []: name at least one class, or null for all.")

    def take(self, y: IntArray, classes: int, rng: np.random.Generator) -> IntArray:
        """As :class:`ServerData` says; exactly as many as asked for."""
        wanted = self._wanted_classes(classes)
        members = [rng.permutation(np.flatnonzero(y == label)) for label in wanted]
        available = np.array([len(indices) for indices in members])
        counts = _balanced(self._number(len(y), int(available.sum())), available, rng)
        taken = [indices[:count] for indices, count in zip(members, counts, strict=True)]
        return np.sort(np.concatenate(taken)).astype(np.int64)

    def _wanted_classes(self, classes: int) -> list[int]:
        if self.classes is None:
            return list(range(classes))
        wrong = [label for label in self.classes if not 0 <= label < classes]
        if wrong:
            raise ConfigError("classes", f"got {wrong[0]}: the classes are 0 to {classes - 1}.")
        return sorted(set(self.classes))

    def _number(self, examples: int, available: int) -> int:
        if self.fraction is not None:
            key, number = "fraction", max(1, round(self.fraction * examples))
            given, largest = f"{self.fraction:g} ({number} examples)", f"{available / examples:.6g}"
        else:
            assert self.examples is not None
            key, number = "examples", self.examples
            given, largest = f"{number}", f"{available}"
        if number > available:
            where = "" if self.classes is None else f" of the classes {list(self.classes)}"
            raise ConfigError(
                key,
                f"got {given}: there are {available} training examples{where}; the largest valid value is {largest}.",
            )
        return number


def _balanced(number: int, available: IntArray, rng: np.random.Generator) -> IntArray:
    """``number`` spread over classes as evenly as ``available`` allows; ties for the last ones are drawn."""
    counts = np.zeros_like(available)
    left = number
    while left:
        open_ = np.flatnonzero(counts < available)
        if left < len(open_):
            counts[rng.choice(open_, left, replace=False)] += 1
            break
        step = min(left // len(open_), int((available - counts)[open_].min()))
        counts[open_] += step
        left -= step * len(open_)
    return counts
