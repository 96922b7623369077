"""The facts of a method at their usual values; a method states those that differ."""

from __future__ import annotations


class Facts:
    """What the engine reads before the first round, see :class:`hybridfl.types.Method`."""

    requires: frozenset[str] = frozenset()
    asynchronous: bool = False
    topology: str = "star"
    moves_raw_data: bool = False
    upper_bound: bool = False
    widths: tuple[float, ...] = ()
    alternatives: tuple[str, ...] = ()
    client_columns: tuple[str, ...] = ()
