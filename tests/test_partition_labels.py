"""Partitionings by label: what must hold for every draw, and small exact truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from partition_helpers import alphas, check, labels, rng, seeds, sizes, table, twice

from hybridfl.data.dataset import Labels
from hybridfl.data.partition_labels import Classes, DirichletMix, Shards
from hybridfl.errors import ConfigError

BALANCED = np.arange(100) % 5

# -- shards ----------------------------------------------------------------------------------------------------------


@given(y=labels, clients=st.integers(1, 30), number=st.integers(1, 5), seed=seeds)
@settings(max_examples=100, deadline=None)
def test_shards_are_disjoint_complete_and_equal(y, clients, number, seed) -> None:
    assume(clients * number <= len(y))
    partition = twice(Shards(number), y, clients, seed)
    check(partition, len(y), clients, number * (len(y) // (clients * number)))
    assert max(sizes(partition)) - min(sizes(partition)) <= number
    assert partition.moved == 0


@given(number=st.integers(1, 4), clients=st.integers(1, 10), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_client_has_no_more_classes_than_its_shards_touch(number, clients, seed) -> None:
    y = np.repeat(np.arange(clients * number), 6)  # a shard is exactly one class
    mixed = rng(seed).permutation(y)
    partition = Shards(number).split(Labels(mixed), clients, rng(seed))
    assert sorted(np.concatenate([np.unique(mixed[share]) for share in partition.shares])) == list(np.unique(y))
    assert all(len(np.unique(mixed[share])) == number for share in partition.shares)


def test_one_shard_each_is_one_class_each() -> None:
    partition = Shards(1).split(Labels(BALANCED), 5, rng())
    assert sorted(map(tuple, table(partition, BALANCED))) == sorted(map(tuple, 20 * np.eye(5, dtype=int)))


def test_the_papers_federation() -> None:
    y = np.arange(6000) % 10
    partition = Shards(2).split(Labels(y), 100, rng())
    assert sizes(partition) == [60] * 100
    held = (table(partition, y) > 0).sum(1)
    assert set(held) == {1, 2}
    assert (held == 2).mean() > 0.7  # 0.9 is expected


def test_shards_of_one_example_are_iid() -> None:
    y = np.arange(5000) % 5
    counts = table(Shards(500).split(Labels(y), 10, rng()), y)
    assert counts.sum(1).tolist() == [500] * 10
    assert np.abs(counts - 100).max() < 45  # five standard deviations


def test_the_longer_shards_are_not_all_of_the_first_classes() -> None:
    """1 example more than shards: it may be in any; 15 shards of 20 examples: every third is longer."""
    y = np.repeat(np.arange(5), 4)
    partition = Shards(1).split(Labels(y), 15, rng())
    longer = sorted(y[share[0]] for share in partition.shares if len(share) == 2)
    assert longer == [0, 1, 2, 3, 4]


def test_which_examples_of_a_label_are_together_is_drawn() -> None:
    partition = Shards(1).split(Labels(np.zeros(100, dtype=np.int64)), 2, rng())
    assert all(10 < (share < 50).sum() < 40 for share in partition.shares)


def test_more_shards_than_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"got 4: 4 clients need 16 shards .* the largest valid value is 2") as caught:
        Shards(4).split(Labels(np.arange(11)), 4, rng())
    assert caught.value.key == "per_client"
    assert len(Shards(2).split(Labels(np.arange(11)), 4, rng()).shares) == 4
    with pytest.raises(ConfigError, match="at most 11 clients"):
        Shards(1).split(Labels(np.arange(11)), 12, rng())


# -- classes ---------------------------------------------------------------------------------------------------------


@given(y=labels, clients=st.integers(1, 30), number=st.integers(1, 6), seed=seeds)
@settings(max_examples=200, deadline=None)
def test_classes_are_disjoint_complete_covered_and_divided_equally(y, clients, number, seed) -> None:
    node = Classes(number)
    try:
        partition = twice(node, y, clients, seed)
    except ConfigError:
        present, available = np.unique(y, return_counts=True)
        assert number * clients < len(present) or number * clients > np.minimum(available, clients).sum()
        return
    check(partition, len(y), clients, number)
    counts = table(partition, y)
    assert ((counts > 0).sum(1) == number).all()
    for column in counts.T:
        held = column[column > 0]
        assert not len(held) or held.max() - held.min() <= 1


@given(clients=st.integers(1, 12), number=st.integers(1, 5), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_classes_are_held_by_equally_many(clients, number, seed) -> None:
    assume(clients * number >= 5)
    held = (table(Classes(number).split(Labels(BALANCED), clients, rng(seed)), BALANCED) > 0).sum(0)
    assert held.max() - held.min() <= 1


def test_who_holds_which_classes_is_drawn() -> None:
    pairs = {
        tuple(np.flatnonzero(row))
        for seed in range(20)
        for row in table(Classes().split(Labels(BALANCED), 5, rng(seed)), BALANCED)
    }
    assert len(pairs) == 10, "all pairs of five classes come up"


def test_two_of_four_classes_for_two_clients() -> None:
    y = np.repeat(np.arange(4), [3, 5, 7, 9])
    one, other = table(Classes(2).split(Labels(y), 2, rng()), y)
    np.testing.assert_array_equal(one + other, [3, 5, 7, 9])
    assert not (one * other).any()


def test_all_classes_are_nearly_iid() -> None:
    counts = table(Classes(5).split(Labels(BALANCED), 8, rng()), BALANCED)
    assert set(counts.ravel()) == {2, 3}
    assert (counts.sum(0) == 20).all()


def test_a_rare_class_goes_to_as_many_as_it_has_examples() -> None:
    y = np.repeat([0, 1, 2], [2, 50, 50])
    counts = table(Classes(2).split(Labels(y), 10, rng()), y)
    assert (counts > 0).sum(0).tolist() == [2, 9, 9]


@pytest.mark.parametrize(
    ("number", "clients", "y", "problem"),
    [
        (1, 3, BALANCED, "got 1: there are 3 clients, 5 classes of 20 to 20 .*; the smallest valid value is 2"),
        (6, 3, BALANCED, "got 6: .*; the largest valid value is 5"),
        (3, 10, np.repeat([0, 1, 2], [2, 50, 50]), "got 3: .* 3 classes of 2 to 50 .*; the largest valid value is 2"),
        (2, 2, np.arange(3), "got 2: .*; no value fits 2 clients; .* is 1"),
        (1, 8, np.arange(3), "got 1: .*; no value fits 8 clients; .* is 3"),
    ],
)
def test_an_impossible_number_of_classes_is_refused(number: int, clients: int, y: np.ndarray, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Classes(number).split(Labels(y), clients, rng())
    assert caught.value.key == "per_client"


# -- a Dirichlet mix per client --------------------------------------------------------------------------------------


@given(y=labels, clients=st.integers(1, 30), alpha=alphas, minimum=st.integers(1, 5), seed=seeds)
@settings(max_examples=100, deadline=None)
def test_mixes_are_disjoint_complete_and_equal(y, clients, alpha, minimum, seed) -> None:
    assume(clients * minimum <= len(y))
    partition = twice(DirichletMix(alpha, minimum), y, clients, seed)
    check(partition, len(y), clients, minimum)
    assert max(sizes(partition)) - min(sizes(partition)) <= 1
    assert partition.moved == 0


def test_a_large_alpha_draws_from_the_classes_shares() -> None:
    y = np.repeat([0, 1], [3000, 1000])
    counts = table(DirichletMix(float("inf")).split(Labels(y), 10, rng()), y)
    assert counts.sum(1).tolist() == [400] * 10
    assert np.abs(counts[:, 0] - 300).max() < 45  # five standard deviations


def test_a_tiny_alpha_gives_one_class_while_there_is_any() -> None:
    y = np.repeat(np.arange(4), 1000)
    for seed in range(5):
        counts = table(DirichletMix(1e-9).split(Labels(y), 3, rng(seed)), y)
        assert (counts.max(1) >= 333).all()
        assert ((counts > 0).sum(1) <= 3).all()
    # About 100 of 400 clients want each class, and there is enough of it for 100 clients.
    largest = table(DirichletMix(1e-9).split(Labels(y), 400, rng()), y).max(1)
    assert (largest == 10).mean() > 0.5
    assert (largest >= 8).mean() > 0.9


def test_the_mixes_are_dirichlet() -> None:
    """Few clients' worth of a large pool would be Dir-multinomial; here the first draws of many clients are."""
    alpha, clients, size = 2.0, 400, 200
    y = np.arange(clients * size) % 2
    mixes = table(DirichletMix(alpha).split(Labels(y), clients, rng()), y)[:, 0] / size
    # Dir(1, 1) is uniform, of variance 1/12; what the last draws lack of a class they take from the other.
    assert mixes.mean() == pytest.approx(0.5)
    assert mixes.var() == pytest.approx(1 / 12, rel=0.2)
    assert np.histogram(mixes, bins=4, range=(0, 1))[0].min() > 70


def test_every_client_gets_the_rare_class_equally_often() -> None:
    y = np.array([0, 0, 0, 1])
    node = DirichletMix(1e-9, min_examples=1)
    often = np.mean([table(node.split(Labels(y), 4, rng(seed)), y)[:, 1] for seed in range(600)], axis=0)
    # In a fixed order the last client would have it in 0.42 of the draws.
    assert np.abs(often - 0.25).max() < 0.08


def test_no_client_is_left_with_the_rest() -> None:
    y = np.repeat(np.arange(4), 500)
    spread = np.array(
        [(table(DirichletMix(0.1).split(Labels(y), 20, rng(seed)), y) > 0).sum(1) for seed in range(40)]
    ).mean(0)
    assert np.abs(spread - spread.mean()).max() < 0.8, "the last clients have as few classes as the first"


def test_only_an_impossible_minimum_is_refused() -> None:
    check(DirichletMix(min_examples=4).split(Labels(np.arange(12) % 3), 3, rng()), 12, 3, 4)
    with pytest.raises(ConfigError, match="the largest valid value is 3") as caught:
        DirichletMix(min_examples=4).split(Labels(np.arange(12) % 3), 4, rng())
    assert caught.value.key == "min_examples"
