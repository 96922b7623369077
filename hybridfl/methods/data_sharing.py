"""Data sharing. Zhao, Li, Lai, Suda, Civin, Chandra 2018, arXiv 1806.00582, section 4."""

from __future__ import annotations

from collections.abc import Generator

from hybridfl.methods.fedavg import FedAvg
from hybridfl.types import SERVER, Job, Results, Round, State, View


class DataSharing(FedAvg):
    """FedAvg in which every client holds a copy of the server's examples beside its own.

    The examples are sent to each client once, when it first takes part; the bytes are booked.
    """

    requires = frozenset({"server_data", "server_labels"})
    moves_raw_data = True

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        jobs = [Job(client, state["global"], view=View(owners=(client, SERVER))) for client in now.clients]
        results = yield jobs
        return {"global": results.mean("examples")}
