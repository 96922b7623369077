"""Readers of CIFAR, digits and synthetic data, options of all of them, and the real files where they are."""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from hybridfl.build import build, locate
from hybridfl.data import digits
from hybridfl.data.cifar import CIFAR10, FOLDER, TEST, TRAIN
from hybridfl.data.dataset import Dataset
from hybridfl.data.digits import Digits
from hybridfl.data.idx import IMAGES, MNIST, FashionMNIST, read_idx
from hybridfl.data.synthetic import Synthetic
from hybridfl.errors import ConfigError, DataError

CONF = Path(__file__).parents[1] / "conf"
NODES = sorted(
    f"{group}/{name}"
    for group, names in {
        "dataset": ("digits", "mnist", "fashion_mnist", "cifar10", "synthetic"),
        "partitioning": ("iid", "dirichlet"),
        "server_data": ("none", "share"),
    }.items()
    for name in names
)


def write_cifar(root: Path, *, size: int = 2) -> None:
    (root / FOLDER).mkdir(parents=True)
    for number, name in enumerate((*TRAIN, TEST)):
        data = np.full((size, 3072), number, dtype=np.uint8)
        data[:, 1024:2048] = 100
        batch = {b"data": data, b"labels": [number, 9][:size], b"batch_label": b"x"}
        (root / FOLDER / name).write_bytes(pickle.dumps(batch, protocol=4))


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    write_cifar(tmp_path)
    return tmp_path


# CIFAR-10


def test_cifar_batches_of_any_size_are_read_in_order(cifar: Path) -> None:
    found = CIFAR10().load(cifar)
    assert found.train.x.shape == (10, 3, 32, 32)
    assert found.train.x[6, :, 5, 5].tolist() == [3, 100, 3]
    assert found.train.y.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert found.test.y.tolist() == [5, 9]
    assert CIFAR10(limit=3).load(cifar).train.y.tolist() == [0, 9, 1]


def python2_batch(flags: bytes) -> bytes:
    """The pickle Python 2 wrote: byte strings as text opcodes, numpy's old module, dtype flags as numbers."""
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1" + flags + b"\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    pixels = b"T" + struct.pack("<I", 3072) + bytes(range(256)) * 12
    state = b"(K\x01K\x01M\x00\x0c\x86" + dtype + b"\x89" + pixels + b"tb"
    return b"\x80\x02}(U\x04data" + reconstruct + state + b"U\x06labels]K\x07au."


@pytest.mark.parametrize("flags", [b"K\x00K\x01", b"K\x00K\x00"])
def test_a_python_2_pickle_is_read(cifar: Path, flags: bytes) -> None:
    (cifar / FOLDER / TEST).write_bytes(python2_batch(flags))
    test = CIFAR10().load(cifar).test
    assert test.y.tolist() == [7]
    np.testing.assert_array_equal(test.x.ravel(), np.tile(np.arange(256), 12))


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_executed(cifar: Path, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    (cifar / FOLDER / TRAIN[2]).write_bytes(pickle.dumps({"data": Exploit(marker)}, protocol=protocol))
    with pytest.raises(DataError, match=rf"data_batch_3: refused, the pickle asks for {os.name}.mkdir"):
        CIFAR10().load(cifar)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Exploit(marker)))
    assert marker.exists(), "the pickle would have done harm"


@pytest.mark.parametrize("name", ["numpy.dtype.__init__", "numpy.load", "numpy.core.multiarray.fromfile"])
def test_other_names_of_numpy_are_refused(cifar: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (cifar / FOLDER / TEST).write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(DataError, match=f"test_batch: refused, the pickle asks for {name}"):
        CIFAR10().load(cifar)


GOOD = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (pickle.dumps({"data": GOOD, "labels": [0, 1]}, protocol=4)[:-100], "truncated or no pickle"),
        (b"", "truncated or no pickle"),
        (b"<!DOCTYPE html>", "truncated or no pickle"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"labels": [0]}), "'data' is missing"),
        (pickle.dumps({"data": GOOD[:, :5], "labels": [0, 1]}, protocol=4), "3,072 columns"),
        (pickle.dumps({"data": GOOD.astype(float), "labels": [0, 1]}, protocol=4), "no uint8 array"),
        (pickle.dumps({"data": GOOD}, protocol=4), "'labels' is missing"),
        (pickle.dumps({"data": GOOD, "labels": ["a", "b"]}, protocol=4), "no list of whole numbers"),
        (pickle.dumps({"data": GOOD, "labels": [0]}, protocol=4), "2 images but 1 labels"),
        (pickle.dumps({"data": GOOD, "labels": [0, 10]}, protocol=4), "label 10 is out of range"),
        (pickle.dumps({"data": GOOD, "labels": [0, 2**80]}, protocol=4), "labels have shape"),
    ],
)
def test_a_damaged_batch_is_refused(cifar: Path, content: bytes, problem: str) -> None:
    (cifar / FOLDER / TEST).write_bytes(content)
    with pytest.raises(DataError, match=f"test_batch: .*{problem}"):
        CIFAR10().load(cifar)


def test_a_missing_batch_is_named(cifar: Path) -> None:
    (cifar / FOLDER / TRAIN[4]).unlink()
    with pytest.raises(DataError, match=r"data_batch_5: not found\. Put the six batch files"):
        CIFAR10().load(cifar)


# Digits


def test_digits_has_a_fixed_stratified_test_part() -> None:
    found = Digits().load(Path("unused"))
    assert found.train.x.shape == (1352, 1, 8, 8)
    assert found.test.x.shape == (445, 1, 8, 8)
    counts = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    np.testing.assert_array_equal(np.bincount(found.test.y), counts // 4)
    np.testing.assert_array_equal(np.bincount(found.train.y), counts - counts // 4)
    assert found.mean == pytest.approx((found.train.x.mean(),), abs=0.01)
    assert found.std == pytest.approx((found.train.x.std(),), abs=0.01)


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    ours = digits._read(digits._file())
    np.testing.assert_array_equal(ours.x[:, 0], theirs.images)
    np.testing.assert_array_equal(ours.y, theirs.target)


def test_digits_import_neither_scikit_learn_nor_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from hybridfl.data.digits import Digits; Digits().load(Path());"
        "import hybridfl.data.split; print(sorted({'sklearn', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parent, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gzip.compress(b"1,2,3\n"), "expected lines of 64 values"),
        (gzip.compress((",".join(["17"] * 64) + ",0\n").encode()), "expected lines of 64 values"),
        (gzip.compress((",".join(["1"] * 64) + ",11\n").encode()), "label 11 is out of range"),
        (gzip.compress(b"a,b\n"), "cannot be read"),
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"1,2,3\n" * 99)[:-9], "cannot be read"),
    ],
    ids=["short lines", "value too large", "label too large", "no numbers", "no gzip", "truncated"],
)
def test_a_damaged_digits_file_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "digits.csv.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"digits.csv.gz: .*{problem}"):
        digits._read(file)


def test_digits_without_scikit_learn_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found\. Reinstall scikit-learn"):
        digits._read(tmp_path / "digits.csv.gz")
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        Digits().load(tmp_path)


# Synthetic


def nearest_prototype_accuracy(found: Dataset) -> float:
    prototypes = np.stack([found.train.x[found.train.y == label].mean(0) for label in range(found.classes)])
    distances = ((found.test.x[:, None] - prototypes) ** 2).sum((2, 3, 4))
    return float((distances.argmin(1) == found.test.y).mean())


def test_synthetic_is_balanced_reproducible_and_as_hard_as_it_says() -> None:
    found = Synthetic(train=4000, test=4000, classes=2, shape=(2, 5, 6), separation=2.0).load(Path())
    assert found.train.x.shape == (4000, 2, 5, 6)
    assert found.train.x.dtype == np.float32
    assert np.bincount(found.train.y).tolist() == [2000, 2000]
    assert found.train.x.std() == pytest.approx(found.std[0], rel=0.02)
    assert len(found.mean) == 2
    prototypes = [found.train.x[found.train.y == label].mean(0) for label in range(2)]
    distance = float(np.linalg.norm(prototypes[0] - prototypes[1]))
    assert distance == pytest.approx(2.0, rel=0.35), "one draw of a random distance"
    best_possible = (1 + math.erf(distance / 2 / math.sqrt(2))) / 2
    assert nearest_prototype_accuracy(found) == pytest.approx(best_possible, abs=0.03)


def test_synthetic_seeds_and_extremes() -> None:
    same, again, other = (Synthetic(seed=seed).load(Path()).fingerprint for seed in (0, 0, 1))
    assert same == again != other
    assert nearest_prototype_accuracy(Synthetic(separation=50).load(Path())) == 1.0
    assert nearest_prototype_accuracy(Synthetic(separation=0).load(Path())) < 0.2
    found = Synthetic().load(Path())
    assert not np.array_equal(found.train.x[: len(found.test)], found.test.x)
    with pytest.raises(ConfigError, match=r"shape: got .*channels, height, width"):
        Synthetic(shape=(8, 8))


# Configuration files


@pytest.mark.parametrize("name", NODES)
def test_each_yaml_names_its_source_and_every_option_with_its_default(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    node = yaml.safe_load(text)
    target = locate(node["_target_"], name)
    built = build(node, name)
    fields = [field.name for field in dataclasses.fields(target)]
    assert [key for key in node if key != "_target_"] == fields
    assert built == target(), "the YAML's defaults are the class's"


@pytest.mark.parametrize(
    ("name", "option", "value", "key"),
    [
        ("dataset/mnist", "limit", 0, "dataset.limit"),
        ("dataset/synthetic", "shape", [1, 8], "dataset.shape"),
        ("dataset/synthetic", "shape", [1, 8, 0], "dataset.shape[2]"),
        ("dataset/synthetic", "classes", 1, "dataset.classes"),
        ("dataset/digits", "limit", 3, "dataset.limit"),
        ("partitioning/dirichlet", "alpha", 0, "partitioning.alpha"),
        ("partitioning/iid", "min_examples", 0, "partitioning.min_examples"),
        ("server_data/share", "fraction", 1.5, "server_data.fraction"),
        ("server_data/share", "classes", [], "server_data.classes"),
        ("server_data/share", "examples", None, "server_data.examples"),
    ],
)
def test_a_wrong_option_is_named_by_its_key(name: str, option: str, value: object, key: str) -> None:
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError) as caught:
        build({**node, option: value}, name.partition("/")[0])
    assert caught.value.key == key


# Real files


@pytest.mark.parametrize("reader", [MNIST(), FashionMNIST()])
def test_real_idx_files(real: Path, reader: MNIST | FashionMNIST) -> None:
    found = reader.load(real)
    assert found.train.x.shape == (60000, 1, 28, 28)
    assert found.test.x.shape == (10000, 1, 28, 28)
    assert found.mean == pytest.approx((found.train.x.mean(),), rel=1e-3)
    assert found.std == pytest.approx((found.train.x.std(),), rel=1e-3)
    expected = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949] if found.name == "mnist" else [6000] * 10
    assert np.bincount(found.train.y).tolist() == expected


def test_real_cifar_files(real: Path) -> None:
    found = CIFAR10().load(real)
    assert found.train.x.shape[1:] == found.test.x.shape[1:] == (3, 32, 32)
    assert len(set(np.bincount(found.train.y, minlength=10))) == 1, "the set, and a fair subset, is balanced"
    np.testing.assert_allclose(found.train.x.mean((0, 2, 3)), found.mean, rtol=0.01)
    np.testing.assert_allclose(found.train.x.std((0, 2, 3)), found.std, rtol=0.01)


def test_a_real_file_cut_short_is_refused(real: Path, tmp_path: Path) -> None:
    source = real / "mnist" / "t10k-images-idx3-ubyte.gz"
    (tmp_path / source.name).write_bytes(source.read_bytes()[:100_000])
    with pytest.raises(DataError, match="truncated"):
        read_idx(tmp_path / source.name, IMAGES, "")
