"""Groups of hidden units that may change places, read off a :class:`~hybridfl.merging.tracing.Trace`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridfl.errors import ConfigError
from hybridfl.merging.tracing import Trace
from hybridfl.merging.units import FIXED


@dataclass(frozen=True, eq=False)
class Entry:
    """Where a group's units are in one axis of a tensor.

    Attributes:
        name: of the parameter or buffer.
        axis: of it.
        index: ``(units, expansion)``, the places of every unit; a channel that was flattened has several.
    """

    name: str
    axis: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Where a group's units can be observed: the input of a module, of the form ``(batch, …)``.

    Attributes:
        module: its name; it runs once in a pass.
        axis, index: as in an :class:`Entry`, of the input.
    """

    module: str
    axis: int
    index: Tensor

    def of(self, x: Tensor) -> Tensor:
        """The module's input as ``(units, observations)``: over the batch and all positions."""
        rows = x.movedim(self.axis, 0)[self.index.flatten().to(x.device)]
        return rows.reshape(len(self.index), -1)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that may change places among themselves.

    Attributes:
        name: of the module that makes them first.
        size: their number.
        entries: every axis they occur in: outputs of weights, biases, norms and their statistics, inputs of weights.
        features: the last layer that takes them up, or the pooling in front of it.
        blocks: ``(blocks, size of a block)`` units that stay together under a GroupNorm: whole blocks may change
            places, and units within a block; ``None`` if they are free.
    """

    name: str
    size: int
    entries: tuple[Entry, ...]
    features: Features
    blocks: Tensor | None = None


Places = dict[int, dict[tuple[str, int], list[int]]]
"""By unit and (tensor name, axis), its places."""
Rows = list[set[int]]
"""The groups of channels of a GroupNorm."""


def groups_of(trace: Trace) -> tuple[Group, ...]:
    """Groups of units that occur in the same places, in the order of their first.

    A GroupNorm makes blocks of a group where its rows of channels are of this group alone and all norms agree on the
    blocks. Elsewhere the group is split so that its units stay within a row: fewer permutations than there are.

    Raises:
        ConfigError: key ``model``: no module shows the features of a group.
    """
    places: Places = {}
    for key, units in trace.axes.items():
        for place, unit in enumerate(trace.units.canonical(units).tolist()):
            if unit > FIXED:
                places.setdefault(unit, {}).setdefault(key, []).append(place)
    norms = [[set(row) for row in trace.units.canonical(units).tolist()] for units in trace.grouped]
    sets = [set(trace.units.canonical(units).tolist()) for units in trace.sets]
    while True:
        alike = _alike(places, sets)
        found = [_blocks(set(units), norms) for units in alike]
        splits = [row for _, rows in found for row in rows]
        if not splits:
            return tuple(_group(trace, places, units, blocks) for units, (blocks, _) in zip(alike, found, strict=True))
        sets += splits


def _alike(places: Places, sets: list[set[int]]) -> list[list[int]]:
    found: dict[tuple[object, ...], list[int]] = {}
    for unit in sorted(places):
        counts = tuple((key, len(where)) for key, where in places[unit].items())
        found.setdefault((counts, tuple(unit in together for together in sets)), []).append(unit)
    return list(found.values())


def _blocks(members: set[int], norms: list[Rows]) -> tuple[Rows, Rows]:
    """The blocks that GroupNorms make of a group, and the rows by which it has to be split if they cannot."""
    blocks: Rows = []
    for rows in norms:
        met = [row for row in rows if row & members]
        if all(row >= members for row in met):
            continue
        if sum(map(len, met)) > len(members):  # others are in these rows too, or a unit is in several
            return [], met
        if blocks and set(map(frozenset, blocks)) != set(map(frozenset, met)):
            return [], min(blocks, met, key=len)
        blocks = met
    return blocks, []


def _group(trace: Trace, places: Places, units: list[int], blocks: Rows) -> Group:
    entries = tuple(
        Entry(name, axis, torch.tensor([places[unit][name, axis] for unit in units])) for name, axis in places[units[0]]
    )
    name = entries[0].name.rpartition(".")[0] or entries[0].name
    number = {unit: i for i, unit in enumerate(units)}
    rows = [[number[unit] for unit in sorted(row)] for row in blocks]
    return Group(name, len(units), entries, _features(trace, units, name), torch.tensor(rows) if rows else None)


def _features(trace: Trace, units: list[int], name: str) -> Features:
    """The input of the first module that takes up what the units' last reader takes up, or pools it on the way there."""
    wanted = torch.tensor(units)
    read = [r.version for r in trace.reads if bool(torch.isin(wanted, trace.units.canonical(r.units)).all())]
    runs = Counter(call.module for call in trace.calls)
    for module, tags, version in trace.calls:
        if version not in read[-1:] or module not in trace.takers or runs[module] > 1:
            continue
        for axis in range(1, tags.dim()):
            along = trace.units.along(tags, axis)
            if along is not None and bool(torch.isin(wanted, along).all()):
                return Features(module, axis, torch.stack([(along == unit).nonzero().squeeze(1) for unit in units]))
    raise ConfigError(
        "model", f"no module that runs once takes the features of layer '{name}' as input, so they cannot be matched."
    )
