"""SLERP as the server's merge. Shoemake, SIGGRAPH 1985; between models as in mergekit, arXiv 2403.13257."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl.merging.slerp import slerp
from hybridfl.methods.fedavg import FedAvg
from hybridfl.types import Job, Model, Results, Round, State


class Slerp(FedAvg):
    """The clients' models on spheres instead of straight lines, tensor by tensor.

    The formula is for two: the first model is turned towards the second by its share of their weight, what comes out
    towards the third, and so on in the order of the cohort.

    Args:
        weights: n_k/n or equal.
    """

    asynchronous = True

    def __init__(self, weights: Literal["examples", "uniform"] = "examples") -> None:
        self.weights: Literal["examples", "uniform"] = weights

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [Job(client, state["global"]) for client in now.clients]
        models, weights = results.around(state["global"].params), results.weights(self.weights)
        merged, gone = models[0], weights[0]
        for model, weight in zip(models[1:], weights[1:], strict=True):
            gone += weight
            merged = slerp([merged, model], weight / gone)
        return {"global": Model(merged, results.mean_buffers(self.weights))}
