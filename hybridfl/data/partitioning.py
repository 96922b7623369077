"""Which client owns which training example: the protocol, what partitionings share, and the two commonest.

The others: labels (``partition_labels.py``), sizes (``partition_sizes.py``), a file (``partition_file.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
from numpy.typing import NDArray

from hybridfl.build import PositiveInt, Range
from hybridfl.data.dataset import IntArray, Labels
from hybridfl.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Partition:
    """Who owns what.

    Attributes:
        shares: for each client the sorted indices of its examples; disjoint, unless ``shared``.
        moved: how many examples changed hands so that every client has the minimum.
        complete: whether an example that nobody owns is a mistake.
        shared: whether several clients may own an example, and one client an example several times: more clients than
            a data set has examples for, drawn with replacement.
    """

    shares: list[IntArray]
    moved: int = 0
    complete: bool = True
    shared: bool = False


class Partitioning(Protocol):
    """A config node of the group ``partitioning``.

    It may have two facts more. ``before_server = True``: it names its examples itself, so it is asked first, about all
    training examples, and the server takes its share of what is left; without it the server chooses first. ``files``, a
    mapping from option to path: files whose contents, rather than their names, decide the run's numbers.
    """

    @property
    def seed(self) -> int | None:
        """Seed of the draw; ``None`` is the run's."""
        ...

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """Deals the examples with these labels out to the clients.

        Raises:
            ConfigError: it cannot be done; its key is the option's name.
        """
        ...


@dataclass(frozen=True)
class IID:
    """Equal shares of the shuffled examples; sizes differ by one at most. McMahan et al. 2017, arXiv 1602.05629.

    Args:
        min_examples: refuse a federation in which somebody has fewer.
        seed: of the draw; ``None`` is the run's.
    """

    min_examples: PositiveInt = 1
    seed: int | None = None

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """As :class:`Partitioning` says."""
        y = labels.y
        check_minimum(self.min_examples, len(y), clients)
        return Partition([sorted_indices(share) for share in np.array_split(rng.permutation(len(y)), clients)])


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: each class is dealt out in proportions drawn once from Dir(α, …, α) over the clients.

    Yurochkin et al. 2019, arXiv 1905.12022, section 4. (Hsu, Qi, Brown 2019, arXiv 1909.06335, draw the class
    proportions per client instead.) Where others draw again until everybody has enough, which changes the distribution
    and may never end, examples move here from the largest client to those below the minimum, and are counted.

    Args:
        alpha: α. Towards 0 one client gets all of a class; towards infinity shares are equal.
        min_examples: every client has at least so many; 2 leave one for training when one is held out.
        seed: of the draw; ``None`` is the run's.
    """

    alpha: Annotated[float, Range(above=0, infinite=True)] = 0.1
    min_examples: PositiveInt = 2
    seed: int | None = None

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """As :class:`Partitioning` says."""
        y = labels.y
        check_minimum(self.min_examples, len(y), clients)
        dealt: list[list[IntArray]] = [[] for _ in range(clients)]
        owed = np.zeros(clients)
        for label in np.unique(y):
            members = rng.permutation(np.flatnonzero(y == label))
            counts, owed = rounded(dirichlet(self.alpha, clients, rng) * len(members), owed)
            for share, part in zip(dealt, np.split(members, np.cumsum(counts)[:-1]), strict=True):
                share.append(part)
        return level([np.concatenate(share) for share in dealt], self.min_examples, rng)


def dirichlet(alpha: float, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """One draw from Dir(α, …, α), for any α > 0 including infinity: non-negative, sums to one."""
    return normalised(log_gamma(np.full(size, alpha), rng))


def log_gamma(alpha: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Logarithms of Gamma(α) variates, one for each α; normalised, these are a draw from Dir(α₁, α₂, …).

    A Gamma(α) variate underflows to zero for small α, and zero over zero is no proportion. Its logarithm does not:
    Gamma(α) = Gamma(α + 1) · U^(1/α) in distribution, and -log U is exponential.
    """
    alpha = np.clip(alpha, 1e-300, 1e300)  # beyond, draws are one-hot or equal to the last bit
    logs: NDArray[np.float64] = np.log(rng.standard_gamma(alpha + 1)) - rng.standard_exponential(len(alpha)) / alpha
    return logs


def normalised(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Proportions from the logarithms of weights."""
    weights: NDArray[np.float64] = np.exp(logs - logs.max())
    weights /= weights.sum()
    return weights


def rounded(exact: NDArray[np.float64], owed: NDArray[np.float64]) -> tuple[IntArray, NDArray[np.float64]]:
    """Whole numbers with the same sum, each less than one off, and what rounding owes each client so far.

    Those who are owed most are rounded up. Without the memory the same clients would win in every class, and equal
    proportions would not give equal shares.
    """
    counts = np.floor(exact).astype(np.int64)
    owed = owed + exact - counts
    lucky = np.argsort(-owed, kind="stable")[: round(exact.sum()) - counts.sum()]
    counts[lucky] += 1
    owed[lucky] -= 1
    return counts, owed


def level(shares: list[IntArray], minimum: int, rng: np.random.Generator) -> Partition:
    """Random examples of whoever is largest at the time go to the clients below the minimum."""
    sizes = np.array([len(share) for share in shares])
    hands: list[list[int]] = [rng.permutation(share).tolist() for share in shares]
    poor = np.flatnonzero(sizes < minimum)
    moved = int((minimum - sizes[poor]).sum())
    for client in poor:
        while sizes[client] < minimum:
            largest = int(sizes.argmax())
            hands[client].append(hands[largest].pop())
            sizes[client] += 1
            sizes[largest] -= 1
    return Partition([sorted_indices(np.array(hand, dtype=np.int64)) for hand in hands], moved)


def check_minimum(minimum: int, examples: int, clients: int) -> None:
    if clients * minimum <= examples:
        return
    most = examples // clients
    way_out = f"the largest valid value is {most}" if most else f"there can be at most {examples // minimum} clients"
    raise ConfigError(
        "min_examples",
        f"got {minimum}: {clients} clients need {clients * minimum} examples and there are {examples}; {way_out}.",
    )


def sorted_indices(indices: NDArray[np.int64]) -> IntArray:
    return np.sort(indices).astype(np.int64)
