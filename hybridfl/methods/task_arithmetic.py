"""Task arithmetic as the server's merge. Ilharco et al. 2023, arXiv 2212.04089; the base is the present global model."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl.build import PositiveFloat
from hybridfl.merging.task_arithmetic import task_arithmetic
from hybridfl.methods.fedavg import FedAvg
from hybridfl.types import Job, Model, Results, Round, State


class TaskArithmetic(FedAvg):
    """The global model moves by the weighted mean of the updates that arrived, times λ; λ = 1 is FedAvg.

    Args:
        scale: λ; the sum of the updates, which the paper scales, is ``clients.per_round`` with uniform weights.
        weights: n_k/n or equal.
    """

    asynchronous = True

    def __init__(self, scale: PositiveFloat = 1.0, weights: Literal["examples", "uniform"] = "examples") -> None:
        self.scale = scale
        self.weights = weights

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [Job(client, state["global"]) for client in now.clients]
        base = state["global"].params
        merged = task_arithmetic(base, results.around(base), results.shares(self.weights), self.scale)
        return {"global": Model(merged, results.mean_buffers(self.weights))}
