"""Examples held out of training: an owner's validation view, and the test sets of clients and server.

Both keep the proportions of cells, a cell being a domain and a class.
"""

from __future__ import annotations

import numpy as np

from hybridfl.data.dataset import Dataset, Examples, IntArray, int_array
from hybridfl.errors import DataError
from hybridfl.rng import stream
from hybridfl.tasks import TaskStream


def cells_of(examples: Examples, classes: int) -> IntArray:
    """A number for each domain and class."""
    return classes * examples.domain + examples.y


def held_out_by_task(
    owned: IntArray, y: IntArray, cells: IntArray, tasks: TaskStream, fraction: float, rng: np.random.Generator
) -> tuple[IntArray, IntArray]:
    """Train and validation part of an owner's examples; whoever has examples of a task keeps one for training."""
    if len(tasks) == 1:
        return _hold_out(owned, cells, fraction, rng)
    own = [owned[np.isin(y[owned], classes)] for classes in tasks.classes]
    train, val = zip(*(_hold_out(part, cells, fraction, rng) for part in own), strict=True)
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def _hold_out(owned: IntArray, cells: IntArray, fraction: float, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Train and validation part of an owner's examples, in the same proportions of cells (domain and class)."""
    size = min(_nearest(fraction * len(owned)), max(0, len(owned) - 1))
    found, counts = np.unique(cells[owned], return_counts=True)
    held = [
        rng.choice(owned[cells[owned] == cell], count, replace=False)
        for cell, count in zip(found, _apportion(size, counts, rng), strict=True)
        if count
    ]
    val = int_array(np.sort(np.concatenate(held)) if held else [])
    return int_array(np.sort(owned[~np.isin(owned, val)])), val


def servers_test(dataset: Dataset, owned: IntArray) -> IntArray | None:
    """Test examples of the domains of which clients own any training examples; ``None`` for all."""
    within = owned[dataset.test.domain] > 0
    return None if within.all() else int_array(np.flatnonzero(within))


def clients_tests(
    dataset: Dataset, owned: list[IntArray], domains: IntArray, min_test: int, seed: int
) -> tuple[IntArray, ...]:
    """For each client examples of the test part, in the proportions of the cells (domain and class) it owns.

    Args:
        owned: each client's examples in the training part.
        domains: ``(clients, domains)``, numbers of these. A client with a tenth of the clients' examples of a domain is
            tested on as many examples as a tenth of this domain's test part has.

    Raises:
        DataError: the test part has none of a client's classes.
    """
    number = dataset.classes * len(dataset.domains)
    held, cells = cells_of(dataset.train, dataset.classes), cells_of(dataset.test, dataset.classes)
    pools = [np.flatnonzero(cells == cell) for cell in range(number)]
    available = np.array([len(pool) for pool in pools])
    tests = np.bincount(dataset.test.domain, minlength=len(dataset.domains))
    expected = (domains / np.maximum(domains.sum(0), 1)) @ tests
    sets = []
    for client, own in enumerate(owned):
        counts = np.bincount(held[own], minlength=number)
        proportions = np.where(available > 0, counts, 0)  # a cell without test examples cannot be tested
        if not proportions.any():
            classes = np.unique(dataset.train.y[own]).tolist()
            names = [dataset.domains[domain] for domain in np.flatnonzero(domains[client])]
            where = f" in the domains {', '.join(names)}" if len(dataset.domains) > 1 else ""
            raise DataError(
                f"{dataset.name}: the test part has no example of the classes {classes} of client {client}{where}."
            )
        # The largest size at which every cell's part, rounded up, is still there.
        most = min(int(a) * int(proportions.sum()) // int(p) for a, p in zip(available, proportions, strict=True) if p)
        size = min(max(min_test, 1, _nearest(expected[client])), most)
        rng = stream(seed, "test", client)
        drawn = [
            rng.choice(pool, count, replace=False)
            for pool, count in zip(pools, _apportion(size, proportions, rng), strict=True)
        ]
        sets.append(int_array(np.sort(np.concatenate(drawn))))
    return tuple(sets)


def _apportion(total: int, weights: IntArray, rng: np.random.Generator) -> IntArray:
    """``total`` in proportion to whole ``weights``, by largest remainder; equal remainders are drawn.

    Every part is its exact value rounded down or up, so with ``total`` ≤ the sum of weights none exceeds its weight.
    Whole-number arithmetic, because a remainder that is 0 must not become 1e-16.
    """
    if total == 0:
        return np.zeros_like(weights)
    whole = weights.sum()
    parts: IntArray = total * weights // whole
    remainders = total * weights % whole
    shuffled = rng.permutation(len(weights))
    order = shuffled[np.argsort(-remainders[shuffled], kind="stable")]
    parts[order[: total - parts.sum()]] += 1
    return parts


def _nearest(value: float) -> int:
    return int(np.floor(value + 0.5))
