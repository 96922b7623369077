"""RegMean. Jin, Ren, Preotiuc-Pietro, Cheng, ICLR 2023, arXiv 2212.09849."""

from __future__ import annotations

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
        around = [model[name].double().flatten(1) - mean for model in models]
        shift = _shift(around, [gram[layer].double() for gram in grams], alpha)
        merged[name] = (mean + shift).reshape(merged[name].shape).to(merged[name])
    return merged


def _shift(around: Sequence[Tensor], grams: Sequence[Tensor], alpha: float) -> Tensor:
    """The minimiser relative to the point that ``around`` is relative to, as near to it as can be, ``(out, in)``."""
    if grams[0].dim() == 1:
        total = torch.stack(list(grams)).sum(0)
        return torch.where(total > 0, sum(w * g for w, g in zip(around, grams, strict=True)) / total, 0.0)
    shrunk = [alpha * gram + (1 - alpha) * gram.diagonal().diag() for gram in grams]
    pulled = torch.stack([w @ g for w, g in zip(around, shrunk, strict=True)]).sum(0)
    # By eigenvectors and not by an inverse, whose rounding errors a Gram with small eigenvalues would blow up.
    eigenvalues, vectors = torch.linalg.eigh(torch.stack(shrunk).sum(0))
    seen = eigenvalues > eigenvalues.max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    shift: Tensor = torch.where(seen, pulled @ vectors / eigenvalues, 0.0) @ vectors.T
    return shift
