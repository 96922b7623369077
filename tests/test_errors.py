"""Wrong input is refused before any work: one readable message, status 2, nothing on disk."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import TINY, Answer, call

from hybridfl.errors import nearest

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYBRIDFL_DATA", str(tmp_path / "no-data"))


def told(answer: Answer) -> str:
    """The one message of a refusal."""
    assert answer.status == 2, answer.both
    assert answer.out == ""
    assert answer.err.startswith("hybridfl: ")
    assert len(answer.err.splitlines()) == 1, answer.err
    assert "Traceback" not in answer.err
    assert len(answer.err) < 900
    return answer.err.removeprefix("hybridfl: ").rstrip("\n")


# One line each: what is typed after the defaults of a tiny run, the key that the message begins with, and what else it
# says: the value where there is one, and the way out.
WRONG: list[tuple[str, str, tuple[str, ...]]] = [
    # misspelt keys
    ("seeed=1", "seeed", ("unknown key", "Did you mean 'seed'?")),
    ("+seeed=1", "seeed", ("unknown key", "Did you mean 'seed'?")),
    ("++seeed=1", "seeed", ("unknown key", "Did you mean 'seed'?")),
    ("~seeed", "seeed", ("unknown key", "Did you mean 'seed'?")),
    ("clients.nmber=3", "clients.nmber", ("unknown key", "'clients.number'")),
    ("+clients.nmber=3", "clients.nmber", ("unknown key", "number")),
    ("++clients.nmber=3", "clients.nmber", ("unknown key", "number")),
    ("~clients.nmber", "clients.nmber", ("unknown key", "number")),
    ("clients={nmber:3}", "clients.nmber", ("unknown key", "number")),
    ("merging.search.stps=3", "merging.search.stps", ("'merging.search.steps'",)),
    ("+merging.search.stps=3", "merging.search.stps", ("steps",)),
    ("lr=0.1", "lr", ("unknown key", "Did you mean 'client_optimizer.lr'?")),
    ("client.number=3", "client.number", ("Did you mean 'clients.number'?",)),
    ("rounds.foo=3", "rounds.foo", ("Did you mean 'rounds'?",)),
    # misspelt groups and choices
    ("datset=mnist", "datset", ("Did you mean 'dataset'?",)),
    ("+datset=mnist", "datset", ("Did you mean 'dataset'?",)),
    ("dataset=mnsit", "dataset", ("got 'mnsit'", "Did you mean 'mnist'?")),
    ("baseline=fedvag", "baseline", ("got 'fedvag'", "Did you mean 'fedavg'?")),
    ("merging=null", "merging", ("got 'null'", "feddle")),
    ("topology=rng", "topology", ("got 'rng'", "Did you mean 'ring'?")),
    ("~dataset", "dataset", ("cannot be left out", "digits")),
    ("~model", "model", ("cannot be left out", "cnn")),
    ("~merging", "merging", ("cannot be left out", "feddle")),
    ("+model=cnn", "model", ("leave out the +",)),
    ("+seed=1", "seed", ("leave out the +",)),
    # wrong types
    ("seed=abc", "seed", ("got 'abc'", "a whole number")),
    ("seed=1.5", "seed", ("got 1.5", "a whole number")),
    ("rounds=", "rounds", ("a whole number",)),
    ("client_optimizer.lr=big", "client_optimizer.lr", ("got 'big'", "a number")),
    ("client_optimizer.nesterov=1", "client_optimizer.nesterov", ("got 1", "true or false")),
    ("model.hidden=64", "model.hidden", ("got 64", "a list")),
    ("merging.atlas=3", "merging.atlas", ("got 3", "evict")),
    ("+client_optimizer.lr_factors={a:b}", "client_optimizer.lr_factors.a", ("got 'b'", "a number")),
    # out of range
    ("seed=-1", "seed", ("got -1", "nearest valid value: 0")),
    ("rounds=0", "rounds", ("got 0", "nearest valid value: 1")),
    ("clients.per_round=0", "clients.per_round", ("got 0", "nearest valid value: 1")),
    ("clients.per_round=1.5", "clients.per_round", ("got 1.5", "at most 1")),
    ("clients.noisy_labels=2", "clients.noisy_labels", ("got 2", "nearest valid value: 1")),
    ("clients.delay=-1", "clients.delay", ("got -1", "nearest valid value: 0")),
    ("client_optimizer.steps=0", "client_optimizer.steps", ("got 0", "nearest valid value: 1")),
    ("partitioning.alpha=0", "partitioning.alpha", ("got 0", "above 0")),
    ("model.hidden=[64,-1]", "model.hidden[1]", ("got -1", "at least 1")),
    # impossible values
    ("ui=loud", "ui", ("got 'loud'", "plain")),
    ("dtype=float16", "dtype", ("got 'float16'", "float32")),
    ("merging.search.kind=adm", "merging.search.kind", ("got 'adm'", "'adam'")),
    ("start=sever", "start", ("got 'sever'", "'server'")),
    ("start=nowhere.safetensors", "start", ("got 'nowhere.safetensors'", "random")),
    ("device=cudda", "device", ("got 'cudda'", "'cuda'")),
    ("device=meta", "device", ("got 'meta'", "cpu")),
    ("server_data.classes=[11]", "server_data.classes", ("got 11", "0 to 9")),
    ("server_data.examples=1000", "server_data.examples", ("got 1000", "200")),
    ("dataset.shape=[1,8]", "dataset.shape", ("got [1, 8]", "[1, 8, 8]")),
    # impossible combinations
    ("clients.per_round=6", "clients.per_round", ("got 6", "5 clients", "nearest valid value: 5")),
    ("partitioning.min_examples=33", "partitioning.min_examples", ("got 33", "160", "32")),
    ("topology=ring", "topology", ("got peers", "merging=feddle needs star", "valid: auto, star")),
    ("topology=torus topology.rows=2", "topology.rows", ("got 2", "nearest valid value: 3")),
    ("clients.delay=4 baseline=fedavg", "clients.delay", ("got 4", "baseline=fedavg", "baseline=fedbuff")),
    ("clients.concurrency=2 baseline=fedavg", "clients.concurrency", ("got 2", "baseline=fedavg", "value: null")),
    ("clients.per_round={0:2,3:6}", "clients.per_round.3", ("got 6", "5 clients", "nearest valid value: 5")),
    ("clients.per_round={a:2}", "clients.per_round", ("'a'", "nearest valid value: 0")),
    ("clients.per_round={0:2} nmber=3", "nmber", ("unknown key",)),
    ("clients.timing={latncy:2}", "clients.timing.latncy", ("unknown key", "latency")),
    ("clients.tiers=8-4-x", "clients.tiers", ("got '8-4-x'", "8-4-2-1")),
    ("client_optimizer.nesterov=true", "client_optimizer.nesterov", ("momentum=0.9",)),
    ("merging.atlas.size=1", "merging.atlas.size", ("got 1", "nearest: 2")),
    ("merging.fallback.accept=heldout", "merging.fallback.accept", ("server_data.validation",)),
    # domains, and what the server owns
    (
        "partitioning=domains partitioning.within=shards",
        "partitioning.within",
        ("partitioning@partitioning.within=shards",),
    ),
    ("partitioning=domains partitioning.within.seed=1", "partitioning.within.seed", ("got 1", "partitioning.seed")),
    ("partitioning=domains partitioning.clients=[2,3]", "partitioning.clients", ("got [2, 3]", "1 numbers with sum 5")),
    ("partitioning=domains partitioning.clients=most", "partitioning.clients", ("got 'most'", "proportional")),
    (
        "server_data=domains server_data.domains=[photo]",
        "server_data.domains",
        ("got ['photo']", "one domain, synthetic"),
    ),
    ("server_data=style server_data.style=blurr", "server_data.style", ("got 'blurr'", "Did you mean 'blur'?")),
    ("server_data=style server_data.style=edges", "server_data.style", ("got edges", "valid: blur, rotate")),
    ("server_data=style server_data.strength=0", "server_data.strength", ("got 0", "above 0")),
    ("server_data.labelled=false", "server_data", ("requires server_labels", "try server_data.labelled=true")),
    # what cannot be read or found
    ("rounds", "rounds", ("key=value",)),
    ("=3", "=3", ("key=value",)),
    ("seed=[1", "seed", ("cannot read 'seed=[1'",)),
    ("seed=${foo}", "seed", ("'foo' not found",)),
    ("seed=${oc.env:NO_SUCH_NAME}", "seed", ("'NO_SUCH_NAME' not found",)),
    ("seed=0,1", "seed", ("got '0,1'", "-m")),
    ("baseline=none,fedavg", "baseline", ("got 'none,fedavg'", "-m")),
    ("baseline=glob(*)", "baseline", ("glob(*)", "-m")),
    ("--config-dir nowhere", "--config-dir", ("'nowhere' is not a folder",)),
    ("merging._target_=nowhere.Thing", "merging._target_", ("'nowhere.Thing'",)),
    ("merging._target_=Thing", "merging._target_", ("'Thing' is not a dotted path",)),
    ("merging._target_=hybridfl.methods.feddle.Fedle", "merging._target_", ("Did you mean 'Feddle'?",)),
]


@pytest.mark.parametrize(("typed", "key", "parts"), WRONG, ids=[typed for typed, _, _ in WRONG])
def test_wrong_input(tmp_path: Path, typed: str, key: str, parts: tuple[str, ...]) -> None:
    message = told(call("train", *TINY, *typed.split()))
    assert message.startswith(f"{key}: "), message
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_the_tiny_line_itself_is_right() -> None:
    assert call("train", *TINY, "--dry-run").status == 0


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("~model", "model: expected a config group with a _target_."),
        ("~merging", "merging: needs a _target_: the dotted path of a class or function."),
        ("~dataset", "dataset: is required and not given."),
        (
            "model=cnn model.channels=[4,4,4,4]",
            "model.channels: 4 poolings are too many for images of 8 pixels a side.",
        ),
        (
            "server_data=none",
            "server_data: merging=feddle requires server_data and server_labels, which is not there; "
            "try server_data=share.",
        ),
        (
            "server_data=none baseline=fedavg start=server",
            "start: got server, but the server owns no labelled examples; try server_data=share.",
        ),
    ],
)
def test_wrong_groups(tmp_path: Path, typed: str, message: str) -> None:
    assert told(call("train", *typed.split())) == message
    assert list(tmp_path.iterdir()) == []


@NO_GPU
def test_a_device_that_is_not_there() -> None:
    message = told(call("train", *TINY, "device=cuda"))
    assert message.startswith("device: got 'cuda'")
    assert "nearest valid choice: cpu" in message


# -- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("seed=0,1,abc", ("seed: got 'abc'", "seed=abc")),
        ("clients.per_round=1,2,6", ("clients.per_round: got 6", "nearest valid value: 5")),
        ("baseline=none,fedavg,fedvag", ("baseline: got 'fedvag'", "'fedavg'")),
        ("clients.nmber=1,2", ("clients.nmber: unknown key", "clients.number")),
        ("baseline=glob(zz*)", ("baseline: 'baseline=glob(zz*)' matches nothing", "fedbuff")),
        ("seed=range(0,0)", ("seed: 'seed=range(0,0)' matches nothing",)),
        ("seed=0,1 --dry-run", ("--dry-run: ", "leave out -m")),
        ("clients.delay=2 baseline=fedavg,fedprox", ("every job of the sweep was skipped", "clients.delay: got 2")),
    ],
)
def test_a_sweep_is_refused_before_its_first_job(tmp_path: Path, typed: str, parts: tuple[str, ...]) -> None:
    message = told(call("train", "-m", *TINY, *typed.split()))
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []


# -- the user's own folder -------------------------------------------------------------------------------------------


def test_a_file_that_hides_behind_a_shipped_choice(tmp_path: Path) -> None:
    own = tmp_path / "my_conf" / "model" / "mlp.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# Mine.\n_target_: mine.MLP\n")
    for command in (["train", *TINY], ["list"]):
        message = told(call(*command, "--config-dir", "my_conf"))
        assert message.startswith("--config-dir: 'my_conf/model/mlp.yaml' has the name of the shipped model=mlp")


def test_a_broken_file(tmp_path: Path) -> None:
    own = tmp_path / "my_conf" / "model" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# Mine.\nhidden: [64\n_target_: mine.MLP\n")
    message = told(call("train", "--config-dir", "my_conf", "dataset=synthetic", "model=mine"))
    assert "mine.yaml" in message
    assert "line 3" in message
    assert [path.name for path in tmp_path.iterdir()] == ["my_conf"]


def test_a_file_without_a_target(tmp_path: Path) -> None:
    own = tmp_path / "my_conf" / "model" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# Mine.\nhidden: [64]\n")
    message = told(call("train", "--config-dir", "my_conf", "dataset=synthetic", "model=mine"))
    assert message.startswith("model: needs a _target_")


# -- files -----------------------------------------------------------------------------------------------------------


def test_data_that_is_not_there(tmp_path: Path) -> None:
    message = told(call("train", "dataset=mnist", "data_root=nowhere"))
    assert message.startswith("nowhere/mnist/train-images-idx3-ubyte.gz: not found. Put the four original IDX files")
    assert "data_root" in message
    assert "HYBRIDFL_DATA" in message
    assert list(tmp_path.iterdir()) == []


def idx(folder: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    images = struct.pack(">4I", 2051, 2, 28, 28) + bytes(2 * 28 * 28)
    labels = struct.pack(">2I", 2049, 2) + bytes([0, 1])
    for part in ("train", "t10k"):
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            file = folder / f"{part}-{kind}-ubyte.gz"
            packed = gzip.compress(content)
            file.write_bytes(damage(packed) if file.name == name else packed)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda packed: packed[:-9], "truncated"),
        (lambda packed: gzip.compress(gzip.decompress(packed)[:-9]), "truncated"),
        (lambda packed: gzip.compress(b"\0" * 20), "magic number"),
        (lambda packed: b"<html>", "cannot be read"),
    ],
)
def test_data_that_are_damaged(tmp_path: Path, damage: Callable[[bytes], bytes], problem: str) -> None:
    (tmp_path / "mnist").mkdir()
    idx(tmp_path / "mnist", "t10k-images-idx3-ubyte.gz", damage)
    message = told(call("train", "dataset=mnist", "data_root=."))
    assert message.startswith("mnist/t10k-images-idx3-ubyte.gz: ")
    assert problem in message
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot read"),
        (b"no weights", "cannot read"),
        (pickle.dumps({"a": 1}, protocol=2), "cannot read"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_start_from_a_file_without_weights(tmp_path: Path, content: bytes, problem: str, suffix: str) -> None:
    file = tmp_path / f"start.{suffix}"
    file.write_bytes(content)
    message = told(call("train", *TINY, f"start={file}"))
    assert message.startswith("start: ")
    assert str(file) in message
    assert problem in message or suffix == "safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_start_from_the_weights_of_another_net(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "start.pt")
    message = told(call("train", *TINY, "start=start.pt"))
    assert message.startswith("start: start.pt does not fit the net: missing body.1.bias")


# -- hints -----------------------------------------------------------------------------------------------------------


def test_nearest() -> None:
    assert nearest("fedvag", ["fedavg", "oracle"]) == "Did you mean 'fedavg'? Valid: fedavg, oracle."
    assert nearest("zzz", ["fedavg", "oracle"]) == "Valid: fedavg, oracle."
    assert nearest("seeed", ["seed", "clients.number"], ["seed"]) == "Did you mean 'seed'? Valid: seed."
    assert nearest("zzz", []) == ""
