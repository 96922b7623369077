"""Task arithmetic. Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi, ICLR 2023, arXiv 2212.04089."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from torch import Tensor

from hybridfl import params as P
from hybridfl.build import Range
from hybridfl.params import Params

Scale = Annotated[float, Range()]
"""Finite, of any sign."""


def task_arithmetic(
    base: Params, models: Sequence[Params], weights: Sequence[float] | None = None, scale: Scale = 1.0
) -> Params:
    """``θ = θ₀ + λ Σ wₖ τₖ`` with the task vectors ``τₖ = θₖ - θ₀`` (section 2).

    Args:
        base: θ₀, what all models were trained from.
        weights: wₖ, used as they are; a negative one forgets. ``None`` is 1 each, the sum of the paper; weights that sum
            to 1 give the weighted mean at λ = 1.
        scale: λ.

    Raises:
        ValueError: as many weights as models are needed.
    """
    return moved(base, task_vectors(base, models), weights, scale)


def task_vectors(base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]) -> list[Params]:
    """``τₖ = θₖ - θ₀``, names in the order of the base."""
    return [{name: model[name] - tensor for name, tensor in base.items()} for model in models]


def moved(
    base: Params, vectors: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None, scale: float
) -> Params:
    """``θ₀ + λ Σ wₖ τₖ``; weights of ``None`` are 1 each."""
    merged = base
    for weight, vector in zip([1.0] * len(vectors) if weights is None else weights, vectors, strict=True):
        merged = P.add(merged, vector, scale * weight)
    return merged
