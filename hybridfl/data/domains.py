"""Several data sets of the same classes as the domains of one federation.

As the digits of Li, Jiang, Zhang, Kamp, Dou 2021 (FedBN), arXiv 2102.07623, and of Hong et al. 2022 (Split-Mix), arXiv
2203.09747.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from hybridfl.build import PositiveInt
from hybridfl.data.conversion import Form, converted
from hybridfl.data.dataset import Dataset, Examples, Reader
from hybridfl.data.downloads import About
from hybridfl.errors import ConfigError, nearest

MIDDLE = 127.5  # of 0 … 255: mean and deviation of every channel, FedBN's


@dataclass(frozen=True)
class Domains:
    """Sets read by their own readers, brought to one size and to one or three channels, uint8, one after the other.

    Args:
        sets: name of the domain → data set, a node of the group ``dataset``.
        domains: which of them, in this order; ``None`` takes all in the order of ``sets``.
        size: height and width in pixels.
        channels: 3, where grey is repeated, or 1, where colours become their luma.
        invert: domains of which the negative is taken, so that all are, say, bright on dark.
        limit: keep the first so many training examples of each domain, of a smaller one all; ``None`` keeps all.
        name: of the whole, for messages and tables.
    """

    licence: ClassVar[str] = "that of each of its sets"

    sets: Mapping[str, Reader]
    domains: tuple[str, ...] | None = None
    size: PositiveInt = 32
    channels: Literal[1, 3] = 3
    invert: tuple[str, ...] = ()
    limit: PositiveInt | None = None
    name: str = "domains"

    def __post_init__(self) -> None:
        if not self.sets:
            raise ConfigError("sets", "got {}: name one or more, as in +dataset@dataset.sets.usps=usps.")
        chosen = self._chosen
        if not chosen or len(set(chosen)) < len(chosen):
            raise ConfigError("domains", f"got {list(chosen)}: expected one or more different names, or null.")
        for key, names in (("domains", chosen), ("invert", self.invert)):
            for number, name in enumerate(names):
                if name not in self.sets:
                    raise ConfigError(f"{key}[{number}]", f"got '{name}'. {nearest(name, self.sets)}")

    @property
    def files(self) -> tuple[str, ...]:
        """What the sets read, see :mod:`hybridfl.data.downloads`."""
        return tuple(file for name in self._chosen for file in About.of(self.sets[name]).files or ())

    @property
    def by_hand(self) -> str:
        """Where the files come from; nothing to say if all sets are built in."""
        return f"It consists of other sets: get {', '.join(self._chosen)} each by its own name." if self.files else ""

    @property
    def _chosen(self) -> tuple[str, ...]:
        return tuple(self.sets) if self.domains is None else self.domains

    def load(self, root: Path) -> Dataset:
        """Reads every set below ``root``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        chosen = self._chosen
        read = [self._read(name, root) for name in chosen]
        classes = {name: dataset.classes for name, dataset in zip(chosen, read, strict=True)}
        if len(set(classes.values())) > 1:
            told = ", ".join(f"{name} {number}" for name, number in classes.items())
            raise ConfigError("sets", f"the sets must have the same classes, but their numbers are {told}.")
        parts: tuple[list[Examples], list[Examples]] = ([], [])
        for number, (name, dataset) in enumerate(zip(chosen, read, strict=True)):
            for part, examples in zip(parts, (dataset.train.at(slice(self.limit)), dataset.test), strict=True):
                images = self._converted(name, dataset, examples)
                part.append(Examples(images.x, images.y, np.full(len(images), number)))
        train, test = (functools.reduce(Examples.followed_by, part) for part in parts)
        middle = (MIDDLE,) * self.channels
        return Dataset(self.name, train, test, read[0].classes, middle, middle, tuple(chosen))

    def _read(self, name: str, root: Path) -> Dataset:
        with _blamed(name):
            return self.sets[name].load(root)

    def _converted(self, name: str, dataset: Dataset, examples: Examples) -> Examples:
        with _blamed(name):
            return converted(dataset, examples, Form((self.channels, self.size, self.size)), name in self.invert)


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """An error of one set under its own key."""
    try:
        yield
    except ConfigError as error:
        raise error.under(f"sets.{name}") from error
