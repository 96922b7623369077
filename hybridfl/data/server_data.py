"""What the server owns: the protocol, nothing, a share of the training examples, and domains of its own.

The others: another data set (``server_other.py``), and the clients' data in another style (``server_style.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol

import numpy as np

from hybridfl.build import Fraction, NonNegativeInt, PositiveInt, Range
from hybridfl.data.dataset import Dataset, Examples, IntArray
from hybridfl.data.partitioning import dirichlet
from hybridfl.errors import ConfigError, nearest

Load = Callable[[str], Dataset]
"""Reads, below the run's data root, the data set that this option of the node holds a reader of."""


def _nothing() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class ServerShare:
    """What the server gets.

    Attributes:
        taken: sorted positions in the data set's training part that are the server's.
        withheld: sorted positions that nobody gets; disjoint with ``taken``.
        own: examples that are not in the training part, of the same shape and type.
        domains: what the numbers in ``own.domain`` stand for: where these examples come from, for tables.
        sources: fingerprints of other data sets that were read for it.
    """

    taken: IntArray = field(default_factory=_nothing)
    withheld: IntArray = field(default_factory=_nothing)
    own: Examples | None = None
    domains: tuple[str, ...] = ("own",)
    sources: tuple[str, ...] = ()


class ServerData(Protocol):
    """A config node of the group ``server_data``.

    It may have a fact more, ``labels_by``: the override with which the server's examples have labels of the clients'
    task, which is proposed where a method needs them and they have none.
    """

    @property
    def provides(self) -> frozenset[str]:
        """What a method may require of the federation: ``server_data``; ``server_labels``, labels of the clients' task;
        ``server_own_labels``, labels of another task."""
        ...

    @property
    def validation(self) -> float:
        """Fraction of the server's examples that is kept for validation."""
        ...

    def share(self, dataset: Dataset, free: IntArray, load: Load, rng: np.random.Generator) -> ServerShare:
        """The server's examples; the clients share the rest.

        Args:
            dataset: of the clients' task.
            free: sorted positions in its training part that are nobody's yet.

        Raises:
            ConfigError: it cannot be done; its key is the option's name.
        """
        ...


@dataclass(frozen=True)
class NoServerData:
    """The server owns nothing."""

    provides: ClassVar[frozenset[str]] = frozenset()
    validation: ClassVar[float] = 0.0

    def share(self, dataset: Dataset, free: IntArray, load: Load, rng: np.random.Generator) -> ServerShare:
        """Nothing."""
        return ServerShare()


@dataclass(frozen=True)
class Amount:
    """How many examples, of which classes; what all kinds of server data have in common.

    Args:
        examples: how many. Not read when ``fraction`` is given, so ``server_data.fraction=0.1`` alone is enough.
        fraction: how many, as a fraction of the training examples there are to choose from (of every class); ``None``
            reads ``examples``.
        classes: from these classes only; ``None`` is all.
        alpha: skew: the classes' proportions are drawn from Dir(α, …, α); ``None`` balances them.
        validation: fraction of the share that is kept for validation.

    A class with too few examples gives all it has, and the others give more in its place.
    """

    examples: PositiveInt | None = 100
    fraction: Annotated[float, Range(above=0, high=1)] | None = None
    classes: tuple[NonNegativeInt, ...] | None = None
    alpha: Annotated[float, Range(above=0, infinite=True)] | None = None
    validation: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.examples is None and self.fraction is None:
            raise ConfigError("examples", "got null, and fraction is null too: give one of them, such as examples=100.")
        if self.classes is not None and not self.classes:
            raise ConfigError("classes", "got []: name at least one class, or null for all.")
        if self.classes is not None and len(once := sorted(set(self.classes))) < len(self.classes):
            raise ConfigError("classes", f"got {list(self.classes)}, a class twice; nearest valid value: {once}.")

    def draw(self, y: IntArray, classes: int, rng: np.random.Generator, where: str = "") -> IntArray:
        """Sorted positions of exactly as many examples as asked for, among those with labels ``y`` ``(N,)``.

        Args:
            classes: labels are ``0 … classes - 1``.
            where: of what they are, for messages, such as ``" of mnist"``.

        Raises:
            ConfigError: there are not so many, or no such class.
        """
        members = [rng.permutation(np.flatnonzero(y == label)) for label in self.chosen(classes)]
        available = np.array([len(indices) for indices in members])
        number = self._number(len(y), int(available.sum()), where)
        if self.alpha is None:
            counts = _balanced(number, available, rng)
        else:
            counts = _skewed(number, available, self.alpha, rng)
        taken = [indices[:count] for indices, count in zip(members, counts, strict=True)]
        return np.sort(np.concatenate(taken)).astype(np.int64)

    def chosen(self, classes: int) -> list[int]:
        """The classes that examples are drawn from, of so many."""
        if self.classes is None:
            return list(range(classes))
        wrong = [label for label in self.classes if not 0 <= label < classes]
        if wrong:
            raise ConfigError("classes", f"got {wrong[0]}: the classes are 0 to {classes - 1}.")
        return sorted(set(self.classes))

    def _number(self, examples: int, available: int, where: str) -> int:
        if self.fraction is not None:
            key, number = "fraction", max(1, round(self.fraction * examples))
            given, largest = f"{self.fraction:g} ({number} examples)", f"{available / examples:.6g}"
        else:
            assert self.examples is not None
            key, number = "examples", self.examples
            given, largest = f"{number}", f"{available}"
        if number > available:
            where += "" if self.classes is None else f" of the classes {list(self.classes)}"
            raise ConfigError(
                key,
                f"got {given}: there are {available} training examples{where}; the largest valid value is {largest}.",
            )
        return number


@dataclass(frozen=True)
class OfTheTask(Amount):
    """Examples of the clients' own data set; what the kinds that draw from it have in common.

    Args:
        labelled: whether the server knows the labels. Other options as in :class:`Amount`.
    """

    labels_by: ClassVar[str] = "server_data.labelled=true"

    labelled: bool = True

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"server_data"} | ({"server_labels"} if self.labelled else set()))


@dataclass(frozen=True)
class Share(OfTheTask):
    """A share of the training examples, balanced over the classes. Zhao et al. 2018, arXiv 1806.00582.

    Options as in :class:`OfTheTask`.
    """

    def share(self, dataset: Dataset, free: IntArray, load: Load, rng: np.random.Generator) -> ServerShare:
        """As :class:`ServerData` says."""
        return ServerShare(free[self.draw(dataset.train.y[free], dataset.classes, rng)])


@dataclass(frozen=True)
class Domains(OfTheTask):
    """Examples of some domains, which no client has: what the server does not take of them is nobody's.

    Domain generalisation from the server's side; the server's test set stays that of the clients' domains.

    Args:
        domains: their names. Other options as in :class:`OfTheTask`; ``fraction`` is of the examples in these domains.
    """

    domains: tuple[str, ...] = ()

    def share(self, dataset: Dataset, free: IntArray, load: Load, rng: np.random.Generator) -> ServerShare:
        """As :class:`ServerData` says."""
        within = np.flatnonzero(np.isin(dataset.train.domain, self._numbers(dataset)))
        if len(within) == len(dataset.train):
            problem = f"got {list(self.domains)}: these are all domains; leave one for the clients."
            raise ConfigError("domains", problem)
        if len(theirs := np.setdiff1d(within, free)):
            problem = f"got {list(self.domains)}: {len(theirs)} examples of these domains are given to clients already"
            raise ConfigError("domains", f"{problem}; name domains that no client has, or use server_data=share.")
        where = f" of the domains {', '.join(self.domains)}"
        taken = within[self.draw(dataset.train.y[within], dataset.classes, rng, where)]
        return ServerShare(taken, withheld=np.setdiff1d(within, taken))

    def _numbers(self, dataset: Dataset) -> list[int]:
        names = dataset.domains
        if not self.domains or len(names) == 1:
            told = f"one domain, {names[0]}" if len(names) == 1 else f"the domains {', '.join(names)}"
            raise ConfigError("domains", f"got {list(self.domains)}: name one or more; {dataset.name} has {told}.")
        for number, name in enumerate(self.domains):
            if name not in names:
                raise ConfigError(f"domains[{number}]", f"got '{name}'. {nearest(name, names)}")
        return [names.index(name) for name in self.domains]


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


def _skewed(number: int, available: IntArray, alpha: float, rng: np.random.Generator) -> IntArray:
    """``number`` spread over classes in proportions from Dir(α, …, α), each drawn as often as it has examples left."""
    counts = np.zeros_like(available)
    logs = np.log(np.maximum(dirichlet(alpha, len(available), rng), 1e-300))
    for _ in range(number):
        # The largest of log weight + Gumbel noise is a draw by the weights, also where those underflow.
        scores = np.where(counts < available, logs + rng.gumbel(size=len(logs)), -np.inf)
        counts[scores.argmax()] += 1
    return counts
