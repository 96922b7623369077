"""Partitionings and the server's share: what must hold for every draw, and small exact truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from partition_helpers import alphas, check, labels, rng, seeds, sizes, unread

from hybridfl.data.dataset import Dataset, Examples, Labels
from hybridfl.data.partitioning import IID, Dirichlet, dirichlet
from hybridfl.data.server_data import NoServerData, Share
from hybridfl.errors import ConfigError


@given(y=labels, clients=st.integers(1, 30), alpha=alphas, minimum=st.integers(1, 5), seed=seeds)
@settings(max_examples=150, deadline=None)
def test_dirichlet_is_disjoint_complete_and_keeps_the_minimum(y, clients, alpha, minimum, seed) -> None:
    assume(clients * minimum <= len(y))
    node = Dirichlet(alpha=alpha, min_examples=minimum)
    partition = node.split(Labels(y), clients, rng(seed))
    check(partition, len(y), clients, minimum)
    again = node.split(Labels(y), clients, rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(partition.shares, again.shares, strict=True))


@given(y=labels, clients=st.integers(1, 30), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_iid_is_disjoint_complete_and_equal(y, clients, seed) -> None:
    clients = min(clients, len(y))
    partition = IID().split(Labels(y), clients, rng(seed))
    check(partition, len(y), clients, 1)
    assert max(sizes(partition)) - min(sizes(partition)) <= 1
    assert partition.moved == 0


@given(y=labels, clients=st.integers(1, 30), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_dirichlet_tends_to_equal_shares_of_every_class(y, clients, seed) -> None:
    clients = min(clients, len(y))
    partition = Dirichlet(alpha=float("inf"), min_examples=1).split(Labels(y), clients, rng(seed))
    assert partition.moved == 0
    assert max(sizes(partition)) - min(sizes(partition)) <= 1
    for label in np.unique(y):
        counts = [(y[share] == label).sum() for share in partition.shares]
        assert max(counts) - min(counts) <= 1


def test_a_large_finite_alpha_is_nearly_equal() -> None:
    y = np.repeat(np.arange(10), 135)
    found = sizes(Dirichlet(alpha=1e6).split(Labels(y), 50, rng()))
    assert max(found) - min(found) <= 2


def test_a_tiny_alpha_gives_each_class_to_one_client() -> None:
    y = np.repeat(np.arange(4), 25)
    partition = Dirichlet(alpha=1e-3, min_examples=1).split(Labels(y), 4, rng(1))
    check(partition, 100, 4, 1)
    largest = [max((y[share] == label).sum() for share in partition.shares) for label in range(4)]
    assert min(largest) >= 25 - partition.moved


def test_dirichlet_moves_only_what_is_missing() -> None:
    # One example for each of 10 clients, all drawn to a single one: 9 must move.
    partition = Dirichlet(alpha=1e-9, min_examples=1).split(Labels(np.zeros(10, dtype=np.int64)), 10, rng())
    assert sizes(partition) == [1] * 10
    assert partition.moved == 9
    partition = Dirichlet(alpha=1e-9, min_examples=3).split(Labels(np.zeros(100, dtype=np.int64)), 3, rng())
    assert sorted(sizes(partition)) == [3, 3, 94]
    assert partition.moved == 6


def test_dirichlet_counts_are_the_drawn_proportions() -> None:
    y = np.zeros(1000, dtype=np.int64)
    generator = rng(3)
    generator.permutation(1000)
    expected = dirichlet(1.0, 5, generator) * 1000
    assert np.abs(np.array(sizes(Dirichlet(alpha=1.0).split(Labels(y), 5, rng(3)))) - expected).max() < 1


@given(alpha=alphas, size=st.integers(1, 50), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_dirichlet_draw_is_a_proportion_for_every_alpha(alpha, size, seed) -> None:
    draw = dirichlet(alpha, size, rng(seed))
    assert np.isfinite(draw).all()
    assert (draw >= 0).all()
    assert draw.sum() == pytest.approx(1)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0])
def test_dirichlet_draws_have_the_moments_of_the_distribution(alpha: float) -> None:
    generator = rng()
    draws = np.array([dirichlet(alpha, 4, generator) for _ in range(4000)])
    np.testing.assert_allclose(draws.mean(0), 0.25, atol=0.03)
    np.testing.assert_allclose(draws.var(0), 0.25 * 0.75 / (4 * alpha + 1), rtol=0.12)


@pytest.mark.parametrize("node", [IID(min_examples=4), Dirichlet(min_examples=4)])
def test_only_an_impossible_minimum_is_refused(node: IID | Dirichlet) -> None:
    y = np.arange(12) % 3
    check(node.split(Labels(y), 3, rng()), 12, 3, 4)
    with pytest.raises(
        ConfigError, match=r"got 4: 4 clients need 16 .* there are 12; the largest valid value is 3"
    ) as e:
        node.split(Labels(y), 4, rng())
    assert e.value.key == "min_examples"
    with pytest.raises(ConfigError, match="at most 3 clients"):
        node.split(Labels(y), 13, rng())


# The server's share


@given(y=labels, fraction=st.floats(0.01, 1), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_share_is_exact_unique_and_as_balanced_as_can_be(y, fraction, seed) -> None:
    number = max(1, round(fraction * len(y)))
    taken = Share(examples=number).draw(y, 5, rng(seed))
    np.testing.assert_array_equal(taken, Share(fraction=fraction).draw(y, 5, rng(seed)))
    assert taken.dtype == np.int64
    assert len(taken) == number
    assert (np.diff(taken) > 0).all()
    available = np.bincount(y, minlength=5)
    counts = np.bincount(y[taken], minlength=5)
    unfinished = counts < available
    if unfinished.any():
        assert counts.max() - counts[unfinished].min() <= 1, "nobody has two more than a class that still has some"


def test_a_share_gives_the_place_of_a_rare_class_to_the_others() -> None:
    y = np.repeat([0, 1, 2], [2, 50, 50])
    taken = Share(examples=20).draw(y, 3, rng())
    assert np.bincount(y[taken]).tolist() == [2, 9, 9]


def test_what_cannot_be_spread_evenly_goes_to_classes_drawn() -> None:
    y = np.arange(30) % 3
    counts = [np.bincount(y[Share(examples=4).draw(y, 3, rng(seed))]).tolist() for seed in range(20)]
    assert sorted(set(map(tuple, counts))) == [(1, 1, 2), (1, 2, 1), (2, 1, 1)]


def test_a_share_of_some_classes_takes_no_other() -> None:
    y = np.arange(30) % 3
    taken = Share(examples=6, classes=(2, 0)).draw(y, 3, rng())
    assert np.bincount(y[taken]).tolist() == [3, 0, 3]


def test_fraction_replaces_examples() -> None:
    assert len(Share(examples=100, fraction=0.5).draw(np.arange(30) % 3, 3, rng())) == 15


@pytest.mark.parametrize(
    ("node", "key", "problem"),
    [
        (Share(examples=31), "examples", "got 31: there are 30 .*; the largest valid value is 30"),
        (Share(examples=11, classes=(1,)), "examples", r"of the classes \[1\]; the largest valid value is 10"),
        (
            Share(fraction=0.5, classes=(1,)),
            "fraction",
            r"got 0.5 \(15 examples\).* the largest valid value is 0.333333",
        ),
        (Share(classes=(0, 3)), "classes", "got 3: the classes are 0 to 2"),
    ],
)
def test_a_share_that_is_not_there_is_refused(node: Share, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        node.draw(np.arange(30) % 3, 3, rng())
    assert caught.value.key == key


def test_the_largest_value_named_is_valid() -> None:
    assert len(Share(fraction=0.333333, classes=(1,)).draw(np.arange(30) % 3, 3, rng())) == 10


def test_what_the_nodes_provide() -> None:
    assert NoServerData().provides == frozenset()
    assert NoServerData().validation == 0.0
    part = Examples(np.zeros((12, 1, 1, 1), dtype=np.uint8), np.arange(12) % 3)
    dozen = Dataset("dozen", part, part, 3, (0.0,), (1.0,))
    nothing = NoServerData().share(dozen, np.arange(12), unread, rng())
    assert len(nothing.taken) == len(nothing.withheld) == 0
    assert nothing.own is None
    assert Share().provides == {"server_data", "server_labels"}
