"""The further readers: exact contents of small files written here, refusal of broken ones, and the real files."""

from __future__ import annotations

import bz2
import dataclasses
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from reader_helpers import CONF, real_dataset

from hybridfl.build import build, locate
from hybridfl.data.chars74k import Chars74KFonts, Chars74KStreet
from hybridfl.data.cifar100 import CIFAR100
from hybridfl.data.dataset import Dataset, Reader
from hybridfl.data.femnist_digits import FEMNISTDigits
from hybridfl.data.mnist_m import MNISTM
from hybridfl.data.usps import USPS
from hybridfl.errors import ConfigError, DataError

NODES = ("cifar100", "usps", "mnist_m", "femnist_digits", "chars74k_fonts", "chars74k_street", "image_folder", "pacs")


def expect_measured_statistics(found: Dataset, rel: float = 1e-3) -> None:
    assert found.train.x.mean((0, 2, 3)) == pytest.approx(np.array(found.mean), rel=rel)
    assert found.train.x.std((0, 2, 3)) == pytest.approx(np.array(found.std), rel=rel)


def counts(y: np.ndarray) -> list[int]:
    return np.bincount(y).tolist()


# CIFAR-100


CIFAR = "cifar100/cifar-100-python"
PICTURES = np.repeat(np.array([[1, 100, 1], [2, 100, 2], [3, 100, 3]], np.uint8), 1024, axis=1)


def write_cifar100(root: Path, **changes: Any) -> Path:
    batch = {"data": PICTURES, "fine_labels": [0, 99, 7], "coarse_labels": [0, 19, 3], **changes}
    (root / CIFAR).mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        content = {key.encode(): value for key, value in batch.items() if value is not None}
        (root / CIFAR / name).write_bytes(pickle.dumps(content, protocol=4))
    return root


def test_cifar100_has_fine_and_coarse_labels(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    fine, coarse = CIFAR100().load(tmp_path), CIFAR100("coarse", limit=2).load(tmp_path)
    assert (fine.classes, fine.train.y.tolist(), fine.test.y.tolist()) == (100, [0, 99, 7], [0, 99, 7])
    assert (coarse.classes, coarse.train.y.tolist(), coarse.test.y.tolist()) == (20, [0, 19], [0, 19, 3])
    assert fine.train.x.shape == (3, 3, 32, 32)
    assert fine.train.x[1, :, 5, 5].tolist() == [2, 100, 2]


@pytest.mark.parametrize(
    ("label", "changes", "problem"),
    [
        ("fine", {"fine_labels": None}, "'fine_labels' is missing"),
        ("coarse", {"coarse_labels": None}, "'coarse_labels' is missing"),
        ("fine", {"fine_labels": [0, 100, 1]}, "label 100 is out of range, expected 0 to 99"),
        ("coarse", {"coarse_labels": [0, 20, 1]}, "label 20 is out of range, expected 0 to 19"),
        ("fine", {"data": PICTURES[:, :7]}, "3,072 columns"),
        ("fine", {"data": PICTURES[:2]}, "2 images but 3 labels"),
    ],
)
def test_a_damaged_cifar100_file_is_refused(tmp_path: Path, label: Any, changes: dict[str, Any], problem: str) -> None:
    write_cifar100(tmp_path, **changes)
    with pytest.raises(DataError, match=f"cifar-100-python/train: .*{problem}"):
        CIFAR100(label).load(tmp_path)


def test_a_missing_or_malicious_cifar100_file_is_named(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    (tmp_path / CIFAR / "test").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(DataError, match=r"test: refused, the pickle asks for os\.system"):
        CIFAR100().load(tmp_path)
    (tmp_path / CIFAR / "test").unlink()
    with pytest.raises(DataError, match=r"test: not found\. Put the files train and test of the CIFAR-100"):
        CIFAR100().load(tmp_path)


def test_real_cifar100(real: Path) -> None:
    found = real_dataset(real, CIFAR100(), CIFAR)
    coarse = CIFAR100("coarse").load(real)
    assert len(set(counts(found.train.y))) == len(set(counts(coarse.train.y))) == 1, "balanced, as the whole set is"
    assert (len(counts(found.test.y)), len(counts(coarse.test.y))) == (100, 20)
    groups = {(fine, group) for fine, group in zip(found.train.y.tolist(), coarse.train.y.tolist(), strict=True)}
    assert len(groups) == 100, "every fine class is in one group"
    expect_measured_statistics(found, rel=0.02)


# USPS


def write_usps(root: Path, train: bytes, test: bytes = b"10 1:1\n") -> Path:
    (root / "usps").mkdir(exist_ok=True)
    (root / "usps/usps.bz2").write_bytes(bz2.compress(train))
    (root / "usps/usps.t.bz2").write_bytes(bz2.compress(test))
    return root


def test_usps_is_read_exactly(tmp_path: Path) -> None:
    dense = b"3 " + b" ".join(b"%d:%.3f" % (column, -1 if column < 256 else 0.6) for column in range(1, 257))
    write_usps(tmp_path, dense + b"\n\n1 1:-1 2:1 17:-0.5 \n10\n")
    found = USPS().load(tmp_path)
    assert found.train.x.shape == (3, 1, 16, 16)
    assert found.train.y.tolist() == [2, 0, 9]
    assert found.train.x[0].ravel().tolist() == [0] * 255 + [204], "(0.6 + 1) / 2 * 255"
    assert found.train.x[1, 0, :2, :3].tolist() == [[0, 255, 128], [64, 128, 128]], "what is left out is 0, half grey"
    assert set(found.train.x[2].ravel().tolist()) == {128}
    assert (found.test.y.tolist(), found.test.x[0, 0, 0, 0]) == ([9], 255)
    assert USPS(limit=1).load(tmp_path).train.y.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"1 1:0\n2 1:0 2\n", "example 2: expected a label and pairs"),
        (b"1 1::0\n", "example 1: could not convert|expected a label and pairs"),
        (b"1 1:x\n", "example 1: could not convert"),
        (b"a 1:0\n", "example 1: invalid literal"),
        (b"1.5 1:0\n", "example 1: invalid literal"),
        (b"1 0:0\n", "indices are not whole numbers 1 to 256"),
        (b"1 257:0\n", "indices are not whole numbers 1 to 256"),
        (b"1 1.5:0\n", "indices are not whole numbers 1 to 256"),
        (b"1 2:0 2:0\n", "in ascending order"),
        (b"1 1:1.01\n", "values are not all between -1 and 1"),
        (b"1 1:nan\n", "values are not all between -1 and 1"),
        (b"0 1:0\n", "label -1 is out of range"),
        (b"11 1:0\n", "label 10 is out of range"),
        (b"", "there are no images"),
    ],
)
def test_a_damaged_usps_text_is_refused(tmp_path: Path, text: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=rf"usps\.bz2: .*({problem})"):
        USPS().load(write_usps(tmp_path, text))


def test_a_broken_or_missing_usps_file_is_named(tmp_path: Path) -> None:
    file = write_usps(tmp_path, b"1 1:0\n") / "usps/usps.t.bz2"
    file.write_bytes(bz2.compress(b"1 1:0\n" * 99)[:-9])
    with pytest.raises(DataError, match=r"usps\.t\.bz2: truncated"):
        USPS().load(tmp_path)
    file.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(DataError, match=r"usps\.t\.bz2: cannot be read"):
        USPS().load(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"usps\.t\.bz2: not found\. Put usps\.bz2 and"):
        USPS().load(tmp_path)


def test_real_usps(real: Path) -> None:
    found = real_dataset(real, USPS(), "usps")
    assert counts(found.train.y) == [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]
    assert counts(found.test.y) == [359, 264, 198, 166, 200, 160, 170, 147, 166, 177]
    expect_measured_statistics(found)


# npz files

GREY = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)
COLOUR = np.arange(3 * 2 * 4 * 3, dtype=np.uint8).reshape(3, 2, 4, 3)
NPZ: Mapping[str, tuple[Reader, np.ndarray]] = {
    "mnist_m/mnist_m.npz": (MNISTM(), COLOUR),
    "femnist_digits/femnist_digits.npz": (FEMNISTDigits(), GREY),
    "chars74k/fonts_digits.npz": (Chars74KFonts(), GREY),
    "chars74k/street_digits.npz": (Chars74KStreet(), COLOUR),
}


def write_npz(root: Path, name: str, **changes: Any) -> Path:
    x = NPZ[name][1]
    y = np.array([9, 0, 1], np.uint8)
    arrays = {"x_train": x, "y_train": y, "x_test": x[1:], "y_test": y[1:], "client_train": y, **changes}
    (root / name).parent.mkdir(exist_ok=True)
    np.savez_compressed(root / name, **{key: value for key, value in arrays.items() if value is not None})
    return root / name


@pytest.mark.parametrize("name", NPZ)
def test_npz_files_are_read_exactly(tmp_path: Path, name: str) -> None:
    write_npz(tmp_path, name)
    reader, x = NPZ[name]
    found = reader.load(tmp_path)
    assert found.train.x.shape == (3, len(found.mean), 2, 4)
    expected = x[:, None] if x is GREY else np.moveaxis(x, 3, 1)
    np.testing.assert_array_equal(found.train.x, expected)
    np.testing.assert_array_equal(found.test.x, expected[1:])
    assert (found.train.y.tolist(), found.test.y.tolist(), found.classes) == ([9, 0, 1], [0, 1], 10)
    assert found.train.y.dtype == np.int64
    if hasattr(reader, "limit"):
        shorter = dataclasses.replace(reader, limit=2).load(tmp_path)  # type: ignore[type-var]
        assert (len(shorter.train), len(shorter.test)) == (2, 2)


@pytest.mark.parametrize(
    ("name", "inverting"),
    [
        ("femnist_digits/femnist_digits.npz", FEMNISTDigits(invert=True)),
        ("chars74k/fonts_digits.npz", Chars74KFonts(invert=True)),
    ],
)
def test_inverted_digits_are_the_negative_and_standardise_to_it(tmp_path: Path, name: str, inverting: Reader) -> None:
    write_npz(tmp_path, name)
    plain, negative = NPZ[name][0].load(tmp_path), inverting.load(tmp_path)
    for part in ("train", "test"):
        before, after = getattr(plain, part), getattr(negative, part)
        np.testing.assert_array_equal(after.x, 255 - before.x)
        assert after.x.dtype == np.uint8
        standardised = [(x - found.mean[0]) / found.std[0] for x, found in ((before.x, plain), (after.x, negative))]
        np.testing.assert_allclose(standardised[1], -standardised[0])


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_python_objects_in_an_npz_file_are_refused_and_not_executed(tmp_path: Path) -> None:
    marker, name = tmp_path / "executed", "mnist_m/mnist_m.npz"
    file = write_npz(tmp_path, name, y_test=np.array([Exploit(marker)], dtype=object))
    with pytest.raises(DataError, match=r"mnist_m\.npz: .*Object arrays cannot be loaded"):
        MNISTM().load(tmp_path)
    assert not marker.exists()
    np.load(file, allow_pickle=True)["y_test"]
    assert marker.exists(), "the file would have done harm"


@pytest.mark.parametrize("name", NPZ)
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"x_test": None, "y_test": None}, "has no array x_test, y_test"),
        ({"x_train": np.zeros((3, 8), np.uint8)}, r"images have shape \(3, 8\), expected \(examples, height, width"),
        ({"x_train": np.zeros((3, 2, 4, 4), np.uint8)}, r"images have shape \(3, 2, 4, 4\), expected"),
        ({"y_train": np.array([0, 10, 1])}, "label 10 is out of range"),
        ({"y_train": np.array([0.0, 1, 1])}, "expected one axis of whole numbers"),
        ({"y_train": np.array([0, 1])}, "3 images but 2 labels"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, name: str, changes: dict[str, Any], problem: str) -> None:
    write_npz(tmp_path, name, **changes)
    with pytest.raises(DataError, match=f"{name}: .*{problem}"):
        NPZ[name][0].load(tmp_path)


def test_other_types_and_sizes_of_npz_images_are_refused(tmp_path: Path) -> None:
    name = "femnist_digits/femnist_digits.npz"
    write_npz(tmp_path, name, x_train=GREY.astype(float))
    with pytest.raises(DataError, match=r"npz: images have type float64"):
        FEMNISTDigits().load(tmp_path)
    write_npz(tmp_path, name, x_test=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"npz: train images are \(1, 2, 4\), test images \(1, 4, 4\)"):
        FEMNISTDigits().load(tmp_path)


@pytest.mark.parametrize("name", NPZ)
def test_a_broken_or_missing_npz_file_is_named(tmp_path: Path, name: str) -> None:
    file = write_npz(tmp_path, name)
    whole = file.read_bytes()
    for content, problem in (
        (whole[:-30], "truncated or damaged"),
        (whole[:60] + b"\0" * 40 + whole[100:], "truncated or damaged"),
        (b"<!DOCTYPE html>", "no npz file"),
        (b"", "no npz file"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {problem}.*Put {file.name} with the arrays"):
            NPZ[name][0].load(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=f"{name}: not found. Put {file.name} with the arrays x_train"):
        NPZ[name][0].load(tmp_path)


@pytest.mark.parametrize(
    ("name", "train", "test", "shape"),
    [
        ("mnist_m/mnist_m.npz", [400] * 10, [100] * 10, (3, 32, 32)),
        ("femnist_digits/femnist_digits.npz", 5046, 950, (1, 28, 28)),
        ("chars74k/fonts_digits.npz", [816] * 10, 1634, (1, 28, 28)),
        ("chars74k/street_digits.npz", [117, 97, 89, 55, 56, 61, 63, 46, 32, 54], 215, (3, 32, 32)),
    ],
)
def test_real_npz_files(real: Path, name: str, train: object, test: object, shape: tuple[int, ...]) -> None:
    found = real_dataset(real, NPZ[name][0], name.split("/")[0])
    assert found.train.x.shape[1:] == found.test.x.shape[1:] == shape
    assert train in (counts(found.train.y), len(found.train))
    assert test in (counts(found.test.y), len(found.test))
    expect_measured_statistics(found)


# Configuration files


@pytest.mark.parametrize("name", NODES)
def test_each_yaml_names_its_source_and_every_option_with_its_default(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    node = yaml.safe_load(text)
    target = locate(node["_target_"], name)
    assert [key for key in node if key != "_target_"] == [field.name for field in dataclasses.fields(target)]
    own = {"folder": "pacs", "first_level": "domain"} if name == "pacs" else {}
    assert build(node, name) == target(**own), "the YAML's defaults are the class's"


@pytest.mark.parametrize(
    ("name", "option", "value", "key"),
    [
        ("cifar100", "label", "fin", "dataset.label"),
        ("usps", "limit", 0, "dataset.limit"),
        ("femnist_digits", "invert", "yes", "dataset.invert"),
        ("chars74k_street", "limit", 3, "dataset.limit"),
        ("image_folder", "test_fraction", 1, "dataset.test_fraction"),
        ("image_folder", "first_level", "classes", "dataset.first_level"),
        ("image_folder", "domains", ["a"], "dataset.domains"),
        ("pacs", "domains", "photo", "dataset.domains"),
        ("pacs", "size", 0, "dataset.size"),
    ],
)
def test_a_wrong_option_is_named_by_its_key(name: str, option: str, value: object, key: str) -> None:
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError) as caught:
        build({**node, option: value}, "dataset")
    assert caught.value.key == key
