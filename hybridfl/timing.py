"""How long a client's job takes, in simulated seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from hybridfl.build import NonNegativeFloat, Range
from hybridfl.rng import stream

Sigma = Annotated[float, Range(low=0, high=10)]


@dataclass(frozen=True)
class Timing:
    """The clock: a job takes (latency + step · local steps) · speed of the client · jitter of the job.

    The local steps are those of the run's ``client_optimizer``; what a method asks for beyond them, and the server's
    own work, take no time.

    Attributes:
        latency: seconds of a job beside its steps.
        step: seconds of a local step.
        speeds: σ of a log-normal factor with median 1 that each client has for the whole run.
        jitter: σ of a log-normal factor with median 1 that each job has.
    """

    latency: NonNegativeFloat = 1.0
    step: NonNegativeFloat = 0.0
    speeds: Sigma = 0.0
    jitter: Sigma = 0.0

    def seconds(self, steps: Sequence[int], seed: int) -> NDArray[np.float64]:
        """Seconds of a job of each client ``(K,)``, before jitter."""
        factors = np.exp(self.speeds * stream(seed, "client speeds").standard_normal(len(steps)))
        return np.asarray((self.latency + self.step * np.asarray(steps)) * factors, dtype=np.float64)

    def factors(self, rng: np.random.Generator, jobs: int) -> NDArray[np.float64]:
        """The jitter of each of ``jobs`` jobs."""
        return np.exp(self.jitter * rng.standard_normal(jobs))
