"""The split of a run: who may own what, and that test data stay apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_helpers import unread

from hybridfl.data import dealing, holding_out
from hybridfl.data import split as split_module
from hybridfl.data.dataset import Dataset, Examples
from hybridfl.data.partitioning import IID, Dirichlet, Partition
from hybridfl.data.server_data import NoServerData, Share
from hybridfl.data.split import Split, draw_split
from hybridfl.errors import ConfigError, DataError
from hybridfl.rng import stream
from hybridfl.tasks import Tasks


def dataset(train: list[int], test: list[int]) -> Dataset:
    """A data set with so many examples of each class."""

    def part(counts: list[int]) -> Examples:
        y = np.repeat(np.arange(len(counts)), counts)
        return Examples(np.zeros((len(y), 1, 1, 1), dtype=np.uint8), y)

    return Dataset("counted", part(train), part(test), len(train), (0.0,), (1.0,))


BALANCED = dataset([100, 100, 100, 100], [50, 50, 50, 50])


def draw(data: Dataset = BALANCED, **changes) -> Split:
    options = {
        "partitioning": Dirichlet(alpha=0.3),
        "server_data": Share(examples=40, validation=0.25),
        "clients": 8,
        "client_validation": 0.2,
        "min_test": 20,
        "seed": 0,
    }
    return draw_split(data, **{**options, **changes}, load=unread, tasks=Tasks().stream(data.classes, 1, 0)).split


@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    clients=st.integers(1, 10),
    share=st.integers(1, 10),
    alpha=st.sampled_from([1e-3, 0.1, 10.0]),
    validation=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_everything_is_owned_once_and_nobody_is_left_without(counts, clients, share, alpha, validation, seed) -> None:
    counts[0] += 20
    data = dataset(counts, counts)
    split = draw(
        data,
        partitioning=Dirichlet(alpha=alpha, min_examples=1),
        server_data=Share(examples=share, validation=validation),
        clients=clients,
        client_validation=validation,
        seed=seed,
    )
    trained = [*split.clients_train, *split.clients_val, split.server_train, split.server_val]
    np.testing.assert_array_equal(np.sort(np.concatenate(trained)), np.arange(len(data.train)))
    assert all(len(train) for train in (*split.clients_train, split.server_train))
    assert len(split.server_train) + len(split.server_val) == share
    for train, val, test, owned in zip(
        split.clients_train, split.clients_val, split.clients_test, split.class_counts, strict=True
    ):
        size = len(train) + len(val)
        assert len(val) == min(int(np.floor(validation * size + 0.5)), size - 1)
        both = np.concatenate([train, val])
        np.testing.assert_array_equal(np.bincount(data.train.y[both], minlength=len(counts)), owned)
        # Each class's part is its exact value rounded down or up, in the validation view and in the test set.
        for view, labels in ((val, data.train.y), (test, data.test.y)):
            found = np.bincount(labels[view], minlength=len(counts))
            assert np.abs(found - len(view) * owned / size).max() < 1
        assert len(test) >= 1
        assert (np.diff(test) > 0).all(), "no test example twice within a client"
        assert test.min() >= 0
        assert test.max() < len(data.test)
    again = draw(
        data,
        partitioning=Dirichlet(alpha=alpha, min_examples=1),
        server_data=Share(examples=share, validation=validation),
        clients=clients,
        client_validation=validation,
        seed=seed,
    )
    assert again.digest == split.digest


def test_the_servers_share_is_balanced_and_so_is_its_validation_view() -> None:
    split = draw()
    owned = np.concatenate([split.server_train, split.server_val])
    assert np.bincount(BALANCED.train.y[owned]).tolist() == [10] * 4
    assert sorted(np.bincount(BALANCED.train.y[split.server_val])) == [2, 2, 3, 3]


def test_a_test_set_has_the_clients_class_proportions_and_size() -> None:
    # Two clients, one class each: 300 and 100 of 400 examples.
    data = dataset([300, 100], [60, 60])

    class ByClass:
        seed = None

        def split(self, labels, clients, rng) -> Partition:
            return Partition([np.flatnonzero(labels.y == 0), np.flatnonzero(labels.y == 1)])

    split = draw(data, partitioning=ByClass(), server_data=NoServerData(), clients=2, min_test=10)
    # 3/4 of 120 test examples would be 90 of class 0: there are 60. A quarter is 30.
    assert [np.bincount(data.test.y[test], minlength=2).tolist() for test in split.clients_test] == [[60, 0], [0, 30]]
    split = draw(data, partitioning=ByClass(), server_data=NoServerData(), clients=2, min_test=50)
    assert [len(test) for test in split.clients_test] == [60, 50]


def test_a_test_set_is_scaled_down_with_its_proportions_kept() -> None:
    data = dataset([30, 10], [30, 5])
    split = draw(data, partitioning=IID(), server_data=NoServerData(), clients=1, min_test=1000)
    assert np.bincount(data.test.y[split.clients_test[0]]).tolist() == [15, 5]


def test_a_class_without_test_examples_is_left_out_and_nothing_to_test_is_refused() -> None:
    split = draw(dataset([10, 10], [10, 0]), partitioning=IID(), server_data=NoServerData(), clients=1)
    assert len(split.clients_test[0]) == 10
    with pytest.raises(DataError, match=r"no example of the classes \[1\] of client 0"):
        draw(dataset([0, 10], [10, 0]), partitioning=IID(), server_data=NoServerData(), clients=1)


def test_test_sets_of_two_clients_may_overlap() -> None:
    split = draw(partitioning=IID(), clients=10, min_test=100)
    assert len(np.intersect1d(split.clients_test[0], split.clients_test[1]))


def test_the_seed_of_the_partitioning_goes_before_the_runs() -> None:
    assert draw(seed=1).digest != draw(seed=2).digest
    fixed = [draw(partitioning=Dirichlet(alpha=0.3, seed=5), seed=seed).digest for seed in (1, 2)]
    assert fixed[0] == fixed[1] == draw(seed=5).digest


def test_views_have_streams_of_their_own() -> None:
    """Holding out more, or testing on more, moves no example from one owner to another."""
    one, other = draw(), draw(client_validation=0.4, min_test=60, server_data=Share(examples=40))
    np.testing.assert_array_equal(one.class_counts, other.class_counts)
    for a, b in zip(one.clients_train, other.clients_train, strict=True):
        assert len(b) < len(a)
    np.testing.assert_array_equal(np.union1d(one.server_train, one.server_val), other.server_train)


def test_no_stream_is_used_for_two_purposes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for module in (split_module, dealing, holding_out):
        monkeypatch.setattr(module, "stream", lambda *keys: asked.append(keys) or stream(*keys))
    draw(clients=3)
    assert len(asked) == len(set(asked)) == 2 + 3 + 1 + 3


def test_validation_can_be_off() -> None:
    split = draw(client_validation=0.0, server_data=Share(examples=40))
    assert all(len(val) == 0 and val.dtype == np.int64 for val in (*split.clients_val, split.server_val))


def test_without_server_data_the_clients_own_everything() -> None:
    split = draw(server_data=NoServerData())
    assert len(split.server_train) == len(split.server_val) == 0
    assert split.class_counts.sum() == 400


def test_moved_examples_are_reported() -> None:
    assert draw(partitioning=IID()).moved == 0
    split = draw(partitioning=Dirichlet(alpha=1e-9), clients=100)
    assert split.moved >= 190
    assert split.class_counts.sum(1).min() == 2


def test_json_and_back() -> None:
    split = draw()
    stored = json.loads(json.dumps(split.to_json()))
    back = Split.from_json(stored)
    assert back.digest == split.digest == stored["digest"]
    assert back.moved == split.moved
    np.testing.assert_array_equal(back.class_counts, split.class_counts)
    np.testing.assert_array_equal(back.clients_test[3], split.clients_test[3])
    assert stored["clients"][3]["sizes"]["train"] == len(split.clients_train[3])
    assert len(split.digest) == 12


def test_a_changed_or_incomplete_stored_split_is_refused() -> None:
    stored = draw().to_json()
    stored["clients"][0]["val"][0] += 1
    with pytest.raises(DataError, match="its digest is"):
        Split.from_json(stored)
    del stored["server"]
    with pytest.raises(DataError, match=r"damaged .*server"):
        Split.from_json(stored)


def test_the_digest_knows_whose_an_example_is() -> None:
    none = np.empty(0, dtype=np.int64)
    counts = np.zeros((2, 1), dtype=np.int64)
    one, two, three = np.array([1]), np.array([2]), np.array([1, 2])
    splits = [
        Split((one, two), (none, none), (none, none), none, none, counts, counts),
        Split((two, one), (none, none), (none, none), none, none, counts, counts),
        Split((three, none), (none, none), (none, none), none, none, counts, counts),
        Split((none, none), (one, two), (none, none), none, none, counts, counts),
        Split((one, two), (none, none), (none, none), none, none, counts, counts, server_test=one),
    ]
    assert len({split.digest for split in splits}) == 5


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        ({"clients": 0}, "clients.number", "at least 1"),
        ({"clients": 361}, "clients.number", "got 361: .* after the server took 40; the largest valid value is 360"),
        ({"clients": 300}, "partitioning.min_examples", "the largest valid value is 1"),
        ({"server_data": Share(examples=400)}, "server_data", "takes all 400"),
        ({"server_data": Share(examples=401)}, "server_data.examples", "the largest valid value is 400"),
        ({"server_data": Share(classes=(7,))}, "server_data.classes", "the classes are 0 to 3"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes: dict, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        draw(**changes)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ([[0, 1], [1, 2, 3]], "exactly once"),
        ([[0], [1, 2]], "exactly once"),
        ([[0, 1, 2, 3], []], "an example or more"),
        ([[0, 1, 2, 3]], "an example or more"),
    ],
)
def test_a_users_own_partitioning_is_checked(shares: list[list[int]], problem: str) -> None:
    class Wrong:
        seed = None

        def split(self, y, clients, rng) -> Partition:
            return Partition([np.array(share, dtype=np.int64) for share in shares])

    with pytest.raises(ConfigError, match=f"Wrong.split must .*{problem}"):
        draw(dataset([4], [4]), partitioning=Wrong(), server_data=NoServerData(), clients=2)


class Shared:
    """Given shares, of which several may have the same example."""

    seed = None

    def __init__(self, shares: list[list[int]], complete: bool) -> None:
        self.partition = Partition([np.array(share, dtype=np.int64) for share in shares], 0, complete, shared=True)

    def split(self, y, clients, rng) -> Partition:
        return self.partition


def test_clients_may_share_examples_where_the_partition_says_so() -> None:
    data, shares = dataset([4, 4], [40, 40]), [[0, 1, 1, 5], [1, 5, 6, 7]]

    def drawn(validation: float) -> Split:
        options = {"partitioning": Shared(shares, False), "server_data": NoServerData(), "clients": 2}
        return draw(data, **options, client_validation=validation)

    split = drawn(0.0)
    assert [share.tolist() for share in split.clients_train] == shares
    assert split.is_shared
    assert not draw(data, clients=2, server_data=NoServerData()).is_shared
    held_out = drawn(0.5)
    for train, val, share in zip(held_out.clients_train, held_out.clients_val, shares, strict=True):
        assert not set(train) & set(val)
        assert {*train, *val} == set(share)


@pytest.mark.parametrize(("last", "complete"), [(4, False), (2, True)])
def test_shared_examples_are_still_checked(last: int, complete: bool) -> None:
    everybody = ", each of them to somebody" if complete else ""
    with pytest.raises(ConfigError, match=rf"Shared.split must deal out examples of 0 to 3{everybody}\."):
        draw(
            dataset([4], [4]),
            partitioning=Shared([[0, 1], [1, last]], complete),
            server_data=NoServerData(),
            clients=2,
        )
