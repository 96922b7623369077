"""Several data sets as domains: how they are read and converted, and shared out among clients."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_helpers import check, rng
from PIL import Image

from hybridfl.data.conversion import Form, converted
from hybridfl.data.dataset import Dataset, Examples, Labels
from hybridfl.data.domains import Domains as Sets
from hybridfl.data.partition_domains import Domains
from hybridfl.data.partition_file import File
from hybridfl.data.partition_labels import Classes
from hybridfl.data.partition_sizes import Quantity
from hybridfl.data.partitioning import IID, Dirichlet, Partition
from hybridfl.errors import ConfigError


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
@settings(max_examples=50, deadline=None)
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
