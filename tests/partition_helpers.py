"""What every partitioning is tested with, and what must hold for each."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from hybridfl.data.dataset import Dataset, Labels, Reader
from hybridfl.data.partitioning import Partition, Partitioning
from hybridfl.rng import stream

labels = st.lists(st.integers(0, 4), min_size=1, max_size=120).map(lambda values: np.array(values, dtype=np.int64))
alphas = st.sampled_from([1e-300, 1e-9, 1e-3, 0.1, 1.0, 100.0, 1e9, float("inf")])
seeds = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return stream(seed, "test")


def unread(reader: Reader) -> Dataset:
    """For server data that read no other data set."""
    raise AssertionError("no other data set should be read")


def sizes(partition: Partition) -> list[int]:
    return [len(share) for share in partition.shares]


def check(partition: Partition, examples: int, clients: int, minimum: int) -> None:
    assert len(partition.shares) == clients
    np.testing.assert_array_equal(np.sort(np.concatenate(partition.shares)), np.arange(examples))
    assert min(sizes(partition)) >= minimum
    for share in partition.shares:
        assert share.dtype == np.int64
        assert (np.diff(share) > 0).all()


def twice(node: Partitioning, y: np.ndarray, clients: int, seed: int) -> Partition:
    """A partition that must come out the same from the same seed."""
    one, other = (node.split(Labels(y), clients, rng(seed)) for _ in range(2))
    assert one.moved == other.moved
    assert all(np.array_equal(a, b) for a, b in zip(one.shares, other.shares, strict=True))
    return one


def table(partition: Partition, y: np.ndarray) -> np.ndarray:
    """Examples by client and class."""
    return np.array([np.bincount(y[share], minlength=int(y.max()) + 1) for share in partition.shares])
