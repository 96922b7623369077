"""A partitioning by domain: every client holds examples of one domain, split further by any other partitioning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hybridfl.build import PositiveInt
from hybridfl.data.dataset import IntArray, Labels
from hybridfl.data.partitioning import Partition, Partitioning, sorted_indices
from hybridfl.errors import ConfigError


@dataclass(frozen=True)
class Domains:
    """Feature skew: clients of different domains. Li, Jiang, Zhang, Kamp, Dou 2021, arXiv 2102.07623, section 5.

    Clients are numbered domain by domain, in the order of the data set's domains. Domains of which the server leaves
    nothing have no clients.

    Args:
        within: the partitioning of a domain's examples over its clients.
        clients: how many clients a domain has: ``equal`` numbers (the first domains have one more if need be),
            ``proportional`` to its examples, or a number for each domain that has clients, in their order.
        cut: leave out examples at random so that every domain has as many as the smallest, as in Split-Mix (Hong et al.
            2022, arXiv 2203.09747); these belong to nobody.
        seed: of the draw; ``None`` is the run's.
    """

    within: Partitioning
    clients: Literal["equal", "proportional"] | tuple[PositiveInt, ...] = "equal"
    cut: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if getattr(self.within, "before_server", False):
            name = type(self.within).__name__
            raise ConfigError("within", f"{name} names examples of the whole data set; choose another, such as iid.")
        if self.within.seed is not None:
            problem = f"got {self.within.seed}: one seed decides the whole draw; leave null and set partitioning.seed"
            raise ConfigError("within.seed", f"{problem}.")

    def settled(self, labels: Labels, clients: int) -> Domains:
        """The same with the number of each domain's clients written out, for parts of these examples to be split alike.

        Raises:
            ConfigError: as :meth:`split`.
        """
        sizes = np.unique(labels.domain, return_counts=True)[1]
        if self.cut:
            sizes[:] = sizes.min()
        return replace(self, clients=tuple(self._clients(clients, sizes.tolist())))

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """As :class:`Partitioning` says."""
        members = [np.flatnonzero(labels.domain == domain) for domain in np.unique(labels.domain)]
        if self.cut:
            size = min(map(len, members))
            members = [sorted_indices(rng.permutation(own)[:size]) for own in members]
        numbers = self._clients(clients, [len(own) for own in members])
        shares: list[IntArray] = []
        moved, complete = 0, not self.cut
        for own, number in zip(members, numbers, strict=True):
            if number > len(own):
                problem = f"got {self._shown}: {number} clients are too many for a domain of {len(own)} examples"
                raise ConfigError("clients", f"{problem}; the largest valid number for it is {len(own)}.")
            inner = self._within(labels.at(own), number, rng)
            shares += [own[share] for share in inner.shares]
            moved, complete = moved + inner.moved, complete and inner.complete
        return Partition(shares, moved, complete)

    @property
    def _shown(self) -> str | list[int]:
        return list(self.clients) if isinstance(self.clients, tuple) else self.clients

    def _within(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        try:
            return self.within.split(labels, clients, rng)
        except ConfigError as error:
            raise error.under("within") from error

    def _clients(self, clients: int, sizes: list[int]) -> list[int]:
        """How many clients each domain has; together ``clients``."""
        if clients < len(sizes):
            problem = f"got {self._shown}: {clients} clients cannot hold {len(sizes)} domains, one each"
            raise ConfigError("clients", f"{problem}; set clients.number to {len(sizes)} or more, or drop domains.")
        if isinstance(self.clients, tuple):
            if len(self.clients) != len(sizes) or sum(self.clients) != clients:
                told = f"{len(sizes)} numbers with sum {clients} (the clients' domains, clients.number)"
                raise ConfigError("clients", f"got {self._shown}: expected {told}; or equal, or proportional.")
            return list(self.clients)
        weights = np.ones(len(sizes)) if self.clients == "equal" else np.array(sizes, dtype=np.float64)
        numbers = np.ones(len(sizes), dtype=np.int64)
        # Largest quotient (D'Hondt's rule): one after the other goes where a client would have the most examples.
        for _ in range(clients - len(sizes)):
            numbers[np.argmax(weights / (numbers + 1))] += 1
        return numbers.tolist()
