"""The coefficients of anchors in a searched merge: what they may be, and where their search starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridfl.build import PositiveFloat
from hybridfl.merging.atlas import Entry
from hybridfl.merging.search import Space
from hybridfl.parametrization import Constraint
from hybridfl.types import Results, Round

Init = Literal["fresh", "examples", "warm", "zero", "uniform"]


@dataclass(frozen=True)
class Coef:
    """The merging coefficients.

    Attributes:
        granularity: one for each anchor, or one for each anchor and layer.
        constraint: see :func:`hybridfl.parametrization.project`; a start that violates it is projected.
        c_max: bound of ``box``.
        init: ``fresh`` 1/m on what arrived and 0 on the rest (FedBuff's mean); ``examples`` n_k/n on what arrived
            (FedAvg's); ``warm`` also last round's on the rest; ``zero``; ``uniform`` 1/K. Around a calibrated origin
            coefficients are offsets of sum 0 that start at 0, or ``warm``.
        frozen: they stay at their start; what the server learns is the residual's.
    """

    granularity: Literal["scalar", "block"] = "scalar"
    constraint: Constraint = "affine"
    c_max: PositiveFloat = 1.0
    init: Init = "fresh"
    frozen: bool = False


def initial(space: Space, init: Init, entries: Sequence[Entry], arrived: Results, now: Round) -> Tensor:
    """The coefficients from which the search starts, of the shape of ``space.default``; see ``init`` of :class:`Coef`."""
    if init == "fresh":
        return space.default
    if init == "zero":
        return torch.zeros_like(space.default)
    if init == "uniform":
        return torch.full_like(space.default, space.length / len(entries))
    if init == "examples":
        weights = {r.participant: r.examples / sum(arrived.weights("examples")) for r in arrived}
        shares = [weights[e["client"]] if e["added"] == now.index else 0.0 for e in entries]
        return space.default.new_tensor(shares).unsqueeze(1).expand_as(space.default) * space.length
    old = [space.default.new_zeros(1) if e["added"] == now.index else e["coefficients"] for e in entries]
    return space.default + torch.stack([row.expand(space.default.shape[1]) for row in old])
