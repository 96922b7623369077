"""A model atlas: a bounded buffer of client updates that serve as axes around the global model.

Feddle, Zhu et al. 2025, arXiv 2503.20138 (overview figure: buffer with add and remove, anchor normalisation). The full
text could not be read: removal rules and formulas of normalisation are inferred.

An entry is a plain dict, so that an atlas can be part of a method's state: ``update`` ``(d,)``, ``client``, ``birth``
(round the client started), ``added`` (round it arrived) and, once merged, ``coefficients`` ``(G,)`` of the last merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridfl.build import NonNegativeFloat, PositiveInt
from hybridfl.parametrization import Segment
from hybridfl.params import Layout

Entry = dict[str, Any]
Norm = Literal["mean", "unit", "fresh", "layer", "none"]
Evict = Literal["coef", "age", "staleness", "cosine"]


@dataclass(frozen=True)
class Atlas:
    """The buffer of updates.

    Attributes:
        size: entries kept; null is so many times the cohort as ``cohorts`` says.
        cohorts: see ``size``.
        evict: who goes first when it is full, see :func:`evict`.
        per_client: keep only the newest update of a client, or all.
        drop_below: also drop entries whose coefficient, relative to a fresh one's 1/m, ends below this.
        storage: type that entries are kept in; ``exact`` is the run's.
    """

    size: PositiveInt | None = None
    cohorts: PositiveInt = 6
    evict: Evict = "coef"
    per_client: Literal["newest", "all"] = "newest"
    drop_below: NonNegativeFloat = 0.0
    storage: Literal["exact", "float16", "bfloat16"] = "exact"


def add(atlas: Sequence[Entry], arrived: Sequence[Entry], per_client: Literal["newest", "all"]) -> list[Entry]:
    """The atlas with what arrived; ``newest`` keeps one entry a client."""
    replaced = {entry["client"] for entry in arrived} if per_client == "newest" else set()
    return [*(entry for entry in atlas if entry["client"] not in replaced), *arrived]


def evict(
    atlas: Sequence[Entry],
    size: int,
    round: int,
    rule: Evict,
    downhill: Tensor | None = None,
    origin: Tensor | None = None,
) -> tuple[list[Entry], list[Entry]]:
    """Kept and removed entries; what arrived in this round is never removed.

    Args:
        size: entries to keep.
        rule: who goes first: ``coef`` the smallest coefficient of the last merge, ``age`` the first to have arrived,
            ``staleness`` the one trained from the oldest model, ``cosine`` the one that points least downhill. Of equals
            the first to have arrived goes first.
        downhill: minus the gradient of the server's loss, ``(d,)``; needed by ``cosine``.
        origin: where ``cosine`` looks from if entries hold whole models; ``None`` if they hold updates.
    """
    old = [i for i, entry in enumerate(atlas) if entry["added"] != round]
    surplus = max(0, min(len(atlas) - size, len(old)))
    gone = set(sorted(old, key=lambda i: _worth(atlas[i], rule, downhill, origin))[:surplus])
    return [e for i, e in enumerate(atlas) if i not in gone], [atlas[i] for i in sorted(gone)]


def _worth(entry: Entry, rule: Evict, downhill: Tensor | None, origin: Tensor | None) -> tuple[float, int, int]:
    if rule == "age":
        worth = float(entry["added"])
    elif rule == "staleness":
        worth = float(entry["birth"])
    elif rule == "coef":
        worth = float(entry["coefficients"].abs().mean())
    elif downhill is None:
        raise ValueError("the rule 'cosine' needs the server's gradient")
    else:
        direction = entry["update"] if origin is None else entry["update"] - origin
        worth = float(torch.cosine_similarity(direction, downhill, dim=0))
    return worth, entry["added"], entry["client"]


def scales(directions: Sequence[Tensor], fresh: Sequence[bool], norm: Norm, layout: Layout) -> tuple[Tensor, float]:
    """Factors that bring the anchors to one length, and the length of a unit coefficient.

    Args:
        directions: K vectors ``(d,)``.
        fresh: which of them arrived in this round.
        norm: ``mean`` all to the mean length of the atlas; ``unit`` all to length 1, coefficients then measured in
            lengths; ``fresh`` to the mean length of what arrived; ``layer`` each block to its mean length; ``none``.

    Returns:
        ``(K, 1)``, or ``(K, blocks)`` for ``layer``; and what the coefficients of a mean sum to (1 but for ``unit``).
        A zero vector keeps the factor 1.
    """
    first = directions[0]
    if norm == "none":
        return first.new_ones(len(directions), 1), 1.0
    if norm == "layer":
        lengths = torch.stack([_block_lengths(direction, layout) for direction in directions])
        return _ratio(lengths.mean(0, keepdim=True), lengths), 1.0
    lengths = torch.stack([direction.norm() for direction in directions]).unsqueeze(1)
    if norm == "unit":
        return _ratio(torch.ones_like(lengths), lengths), float(lengths.mean()) or 1.0
    chosen = lengths[torch.tensor(list(fresh), device=lengths.device)] if norm == "fresh" else lengths
    return _ratio(chosen.mean(0, keepdim=True), lengths), 1.0


def _ratio(wanted: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, wanted / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 1.0)


def _block_lengths(direction: Tensor, layout: Layout) -> Tensor:
    blocks = layout.blocks()
    squares = direction.new_zeros(blocks[-1][2] + 1)
    for start, end, block in blocks:
        squares[block] += direction[start:end].square().sum()
    return squares.sqrt()


def segments(layout: Layout, columns: int) -> tuple[Segment, ...]:
    """Pieces of the flat vector for this many columns of coefficients: one piece, or one a tensor."""
    return layout.blocks() if columns > 1 else ((0, sum(layout.sizes), 0),)
