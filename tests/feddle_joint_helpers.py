"""Feddle's extensions as configs, and their arithmetic written out."""

from __future__ import annotations

from feddle_helpers import Run
from torch import Tensor

from hybridfl import params as P

GUIDED = "merging=feddle_joint"
CLEAN = (GUIDED, "merging.objective=ce")
LATE = ["clients.delay=1.5", "clients.failure=0.2", "clients.dropout=0.1", "seed=3"]
"""Stale updates, and clients that fail."""


def arrivals(played: Run, round: int) -> list[tuple[int, Tensor, Tensor]]:
    """Client, update and model of what arrived in a round, in order."""
    entries = [entry for entry in played.states[round + 1]["atlas"] if entry["added"] == round]
    starts = [P.flatten(played.states[entry["birth"]]["global"].params) for entry in entries]
    return [(e["client"], e["update"], start + e["update"]) for e, start in zip(entries, starts, strict=True)]


def adam(moments: list[Tensor], slope: Tensor, lr: float = 0.02) -> Tensor:
    """A step of Adam, written out; torch.optim takes seconds to import."""
    moments.append(slope)
    t = len(moments)
    mean = sum(0.1 * 0.9 ** (t - 1 - i) * g for i, g in enumerate(moments)) / (1 - 0.9**t)
    square = sum(0.001 * 0.999 ** (t - 1 - i) * g.square() for i, g in enumerate(moments)) / (1 - 0.999**t)
    return lr * mean / (square.sqrt() + 1e-8)  # type: ignore[union-attr,return-value]
