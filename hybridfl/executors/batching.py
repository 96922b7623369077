"""The batches of clients in lock-step: laid out for many steps at once, handed out step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybridfl.local import Task, Workbench
from hybridfl.optimizers import batches

Selection = slice | Tensor
"""Which clients of a stack: a part of it in one piece, or positions."""
LAID_OUT = 2**20
"""Positions of examples that are laid out at once."""


class Fed(NamedTuple):
    """A step's batches of b examples, first axis the clients.

    Attributes:
        real: 1 for examples, 0 for what only fills up a short batch; ``None`` if nothing does.
        partners, share: of mixup.
    """

    x: Tensor
    y: Tensor
    positions: Tensor
    real: Tensor | None
    partners: Tensor | None
    share: Tensor | None


class Share(NamedTuple):
    """Clients that make a step together.

    Attributes:
        chosen: which.
        numbers: the same for numpy.
        sizes: of their batches ``(clients,)``.
    """

    chosen: Selection
    numbers: slice | np.ndarray
    sizes: np.ndarray
    fed: Fed


class _Block(NamedTuple):
    """Some steps of all clients that still work in the first of them; first axes ``(steps, clients)``.

    Attributes:
        positions: in the client's view ``(…, size)``; a short batch is repeated.
        rows: the same in the pool, y: their labels.
        sizes: of the batches; 0 once a client is done.
    """

    positions: Tensor
    rows: Tensor
    y: Tensor
    sizes: np.ndarray


class Feed:
    """The batches of tasks of one kind, those with many steps first.

    Args:
        fills: short batches are filled up, with their own examples again, so that all clients work together; otherwise
            clients whose batches differ in size work apart.
    """

    def __init__(self, bench: Workbench, tasks: Sequence[Task], fills: bool) -> None:
        self.bench, self.tasks, self.fills = bench, tasks, fills
        work = tasks[0].work
        self.size = min(work.batch_size, max(task.examples for task in tasks))
        self.repeated = np.arange(self.size)
        self.feeds = [batches(task.examples, work, task.shuffle, task.steps) for task in tasks]
        rows = [task.rows.cpu().numpy() for task in tasks]
        self.rows = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for own, examples in zip(self.rows, rows, strict=True):
            own[: len(examples)] = examples

    def __iter__(self) -> Iterator[list[Share]]:
        """For every step, those who make it together."""
        together = max(1, LAID_OUT // (len(self.tasks) * self.size))
        for begin in range(0, self.tasks[0].steps, together):
            block = self.block([min(task.steps - begin, together) for task in self.tasks if task.steps > begin])
            for number in range(len(block.sizes)):
                yield self.shares(block, number)

    def block(self, steps: Sequence[int]) -> _Block:
        """The next steps, so many of each client that still works."""
        positions = np.zeros((steps[0], len(steps), self.size), np.int64)
        sizes = np.zeros(positions.shape[:2], np.int64)
        for i, own in enumerate(steps):
            for number, batch in enumerate(islice(self.feeds[i], own)):
                size = sizes[number, i] = len(batch)
                positions[number, i] = batch if size == self.size else batch[self.repeated % size]
        rows = torch.from_numpy(self.rows[np.arange(len(steps))[:, None], positions])
        rows = rows.to(self.bench.x.device, non_blocking=True)
        there = torch.from_numpy(positions).to(self.bench.x.device, non_blocking=True)
        return _Block(there, rows, self.bench.y[rows], sizes)

    def shares(self, block: _Block, number: int) -> list[Share]:
        """Everybody who still works, or apart those whose batches differ in size."""
        sizes = block.sizes[number]
        working = int(np.count_nonzero(sizes))
        sizes = sizes[:working]
        if self.fills or (sizes == sizes[0]).all():
            everybody = slice(0, working)
            return [Share(everybody, everybody, sizes, self.fed(block, number, everybody, range(working), sizes))]
        found = []
        for size in np.unique(sizes):
            (who,) = np.nonzero(sizes == size)
            chosen = torch.from_numpy(who).to(self.bench.x.device)
            found.append(Share(chosen, who, sizes[who], self.fed(block, number, chosen, who.tolist(), sizes[who])))
        return found

    def fed(self, block: _Block, number: int, chosen: Selection, who: Sequence[int], sizes: np.ndarray) -> Fed:
        """Their batches of a step, augmented if the run says so."""
        size, pool = int(sizes.max()), self.bench.x
        positions, rows, y = (part[number] for part in block[:3])
        if (len(who), size) != rows.shape:
            positions, rows, y = positions[chosen, :size], rows[chosen, :size], y[chosen, :size]
        x = pool.index_select(0, rows.reshape(-1)).view(*rows.shape, *pool.shape[1:])
        real = None
        if sizes.min() < size:
            real = torch.from_numpy(np.arange(size) < sizes[:, None]).to(pool.device, pool.dtype)
        augment = self.tasks[0].augment
        if augment is None:
            return Fed(x, y, positions, real, None, None)
        partners, shares = torch.arange(size, device=pool.device).repeat(len(x), 1), []
        for k, (i, examples) in enumerate(zip(who, sizes.tolist(), strict=True)):
            seen = augment(x[k, :examples], self.tasks[i].noise)
            x[k, :examples] = seen.x
            shares.append(seen.share)
            if seen.partners is not None:
                partners[k, :examples] = seen.partners
        if seen.partners is None:
            return Fed(x, y, positions, real, None, None)
        return Fed(x, y, positions, real, partners, torch.tensor(shares, device=pool.device, dtype=pool.dtype))
