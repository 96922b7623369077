"""Hidden units of a net as numbers: which elements of which tensors belong to the same unit.

An element's tag is the number of its unit, ``FIXED`` where its place may not change (inputs, logits), or ``CONSTANT``
where every element is the same number (zeros that pad channels), which ties nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIXED = 0
CONSTANT = -1


class Units:
    """Units and which of them turned out to be one, a union-find whose representative is the smallest number."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._table: Tensor | None = None

    def fresh(self, number: int) -> Tensor:
        """``(number,)`` units that are tied to nothing yet."""
        first = len(self._parent)
        self._parent.extend(range(first, first + number))
        self._table = None
        return torch.arange(first, first + number)

    def canonical(self, tags: Tensor) -> Tensor:
        """Every tag replaced by the representative of its unit."""
        if self._table is None:
            # The last entry answers for CONSTANT, which indexes from the end.
            self._table = torch.tensor([*map(self._find, range(len(self._parent))), CONSTANT])
        return self._table[tags]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Elements at the same place belong to one unit from now on; the shapes must broadcast."""
        a, b = torch.broadcast_tensors(self.canonical(a), self.canonical(b))
        differ = (a != b) & (a != CONSTANT) & (b != CONSTANT)
        number = len(self._parent)
        for pair in (a[differ] * number + b[differ]).unique().tolist():
            low, high = sorted((self._find(pair // number), self._find(pair % number)))
            self._parent[high] = low
            self._table = None

    def along(self, tags: Tensor, axis: int) -> Tensor | None:
        """The unit of every index of an axis, ``(n,)``; ``None`` if other axes tell units apart too."""
        rows = self.canonical(tags).movedim(axis, 0).flatten(1)
        units = rows.amax(1)
        return units if bool(((rows == units.unsqueeze(1)) | (rows == CONSTANT)).all()) else None

    def vary(self, tags: Tensor, axis: int) -> bool:
        """Whether units differ along an axis."""
        lines = self.canonical(tags)
        high = lines.amax(axis, keepdim=True)
        return not bool(((lines == high) | (lines == CONSTANT)).all())

    def _find(self, unit: int) -> int:
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit
