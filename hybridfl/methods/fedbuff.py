"""FedBuff. Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, AISTATS 2022, arXiv 2106.06639, algorithm 1."""

from __future__ import annotations

from collections.abc import Generator

from hybridfl import params as P
from hybridfl.build import PositiveFloat
from hybridfl.methods.fedavg import FedAvg
from hybridfl.types import Job, Model, Results, Round, State


class FedBuff(FedAvg):
    """Updates are buffered as they arrive, stale ones too; a full buffer moves the global model by their mean.

    The buffer holds ``clients.per_round`` updates.

    Args:
        server_lr: η_g, the length of the server's step.
        staleness_weight: scale every update by 1/√(1 + staleness) (section 5 of the paper).
    """

    asynchronous = True

    def __init__(self, server_lr: PositiveFloat = 1.0, staleness_weight: bool = False) -> None:
        self.server_lr = server_lr
        self.staleness_weight = staleness_weight

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [Job(client, state["global"]) for client in now.clients]
        scales = [(1 + now.index - r.birth) ** -0.5 if self.staleness_weight else 1.0 for r in results]
        # The sum of scaled updates is divided by their number, not by the sum of the scales.
        step = P.mean([r.delta for r in results], scales)
        length = self.server_lr * sum(scales) / len(scales)
        params = P.add(state["global"].params, step, length)
        return {"global": Model(params, results.mean_buffers("uniform"))}
