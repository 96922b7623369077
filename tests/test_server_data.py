"""What the server has of another data set or by a user's own rule, and who has what then."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from typing import Any

import cli_helpers
import helpers
import numpy as np
import pytest
from cli_helpers import call, done
from server_data_helpers import OTHER, clients, dataset, draw, images, servers

from hybridfl.data.dataset import Dataset, Examples
from hybridfl.data.server_data import Domains, ServerShare, Share
from hybridfl.data.server_other import OtherDataset
from hybridfl.errors import ConfigError
from hybridfl.plan import DataCache, Plan


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def other_node(**options: Any) -> OtherDataset:
    return OtherDataset(dataset=None, **options)  # type: ignore[arg-type]  # the tests' load does not ask it


# -- another data set ------------------------------------------------------------------------------------------------


def test_the_clients_keep_all_and_the_server_has_what_they_do_not() -> None:
    data, other = dataset(), dataset("other", number=40, seed=7)
    drawn = draw(data, other_node(examples=12, validation=0.25), other)
    np.testing.assert_array_equal(np.sort(clients(drawn)), np.arange(60))
    own = servers(drawn)
    assert sorted(own) == list(range(60, 72))
    assert len(drawn.split.server_val) == 3
    assert drawn.domains == ("theirs", "other")
    assert (drawn.pool.domain[own] == 1).all()
    assert (drawn.pool.domain[:60] == 0).all()
    assert drawn.sources == (other.fingerprint,)
    assert drawn.provides == {"server_data", "server_labels"}
    originals = {image.tobytes(): label for image, label in zip(other.train.x, other.train.y, strict=True)}
    assert [originals[drawn.pool.x[i].tobytes()] for i in own] == drawn.pool.y[own].tolist()
    assert np.bincount(drawn.pool.y[own]).tolist() == [4, 4, 4]
    assert drawn.split.server_test is None


def test_images_get_the_clients_form() -> None:
    """MNIST is 0 … 255; scikit-learn's digits are 0 … 16, and a user's own set may be of any size and type."""
    other = dataset("other", shape=(1, 4, 4), seed=7)
    for shape, white, dtype in (((1, 4, 4), 16.0, "uint8"), ((3, 8, 6), 255.0, "uint8"), ((3, 4, 4), 1.0, "float32")):
        data = dataset(shape=shape, white=white, dtype=dtype)
        drawn = draw(data, other_node(examples=60), other)
        own = drawn.pool.x[servers(drawn)]
        assert (own.shape[1:], own.dtype.name) == (shape, dtype)
        assert own.min() >= 0
        assert white / 2 < own.max() <= white
        if shape[1:] == (4, 4):
            expected = other.train.x[:, 0] * (white / 255)
            expected = np.rint(expected) if dtype == "uint8" else expected
            for channel in range(shape[0]):
                np.testing.assert_allclose(own[:, channel], expected, rtol=1e-6)
        negative = draw(data, other_node(examples=60, invert=True), other)
        np.testing.assert_allclose(negative.pool.x[servers(negative)], white - own, atol=1e-6 * white)


def test_a_set_in_the_same_form_is_not_touched_even_if_its_values_are_no_intensities() -> None:
    data, other = (dataset(name, white=None, dtype="float32", seed=s) for name, s in (("a", 0), ("b", 7)))
    drawn = draw(data, other_node(examples=60), other)
    np.testing.assert_array_equal(drawn.pool.x[servers(drawn)], other.train.x)


@pytest.mark.parametrize(
    ("options", "other", "key", "problem"),
    [
        ({}, {"classes": 4}, "labels", "got task: other has 4 classes and the clients' task 3; use own or none"),
        ({"classes": (1, 4)}, {"classes": 5}, "labels", "server_data.classes from 0 to 2"),
        ({"classes": (7,), "labels": "own"}, {"classes": 5}, "classes", "got 7: the classes are 0 to 4"),
        ({"examples": 61}, {}, "examples", "got 61: there are 60 training examples of other; .* 60"),
        ({"examples": 21, "classes": (2,)}, {}, "examples", r"20 training examples of other of the classes \[2\]"),
        ({}, {"white": None}, "dataset", "got other, .* other has values that are no intensities"),
        ({}, {"shape": (2, 4, 4)}, "dataset", "got other, .* other has 2 channels"),
        ({}, {"name": "renamed", "seed": 0}, "dataset", "got renamed, which the clients have; .* server_data=share"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], other: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        draw(dataset(), other_node(**{"examples": 10, **options}), dataset(**{"name": "other", "seed": 7, **other}))
    assert caught.value.key == f"server_data.{key}"


@pytest.mark.parametrize("changes", [{"white": None}, {"shape": (2, 4, 4)}])
def test_clients_whose_form_no_image_has(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the form wanted has") as caught:
        draw(dataset(**changes), other_node(examples=10), dataset("other", seed=7))
    assert caught.value.key == "server_data.dataset"


def test_classes_within_the_task_are_its_labels_and_more_can_be_own_ones() -> None:
    data, other = dataset(), dataset("other", classes=5, seed=7)
    drawn = draw(data, other_node(examples=10, classes=(0, 2)), other)
    assert np.bincount(drawn.pool.y[servers(drawn)]).tolist() == [5, 0, 5]
    drawn = draw(data, other_node(examples=20, labels="own", validation=0.5), other)
    assert np.bincount(drawn.pool.y[servers(drawn)]).tolist() == [4] * 5
    assert drawn.split.class_counts.shape == (4, 3)


def test_a_validation_view_tells_classes_of_its_own_and_domains_apart() -> None:
    """Five classes in two domains are ten cells, although the clients' task has three classes."""
    other = dataset("other", classes=5, domains=("c", "d"), seed=7)
    drawn = draw(dataset(), other_node(examples=60, labels="own", validation=0.5), other)
    val = drawn.split.server_val
    cells = np.stack([drawn.pool.domain[val], drawn.pool.y[val]])
    assert np.unique(cells, axis=1, return_counts=True)[1].tolist() == [3] * 10


def test_the_clients_own_domains_stay_apart_from_the_servers() -> None:
    data = dataset(domains=("a", "b"))
    drawn = draw(data, other_node(examples=40, labels="none"), dataset("other", domains=("c", "d"), seed=7))
    assert drawn.domains == ("a", "b", "c", "d")
    assert set(drawn.pool.domain[servers(drawn)]) == {2, 3}
    assert drawn.split.domain_counts.sum(0).tolist() == [30, 30]
    assert drawn.split.server_test is None


# -- in a config -----------------------------------------------------------------------------------------------------


def write_mnist(root: Path, shift: int) -> None:
    """Two images of each class, 28x28."""
    (root / "mnist").mkdir(parents=True)
    labels = np.repeat(np.arange(10), 2).astype(np.uint8)
    pixels = (np.arange(20 * 28 * 28).reshape(20, 28, 28) * (7 + shift) % 256).astype(np.uint8)
    for part in ("train", "t10k"):
        for kind, magic, array in (("images-idx3", 2051, pixels), ("labels-idx1", 2049, labels)):
            header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
            (root / "mnist" / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


MNIST = ("dataset=digits", "server_data=dataset", "server_data.examples=20", "clients.number=5", "clients.per_round=2")


def test_the_contents_of_the_other_set_name_the_run_and_a_set_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridfl.data.idx import MNIST as Reader

    read: list[Reader] = []
    load = Reader.load
    monkeypatch.setattr(Reader, "load", lambda self, root: read.append(self) or load(self, root))
    cache = DataCache()

    def plan(*line: str) -> Plan:
        return helpers.make_plan(helpers._composed(*MNIST, *line), cache)

    for root, shift in (("one", 0), ("two", 1)):
        write_mnist(Path(root), shift)
    digests = {plan(f"data_root={root}").digest for root in ("one", "one", "two")}
    assert len(digests) == 2
    assert len(read) == 2
    with pytest.raises(ConfigError) as caught:
        plan("data_root=one", "server_data.dataset.limit=21")
    assert caught.value.key == "server_data.dataset.limit"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "server_data.dataset=usps",
            "server_data.dataset: got 'usps', and it is a config group; write dataset@server_data.dataset=usps.",
        ),
        ("dataset@server_data.dataset=uspss", "dataset@server_data.dataset: got 'uspss'. Did you mean 'usps'?"),
        (
            "server_data.dataset.limt=3",
            "server_data.dataset.limt: unknown key. Did you mean 'server_data.dataset.limit'",
        ),
        ("server_data.labels=tasks", "server_data.labels: got 'tasks'. Did you mean 'task'? Valid: none, own, task."),
        ("server_data.labelled=false", "server_data.labelled: unknown key. Did you mean 'server_data.labels'?"),
        ("dataset@server_data.dataset=synthetic", "server_data.dataset: got synthetic, which cannot be brought"),
        ("dataset=mnist dataset.limit=null", "server_data.dataset: got mnist, which the clients have"),
    ],
)
def test_what_is_typed_wrongly(typed: str, message: str) -> None:
    write_mnist(Path("data"), 0)
    replaced = {text.partition("=")[0] for text in typed.split()}
    line = [text for text in MNIST if text.partition("=")[0] not in replaced]
    answer = call("train", "--dry-run", *line, "data_root=data", *typed.split())
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: {message}"), answer.err


def test_a_choice_inside_another_group_is_an_override_like_any() -> None:
    run = done(
        *cli_helpers.TINY, *OTHER, "server_data.dataset.shape=[1,8,8]", "server_data.labels=own", "baseline=fedavg"
    )
    assert "dataset@server_data.dataset=synthetic" in (run / "config.yaml").read_text()
    again = call(
        "train",
        *cli_helpers.TINY,
        *OTHER,
        "server_data.dataset.shape=[1,8,8]",
        "server_data.labels=own",
        "baseline=fedavg",
    )
    assert again.folder == run


# -- a user's own kind -----------------------------------------------------------------------------------------------


class Mine:
    """What a user may write; ``given`` says what it gives."""

    validation = 0.0

    def __init__(self, given: ServerShare, provides: set[str] = frozenset({"server_data", "server_labels"})) -> None:
        self.given, self.provides = given, provides

    def share(self, dataset: Dataset, free: np.ndarray, load: Any, rng: np.random.Generator) -> ServerShare:
        return self.given


def own(shape: tuple[int, ...] = (1, 4, 4), label: int = 0, domain: int = 0, dtype: str = "uint8") -> Examples:
    return Examples(np.zeros((2, *shape), dtype), np.array([0, label]), np.array([0, domain]))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (ServerShare(np.array([3, 3])), "must name free examples, each once"),
        (ServerShare(np.array([3]), withheld=np.array([3])), "must name free examples, each once"),
        (ServerShare(np.array([60])), "must name free examples, each once"),
        (ServerShare(own=own(shape=(1, 4, 5))), r"gives images \(1, 4, 5\) uint8, the clients' are \(1, 4, 4\) uint8"),
        (ServerShare(own=own(dtype="float32")), "float32, the clients' are .* uint8"),
        (ServerShare(own=own(label=3)), "gives examples of its own whose label 3 is out of range, expected 0 to 2"),
        (ServerShare(own=own(domain=1)), "whose domain 1 is out of range, expected 0 to 0"),
    ],
)
def test_a_users_own_kind_is_checked(given: ServerShare, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"Mine.share .*{problem}"):
        draw(dataset(), Mine(given))


def test_a_users_own_kind_may_have_labels_of_its_own() -> None:
    drawn = draw(dataset(), Mine(ServerShare(own=own(label=99)), {"server_data", "server_own_labels"}))
    assert drawn.pool.y[-1] == 99
    assert drawn.domains == ("theirs", "own")


def test_labels_and_domains_of_any_width_are_counted_right() -> None:
    """100 classes in 3 domains are 300 cells, which 8 bits do not hold."""
    x, y = images(300, (1, 2, 2)), np.arange(300) % 100
    domain = np.arange(300) // 100
    wide, narrow = (Examples(x, y.astype(kind), domain.astype(kind)) for kind in ("int64", "uint8"))
    digests = {
        draw(
            Dataset("d", examples, examples, 100, (0.0,), (1.0,), ("a", "b", "c")),
            Share(examples=150),
            client_validation=0.3,
        ).split.digest
        for examples in (wide, narrow)
    }
    assert len(digests) == 1


# -- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("dataset=cifar10 dataset@server_data.dataset=cifar100 server_data.labels=own", "own labels"),
        ("dataset=fashion_mnist", "100 that only it has"),
        ("dataset=digits dataset@server_data.dataset=mnist_m server_data.labels=none", "unlabelled"),
    ],
)
def test_real_sets_on_the_server(real: Path, line: str, answer: str) -> None:
    if not (real / "mnist").is_dir():
        pytest.skip("mnist is not in HYBRIDFL_DATA")
    limit = () if "digits" in line else ("dataset.limit=1000",)
    few = ("clients.number=5", "clients.per_round=2")
    shown = call("split", f"data_root={real}", *line.split(), *limit, "server_data=dataset", *few)
    assert shown.status == 0, shown.both
    assert answer in shown.out


def test_the_domains_of_a_share_are_named_by_name() -> None:
    assert Domains(domains=("a",)).provides == {"server_data", "server_labels"}
    assert Domains(domains=("a",), labelled=False).provides == {"server_data"}
