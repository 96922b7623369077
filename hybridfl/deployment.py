"""From what a method serves to what a participant runs: its own tensors put in, statistics of BatchNorm made anew."""

from __future__ import annotations

from typing import Any

import torch

from hybridfl.federation import Federation
from hybridfl.kept import Kept, own
from hybridfl.models.batch_norm import reestimated
from hybridfl.scoring import identity
from hybridfl.types import SERVER, Served, View


class Deployment:
    """Applies the policy ``model.batch_norm`` of a federation to served models.

    Args:
        kept: what participants have kept to themselves.
        round: rounds that are done.
    """

    def __init__(self, federation: Federation, kept: Kept, round: int) -> None:
        self.federation, self.kept, self.round = federation, kept, round
        self._ready: dict[tuple[Any, ...], tuple[list[Served], list[Served]]] = {}

    def ready(self, ensemble: list[Served], participant: int) -> list[Served]:
        """The ensemble as the participant would run it; nothing for the server if clients keep tensors to themselves."""
        policy = self.federation.model_options.batch_norm
        if policy == "local":
            if participant == SERVER:
                return []
            return [s._replace(model=own(s.model, self.kept, participant, s.tag)) for s in ensemble]
        if policy != "reestimate" or not ensemble:
            return ensemble
        owners = self._owners(participant)
        key = (owners, identity(ensemble))
        if key not in self._ready:
            # Kept alive with the result: an identity is made of addresses.
            self._ready[key] = ensemble, [self._reestimated(served, owners) for served in ensemble]
        return self._ready[key][1]

    def _owners(self, participant: int) -> tuple[int, ...]:
        """Whose training examples the statistics are taken of."""
        federation, where = self.federation, self.federation.model_options.reestimate_on
        everybody = tuple(federation.participants)
        if where == "all":
            return everybody
        owner = SERVER if where == "server" else participant
        # One without two examples of its own, as a batch needs them, can only ask for everybody's statistics.
        return (owner,) if len(self._rows((owner,))) > 1 else everybody

    def _rows(self, owners: tuple[int, ...]) -> torch.Tensor:
        """Positions of their training examples of the tasks so far."""
        return self.federation.rows(SERVER, View(owners=owners, tasks="seen"), max(self.round - 1, 0))

    def _reestimated(self, served: Served, owners: tuple[int, ...]) -> Served:
        federation, rows = self.federation, self._rows(owners)
        # Batches of one size, so that each counts the same.
        parts = torch.tensor_split(rows, -(-len(rows) // federation.chunk))
        batches = (federation.bench.x[part] for part in parts)
        net = federation.net_at(served.width)
        return served._replace(model=reestimated(net, served.model, batches))
