"""What the server owns, of every kind: who loses it, how it looks, what is known of it, and who reads its labels."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

import cli_helpers
import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_helpers import call, done, rows
from partition_helpers import rng, unread
from PIL import Image

from hybridfl.config import choices
from hybridfl.data.dataset import Dataset, Examples
from hybridfl.data.partitioning import IID
from hybridfl.data.server_data import Domains, NoServerData, ServerShare, Share
from hybridfl.data.server_other import OtherDataset
from hybridfl.data.server_style import Styled, restyled
from hybridfl.data.split import Drawn, draw_split
from hybridfl.engine import Unsuitable, check_method
from hybridfl.errors import ConfigError
from hybridfl.evaluation import Evaluator
from hybridfl.methods.base import Facts
from hybridfl.methods.oracle import Oracle
from hybridfl.plan import DataCache, Plan
from hybridfl.tasks import Tasks
from hybridfl.types import SERVER

OTHER = (
    "server_data=dataset",
    "dataset@server_data.dataset=synthetic",
    "server_data.dataset.shape=[1,4,4]",
    "server_data.dataset.train=60",
    "server_data.dataset.classes=5",
    "server_data.dataset.seed=1",
    "server_data.examples=20",
)
"""Of five classes, for the tiny federation of three."""
STYLES = ["blur", "edges", "grey", "invert", "noise", "rotate"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def images(number: int, shape: tuple[int, ...], seed: int = 0, white: float = 255, dtype: str = "uint8") -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, int(white) + 1, (number, *shape))
    return values.astype(dtype)


def dataset(
    name: str = "theirs",
    number: int = 60,
    classes: int = 3,
    shape: tuple[int, ...] = (1, 4, 4),
    white: float | None = 255.0,
    dtype: str = "uint8",
    domains: tuple[str, ...] = (),
    seed: int = 0,
) -> Dataset:
    """Random images; classes in turn, domains in blocks."""

    def part(number: int, seed: int) -> Examples:
        x = images(number, shape, seed, white or 255, dtype)
        domain = np.arange(number) * max(1, len(domains)) // number
        return Examples(x, np.arange(number) % classes, domain)

    channels = shape[0]
    parts = part(number, seed), part(number // 2, seed + 1)
    return Dataset(name, *parts, classes, (0.0,) * channels, (1.0,) * channels, domains, white)


def draw(data: Dataset, server_data: Any, other: Dataset | None = None, **changes: Any) -> Drawn:
    options: dict[str, Any] = {"partitioning": IID(), "clients": 4, "client_validation": 0.0, "min_test": 1, "seed": 0}
    return draw_split(
        data,
        server_data=server_data,
        **{**options, **changes},
        load=unread if other is None else of(other),
        tasks=Tasks().stream(data.classes, 1, 0),
    )


def of(other: Dataset) -> Any:
    """Reads the other data set, under the option that holds it."""

    def load(option: str) -> Dataset:
        assert option == "dataset"
        return other

    return load


def servers(drawn: Drawn) -> np.ndarray:
    return np.concatenate([drawn.split.server_train, drawn.split.server_val])


def clients(drawn: Drawn) -> np.ndarray:
    return np.concatenate([*drawn.split.clients_train, *drawn.split.clients_val])


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


# -- another style: exact truths -------------------------------------------------------------------------------------


def changed(x: np.ndarray, style: Any, strength: float | None = None, white: float | None = 255.0) -> np.ndarray:
    return restyled(x, style, strength, white, rng())


@pytest.mark.parametrize("white", [255.0, 16.0])
def test_the_negative_of_the_negative(white: float) -> None:
    x = images(3, (3, 5, 4), white=white)
    once = changed(x, "invert", white=white)
    np.testing.assert_array_equal(once, white - x)
    np.testing.assert_array_equal(changed(once, "invert", white=white), x)
    assert (changed(x.astype(np.float32), "invert", 0.5, white) == white / 2).all(), "half of each leaves no image"


def test_a_blur_keeps_the_mean_and_constants_and_spreads_a_point_as_far_as_said() -> None:
    x = images(2, (1, 12, 10), dtype="float32")
    blurred = changed(x, "blur", 0.2)
    np.testing.assert_allclose(blurred.mean((2, 3)), x.mean((2, 3)), rtol=1e-5)
    assert (blurred.std((2, 3)) < 0.5 * x.std((2, 3))).all()
    np.testing.assert_allclose(changed(np.full_like(x, 77), "blur", 0.2), 77, rtol=1e-6)
    point = np.zeros((1, 3, 61, 81), dtype=np.float32)
    point[0, 1, 30, 40] = 200
    spread = changed(point, "blur")
    assert not spread[:, [0, 2]].any(), "channels are not mixed"
    away = np.arange(61) - 30
    sigma = 0.05 * 61  # the shorter side
    assert (spread[0, 1].sum(1) @ away**2) / 200 == pytest.approx(sigma**2, rel=0.02)


def test_rotations_by_right_angles() -> None:
    x = images(2, (3, 7, 7))
    np.testing.assert_array_equal(changed(x, "rotate", 90), np.rot90(x, axes=(2, 3)))
    np.testing.assert_array_equal(changed(x, "rotate", 360), x)
    np.testing.assert_array_equal(changed(x, "rotate"), changed(x, "rotate", 45))
    np.testing.assert_allclose(changed(np.full_like(x, 9), "rotate", 33), 9)
    wide = images(1, (1, 4, 6), dtype="float32")
    np.testing.assert_allclose(changed(wide, "rotate", 180), wide[:, :, ::-1, ::-1], rtol=1e-4, atol=0.1)


def test_edges_are_the_sobel_gradients_of_torch() -> None:
    x = images(2, (3, 6, 5), dtype="float32", white=100)
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    padded = F.pad(torch.from_numpy(x).reshape(6, 1, 6, 5), (1, 1, 1, 1), mode="replicate")
    across, down = (F.conv2d(padded, k[None, None]) for k in (kernel, kernel.T))
    expected = torch.hypot(across, down).reshape(2, 3, 6, 5).numpy()
    np.testing.assert_allclose(changed(x, "edges"), expected, rtol=1e-4, atol=1e-3)
    assert not changed(np.full((1, 1, 5, 5), 200, dtype=np.uint8), "edges").any()
    step = np.zeros((1, 1, 5, 6), dtype=np.uint8)
    step[..., 3:] = 255
    assert changed(step, "edges")[0, 0].tolist() == [[0, 0, 255, 255, 0, 0]] * 5
    np.testing.assert_array_equal(changed(step, "edges", 0.5)[0, 0, 0], [0, 0, 128, 255, 128, 128])


def test_grey_is_pillows_and_stays_as_it_is() -> None:
    x = images(4, (3, 6, 5))
    grey = changed(x, "grey")
    assert (grey == grey[:, :1]).all()
    pillows = [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L"), dtype=int) for image in x]
    assert np.abs(grey[:, 0] - np.stack(pillows)).max() <= 1
    np.testing.assert_array_equal(changed(grey, "grey"), grey)
    half = changed(x.astype(np.float32), "grey", 0.5)
    np.testing.assert_allclose(half, (x + changed(x.astype(np.float32), "grey")) / 2, rtol=1e-5, atol=1e-3)


def test_noise_has_the_deviation_said_and_comes_from_the_stream_given() -> None:
    x = np.full((4, 3, 60, 60), 8.0, dtype=np.float32)
    noisy = changed(x, "noise", 0.1, white=16.0)
    assert noisy.std() == pytest.approx(1.6, rel=0.02)
    assert noisy.mean() == pytest.approx(8.0, abs=0.05)
    np.testing.assert_array_equal(noisy, changed(x, "noise", 0.1, white=16.0))
    assert (restyled(x, "noise", 0.1, 16.0, rng(1)) != noisy).mean() > 0.99
    np.testing.assert_array_equal(changed(x, "noise"), changed(x, "noise", 0.2))
    assert set(np.unique(changed(images(1, (1, 9, 9)), "noise", 50.0))) == {0, 255}, "what is beyond is cut"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("shape", "dtype", "white"), [((3, 9, 9), "uint8", 255.0), ((3, 8, 9), "float32", 1.0), ((3, 9, 8), "uint8", 16.0)]
)
def test_images_stay_in_range_and_type_and_are_changed(style: Any, shape: Any, dtype: str, white: float) -> None:
    x = images(5, shape, white=white, dtype=dtype)
    before = x.copy()
    seen = changed(x, style, white=white)
    assert (seen.shape, seen.dtype) == (x.shape, x.dtype)
    assert seen.min() >= 0
    assert seen.max() <= white
    assert (seen != x).any()
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_must_make_sense_for_the_images(style: Any) -> None:
    x = images(2, (3, 6, 6), dtype="float32") - 100
    if style in ("blur", "rotate"):
        seen = changed(x, style, white=None)
        assert seen.min() >= x.min()
        assert seen.min() < 0
        whole = changed((x + 100).astype(np.uint8), style, white=None)
        np.testing.assert_allclose(whole, np.rint(seen + 100), atol=1)
        assert whole.dtype == np.uint8
        return
    with pytest.raises(ConfigError, match=f"got {style}, and the clients' values are no intensities") as caught:
        changed(x, style, white=None)
    assert caught.value.key == "style"


@pytest.mark.parametrize(
    ("style", "strength", "shape", "key", "problem"),
    [
        ("grey", None, (1, 4, 4), "style", "got grey, which changes images of 3 channels, and the clients' have 1"),
        ("invert", 1.5, (1, 4, 4), "strength", "got 1.5: must be at most 1 with style=invert; nearest valid value: 1"),
        ("edges", 2, (1, 4, 4), "strength", "got 2: must be at most 1"),
    ],
)
def test_a_style_that_cannot_be(style: Any, strength: float | None, shape: Any, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        draw(dataset(shape=shape), Styled(examples=6, style=style, strength=strength))
    assert caught.value.key == f"server_data.{key}"


# -- another style: who has what -------------------------------------------------------------------------------------


def test_nobody_has_the_originals_of_restyled_examples() -> None:
    data = dataset(domains=("a", "b"))
    drawn = draw(data, Styled(examples=12, style="invert", validation=0.25))
    own = servers(drawn)
    assert sorted(own) == list(range(60, 72))
    originals = np.setdiff1d(np.arange(60), clients(drawn))
    assert len(originals) == 12
    np.testing.assert_array_equal(drawn.pool.x[60:], 255 - data.train.x[originals])
    np.testing.assert_array_equal(drawn.pool.y[60:], data.train.y[originals])
    np.testing.assert_array_equal(drawn.pool.domain[60:], 2 + data.train.domain[originals])
    assert drawn.domains == ("a", "b", "a (invert)", "b (invert)")
    assert drawn.sources == ()
    share = draw(data, Share(examples=12))
    np.testing.assert_array_equal(np.sort(servers(share)), originals)  # the same ones that a plain share takes
    noisy = draw(data, Styled(examples=12, style="noise"))
    np.testing.assert_array_equal(np.sort(clients(noisy)), np.sort(clients(drawn)))
    assert (noisy.pool.x[60:] == draw(data, Styled(examples=12, style="noise")).pool.x[60:]).all()
    assert (noisy.pool.x[60:] != draw(data, Styled(examples=12, style="noise"), seed=1).pool.x[60:]).any()


@pytest.mark.parametrize("server", ["server_data=style", "server_data=share"])
def test_a_split_can_be_given_back(server: str) -> None:
    line = ("split", *cli_helpers.TINY, server, "server_data.validation=0.25")
    first = call(*line, "--out", "out")
    again = call(*line, "partitioning=file", "partitioning.path=out/split.json")
    told = [[text for text in answer.out.splitlines() if text.startswith("split ")] for answer in (first, again)]
    assert told[0] == told[1] != []


def test_what_is_withheld_is_nobodys_without_being_forgotten() -> None:
    """Only what neither the clients nor the server names is a mistake."""
    answer = call("split", *cli_helpers.TINY, "server_data=style", "server_data.examples=30")
    assert "examples   30 to the server (30 that only it has), 170 to 5 clients, 30 to nobody\n" in answer.out
    Path("owners.json").write_text(json.dumps([list(range(client, 150, 5)) for client in range(5)]))
    line = ("partitioning=file", "partitioning.path=owners.json", "server_data=style", "server_data.examples=30")
    answer = call("split", *cli_helpers.TINY, *line)
    assert answer.err.startswith(
        "hybridfl: partitioning.complete: got true, and 20 training examples belong to no client"
    )
    assert call("split", *cli_helpers.TINY, *line, "server_data.examples=50").status == 0


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


# -- labels that the server has, has of its own, or has not ----------------------------------------------------------

KINDS = {
    "labelled": (),
    "unlabelled": ("server_data.labelled=false",),
    "task": (*OTHER, "server_data.classes=[0,1,2]"),
    "own": (*OTHER, "server_data.labels=own"),
    "none": (*OTHER, "server_data.labels=none"),
    "styled": ("server_data=style", "server_data.examples=12"),
    "styled unlabelled": ("server_data=style", "server_data.examples=12", "server_data.labelled=false"),
}
KNOWN = {"labelled", "task", "styled"}
WAYS = {
    "unlabelled": "labelled=true",
    "styled unlabelled": "labelled=true",
    "own": "labels=task",
    "none": "labels=task",
}


@pytest.fixture(scope="module", params=KINDS)
def kind_and_plan(request: pytest.FixtureRequest) -> tuple[str, Plan]:
    options = ("baseline=fedavg", "clients.validation=0.3", "server_data.validation=0.5", *KINDS[request.param])
    return request.param, helpers.plan(*options)


def test_labels_that_nobody_knows_are_out_of_reach(kind_and_plan: tuple[str, Plan]) -> None:
    kind, plan = kind_and_plan
    federation = plan.federation
    labels, own = federation.bench.y.numpy(), servers(plan.drawn)
    assert federation.provides == plan.drawn.provides
    if kind in KNOWN or kind == "own":
        np.testing.assert_array_equal(labels[own], federation.pool.y[own])
        assert labels[own].max() == (4 if kind == "own" else 2)
    else:
        assert (labels[own] == -1).all()
    theirs = clients(plan.drawn)
    np.testing.assert_array_equal(labels[theirs], federation.pool.y[theirs])
    assert (SERVER in federation.labelled) == (kind in KNOWN)
    assert SERVER in federation.participants


# A baseline that has the name of a merging method is that one; tests/test_merging_rounds.py sees to it.
METHOD_LINES = [
    *(f"merging={name}" for name in choices("merging")),
    *(f"baseline={name}" for name in choices("baseline") if name not in {"none", *choices("merging")}),
    *(f"merging=feddle merging.objective={objective}" for objective in ("kd", "head", "entropy", "mix")),
]
CASES = [(line, "unlabelled") for line in METHOD_LINES]
CASES += [(line, kind) for line in ("baseline=server_only", METHOD_LINES[-4]) for kind in ("own", "none")]


@pytest.mark.parametrize(("line", "kind"), CASES)
def test_a_method_is_refused_or_never_reads_the_servers_labels(line: str, kind: str) -> None:
    typed = (*line.split(), "server_data.validation=0.25", "rounds=2", "client_optimizer.epochs=1", *KINDS[kind])
    try:
        plan = helpers.plan(*typed)
    except Unsuitable as refusal:
        method = helpers.plan(*line.split()).method
        assert method.requires >= {"server_labels"}
        name = line.split()[0]
        hint = f"{name} requires server_labels, which is not there; try server_data.{WAYS[kind]}"
        if other := getattr(method, "instead", {}).get("server_labels"):
            hint += f", or {name.partition('=')[0]}={other}, which does without"
        assert str(refusal) == f"server_data: {hint}."
        return
    own = servers(plan.drawn)
    pool = plan.federation.pool
    others = pool.y.copy()
    others[own] = (others[own] + 1) % 5
    swapped = dataclasses.replace(plan.federation, pool=Examples(pool.x, others, pool.domain))
    states = [
        helpers.snapshots(dataclasses.replace(plan, federation=federation).engine())[-1].state
        for federation in (plan.federation, swapped)
    ]
    assert helpers.identical(*states)


def test_the_oracle_pools_what_has_labels_of_the_task(kind_and_plan: tuple[str, Plan]) -> None:
    kind, plan = kind_and_plan
    everybody = Oracle().init(plan.federation)["everybody"]
    assert everybody == ([0, 1, 2, 3, 4, SERVER] if kind in KNOWN else [0, 1, 2, 3, 4])


def test_validation_is_the_servers_only_if_it_has_labels_of_the_task(kind_and_plan: tuple[str, Plan]) -> None:
    kind, plan = kind_and_plan
    split = plan.federation.split
    evaluator = Evaluator(plan.federation, plan.method, plan.settings.evaluation)
    found = {row["scope"]: row for row in evaluator.score(plan.method.init(plan.federation), 1, True).rows}
    theirs = np.concatenate(split.clients_val)
    assert 0 < len(split.server_val) < len(theirs)
    assert found["validation"]["examples"] == (len(split.server_val) if kind in KNOWN else len(theirs))


@pytest.mark.parametrize("kind", ["unlabelled", "own"])
def test_a_start_on_the_server_needs_labels(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        helpers.plan("baseline=fedavg", "start=server", *KINDS[kind])
    problem = f"got server, but the server owns no labelled examples; try server_data.{WAYS[kind]}."
    assert (caught.value.key, caught.value.problem) == ("start", problem)


@pytest.mark.parametrize(
    ("requires", "options", "hint"),
    [
        ({"server_data", "server_labels"}, ("server_data=none",), "server_data=share"),
        ({"server_labels"}, ("server_data.labelled=false",), "server_data.labelled=true"),
        ({"server_labels"}, (*OTHER, "server_data.labels=own"), "server_data.labels=task"),
        ({"server_own_labels"}, ("server_data=none",), "server_data=dataset server_data.labels=own"),
        ({"server_data", "server_own_labels"}, ("server_data=none",), "server_data=dataset server_data.labels=own"),
        ({"server_own_labels"}, (*OTHER, "server_data.labels=none"), "server_data=dataset server_data.labels=own"),
    ],
)
def test_the_hint_of_a_refusal_gives_what_is_missing(requires: set[str], options: Any, hint: str) -> None:
    plan = helpers.plan("baseline=fedavg", *options)
    method = Facts()
    method.requires = frozenset(requires)
    labels_by = getattr(plan.settings.server_data, "labels_by", "server_data=share")
    with pytest.raises(Unsuitable) as caught:
        check_method(method, plan.federation, "star", "baseline=mine", labels_by)  # type: ignore[arg-type]
    assert caught.value.problem.endswith(f"; try {hint}.")
    assert caught.value.key == "server_data"


def test_a_method_that_wants_something_else_gets_no_such_hint() -> None:
    method = Facts()
    method.requires = frozenset({"public_key"})
    with pytest.raises(Unsuitable, match=r"requires public_key, which is not there\.$"):
        check_method(method, helpers.plan("baseline=fedavg").federation, "star", "m")  # type: ignore[arg-type]


def test_a_sweep_skips_what_needs_labels_and_says_how_it_could_have_them() -> None:
    line = (*cli_helpers.TINY, "server_data.labelled=false", "merging.objective=kd")
    answer = call("train", "-m", *line, "baseline=none,server_only,data_sharing")
    assert answer.status == 0, answer.both
    jobs = rows(answer.folder / "runs.csv")
    assert [job["status"] for job in jobs] == ["done", "skipped", "skipped"]
    skipped = [text for text in answer.both.splitlines() if text.startswith("skipped: ")]
    for name, text in zip(("server_only", "data_sharing"), skipped, strict=True):
        reason = f"baseline={name} requires server_labels, which is not there; try server_data.labelled=true."
        assert text.endswith(f"server_data: {reason}")


def test_nothing_provides_nothing() -> None:
    assert NoServerData().provides == frozenset()
    drawn = draw(dataset(), NoServerData())
    assert len(servers(drawn)) == 0
    assert drawn.provides == frozenset()


# -- tables ----------------------------------------------------------------------------------------------------------


def cells(text: str) -> dict[str, list[str]]:
    found = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {owner: rest for owner, *rest in found}


TINY_OTHER = tuple(text.replace("[1,4,4]", "[1,8,8]") for text in OTHER)


@pytest.mark.parametrize(
    ("command", "classes"), [(("split",), 10), (("split",), 30), (("train", "--dry-run", "baseline=fedavg"), 10)]
)
@pytest.mark.parametrize(
    ("options", "owner", "origin", "counts"),
    [
        (("server_data.labelled=false",), "server (unlabelled)", None, None),
        ((*TINY_OTHER, "server_data.labels=own"), "server (own labels)", "synthetic", None),
        (TINY_OTHER, "server", "synthetic", [4] * 5),
        (("server_data=style", "server_data.examples=40"), "server", "synthetic (blur)", "balanced"),
    ],
)
def test_the_table_says_what_is_known_and_where_it_comes_from(
    command: tuple[str, ...], classes: int, options: tuple[str, ...], owner: str, origin: str | None, counts: Any
) -> None:
    answer = call(*command, *cli_helpers.TINY, f"dataset.classes={classes}", *options)
    assert answer.status == 0, answer.both
    table = cells(answer.out)
    assert [name for name in table if name.startswith("server")] == [owner]
    row = table[owner]
    if origin is not None:
        assert row.pop(0) == origin
        assert table["0"].pop(0) == "synthetic"
    number = 20 if options[: len(TINY_OTHER)] == TINY_OTHER else 40
    assert row[:3] == [str(number), "·", "100"]
    if counts is None:
        assert set(row[3:]) == {""}
    elif classes > 20:
        assert row[3] == ("5" if counts != "balanced" else "30")
    else:
        counts = [4] * 10 if counts == "balanced" else counts + [0] * 5
        assert row[3:] == [str(n) if n else "·" for n in counts]
    if command == ("split",):
        (told,) = (line for line in answer.out.splitlines() if line.startswith("examples   "))
        assert ("that only it has" in told) == (origin is not None)
        assert ("unlabelled" in told, "own labels" in told) == ("unlabelled" in owner, "own" in owner)


def test_a_comparison_tells_two_kinds_of_server_data_apart() -> None:
    for line in (TINY_OTHER, ("server_data=style",)):
        done(*cli_helpers.TINY, "baseline=fedavg", "rounds=1", *line)
    answer = call("compare", "--format", "csv")
    assert answer.status == 0, answer.both
    found = list(csv.DictReader(io.StringIO(answer.out)))
    assert sorted(row["server_data"] for row in found) == ["OtherDataset", "Styled"]


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
