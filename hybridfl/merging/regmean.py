"""RegMean. Jin, Ren, Preotiuc-Pietro, Cheng, ICLR 2023, arXiv 2212.09849."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import Fraction
from hybridfl.params import Params


def regmean(
    models: Sequence[Params],
    grams: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    alpha: Fraction = 0.9,
) -> Params:
    """``W = (Σ Wₖ Gₖ) (Σ Gₖ)⁻¹`` for every layer with a Gram matrix (the paper's closed form, with weights as (out, in)).

    That is the layer whose outputs are nearest to those of every model on its own inputs: it minimises
    ``Σ tr (W - Wₖ) Gₖ (W - Wₖ)ᵀ``, which is ``Σ ‖W Xₖ - Wₖ Xₖ‖²`` for ``Gₖ = Xₖ Xₖᵀ``. Of all minimisers it is the one
    nearest to the weighted mean, so directions that no input has keep that mean. A convolution is the layer that
    multiplies its patches, C·k·k long. All other tensors, biases among them, take the weighted mean.

    Args:
        grams: by the name of the layer, sums over its inputs ``(d, d)``, or only their diagonals ``(d,)``;
            :class:`hybridfl.probes.Gram` measures them. More inputs weigh more; ``weights`` are not applied to them.
        weights: of the other tensors; ``None`` is equal weights.
        alpha: factor of the Grams' off-diagonal entries (the paper's shrinkage: 0.9, for some models 0.1).
    """
    merged = P.mean(models, weights)
    for layer in grams[0]:
        name = f"{layer}.weight".removeprefix(".")
        mean = merged[name].double().flatten(1)
        layers = [model[name].double().flatten(1) for model in models]
        shrunk = [shrink(gram[layer].double(), alpha) for gram in grams]
        merged[name] = nearest_layer(layers, shrunk, mean).reshape(merged[name].shape).to(merged[name])
    return merged


def nearest_layer(layers: Sequence[Tensor], grams: Sequence[Tensor], around: Tensor) -> Tensor:
    """The minimiser of ``Σ tr (W - Wₖ) Gₖ (W - Wₖ)ᵀ`` that is nearest to ``around``.

    Args:
        layers: Wₖ, ``(out, in)``.
        grams: Gₖ, ``(in, in)``, or all of them diagonals ``(in,)``.
    """
    pulled = total([times(layer - around, gram) for layer, gram in zip(layers, grams, strict=True)])
    return around + over(pulled, total(grams))


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """``α G + (1 - α) diag G`` of a matrix; a diagonal as it is."""
    return gram if gram.dim() == 1 else alpha * gram + (1 - alpha) * gram.diagonal().diag()


def times(layer: Tensor, gram: Tensor) -> Tensor:
    """``W G`` for a matrix ``(in, in)`` or the diagonal ``(in,)`` of one."""
    return layer * gram if gram.dim() == 1 else layer @ gram


def over(pulled: Tensor, gram: Tensor) -> Tensor:
    """``P G⁺`` with the pseudo-inverse of a symmetric matrix ``(in, in)``, or of the diagonal ``(in,)`` of one."""
    if gram.dim() == 1:
        return torch.where(gram > 0, pulled / gram, 0.0)
    # By eigenvectors and not by an inverse, whose rounding errors a Gram with small eigenvalues would blow up.
    eigenvalues, vectors = torch.linalg.eigh(gram)
    seen = eigenvalues > eigenvalues.max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    along: Tensor = torch.where(seen, pulled @ vectors / eigenvalues, 0.0)
    divided: Tensor = along @ vectors.T
    return divided


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in order."""
    summed: Tensor = functools.reduce(operator.add, tensors)
    return summed
