"""Partitionings that skew the labels while the clients' sizes stay about equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from hybridfl.build import PositiveInt, Range
from hybridfl.data.dataset import IntArray, Labels
from hybridfl.data.partitioning import Partition, check_minimum, log_gamma, sorted_indices
from hybridfl.errors import ConfigError


@dataclass(frozen=True)
class Shards:
    """Examples sorted by label and cut into equal shards, dealt out at random. McMahan et al. 2017, arXiv 1602.05629.

    Section 3 there: 200 shards of 300 examples, two for each of 100 clients. Which examples of a label lie in which shard
    is drawn. Shards differ in size by one at most, so clients by at most ``per_client``.

    Args:
        per_client: shards of each client. One gives nearly one class each; as many as a client has examples give IID.
        seed: of the draw; ``None`` is the run's.
    """

    per_client: PositiveInt = 2
    seed: int | None = None

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """As :class:`Partitioning` says."""
        y = labels.y
        number = clients * self.per_client
        if number > len(y):
            most = len(y) // clients
            problem = f"{clients} clients need {number} shards and there are {len(y)} examples"
            way_out = f"the largest valid value is {most}" if most else f"there can be at most {len(y)} clients"
            raise ConfigError("per_client", f"got {self.per_client}: {problem}; {way_out}.")
        mixed = rng.permutation(len(y))
        by_label = mixed[np.argsort(y[mixed], kind="stable")]
        # Cut this way the longer shards are spread over all labels, not gathered at the first.
        shards = np.split(by_label, np.arange(1, number) * len(y) // number)
        dealt = rng.permutation(number).reshape(clients, self.per_client)
        return Partition([sorted_indices(np.concatenate([shards[i] for i in hand])) for hand in dealt])


@dataclass(frozen=True)
class Classes:
    """Each client has so many classes, and a class is divided equally among those who have it ("#C = k").

    Li, Diao, Chen, He 2021, arXiv 2102.02079, section 4.1. There a class may be left to fewer clients than another; here all
    classes are held by equally many as far as possible, so that each is covered and sizes stay close.

    Args:
        per_client: k, the classes of each client. All of them give about IID.
        seed: of the draw; ``None`` is the run's.
    """

    per_client: PositiveInt = 2
    seed: int | None = None

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """As :class:`Partitioning` says."""
        y = labels.y
        kinds, sizes = np.unique(y, return_counts=True)
        self._check(sizes, clients)
        holders = _holders(self.per_client, np.minimum(sizes, clients), clients, rng)
        hands: list[list[IntArray]] = [[] for _ in range(clients)]
        for label, who in zip(kinds, holders, strict=True):
            members = rng.permutation(np.flatnonzero(y == label))
            for client, part in zip(rng.permutation(who), np.array_split(members, len(who)), strict=True):
                hands[client].append(part)
        return Partition([sorted_indices(np.concatenate(hand)) for hand in hands])

    def _check(self, sizes: IntArray, clients: int) -> None:
        """A class needs a holder, a holder an example, and nobody holds a class twice."""
        low, high = _valid(sizes, clients)
        if low <= self.per_client <= high:
            return
        if low > high:
            fewer = next(number for number in range(clients, 0, -1) if np.less_equal(*_valid(sizes, number)))
            way_out = f"no value fits {clients} clients; the largest number of clients that one fits is {fewer}"
        elif self.per_client < low:
            way_out = f"the smallest valid value is {low}"
        else:
            way_out = f"the largest valid value is {high}"
        there = f"{clients} clients, {len(sizes)} classes of {sizes.min()} to {sizes.max()} examples"
        raise ConfigError("per_client", f"got {self.per_client}: there are {there}; {way_out}.")


def _valid(sizes: IntArray, clients: int) -> tuple[int, int]:
    """Least and most classes of a client with which every class is held and every holder has an example of it."""
    return -(-len(sizes) // clients), int(np.minimum(sizes, clients).sum()) // clients


def _holders(k: int, limits: IntArray, clients: int, rng: np.random.Generator) -> list[IntArray]:
    """For each class who holds it: k different classes for each client, all classes equally often within ``limits``."""
    places = np.zeros_like(limits)
    for _ in range(clients * k):
        open_ = np.flatnonzero(places < limits)
        fewest = open_[places[open_] == places[open_].min()]
        places[rng.choice(fewest)] += 1
    held: list[list[int]] = [[] for _ in limits]
    for client in rng.permutation(clients):
        # With the k classes that have most places left, the rest can always be dealt out (Gale, Ryser 1957).
        mixed = rng.permutation(len(limits))
        for label in mixed[np.argsort(-places[mixed], kind="stable")][:k]:
            held[label].append(int(client))
            places[label] -= 1
    return [np.array(who, dtype=np.int64) for who in held]


@dataclass(frozen=True)
class DirichletMix:
    """A class mix for each client, q ~ Dir(α p) with p the classes' shares of all examples, and equal sizes.

    Hsu, Qi, Brown 2019, arXiv 1909.06335, section 3: examples are drawn by the mix without replacement, and where a class
    is used up by the rest of the mix. The paper leaves the order open: here the clients draw one example each in turn, in
    a new random order every time, so that what is left over at the end does not fall to the last clients alone.

    Args:
        alpha: α, the sum of the distribution's parameters. Towards 0 a client has one class as long as there is any of it;
            towards infinity everybody draws from p. With C equal classes, α is C times that of a Dir(a, …, a).
        min_examples: refuse a federation in which somebody has fewer.
        seed: of the draw; ``None`` is the run's.
    """

    alpha: Annotated[float, Range(above=0, infinite=True)] = 1.0
    min_examples: PositiveInt = 2
    seed: int | None = None

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """As :class:`Partitioning` says."""
        y = labels.y
        check_minimum(self.min_examples, len(y), clients)
        kinds, left = np.unique(y, return_counts=True)
        prior = left / left.sum()
        logs = np.array([log_gamma(self.alpha * prior, rng) for _ in range(clients)])
        size, longer = divmod(len(y), clients)
        counts = np.zeros((clients, len(kinds)), dtype=np.int64)
        for _ in range(size):
            _draw_each(counts, rng.permutation(clients), logs, left, rng)
        _draw_each(counts, rng.permutation(clients)[:longer], logs, left, rng)
        hands: list[list[IntArray]] = [[] for _ in range(clients)]
        for label, column in zip(kinds, counts.T, strict=True):
            members = rng.permutation(np.flatnonzero(y == label))
            for hand, part in zip(hands, np.split(members, np.cumsum(column)[:-1]), strict=True):
                hand.append(part)
        return Partition([sorted_indices(np.concatenate(hand)) for hand in hands])


def _draw_each(
    counts: IntArray, waiting: IntArray, logs: NDArray[np.float64], left: IntArray, rng: np.random.Generator
) -> None:
    """One example more for each who waits: adds to ``counts`` and takes from ``left``, both in place."""
    while len(waiting):
        # The largest of log weight + Gumbel noise is a draw by the weights, also where those underflow.
        scores = logs[waiting] + rng.gumbel(size=(len(waiting), len(left)))
        wanted = np.where(left > 0, scores, -np.inf).argmax(axis=1)
        # The first in the row are served; whoever comes too late for a class draws again.
        rank = np.array([np.count_nonzero(wanted[:i] == label) for i, label in enumerate(wanted)])
        served = rank < left[wanted]
        counts[waiting[served], wanted[served]] += 1
        np.subtract.at(left, wanted[served], 1)
        waiting = waiting[~served]
