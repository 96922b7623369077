"""TIES: trim, elect sign, disjoint merge. Yadav, Tam, Choshen, Raffel, Bansal, NeurIPS 2023, arXiv 2306.01708."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import Range
from hybridfl.merging.task_arithmetic import Scale, task_vectors
from hybridfl.params import Layout, Params

Density = Annotated[float, Range(above=0, high=1)]


def ties(
    base: Params,
    models: Sequence[Params],
    weights: Sequence[float] | None = None,
    density: Density = 0.2,
    scale: Scale = 1.0,
) -> Params:
    """``θ = θ₀ + λ τ`` (algorithm 1), ``τ`` in every coordinate the weighted mean of the updates that have its sign.

    Of every task vector only the largest magnitudes are kept, over all its tensors together. The sign of a coordinate is
    ``sgn Σ wₖ τ̂ₖ``; where that is 0 the base stays, which the paper leaves open.

    Args:
        base: θ₀, what all models were trained from.
        weights: wₖ ≥ 0, their scale does not matter; ``None`` is the paper's unweighted form.
        density: share of the coordinates kept; all that are as large as the smallest one kept are kept too.
        scale: λ.

    Raises:
        ValueError: a negative weight, or not as many weights as models.
    """
    weights = [1.0] * len(models) if weights is None else weights
    if min(weights) < 0:
        raise ValueError(f"weights must not be negative, got {min(weights):g}")
    trimmed = [_trimmed(P.flatten(vector), density) for vector in task_vectors(base, models)]
    elected = torch.zeros_like(trimmed[0])
    for weight, vector in zip(weights, trimmed, strict=True):
        elected.add_(vector, alpha=weight)
    elected.sign_()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for weight, vector in zip(weights, trimmed, strict=True):
        agrees = vector.sign() == elected
        total += weight * vector * agrees
        mass += weight * agrees
    mean = torch.where(mass > 0, total / mass, 0.0)
    return P.add(base, Layout.of(base).unflatten(mean), scale)


def _trimmed(vector: Tensor, density: float) -> Tensor:
    kept = max(1, round(density * len(vector)))
    magnitude = vector.abs()
    smallest = magnitude.kthvalue(len(vector) - kept + 1).values
    return torch.where(magnitude >= smallest, vector, 0.0)
