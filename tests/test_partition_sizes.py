"""Partitionings by size: what must hold for every draw, and small exact truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from partition_helpers import alphas, check, labels, rng, seeds, sizes, table, twice

from hybridfl.data.dataset import Labels
from hybridfl.data.partition_sizes import Quantity
from hybridfl.data.partitioning import dirichlet
from hybridfl.errors import ConfigError

laws = st.sampled_from(["dirichlet", "lognormal"])
sigmas = st.sampled_from([0.0, 1e-9, 0.3, 2.0, 1e3, 1e308])


@given(
    y=labels, clients=st.integers(1, 30), law=laws, alpha=alphas, sigma=sigmas, minimum=st.integers(1, 5), seed=seeds
)
@settings(max_examples=150, deadline=None)
def test_sizes_are_disjoint_complete_and_keep_the_minimum(y, clients, law, alpha, sigma, minimum, seed) -> None:
    assume(clients * minimum <= len(y))
    partition = twice(Quantity(law, alpha, sigma, minimum), y, clients, seed)
    check(partition, len(y), clients, minimum)


@pytest.mark.parametrize("node", [Quantity(alpha=float("inf")), Quantity("lognormal", sigma=0.0)])
@pytest.mark.parametrize("clients", [1, 3, 7])
def test_without_skew_sizes_are_equal(node: Quantity, clients: int) -> None:
    partition = node.split(Labels(np.zeros(100, dtype=np.int64)), clients, rng())
    assert max(sizes(partition)) - min(sizes(partition)) <= 1
    assert partition.moved == 0


@pytest.mark.parametrize("node", [Quantity(alpha=1e-9), Quantity("lognormal", sigma=1e6)])
def test_with_all_the_skew_one_client_has_all_but_the_others_minimum(node: Quantity) -> None:
    partition = node.split(Labels(np.zeros(100, dtype=np.int64)), 4, rng())
    assert sorted(sizes(partition)) == [2, 2, 2, 94]
    assert partition.moved == 6


def test_sizes_are_the_drawn_proportions() -> None:
    y = np.zeros(1000, dtype=np.int64)
    expected = dirichlet(5.0, 5, rng(3)) * 1000
    assert np.abs(np.array(sizes(Quantity(alpha=5.0).split(Labels(y), 5, rng(3)))) - expected).max() < 1
    weights = np.exp(0.5 * rng(3).standard_normal(5))
    found = sizes(Quantity("lognormal", sigma=0.5).split(Labels(y), 5, rng(3)))
    assert np.abs(np.array(found) - 1000 * weights / weights.sum()).max() < 1


def test_labels_stay_iid() -> None:
    y = np.arange(20000) % 2
    partition = Quantity(alpha=1.0, min_examples=100).split(Labels(y), 10, rng())
    assert max(sizes(partition)) > 3 * min(sizes(partition))
    ones = table(partition, y)[:, 1]
    spread = np.sqrt(np.array(sizes(partition)) / 4)
    assert (np.abs(ones - np.array(sizes(partition)) / 2) < 5 * spread).all()


def test_only_an_impossible_minimum_is_refused() -> None:
    check(Quantity(min_examples=4).split(Labels(np.arange(12) % 3), 3, rng()), 12, 3, 4)
    with pytest.raises(ConfigError, match="the largest valid value is 3") as caught:
        Quantity(min_examples=4).split(Labels(np.arange(12) % 3), 4, rng())
    assert caught.value.key == "min_examples"
