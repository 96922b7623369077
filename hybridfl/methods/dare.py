"""DARE as the server's merge. Yu et al. 2024, arXiv 2311.03099; the base is the present global model."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl.build import PositiveFloat
from hybridfl.merging.dare import DropRate, dare
from hybridfl.methods.fedavg import FedAvg
from hybridfl.types import Job, Model, Results, Round, State


class Dare(FedAvg):
    """Of every update that arrived coordinates are dropped at random and the others rescaled; then they are averaged.

    Args:
        drop: p, the share of coordinates that is dropped; 0 is task arithmetic.
        scale: λ, the length of the step.
        weights: n_k/n or equal.
    """

    asynchronous = True

    def __init__(
        self,
        drop: DropRate = 0.5,
        scale: PositiveFloat = 1.0,
        weights: Literal["examples", "uniform"] = "examples",
    ) -> None:
        self.drop = drop
        self.scale = scale
        self.weights = weights

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [Job(client, state["global"]) for client in now.clients]
        base, seed = state["global"].params, int(now.rng("drop").integers(2**63))
        merged = dare(base, results.around(base), results.shares(self.weights), self.drop, self.scale, seed)
        return {"global": Model(merged, results.mean_buffers(self.weights))}
