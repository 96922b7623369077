"""The loss barrier between two models: how much worse the models between them are than they should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from hybridfl import params as P
from hybridfl.params import Params

POINTS = 11


class Barrier(NamedTuple):
    """The height of a barrier, where it is highest (0 is the first model, 1 the second), and the losses on the way."""

    height: float
    at: float
    losses: tuple[float, ...]


def barrier(loss: Callable[[Params], float], a: Params, b: Params, points: int = POINTS) -> Barrier:
    """``max over t of L((1 - t) a + t b) - ((1 - t) L(a) + t L(b))`` at equally distant t, the ends among them.

    Frankle, Dziugaite, Roy, Carbin 2020, arXiv 1912.05671, compare with the mean of the ends; the line between them is
    that of Entezari, Sedghi, Saukh, Neyshabur 2022, arXiv 2110.06296, definition 2.1. It is never negative; a loss that is
    not a number counts as infinite. Integer tensors take the larger value all the way.
    """
    ts = [i / (points - 1) for i in range(points)]
    losses = [loss(P.mean([a, b], [1 - t, t])) for t in ts]
    losses = [math.inf if math.isnan(value) else value for value in losses]
    above = [value - ((1 - t) * losses[0] + t * losses[-1]) for t, value in zip(ts, losses, strict=True)]
    highest = max(range(points), key=above.__getitem__)
    return Barrier(above[highest], ts[highest], tuple(losses))
