"""Fisher-weighted averaging. Matena, Raffel, NeurIPS 2022, arXiv 2111.09832."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import NonNegativeFloat
from hybridfl.params import Params


def fisher_mean(
    models: Sequence[Params],
    fishers: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    floor: NonNegativeFloat = 1e-6,
) -> Params:
    """``θ = Σ λₖ Fₖ θₖ / Σ λₖ Fₖ`` in every coordinate: the mode of the product of the models' posteriors,
    each a Gaussian with precision ``Fₖ``.

    Args:
        fishers: diagonals Fₖ of the models' Fisher information, such as
            :class:`hybridfl.probes.DiagonalFisher` measures; tensors without one get the weighted mean.
        weights: λₖ ≥ 0; ``None`` is 1 each.
        floor: least Fₖ, so that coordinates that matter to nobody get the weighted mean.

    Raises:
        ValueError: a negative weight, or not as many weights as models.
    """
    weights = [1.0] * len(models) if weights is None else weights
    if min(weights) < 0:
        raise ValueError(f"weights must not be negative, got {min(weights):g}")
    merged = P.mean(models, weights)
    for name in fishers[0]:
        masses = [weight * fisher[name].clamp_min(floor) for weight, fisher in zip(weights, fishers, strict=True)]
        total = torch.stack(masses).sum(0)
        pull = sum(m * (model[name] - merged[name]) for m, model in zip(masses, models, strict=True))
        merged[name] = merged[name] + torch.where(total > 0, pull / total, 0.0)
    return merged
