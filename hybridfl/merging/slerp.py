"""SLERP: spherical linear interpolation. Shoemake, SIGGRAPH 1985; between models as in mergekit (Goddard et al. 2024,
arXiv 2403.13257), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hybridfl.build import Fraction
from hybridfl.params import Params

PARALLEL = 0.9995
"""Cosine from which on two tensors count as parallel, or as opposite: mergekit's."""


def slerp(models: Sequence[Params], t: Fraction = 0.5) -> Params:
    """``(sin (1 - t)ω · a + sin tω · b) / sin ω`` with ω the angle between the tensors a and b of two models.

    Directions turn evenly on the sphere; lengths are interpolated by the same factors. Where the tensors are nearly
    parallel or nearly opposite, or one of them is 0, the interpolation is linear.

    Args:
        t: 0 is the first model, 1 the second.

    Raises:
        ValueError: there are not two models.
    """
    if len(models) != 2:
        raise ValueError(f"it goes from one model to another, got {len(models)}")
    one, other = models
    return {name: _between(tensor, other[name], t) for name, tensor in one.items()}


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    lengths = float(a.norm() * b.norm())
    cosine = float((a * b).sum()) / lengths if lengths > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
