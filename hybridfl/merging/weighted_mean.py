"""Weighted mean of models. McMahan et al. 2017, arXiv 1602.05629, algorithm 1; Wortsman et al. 2022, arXiv 2203.05482."""

from __future__ import annotations

from collections.abc import Sequence

from hybridfl import params as P
from hybridfl.params import Params


def weighted_mean(models: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """``θ = Σ wₖ θₖ / Σ wₖ``; without weights the uniform soup.

    Raises:
        ValueError: no models, or weights that do not sum to a positive number.
    """
    return P.mean(models, weights)
