"""The learning rate over the rounds of a run.

It holds for all work with the run's ``client_optimizer``, whoever does it; ``start=server`` works at the rate of round 0. A
method that gives the server an optimiser of its own (``server_only``, fine-tuning, Feddle's search) has a constant rate
there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from hybridfl.build import Fraction, NonNegativeInt, PositiveInt, Range
from hybridfl.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """What the learning rate is multiplied with in round t = 0 … R - 1 of a run of R rounds.

    While w rounds warm up the factor rises linearly, (t + 1) / (w + 1), and is 1 from round w on (Goyal et al. 2017,
    arXiv 1706.02677, section 2.2). It is multiplied with that of the kind:

    - ``constant``: 1.
    - ``cosine``: ``final + (1 - final) · (1 + cos(π (t - w) / (R - w))) / 2`` from round w on, 1 before (Loshchilov, Hutter
      2017, arXiv 1608.03983, equation 5 without restarts). ``final`` would be reached in round R: the last round,
      R - 1, still works at a rate above it, so that no round is idle with ``final=0``. Split-Mix (Hong et al. 2022, arXiv
      2203.09747) has this schedule with ``final=0``.
    - ``step``: ``gamma`` to the number of milestones reached, those ≤ t.

    Attributes:
        milestones: of ``step``, increasing: rounds, counted from 0, or all of them fractions of the run; the fraction f is
            round ⌊f R⌋.
        gamma: of ``step``.
        warmup: w, rounds below the full rate.
        final: of ``cosine``.
    """

    kind: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[PositiveInt | Annotated[float, Range(above=0, below=1)], ...] = ()
    gamma: Annotated[float, Range(above=0, high=1)] = 0.1
    warmup: NonNegativeInt = 0
    final: Fraction = 0.0

    def __post_init__(self) -> None:
        given = list(self.milestones)
        if self.kind == "step" and not given:
            raise ConfigError(
                "milestones", "got []: kind=step needs rounds such as [30, 45], or fractions of the run: [0.5, 0.75]."
            )
        if len({type(milestone) for milestone in given}) > 1:
            problem = f"got {given}: rounds and fractions of the run are mixed; give either, such as [0.5, 0.75]."
            raise ConfigError("milestones", problem)
        if given != (increasing := sorted(set(given))):
            raise ConfigError("milestones", f"got {given}: they must increase; nearest valid value: {increasing}.")

    def check(self, rounds: int) -> None:
        """Refuse a schedule that a run of so many rounds would not come to.

        Raises:
            ConfigError: the warm-up does not end, or a milestone lies beyond the last round.
        """
        if self.warmup >= rounds:
            problem = f"got {self.warmup}, but the run has rounds={rounds}; nearest valid value: {rounds - 1}."
            raise ConfigError("warmup", problem)
        beyond = [milestone for milestone in self.milestones if milestone >= rounds]
        if self.kind == "step" and beyond:
            problem = f"got {beyond[0]}, but the last round of rounds={rounds} is {rounds - 1}"
            raise ConfigError("milestones", f"{problem}; take less, or a fraction of the run such as 0.75.")

    def factor(self, round: int, rounds: int) -> float:
        """The factor of this round in a run of so many."""
        warm = min(1.0, (round + 1) / (self.warmup + 1))
        if self.kind == "cosine":
            progress = max(0, round - self.warmup) / max(1, rounds - self.warmup)
            return warm * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)
        if self.kind == "step":
            return warm * self.gamma ** sum(_round_of(milestone, rounds) <= round for milestone in self.milestones)
        return warm


def _round_of(milestone: float, rounds: int) -> int:
    # A float such as 0.29 may lie a rounding error below what was typed: 0.29 · 100 is 28.999….
    return milestone if isinstance(milestone, int) else math.floor(milestone * rounds + 1e-9)
