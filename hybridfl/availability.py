"""The clients of the federation: how many, who is there in which round, and the options of how they behave.

What the options mean is written where they are used: ``schedule.py`` (delays, the event queue, dropout, failure),
``timing.py`` (the clock), ``tiers.py`` (widths) and ``behaviour.py`` (noise and attacks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Annotated

from hybridfl.behaviour import SHARES, Role
from hybridfl.build import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Range
from hybridfl.errors import ConfigError
from hybridfl.rng import stream
from hybridfl.tiers import Assign, Tiers, allot, ladder
from hybridfl.timing import Timing

Size = PositiveInt | Annotated[float, Range(above=0, high=1)]


@dataclass(frozen=True)
class Cycle:
    """Clients that are there in turn, such as by night (Eichner, Koren, McMahan, Srebro, Talwar 2019, arXiv 1904.10120;
    Cho, Sharma, Joshi, Xu, Kale, Zhang 2023, arXiv 2302.03109).

    Attributes:
        groups: blocks of clients with neighbouring numbers, equal up to one client; of N, client i is in ⌊groups i / N⌋.
        rounds: how long a block is available before the next one is.
    """

    groups: PositiveInt = 1
    rounds: PositiveInt = 1


@dataclass(frozen=True)
class Clients:
    """The clients of the federation and how they behave.

    Attributes:
        number: how many there are.
        per_round: results that are due in a round: a whole number, or a fraction of the clients available in it; or a
            mapping from the round in which it begins to such a size, which holds until the next one.
        held_out: clients that never train: a number, a fraction of all, or their own numbers.
        cycle: which clients are available in which round.
        delay: standard deviation of the half-normal staleness in rounds; 0 is synchronous.
        concurrency: clients that work at the same time in an event queue; ``None`` is no queue. It may be smaller than
            ``per_round``: the fast ones then fill several slots of a round.
        timing: how long a client's job takes.
        dropout: probability that a sampled client does not take part: it costs nothing.
        failure: probability that a client works and its result is lost: it costs all but the upload.
        tiers: how wide a net each client can run, see :mod:`hybridfl.tiers`; ``None`` is 1 for all.
        assign: to whom the widths go.
        noisy_labels, flipped_labels, noisy_inputs, random_updates: shares of the clients that train, see
            :mod:`hybridfl.behaviour`. They do not overlap, and those held out have none of these roles.
        input_noise: standard deviation of the noise on standardised inputs.
        random_scale: length of a random update relative to the honest one.
        validation: fraction of each client's examples kept for validation.
    """

    number: PositiveInt = 50
    per_round: Size | Mapping[int, Size] = 5
    held_out: NonNegativeInt | Fraction | tuple[NonNegativeInt, ...] = 0
    cycle: Cycle = field(default_factory=Cycle)
    delay: NonNegativeFloat = 0.0
    concurrency: PositiveInt | None = None
    timing: Timing = field(default_factory=Timing)
    dropout: Fraction = 0.0
    failure: Fraction = 0.0
    tiers: Tiers = None
    assign: Assign = "index"
    noisy_labels: Fraction = 0.0
    flipped_labels: Fraction = 0.0
    noisy_inputs: Fraction = 0.0
    input_noise: NonNegativeFloat = 1.0
    random_updates: Fraction = 0.0
    random_scale: NonNegativeFloat = 1.0
    validation: Annotated[float, Range(low=0, below=1)] = 0.0

    def __post_init__(self) -> None:
        self._check_held_out()
        self._check_sizes()
        self._check_shares()
        ladder(self.tiers, 1)

    # -- who is there -------------------------------------------------------------------------------------------------

    def held_out_clients(self, seed: int) -> list[int]:
        """The clients that never train."""
        if isinstance(self.held_out, tuple):
            return sorted(self.held_out)
        return sorted(stream(seed, "held out").permutation(self.number)[: self._held_out].tolist())

    def trainers(self, seed: int) -> list[int]:
        """The clients that train, all but those held out."""
        held_out = set(self.held_out_clients(seed))
        return [client for client in range(self.number) if client not in held_out]

    def block(self, round: int) -> slice:
        """Which of the :meth:`trainers` are available in a round."""
        block = round // self.cycle.rounds % self.cycle.groups
        return slice(self._begin(block), self._begin(block + 1))

    def cohort_of(self, round: int) -> int:
        """``per_round`` in this round as a number of clients, at least one."""
        block, sizes = self.block(round), self._sizes
        return _clients(sizes[max(begin for begin in sizes if begin <= round)], block.stop - block.start)

    @property
    def cohort(self) -> int:
        """The largest cohort of any round."""
        largest = -(-self._training // self.cycle.groups)
        return max(_clients(size, largest) for size in self._sizes.values())

    @property
    def _sizes(self) -> Mapping[int, int | float]:
        """The size of a cohort by the round in which it begins."""
        return self.per_round if isinstance(self.per_round, Mapping) else {0: self.per_round}

    @property
    def _held_out(self) -> int:
        if isinstance(self.held_out, tuple):
            return len(self.held_out)
        return self.held_out if isinstance(self.held_out, int) else round(self.held_out * self.number)

    @property
    def _training(self) -> int:
        return self.number - self._held_out

    def _begin(self, block: int) -> int:
        """⌈block · N / groups⌉: the first i with ⌊groups i / N⌋ = block."""
        return -(-block * self._training // self.cycle.groups)

    # -- what they are like -------------------------------------------------------------------------------------------

    def widths(self, seed: int, domains: Sequence[int] | None = None) -> tuple[float, ...]:
        """The width of the net that each client can run, in (0, 1].

        Args:
            domains: the number of each client's domain, that of most of its examples; ``None`` if there is one only.

        Raises:
            ConfigError: ``assign=domain`` without domains.
        """
        return allot(self.tiers, self.assign, self.number, seed, domains)

    def roles(self, seed: int) -> dict[int, Role]:
        """The clients that are held out, noisy or hostile, and in which way; each has one role at most.

        Shares are rounded one by one, so the last may get a client less where they sum to 1.
        """
        found: dict[int, Role] = dict.fromkeys(self.held_out_clients(seed), "held_out")
        others = [k for k in stream(seed, "noisy clients").permutation(self.number).tolist() if k not in found]
        ends = accumulate((round(getattr(self, role) * len(others)) for role in SHARES), initial=0)
        for role, (begin, end) in zip(SHARES, pairwise(ends), strict=True):
            found |= dict.fromkeys(others[begin:end], role)
        return dict(sorted(found.items()))

    # -- what is refused ----------------------------------------------------------------------------------------------

    def _check_held_out(self) -> None:
        if isinstance(self.held_out, tuple):
            listed = sorted(self.held_out)
            if listed != sorted({k for k in listed if k < self.number}):
                nearest = sorted({min(k, self.number - 1) for k in listed})
                problem = f"got {_shown(self.held_out)}: expected different clients of 0 to {self.number - 1}"
                raise ConfigError("held_out", f"{problem}; nearest valid value: {nearest}.")
        if self._training < 1:
            problem = f"got {_shown(self.held_out)}: none of {self.number} clients is left to train"
            raise ConfigError("held_out", f"{problem}; nearest valid value: {self.number - 1}.")

    def _check_sizes(self) -> None:
        groups, smallest = self.cycle.groups, self._training // self.cycle.groups
        if smallest < 1:
            problem = f"got {groups}, but {self._training} clients train; nearest valid value: {self._training}."
            raise ConfigError("cycle.groups", problem)
        whole = smallest == self.number
        there = f"there are {smallest} clients" if whole else f"only {smallest} clients are available"
        for begin, size in self._sizes.items():
            if not isinstance(begin, int) or isinstance(begin, bool) or begin < 0:
                problem = f"got {begin!r} for the round in which a size begins: expected a whole number from 0 on"
                raise ConfigError("per_round", f"{problem}; nearest valid value: 0.")
            if isinstance(size, int) and size > smallest:
                key = f"per_round.{begin}" if isinstance(self.per_round, Mapping) else "per_round"
                raise ConfigError(key, f"got {size}, but {there}; nearest valid value: {smallest}.")
        if 0 not in self._sizes:
            first = min(self._sizes, default=0)
            example = f"{{0: {self._sizes.get(first, 5)}}}"
            problem = (
                f"got {_shown(self.per_round)}: the first size must begin in round 0; nearest valid value: {example}."
            )
            raise ConfigError("per_round", problem)
        if self.concurrency is None:
            return
        if self.delay > 0:
            problem = f"got {self.concurrency} beside delay={self.delay:g}: a queue makes its own staleness"
            raise ConfigError("concurrency", f"{problem}; nearest valid value: null, or delay=0.")
        if self.concurrency > smallest:
            problem = f"got {self.concurrency}, but {there}; nearest valid value: {smallest}."
            raise ConfigError("concurrency", problem)

    def _check_shares(self) -> None:
        shares = {role: getattr(self, role) for role in SHARES if getattr(self, role)}
        if math.fsum(shares.values()) > 1 + 1e-9:
            *others, last = shares
            told = ", ".join(f"{role}={shares[role]:g}" for role in others)
            left = max(0.0, 1 - math.fsum(shares[role] for role in others))
            problem = f"got {shares[last]:g} beside {told}: the shares sum to more than 1"
            raise ConfigError(last, f"{problem}; nearest valid value: {left:g}.")


def _clients(size: int | float, available: int) -> int:
    return size if isinstance(size, int) else max(1, round(size * available))


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(dict(value) if isinstance(value, Mapping) else value)
