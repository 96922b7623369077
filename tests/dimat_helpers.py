"""Steps of peers, and mixing by hand."""

from __future__ import annotations

from dataclasses import replace

import helpers
import numpy as np
import torch

from hybridfl.engine import Record
from hybridfl.methods.peer_average import PeerAverage
from hybridfl.params import Params
from hybridfl.plan import Plan
from hybridfl.snapshot import Snapshot
from hybridfl.types import Model

STILL = "client_optimizer.lr=1e-300"
"""So small a rate that in float64 local work leaves a model as it is, to the bit."""
NARROW = ("model.hidden=[9,7]", "initial=different")
WITH_BATCH_NORM = ("model=resnet20", "model.norm=batch", "model.width=0.125", "dataset.shape=[1,8,8]")


def step(plan: Plan, models: list[Model] | None = None, method: PeerAverage | None = None) -> tuple[Snapshot, Record]:
    """One round, from these models if given."""
    engine = helpers.engine_of(plan, method)
    begun = engine.begin()
    return engine.step(begun if models is None else replace(begun, state=begun.state | {"models": models}))


def starts(plan: Plan) -> list[Model]:
    return [plan.federation.fresh_model(k) for k in range(plan.federation.clients.number)]


def mixed_by_hand(W: np.ndarray, models: list[Params]) -> list[Params]:
    stacked = {name: torch.stack([model[name] for model in models]) for name in models[0]}
    weights = torch.from_numpy(W)
    return [{name: torch.tensordot(row, t, 1) for name, t in stacked.items()} for row in weights]


def reported(record: Record, name: str) -> list[float]:
    return [number for found, _, number in record.reports if found == name]
