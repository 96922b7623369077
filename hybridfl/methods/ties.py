"""TIES as the server's merge. Yadav et al. 2023, arXiv 2306.01708; the base is the present global model."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl.build import PositiveFloat
from hybridfl.merging.ties import Density, ties
from hybridfl.methods.fedavg import FedAvg
from hybridfl.types import Job, Model, Results, Round, State


class Ties(FedAvg):
    """The updates that arrived are trimmed, a sign is elected in every coordinate, and those that have it are averaged.

    Args:
        density: share of an update's coordinates that is kept.
        scale: λ, the length of the step.
        weights: n_k/n or equal, for electing and averaging.
    """

    asynchronous = True

    def __init__(
        self,
        density: Density = 0.2,
        scale: PositiveFloat = 1.0,
        weights: Literal["examples", "uniform"] = "examples",
    ) -> None:
        self.density = density
        self.scale = scale
        self.weights = weights

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [Job(client, state["global"]) for client in now.clients]
        base = state["global"].params
        merged = ties(base, results.around(base), results.shares(self.weights), self.density, self.scale)
        return {"global": Model(merged, results.mean_buffers(self.weights))}
