"""Who owns which domain, when the server has some of its own or a file says so."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from partition_helpers import unread

from hybridfl.data.dataset import Dataset, Examples
from hybridfl.data.partition_domains import Domains
from hybridfl.data.partition_file import File
from hybridfl.data.partitioning import IID, Dirichlet
from hybridfl.data.server_data import Domains as ServerDomains
from hybridfl.data.server_data import NoServerData, Share
from hybridfl.data.split import Drawn, Split, draw_split
from hybridfl.errors import ConfigError, DataError
from hybridfl.tasks import Tasks


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


NAMES = ("a", "b", "c")


def dataset(train: tuple[int, ...] = (60, 40, 20), test: tuple[int, ...] = (30, 30, 30), classes: int = 2) -> Dataset:
    """Three domains with so many examples each, classes in turn."""

    def part(sizes: tuple[int, ...]) -> Examples:
        domain = np.repeat(np.arange(len(sizes)), sizes)
        return Examples(np.zeros((len(domain), 1, 1, 1), np.uint8), np.arange(len(domain)) % classes, domain)

    return Dataset("three", part(train), part(test), classes, (0.0,), (1.0,), NAMES[: len(train)])


def draw(data: Dataset, **changes: Any) -> Drawn:
    options: dict[str, Any] = {
        "partitioning": Domains(IID()),
        "server_data": NoServerData(),
        "clients": 6,
        "client_validation": 0.0,
        "min_test": 1,
        "seed": 0,
    }
    return draw_split(data, **{**options, **changes}, load=unread, tasks=Tasks().stream(data.classes, 1, 0))


def test_the_servers_domains_are_nobody_elses() -> None:
    data = dataset()
    for partitioning in (Domains(IID()), IID(), Dirichlet()):
        server = ServerDomains(domains=("b",), examples=10, validation=0.2)
        drawn = draw(data, server_data=server, partitioning=partitioning, client_validation=0.25)
        split = drawn.split
        theirs = np.concatenate([*split.clients_train, *split.clients_val])
        assert set(data.train.domain[theirs]) == {0, 2}
        assert len(theirs) == 80, "all of the other domains is dealt out"
        own = np.concatenate([split.server_train, split.server_val])
        assert len(own) == 10
        assert len(split.server_val) == 2
        assert (data.train.domain[own] == 1).all()
        assert np.bincount(data.train.y[own]).tolist() == [5, 5]
        assert split.domain_counts.sum(0).tolist() == [60, 0, 20]
        assert split.server_test is not None
        assert data.test.domain[split.server_test].tolist() == [0] * 30 + [2] * 30
        assert not any((data.test.domain[test] == 1).any() for test in split.clients_test)
        assert drawn.domains == NAMES
        assert drawn.pool is data.train


def test_a_fraction_is_of_the_servers_domains() -> None:
    split = draw(dataset(), server_data=ServerDomains(domains=("c", "b"), fraction=0.5)).split
    assert len(split.server_train) == 30
    assert split.server_test is not None
    assert set(dataset().test.domain[split.server_test]) == {0}


def test_without_domains_of_its_own_the_server_tests_on_everything() -> None:
    assert draw(dataset(), server_data=Share(examples=10)).split.server_test is None
    # A share that takes the last example of a domain leaves its test examples to nobody.
    split = draw(dataset((60, 4, 20)), server_data=ServerDomains(domains=("b",), examples=4)).split
    assert split.server_test is not None
    assert len(split.server_test) == 60


@pytest.mark.parametrize(
    ("domains", "key", "problem"),
    [
        ((), "domains", r"got \[\]: name one or more; three has the domains a, b, c"),
        (("a", "d"), "domains[1]", "got 'd'. .*Valid: a, b, c"),
        (("a", "b", "c"), "domains", r"these are all domains; leave one for the clients"),
    ],
)
def test_the_servers_domains_must_be_some(domains: tuple[str, ...], key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        draw(dataset(), server_data=ServerDomains(domains=domains, examples=5))
    assert caught.value.key == f"server_data.{key}"


def test_there_must_be_so_many_in_them_and_domains_at_all() -> None:
    with pytest.raises(ConfigError, match=r"got 41: there are 40 training examples of the domains b; .* 40"):
        draw(dataset(), server_data=ServerDomains(domains=("b",), examples=41))
    with pytest.raises(ConfigError, match="name one or more; three has one domain, a"):
        draw(dataset((60,), (30,)), server_data=ServerDomains(domains=("a",)))


def file(owners: Any, complete: bool = True) -> File:
    Path("owners.json").write_text(json.dumps(owners))
    return File("owners.json", complete=complete)


def test_a_split_with_the_servers_domains_can_be_given_back() -> None:
    server = ServerDomains(domains=("b",), examples=10)
    first = draw(dataset(), server_data=server).split
    again = draw(dataset(), server_data=server, partitioning=file(first.to_json())).split
    assert again.digest == first.digest


def test_a_file_that_gives_clients_what_should_be_the_servers_alone() -> None:
    owners = [[0, 1, 60], *([n] for n in range(61, 66))]  # 60 to 65 are of domain b
    with pytest.raises(ConfigError, match=r"got \['b'\]: 6 examples of these domains are given to clients") as caught:
        draw(
            dataset(),
            server_data=ServerDomains(domains=("b",), examples=5),
            partitioning=file(owners, complete=False),
        )
    assert caught.value.key == "server_data.domains"


def test_one_domain_left_by_a_file_is_still_not_all() -> None:
    owners = [list(range(k, 60, 6)) + list(range(100 + k, 120, 6)) for k in range(6)]
    split = draw(dataset(), server_data=ServerDomains(domains=("b",), examples=5), partitioning=file(owners)).split
    assert len(split.server_train) == 5


def test_test_sets_keep_the_proportions_of_domains_and_classes() -> None:
    """Client 0 has 3 of 4 of its examples in a and 2 of 3 of those in class 0; client 1 is all of c."""
    data = dataset((60, 40, 20), (60, 60, 60))
    in_a = np.flatnonzero((data.train.domain == 0) & (data.train.y == 0))[:12]
    also = np.flatnonzero((data.train.domain == 0) & (data.train.y == 1))[:6]
    in_b = np.flatnonzero((data.train.domain == 1) & (data.train.y == 0))[:6]
    in_c = np.flatnonzero(data.train.domain == 2)
    owners = [[*in_a.tolist(), *also.tolist(), *in_b.tolist()], in_c.tolist()]
    split = draw(data, partitioning=file(owners, complete=False), clients=2, min_test=8, seed=3).split
    test = split.clients_test[0]
    cells = np.stack([data.test.domain[test], data.test.y[test]])
    # All of the clients' examples of a and of b are its own, so it is tested on 120 examples, as far as there are: class 0
    # of domain a has 30, which are half of the test set, so it has 60.
    assert np.unique(cells, axis=1, return_counts=True)[1].tolist() == [30, 15, 15]
    assert len(split.clients_test[1]) == 60
    assert set(data.test.domain[split.clients_test[1]]) == {2}
    assert split.client_domains == [0, 2]
    assert split.domain_counts.tolist() == [[18, 6, 0], [0, 0, 20]]


def test_a_client_is_tested_on_as_large_a_part_of_its_domain_as_it_owns() -> None:
    split = draw(dataset((60, 40, 20), (30, 60, 90)), clients=6).split
    assert split.client_domains == [0, 0, 1, 1, 2, 2]
    assert [len(test) for test in split.clients_test] == [15, 15, 30, 30, 45, 45]


def test_validation_views_keep_the_proportions_of_domains() -> None:
    split = draw(dataset(), partitioning=IID(), clients=1, client_validation=0.2).split
    assert np.bincount(dataset().train.domain[split.clients_val[0]]).tolist() == [12, 8, 4]


def test_a_domain_without_test_examples_is_named() -> None:
    with pytest.raises(DataError, match=r"no example of the classes \[0, 1\] of client 4 in the domains c"):
        draw(dataset((60, 40, 20), (30, 30, 0)))


def test_a_split_by_domains_goes_to_json_and_back() -> None:
    split = draw(dataset(), server_data=ServerDomains(domains=("a",), examples=10), client_validation=0.2).split
    stored = json.loads(json.dumps(split.to_json()))
    back = Split.from_json(stored)
    assert back.digest == split.digest
    for field in dataclasses.fields(Split):
        one, other = (getattr(s, field.name) for s in (split, back))
        if isinstance(one, tuple):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)), field.name
        else:
            np.testing.assert_array_equal(one, other, err_msg=field.name)
    assert back.client_domains == split.client_domains
    stored["server"]["test"][0] += 1
    with pytest.raises(DataError, match="its digest is"):
        Split.from_json(stored)
