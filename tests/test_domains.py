"""Data of several domains: reading them, dealing them out, the server's own, test sets and scores by domain."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import cli_helpers
import helpers
import numpy as np
import pytest
import torch
from cli_helpers import call, done, rows, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from partition_helpers import check, rng, unread
from PIL import Image

from hybridfl.data.conversion import Form, converted
from hybridfl.data.dataset import Dataset, Examples, Labels
from hybridfl.data.domains import Domains as Sets
from hybridfl.data.partition_domains import Domains
from hybridfl.data.partition_file import File
from hybridfl.data.partition_labels import Classes
from hybridfl.data.partition_sizes import Quantity
from hybridfl.data.partitioning import IID, Dirichlet, Partition
from hybridfl.data.server_data import Domains as ServerDomains
from hybridfl.data.server_data import NoServerData, Share
from hybridfl.data.split import Drawn, Split, draw_split
from hybridfl.errors import ConfigError, DataError
from hybridfl.evaluation import Evaluation, Evaluator
from hybridfl.executors import sequential
from hybridfl.local import Outcome, Task, Workbench, run_task
from hybridfl.methods.base import Facts
from hybridfl.plan import Plan
from hybridfl.tasks import Tasks
from hybridfl.types import SERVER, Model, Served


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def blocks(*sizes: int, classes: int = 3) -> Labels:
    """Labels of domains with so many examples; those of one domain do not lie together."""
    domain = rng().permutation(np.repeat(np.arange(len(sizes)), sizes))
    return Labels(np.arange(len(domain)) % classes, domain)


def held(partition: Partition, labels: Labels) -> list[list[int]]:
    """The domains of each client."""
    return [np.unique(labels.domain[share]).tolist() for share in partition.shares]


# -- the partitioning ------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(12, 60), min_size=1, max_size=4),
    clients=st.integers(4, 12),
    numbers=st.sampled_from(["equal", "proportional"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_client_has_one_domain_and_nothing_is_lost(
    sizes: list[int], clients: int, numbers: Any, seed: int
) -> None:
    labels = blocks(*sizes)
    node = Domains(Dirichlet(alpha=0.5, min_examples=1), clients=numbers)
    partition = node.split(labels, clients, rng(seed))
    check(partition, len(labels), clients, 1)
    assert partition.complete
    domains = held(partition, labels)
    assert all(len(found) == 1 for found in domains)
    assert domains == sorted(domains), "clients are numbered domain by domain"
    of = np.bincount(np.concatenate(domains), minlength=len(sizes))
    if numbers == "equal":
        assert of.max() - of.min() <= 1
        assert sorted(of, reverse=True) == of.tolist()
        return
    # No client more could go where its examples would be more than those of a client that another domain has.
    assert all(
        of[d] == 1 or sizes[d] / of[d] >= sizes[e] / (of[e] + 1) for d in range(len(sizes)) for e in range(len(sizes))
    )


@given(sizes=st.lists(st.integers(12, 60), min_size=2, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_cut_domains_have_as_many_as_the_smallest(sizes: list[int], seed: int) -> None:
    labels = blocks(*sizes)
    partition = Domains(IID(), cut=True).split(labels, 8, rng(seed))
    dealt = np.concatenate(partition.shares)
    assert len(np.unique(dealt)) == len(dealt)
    assert np.bincount(labels.domain[dealt]).tolist() == [min(sizes)] * len(sizes)
    assert not partition.complete
    # After the cut all domains are of one size, so their clients are equally many.
    even = Domains(IID(), clients="proportional", cut=True).split(labels, 4 * len(sizes), rng(seed))
    assert np.bincount(np.concatenate(held(even, labels))).tolist() == [4] * len(sizes)


def test_the_examples_cut_away_are_drawn() -> None:
    labels = Labels(np.zeros(30, dtype=np.int64), np.repeat([0, 1], (20, 10)))
    left = [np.concatenate(Domains(IID(), cut=True).split(labels, 2, rng(seed)).shares[:1]) for seed in range(2)]
    assert len(left[0]) == len(left[1]) == 10
    assert set(left[0]) != set(left[1])
    assert max(left[0].max(), left[1].max()) > 9, "not the first ones"


def test_proportions_and_numbers_by_hand() -> None:
    labels = blocks(60, 30, 12)
    for clients, expected in ((3, [1, 1, 1]), (6, [4, 1, 1]), (9, [6, 2, 1]), (17, [10, 5, 2])):
        partition = Domains(IID(), clients="proportional").split(labels, clients, rng())
        assert np.bincount(np.concatenate(held(partition, labels))).tolist() == expected
    partition = Domains(IID(), clients=(1, 3, 2)).split(labels, 6, rng())
    assert [len(share) for share in partition.shares] == [60, 10, 10, 10, 6, 6]


def test_one_domain_is_the_inner_partitioning_alone() -> None:
    labels = blocks(50)
    for within in (IID(), Dirichlet(), Classes(), Quantity()):
        one, other = Domains(within).split(labels, 5, rng()), within.split(labels, 5, rng())
        assert one.moved == other.moved
        for share, same in zip(one.shares, other.shares, strict=True):
            np.testing.assert_array_equal(share, same)


def test_the_inner_partitioning_sees_the_labels_of_its_domain() -> None:
    labels = Labels(np.repeat([0, 1, 2, 3], 10), np.repeat([0, 1], 20))
    partition = Domains(Classes(per_client=1)).split(labels, 4, rng())
    found = [np.unique(labels.y[share]).tolist() for share in partition.shares]
    assert sorted(found[:2]) == [[0], [1]]
    assert sorted(found[2:]) == [[2], [3]]


def test_moved_examples_of_all_domains_are_counted() -> None:
    labels = blocks(30, 30)
    partition = Domains(Dirichlet(alpha=1e-9, min_examples=2)).split(labels, 20, rng())
    draws = rng()
    alone = [
        Dirichlet(alpha=1e-9, min_examples=2).split(Labels(labels.y[labels.domain == d]), 10, draws) for d in (0, 1)
    ]
    assert min(part.moved for part in alone) > 0
    assert partition.moved == sum(part.moved for part in alone)
    assert held(partition, labels) == [[0]] * 10 + [[1]] * 10


@pytest.mark.parametrize(
    ("options", "clients", "key", "problem"),
    [
        ({}, 2, "clients", "got equal: 2 clients cannot hold 3 domains, one each; set clients.number to 3 or more"),
        ({}, 33, "clients", "got equal: 11 clients are too many for a domain of 4 examples; .* 4"),
        ({"clients": (2, 2)}, 4, "clients", r"got \[2, 2\]: expected 3 numbers with sum 4"),
        ({"clients": (2, 2, 2)}, 7, "clients", r"got \[2, 2, 2\]: expected 3 numbers with sum 7"),
        ({"clients": (1, 1, 5)}, 7, "clients", r"got \[1, 1, 5\]: 5 clients are too many .* of 4 examples"),
        ({"within": Dirichlet(min_examples=3)}, 6, "within.min_examples", "got 3: 2 clients need 6 .* value is 2"),
        ({"within": Classes(per_client=4)}, 3, "within.per_client", "got 4: .* value is 3"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], clients: int, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Domains(**{"within": IID(), **options}).split(blocks(30, 30, 4), clients, rng())
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("within", "key", "problem"),
    [
        (File(path="owners.json"), "within", "File names examples of the whole data set"),
        (IID(seed=3), "within.seed", "got 3: one seed decides the whole draw; leave null and set partitioning.seed"),
    ],
)
def test_an_inner_partitioning_that_does_not_fit(within: Any, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Domains(within)
    assert caught.value.key == key


# -- reading ---------------------------------------------------------------------------------------------------------


class Fixed:
    """A reader of images that are given to it."""

    def __init__(self, x: np.ndarray, classes: int = 10, white: float | None = 255.0, name: str = "fixed") -> None:
        self.x, self.classes, self.white, self.name = x, classes, white, name

    def load(self, root: Path) -> Dataset:
        y = np.arange(len(self.x)) % self.classes
        part = Examples(self.x, y)
        channels = self.x.shape[1]
        return Dataset(
            self.name,
            part,
            part.at(slice(2)),
            self.classes,
            (0.0,) * channels,
            (1.0,) * channels,
            white=self.white,
        )


def pixels(*shape: int, white: int = 255) -> np.ndarray:
    return np.random.default_rng(0).integers(0, white + 1, shape).astype(np.uint8)


def sets() -> dict[str, Any]:
    return {"grey": Fixed(pixels(5, 1, 4, 4)), "dark": Fixed(pixels(4, 1, 4, 4, white=16), white=16.0)} | {
        "colour": Fixed(pixels(3, 3, 4, 4))
    }


def test_sets_become_domains_of_one_form() -> None:
    found = Sets(sets(), size=4, name="mine").load(Path())
    assert (found.name, found.classes, found.white) == ("mine", 10, 255.0)
    assert found.domains == ("grey", "dark", "colour")
    assert found.mean == found.std == (127.5,) * 3
    assert found.train.x.shape == (12, 3, 4, 4)
    assert found.train.x.dtype == np.uint8
    assert found.train.domain.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert found.train.y.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert found.test.domain.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.test.y.tolist() == [0, 1] * 3
    given = sets()
    for channel in range(3):
        np.testing.assert_array_equal(found.train.x[:5, channel], given["grey"].x[:, 0])
        np.testing.assert_array_equal(found.train.x[5:9, channel], np.rint(given["dark"].x[:, 0] * (255 / 16)))
    np.testing.assert_array_equal(found.train.x[9:], given["colour"].x)


def test_chosen_domains_their_order_negatives_and_a_limit() -> None:
    whole = Sets(sets(), size=4).load(Path())
    found = Sets(sets(), ("colour", "grey"), size=4, invert=("grey",), limit=4).load(Path())
    assert found.domains == ("colour", "grey")
    assert found.train.domain.tolist() == [0] * 3 + [1] * 4, "of a smaller domain all"
    np.testing.assert_array_equal(found.train.x[:3], whole.train.x[9:])
    np.testing.assert_array_equal(found.train.x[3:], 255 - whole.train.x[:4])
    np.testing.assert_array_equal(found.test.x[2:], 255 - whole.test.x[:2])
    assert found.fingerprint != whole.fingerprint
    single = Sets(sets(), size=4, channels=1).load(Path())
    assert single.train.x.shape == (12, 1, 4, 4)
    assert single.mean == (127.5,)


def test_a_fingerprint_knows_the_domains() -> None:
    examples = Examples(pixels(4, 1, 2, 2), np.arange(4))
    other = dataclasses.replace(examples, domain=np.array([0, 0, 1, 1]))
    found = [Dataset("d", e, examples, 4, (0.0,), (1.0,), names) for e in (examples, other) for names in ("ab", "ac")]
    assert len({one.fingerprint for one in found}) == 4


@pytest.mark.parametrize(
    ("options", "key", "problem"),
    [
        ({"sets": {}}, "sets", "name one or more"),
        ({"domains": ("grey", "grey")}, "domains", "different names"),
        ({"domains": ()}, "domains", "one or more"),
        ({"domains": ("gray",)}, r"domains[0]", "got 'gray'. Did you mean 'grey'?"),
        ({"invert": ("dark", "drak")}, r"invert[1]", "Did you mean 'dark'?"),
    ],
)
def test_names_are_checked_before_anything_is_read(options: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sets(**{"sets": sets(), **options})
    assert caught.value.key == key
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("odd", "key", "problem"),
    [
        (Fixed(pixels(3, 1, 4, 4), classes=3), "sets", "their numbers are grey 10, odd 3"),
        (Fixed(pixels(3, 1, 4, 4), white=None, name="waves"), "sets.odd", "got waves, .* values that are no intens"),
        (Fixed(pixels(3, 2, 4, 4)), "sets.odd", "got fixed, .* has 2 channels"),
    ],
)
def test_sets_that_cannot_be_domains_of_one_task(odd: Fixed, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Sets({"grey": sets()["grey"], "odd": odd}).load(Path())
    assert caught.value.key == key


# -- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 5), (28, 28), (32, 40), (64, 3), (1, 1)])
@pytest.mark.parametrize("old", [(28, 28), (8, 8), (17, 30)])
def test_sizes_change_as_in_pillow(old: tuple[int, int], size: tuple[int, int]) -> None:
    x = pixels(3, 1, *old)
    form = Form((1, *size), 1.0, "float32")
    found = converted(Fixed(x).load(Path()), Examples(x, np.zeros(3, dtype=np.int64)), form)
    for image, mine in zip(x[:, 0].astype(np.float32), found.x[:, 0], strict=True):
        theirs = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(255 * mine, np.asarray(theirs), atol=2e-3)


@pytest.mark.parametrize("size", [16, 32, 40])
def test_whole_numbers_are_pillows_but_for_its_rounding_in_between(size: int) -> None:
    x = pixels(3, 3, 28, 28)
    examples = Examples(x, np.arange(3))
    for channels, mode in ((3, "RGB"), (1, "L")):
        found = converted(Fixed(x).load(Path()), examples, Form((channels, size, size)))
        assert found.x.dtype == np.uint8
        for image, mine in zip(x, found.x, strict=True):
            pillow = Image.fromarray(image.transpose(1, 2, 0)).convert(mode)
            theirs = np.atleast_3d(np.asarray(pillow.resize((size, size), Image.Resampling.BILINEAR), dtype=int))
            assert np.abs(mine.transpose(1, 2, 0) - theirs).max() <= 1


def test_constants_stay_and_grey_becomes_equal_colours() -> None:
    x = np.full((2, 1, 5, 9), 100, dtype=np.uint8)
    found = converted(Fixed(x).load(Path()), Examples(x, np.arange(2)), Form((3, 16, 16)))
    assert (found.x == 100).all()
    back = converted(Fixed(found.x).load(Path()), found, Form((1, 5, 9)))
    assert (back.x == 100).all()
    assert back.y.tolist() == [0, 1]


# -- who owns what ---------------------------------------------------------------------------------------------------

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


# -- scores ----------------------------------------------------------------------------------------------------------

TWO = (
    "dataset=domains",
    "+dataset@dataset.sets.more=digits",
    "dataset.size=4",
    "dataset.channels=1",
    "dataset.limit=60",
    "dataset.invert=[more]",
    "partitioning=domains",
    "model.hidden=[]",
    "baseline=fedavg",
)


class Deployed(Facts):
    """Serves what it is told, by participant."""

    def __init__(self, served: dict[int, list[Served]]) -> None:
        self.served = served

    def serve(self, state: Any, participant: int) -> list[Served]:
        return self.served.get(participant, [])


@pytest.fixture(scope="module")
def plan() -> Plan:
    return helpers.plan(*TWO)


def constant(plan: Plan, label: int) -> list[Served]:
    """A net that always says this class, with logits 1 and nine times 0."""
    params = {name: torch.zeros_like(tensor) for name, tensor in plan.federation.start.params.items()}
    params["head.bias"][label] = 1
    return [Served(Model(params, {}))]


def scores(plan: Plan, served: dict[int, list[Served]]) -> dict[str, dict[str, Any]]:
    method: Any = Deployed(served)
    found = Evaluator(plan.federation, method, Evaluation()).score({}, 1, True)
    return {row["scope"]: row for row in found.rows}


def test_scopes_by_domain_of_a_global_model(plan: Plan) -> None:
    federation = plan.federation
    test, own = federation.dataset.test, federation.split.clients_test
    found = scores(plan, dict.fromkeys((SERVER, *range(5)), constant(plan, 3)))
    assert list(found) == [
        *("global", "global/domain=digits", "global/domain=more"),
        *("clients", "clients/domain=digits", "clients/domain=more"),
        *("served", "served/domain=digits", "served/domain=more"),
    ]
    for d, name in enumerate(("digits", "more")):
        inside = test.domain == d
        row = found[f"global/domain={name}"]
        right = float((test.y[inside] == 3).mean())
        assert (row["examples"], row["accuracy"]) == (445, pytest.approx(right))
        assert row["loss"] == pytest.approx(np.log(np.e + 9) - right)
        assert found[f"served/domain={name}"]["accuracy"] == pytest.approx(right)
        theirs = [index for index in own if test.domain[index[0]] == d]
        assert len(theirs) == (3, 2)[d]
        each = [(test.y[index] == 3).mean() for index in theirs]
        row = found[f"clients/domain={name}"]
        assert row["accuracy"] == pytest.approx(np.mean(each))
        assert row["worst10"] == pytest.approx(min(each))
        assert row["spread"] == pytest.approx(np.std(each))
        assert row["examples"] == sum(map(len, theirs))


def test_scopes_by_domain_of_personal_models(plan: Plan) -> None:
    """A net of their own for each client, so that the client's examples alone are run; and one client serves nothing."""
    federation = plan.federation
    test, own = federation.dataset.test, federation.split.clients_test
    found = scores(plan, {k: constant(plan, k) for k in range(4)})
    each = [(test.y[own[k]] == k).mean() for k in range(4)]
    assert found["clients/domain=digits"]["accuracy"] == pytest.approx(np.mean(each[:3]))
    assert found["clients/domain=more"]["accuracy"] == pytest.approx(each[3])
    inside = test.domain == 1
    assert found["served/domain=more"]["accuracy"] == pytest.approx(
        np.mean([(test.y[inside] == k).mean() for k in range(4)])
    )
    assert "global" not in found


def test_clients_of_several_domains_count_in_each_with_their_part_of_it() -> None:
    plan = helpers.plan(*(text for text in TWO if text != "partitioning=domains"), "partitioning=iid")
    test, own = plan.federation.dataset.test, plan.federation.split.clients_test
    found = scores(plan, {k: constant(plan, k) for k in range(5)})
    for d, name in enumerate(("digits", "more")):
        parts = [index[test.domain[index] == d] for index in own]
        assert all(0 < len(part) < len(index) for part, index in zip(parts, own, strict=True))
        each = [(test.y[part] == k).mean() for k, part in enumerate(parts)]
        assert found[f"clients/domain={name}"]["accuracy"] == pytest.approx(np.mean(each))
        assert found[f"clients/domain={name}"]["examples"] == sum(map(len, parts))


def test_a_domain_of_the_servers_alone_is_scored_apart() -> None:
    server = ("server_data=domains", "server_data.domains=[digits]", "server_data.examples=12")
    plan = helpers.plan(*TWO, *server)
    test = plan.federation.dataset.test
    found = scores(plan, dict.fromkeys((SERVER, *range(5)), constant(plan, 3)))
    in_more, in_digits = ((test.y[test.domain == d] == 3).mean() for d in (1, 0))
    assert found["global"] == found["global/domain=more"] | {"scope": "global"}
    assert found["served"] == found["served/domain=more"] | {"scope": "served"}
    assert found["global"]["examples"] == 445
    assert found["global"]["accuracy"] == pytest.approx(in_more)
    assert found["global/domain=digits"]["accuracy"] == pytest.approx(in_digits)
    assert "clients/domain=digits" not in found


def test_one_domain_has_no_scopes_of_its_own() -> None:
    plan = helpers.plan(*(text for text in TWO if "more" not in text))
    assert list(scores(plan, {SERVER: constant(plan, 0)})) == ["global"]


# -- from the command line -------------------------------------------------------------------------------------------

SMALL = (
    "dataset=domains",
    "+dataset@dataset.sets.more=digits",
    "dataset.size=6",
    "dataset.channels=1",
    "dataset.limit=80",
    "partitioning=domains",
    *cli_helpers.SMALL_WORK,
)
SERVER_DATA = {
    "domains": ("server_data=domains", "server_data.domains=[more]"),
    "style": ("server_data=style", "server_data.style=noise"),
    "dataset": (
        "server_data=dataset",
        "dataset@server_data.dataset=digits",
        "server_data.invert=true",
        "server_data.labels=none",
        "merging.objective=kd",
    ),
}


@pytest.mark.parametrize("kind", SERVER_DATA)
def test_an_interrupted_run_continues_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    line = (*SMALL, *SERVER_DATA[kind], "ui=none", "executor=sequential")
    once = done(*line, "output_dir=once")
    assert any(row["scope"] == "global/domain=more" for row in rows(once / "metrics.csv"))

    def stopped(bench: Workbench, task: Task) -> Outcome:
        if task.round == 2:
            raise KeyboardInterrupt
        return run_task(bench, task)

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "run_task", stopped)
        assert call("train", *line).status == 130
    run = done(*line)
    assert "continues after round 2" in (run / "log.txt").read_text()
    assert tables(run) == tables(once)
    assert (run / "split.json").read_bytes() == (once / "split.json").read_bytes()


def test_the_split_of_two_domains_is_shown_and_drawn(tmp_path: Path) -> None:
    answer = call("split", *SMALL, "--out", "out")
    assert answer.status == 0, answer.both
    assert "of 10 classes from 2 domains (digits, more)\n" in answer.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("classes.png", "domains.png", "sizes.png", "split.json")
    ]
    assert f"wrote {Path('out') / 'domains.png'}" in answer.out
    picture = imread(tmp_path / "out" / "domains.png")
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10, "something is drawn"
    table = [[cell.strip() for cell in row.split("│")[1:-1]] for row in answer.out.splitlines() if row[:1] == "│"]
    assert [(row[0], row[1]) for row in table] == [
        ("server", "digits 21, more 19"),
        *((str(client), "digits" if client < 3 else "more") for client in range(5)),
    ]


def test_a_scope_by_domain_can_be_compared() -> None:
    for seed in (0, 1):
        done(*SMALL, "baseline=fedavg", "rounds=1", f"seed={seed}")
    answer = call("compare", "--scope", "global/domain=more")
    assert answer.status == 0, answer.both
    assert "scope global/domain=more" in answer.out
    assert call("compare", "--scope", "global/domain=mroe").status == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("dataset=pacs dataset.size=8 server_data.domains=[photo] clients.number=9", "from 4 domains"),
        ("dataset=digits_five dataset.domains=[street,mnist_m] server_data.domains=[mnist_m]", "from 2 domains"),
    ],
)
def test_real_domains_on_the_server(real: Path, line: str, told: str) -> None:
    if not all((real / name).is_dir() for name in ("pacs", "mnist_m", "chars74k")):
        pytest.skip("pacs, mnist_m or chars74k is not in HYBRIDFL_DATA")
    answer = call("split", *line.split(), "server_data=domains", "partitioning=domains", "--all")
    assert answer.status == 0, answer.both
    assert told in answer.out
    server = "photo" if "pacs" in line else "mnist_m"
    owners = [row.split("│")[1:3] for row in answer.out.splitlines() if row[:1] == "│"]
    assert [owner.strip() for owner, domain in owners if domain.strip() == server] == ["server"]
