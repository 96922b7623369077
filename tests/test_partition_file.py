"""A partitioning from a file: both forms, every mistake in it, and what it means for the server and the run's identity."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import TINY, call, done
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_helpers import check, rng, seeds, unread

from hybridfl.data.dataset import Dataset, Examples, Labels
from hybridfl.data.partition_file import File
from hybridfl.data.partitioning import IID, Dirichlet
from hybridfl.data.server_data import NoServerData, ServerData, Share
from hybridfl.data.split import Split, draw_split
from hybridfl.errors import ConfigError
from hybridfl.tasks import Tasks

Y = np.arange(12) % 3


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def file(content: Any, **options: Any) -> File:
    Path("owners.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return File("owners.json", **options)


def draw(partitioning: Any, server_data: ServerData, clients: int = 3, seed: int = 0) -> Split:
    part = Examples(np.zeros((12, 1, 1, 1), dtype=np.uint8), Y)
    dataset = Dataset("dozen", part, part, 3, (0.0,), (1.0,))
    return draw_split(dataset, partitioning, server_data, clients, 0.25, 1, seed, unread, Tasks().stream(3, 1, 0)).split


@given(examples=st.integers(1, 60), clients=st.integers(1, 10), seed=seeds, as_split=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_file_gives_back_what_was_put_in(examples, clients, seed, as_split) -> None:
    clients = min(clients, examples)
    shares = [
        rng(seed).permutation(share) for share in IID().split(Labels(np.zeros(examples)), clients, rng(seed)).shares
    ]
    content: Any = [share.tolist() for share in shares]
    if as_split:
        content = {"clients": [{"train": share[1:], "val": share[:1]} for share in content]}
    partition = file(content).split(Labels(np.zeros(examples, dtype=np.int64)), clients, rng(seed + 1))
    check(partition, examples, clients, 1)
    assert all(set(a) == set(b) for a, b in zip(partition.shares, shares, strict=True))


def test_a_split_of_a_run_gives_the_same_split_with_the_same_seed() -> None:
    first = draw(Dirichlet(), Share(examples=3, validation=0.4), seed=7)
    again = draw(file(first.to_json()), Share(examples=3, validation=0.4), seed=7)
    assert again.digest == first.digest
    other = draw(file(first.to_json()), Share(examples=3), seed=8)
    np.testing.assert_array_equal(other.class_counts, first.class_counts)
    np.testing.assert_array_equal(other.server_train, np.union1d(first.server_train, first.server_val))


def test_the_server_takes_its_share_of_what_the_file_leaves() -> None:
    node = file([[0, 1], [2, 3], [4, 5]], complete=False)
    split = draw(node, Share(examples=3))
    assert split.server_train.min() >= 6
    assert split.class_counts.sum() == 6
    assert len(draw(node, NoServerData()).server_train) == 0
    everything = draw(file([[0, 1], [2, 3], [4, 5]]), Share(fraction=1.0))
    np.testing.assert_array_equal(everything.server_train, np.arange(6, 12))


@pytest.mark.parametrize(
    ("server_data", "key", "problem"),
    [
        (
            Share(examples=3),
            "partitioning.complete",
            "got true, and 3 .* belong to no client .*; false leaves them out",
        ),
        (NoServerData(), "partitioning.complete", "and 6 training examples belong to no client"),
        (Share(examples=7), "server_data.examples", r"largest valid value is 6 \(what the partitioning leaves of 12\)"),
    ],
)
def test_what_the_server_leaves_is_somebodys_or_said_to_be_nobodys(server_data, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        draw(file([[0, 1], [2, 3], [4, 5]]), server_data)
    assert caught.value.key == key


def test_a_file_that_leaves_nothing_to_the_server() -> None:
    node = file([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    assert draw(node, NoServerData()).class_counts.sum() == 12
    with pytest.raises(ConfigError, match="gives all 12 training examples to clients; use server_data=none") as caught:
        draw(node, Share(examples=3))
    assert caught.value.key == "server_data"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[[0, 1", "is no JSON"),
        ("{}", "neither a list of lists of positions nor a run's split.json"),
        ("[]", "neither a list"),
        ("3", "neither a list"),
        ([[0], [1]], "has 2 clients and clients.number is 3; set it to 2"),
        ([[0], [1], []], "gives client 2 no example"),
        ([[0], [1], [12]], "client 2 example 12, .* 12 training examples, 0 to 11; the nearest valid position is 11"),
        ([[0], [-1], [2]], "client 1 example -1, .*; the nearest valid position is 0"),
        ([[0], [1], [2, 0]], "gives example 0 to client 0 and to client 2"),
        ([[0], [1], [2, 3, 2]], "gives client 2 example 2 twice"),
        ([[0], [1], [2.0]], "client 2 something other than a list of whole numbers"),
        ([[0], [1], [True]], "client 2 something other"),
        ([[0], [1], 2], "client 2 something other"),
        ([[0], [1], {"val": [2]}], "client 2 something other"),
        (
            [[0], [1], {"train": [2, 5], "class_counts": [0, 1, 1]}],
            r"client 2 has \[0, 1, 1\] .* \[0, 0, 2\]: it belongs",
        ),
        ([[0], [1], {"train": [2, 5], "class_counts": [0, 0, 1, 1]}], "another data set"),
        ([[0], [1], {"train": [2, 5], "class_counts": 2}], "another data set"),
    ],
)
def test_a_mistake_in_the_file_is_named(content: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        draw(file(content, complete=False), NoServerData())
    assert caught.value.key == "partitioning.path"
    assert "'owners.json'" in caught.value.problem


def test_a_users_own_class_before_the_server_is_checked() -> None:
    class Wrong:
        before_server = True
        seed = None

        def split(self, y, clients, rng):
            from hybridfl.data.partitioning import Partition

            return Partition([np.array([0, 1]), np.array([1, 2]), np.array([3])])

    with pytest.raises(ConfigError, match=r"Wrong.split must deal out no example twice, of 0 to 11"):
        draw(Wrong(), NoServerData())


# -- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "problem"),
    [("seed=0", "got null: name a JSON file"), ("partitioning.path=none.json", "'none.json' cannot be read")],
)
def test_a_file_must_be_named_and_be_there(override: str, problem: str) -> None:
    answer = call("train", "--dry-run", *TINY, "partitioning=file", override)
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: partitioning.path: {problem}")


def test_the_split_of_a_run_serves_another_and_its_contents_name_the_run(tmp_path: Path) -> None:
    first = done(*TINY, "baseline=fedavg")
    (tmp_path / "a.json").write_bytes((first / "split.json").read_bytes())
    (tmp_path / "b.json").write_bytes((first / "split.json").read_bytes())
    second = done(*TINY, "baseline=fedavg", "partitioning=file", "partitioning.path=a.json")
    assert second != first
    assert json.loads((second / "split.json").read_text()) == {
        **json.loads((first / "split.json").read_text()),
        "moved": 0,
    }
    assert (second / "clients.csv").read_bytes() == (first / "clients.csv").read_bytes()
    line = (*TINY, "baseline=fedavg", "partitioning=file")
    assert done(*line, "partitioning.path=b.json") == second, "the name does not matter"
    swapped = json.loads((tmp_path / "a.json").read_text())
    swapped["clients"].reverse()
    (tmp_path / "a.json").write_text(json.dumps(swapped))
    assert done(*line, "partitioning.path=a.json") != second, "the contents do"


def test_a_path_may_begin_with_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file([list(range(client, 160, 5)) for client in range(5)])
    line = ("train", "--dry-run", *TINY, "partitioning=file", "partitioning.path=~/owners.json")
    assert call(*line).status == 0
