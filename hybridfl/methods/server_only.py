"""Training on the server's own examples alone: the purely centralised baseline."""

from __future__ import annotations

from collections.abc import Generator

from hybridfl.build import PositiveFloat, PositiveInt
from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.optimizers import SGD, Beta
from hybridfl.types import SERVER, Job, Results, Round, Served, State


class ServerOnly(Facts):
    """SGD on the server's examples, optimiser state kept over the rounds; clients do nothing.

    Args:
        steps, batch_size, lr, momentum: of the server's work in every round.
    """

    requires = frozenset({"server_data", "server_labels"})
    asynchronous = True

    def __init__(
        self, steps: PositiveInt = 40, batch_size: PositiveInt = 32, lr: PositiveFloat = 0.1, momentum: Beta = 0.0
    ) -> None:
        self.work = SGD(steps=steps, batch_size=batch_size, lr=lr, momentum=momentum)

    def init(self, federation: Federation) -> State:
        return {"global": federation.fresh_model(), "optimizer": {}}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        job = Job(SERVER, state["global"], work=self.work, optimizer_state=state["optimizer"], keep_optimizer=True)
        (result,) = yield [job]
        return {"global": result.model, "optimizer": result.optimizer_state}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [Served(state["global"])]
