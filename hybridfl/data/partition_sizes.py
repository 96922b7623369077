"""Partitionings that skew the clients' sizes while the labels stay IID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from hybridfl.build import NonNegativeFloat, PositiveInt, Range
from hybridfl.data.dataset import Labels
from hybridfl.data.partitioning import Partition, check_minimum, dirichlet, level, normalised, rounded


@dataclass(frozen=True)
class Quantity:
    """Shuffled examples in shares of unequal size.

    ``law=dirichlet``: proportions from Dir(α, …, α); Li, Diao, Chen, He 2021, arXiv 2102.02079, section 4.3.
    ``law=lognormal``: proportions exp(σ z) with z ~ N(0, 1); Acar et al. 2021, arXiv 2111.04263, section 4. As with
    :class:`~hybridfl.data.partitioning.Dirichlet`, examples move from the largest client to those below the minimum.

    Args:
        law: of the sizes.
        alpha: α of the Dirichlet law; towards infinity sizes are equal. Not read by the other.
        sigma: σ of the log-normal law; 0 gives equal sizes. Not read by the other.
        min_examples: every client has at least so many.
        seed: of the draw; ``None`` is the run's.
    """

    law: Literal["dirichlet", "lognormal"] = "dirichlet"
    alpha: Annotated[float, Range(above=0, infinite=True)] = 0.5
    sigma: NonNegativeFloat = 1.0
    min_examples: PositiveInt = 2
    seed: int | None = None

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """As :class:`Partitioning` says."""
        y = labels.y
        check_minimum(self.min_examples, len(y), clients)
        if self.law == "dirichlet":
            proportions = dirichlet(self.alpha, clients, rng)
        else:
            proportions = normalised(min(self.sigma, 1e300) * rng.standard_normal(clients))
        sizes, _ = rounded(proportions * len(y), np.zeros(clients))
        shares = np.split(rng.permutation(len(y)), np.cumsum(sizes)[:-1])
        return level(shares, self.min_examples, rng)
