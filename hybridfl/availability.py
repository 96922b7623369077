"""Who takes part when: the cohort of every round and the staleness of what arrives.

The whole schedule is drawn up front, keyed by (seed, arrival round): each round consumes exactly ``cohort`` results;
slot k of round t was born in round max(0, t - s), s = floor(abs(N(0, delay))), and trained from the model of that round
(the stale-model simulator of the FedBuff line of work, Nguyen et al. 2022, arXiv 2106.06639).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from hybridfl.build import Fraction, NonNegativeFloat, PositiveInt, Range
from hybridfl.errors import ConfigError
from hybridfl.rng import stream


@dataclass(frozen=True)
class Clients:
    """The clients of the federation and how they behave.

    Attributes:
        number: how many there are.
        per_round: results that arrive in a round: a whole number, or a fraction of ``number``.
        delay: standard deviation of the half-normal staleness in rounds; 0 is synchronous.
        noisy_labels: share of the clients whose labels are all replaced by uniformly random ones.
        validation: fraction of each client's examples kept for validation.
    """

    number: PositiveInt = 50
    per_round: PositiveInt | Annotated[float, Range(above=0, high=1)] = 5
    delay: NonNegativeFloat = 0.0
    noisy_labels: Fraction = 0.0
    validation: Annotated[float, Range(low=0, below=1)] = 0.0

    def __post_init__(self) -> None:
        if self.cohort > self.number:
            problem = f"got {self.per_round}, but there are {self.number} clients; nearest valid value: {self.number}."
            raise ConfigError("per_round", problem)

    @property
    def cohort(self) -> int:
        """``per_round`` as a number of clients, at least one."""
        if isinstance(self.per_round, int):
            return self.per_round
        return max(1, round(self.per_round * self.number))

    def noisy(self, seed: int) -> list[int]:
        """The clients with random labels."""
        count = round(self.noisy_labels * self.number)
        return sorted(stream(seed, "noisy clients").permutation(self.number)[:count].tolist())


class Arrival(NamedTuple):
    """A client's result on its way: it arrives in slot ``slot`` of round ``round``."""

    round: int
    slot: int
    client: int


class Schedule:
    """Births by round, in the order of their arrival."""

    def __init__(self, clients: Clients, rounds: int, seed: int) -> None:
        self._births: dict[int, list[Arrival]] = {}
        for t in range(rounds):
            cohort = stream(seed, "cohort", t).choice(clients.number, clients.cohort, replace=False)
            delays = np.abs(stream(seed, "delay", t).normal(size=clients.cohort)) * clients.delay
            for slot, (client, delay) in enumerate(zip(cohort.tolist(), delays, strict=True)):
                self._births.setdefault(max(0, t - int(delay)), []).append(Arrival(t, slot, client))

    def born(self, round: int) -> list[Arrival]:
        """Arrivals whose local work starts in this round."""
        return self._births.get(round, [])
