"""The further readers: exact contents of small files written here, refusal of broken ones, and the real files."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from hybridfl.build import build, locate
from hybridfl.data.chars74k import Chars74KFonts, Chars74KStreet
from hybridfl.data.cifar100 import CIFAR100
from hybridfl.data.dataset import Dataset, Reader
from hybridfl.data.femnist_digits import FEMNISTDigits
from hybridfl.data.image_folder import ImageFolder
from hybridfl.data.mnist_m import MNISTM
from hybridfl.data.usps import USPS
from hybridfl.errors import ConfigError, DataError

CONF = Path(__file__).parents[1] / "conf" / "dataset"
NODES = ("cifar100", "usps", "mnist_m", "femnist_digits", "chars74k_fonts", "chars74k_street", "image_folder", "pacs")


def real_dataset(real: Path, reader: Reader, folder: str) -> Dataset:
    if not (real / folder).is_dir():
        pytest.skip(f"{folder} is not in HYBRIDFL_DATA")
    return reader.load(real)


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


# Image folders


def encoded(value: int | tuple[int, int, int], size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(stream, kind)
    return stream.getvalue()


def write_tree(top: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)


def zip_first_level(top: Path) -> None:
    for folder in [path for path in top.iterdir() if path.is_dir()]:
        with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
            for path in sorted(folder.rglob("*"), reverse=True):
                archive.write(path, path.relative_to(folder).as_posix())
        shutil.rmtree(folder)


def domain_tree(top: Path) -> None:
    """Two domains of five cats and five dogs; red tells the domain, green the class, blue the image."""
    for red, domain in enumerate(("paint", "photo")):
        for green, kind in enumerate(("cat", "dog")):
            images = {f"{domain}/{kind}/{blue}.png": encoded((red, green, blue)) for blue in range(5)}
            write_tree(top, images)


def write_index(top: Path, rows: list[str], header: str = "domain,class,label,file,split") -> None:
    (top / "index.csv").write_text("\n".join([header, *rows]) + "\n")


def colours(x: np.ndarray) -> list[list[int]]:
    assert np.array_equal(x, np.broadcast_to(x[:, :, :1, :1], x.shape)), "one colour an image"
    return x[:, :, 0, 0].tolist()


DOMAINS = ImageFolder("pics", "domain", size=None)
"""Of the tree above."""


@pytest.mark.parametrize("pack", [False, True], ids=["folders", "zips"])
def test_a_tree_of_domains_without_an_index_holds_out_of_every_class(tmp_path: Path, pack: bool) -> None:
    domain_tree(tmp_path / "pics")
    write_tree(tmp_path / "pics", {"paint/cat/notes.txt": b"", "paint/cat/.hidden.png": b"", "readme.md": b""})
    if pack:
        zip_first_level(tmp_path / "pics")
    found = DOMAINS.load(tmp_path)
    assert (found.name, found.classes, found.train.x.dtype) == ("pics", 2, np.uint8)
    assert colours(found.train.x) == [[red, green, blue] for red in (0, 1) for green in (0, 1) for blue in range(4)]
    assert colours(found.test.x) == [[0, 0, 4], [0, 1, 4], [1, 0, 4], [1, 1, 4]], "the fifth of every class"
    assert found.train.y.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert found.test.y.tolist() == [0, 1, 0, 1]


def test_folders_and_zips_are_the_same_data(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    before = DOMAINS.load(tmp_path).fingerprint
    zip_first_level(tmp_path / "pics")
    assert DOMAINS.load(tmp_path).fingerprint == before


def test_chosen_domains_come_in_their_order_and_keep_their_labels(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    shutil.rmtree(tmp_path / "pics/photo/cat")
    both = dataclasses.replace(DOMAINS, domains=("photo", "paint")).load(tmp_path)
    assert [red for red, _, _ in colours(both.test.x)] == [1, 0, 0]
    photo = dataclasses.replace(DOMAINS, domains=("photo",)).load(tmp_path)
    assert (photo.classes, photo.test.y.tolist()) == (2, [1]), "dogs are 1 though there are no cats"
    with pytest.raises(ConfigError, match=r"domains\[0\]: got 'phot'\. Did you mean 'photo'\? Valid: paint, photo"):
        dataclasses.replace(DOMAINS, domains=("phot",)).load(tmp_path)
    for wrong in ((), ("photo", "photo")):
        with pytest.raises(ConfigError, match=r"domains: got .*different names"):
            dataclasses.replace(DOMAINS, domains=wrong)
    with pytest.raises(ConfigError, match=r"domains: got .*unless first_level is domain"):
        ImageFolder(domains=("photo",))


def test_a_tree_of_classes_with_every_kind_of_image(tmp_path: Path) -> None:
    grey = {f"light/{number}.{kind}": encoded(200, kind=kind) for number, kind in enumerate(("png", "bmp", "gif"))}
    write_tree(
        tmp_path / "pics", {**grey, "light/3.JPG": encoded(200, kind="JPEG"), "light/4.pgm": encoded(200, kind="PPM")}
    )
    write_tree(tmp_path / "pics", {f"dark/{n}.png": encoded((0, 10, 0)) for n in range(5)})
    found = ImageFolder("pics", size=None).load(tmp_path)
    assert colours(found.train.x) == [[0, 10, 0]] * 4 + [[200] * 3] * 4
    assert found.test.y.tolist() == [0, 1]
    grey_ones = ImageFolder("pics", size=None, grey=True).load(tmp_path)
    assert colours(grey_ones.test.x) == [[6], [200]], "0.587 of green"
    assert (len(found.mean), len(grey_ones.mean)) == (3, 1)


def test_images_are_squeezed_to_size_or_all_alike(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 200], np.uint8), (4, 4))
    stream = io.BytesIO()
    Image.fromarray(stripes).save(stream, "PNG")
    write_tree(tmp_path / "pics", {"a/0.png": stream.getvalue(), "a/1.png": encoded(7, size=(3, 5))})
    found = ImageFolder("pics", size=2, grey=True, test_fraction=0.5).load(tmp_path)
    assert found.train.x.shape == (1, 1, 2, 2)
    np.testing.assert_allclose(found.train.x[0, 0], np.full((2, 2), 100), atol=20, err_msg="means, not single pixels")
    assert found.test.x.ravel().tolist() == [7] * 4
    with pytest.raises(DataError, match=r"a/1\.png: 3x5 pixels, but .*a/0\.png has 8x4\. Set dataset\.size"):
        ImageFolder("pics", size=None, test_fraction=0.5).load(tmp_path)


@pytest.mark.parametrize(
    ("fraction", "number", "test"), [(0.2, 9, [4]), (0.25, 8, [3, 7]), (0.5, 3, [1]), (0.29, 100, 29)]
)
def test_the_fraction_held_out(tmp_path: Path, fraction: float, number: int, test: object) -> None:
    write_tree(tmp_path / "pics", {f"a/{n:03}.png": encoded(n) for n in range(number)})
    found = ImageFolder("pics", size=None, grey=True, test_fraction=fraction).load(tmp_path)
    held_out = found.test.x[:, 0, 0, 0].tolist()
    assert test in (held_out, len(held_out))
    assert sorted(held_out + found.train.x[:, 0, 0, 0].tolist()) == list(range(number))


# A split file

ROWS = ["photo,dog,0,dog/3.png,test", "photo,cat,1,cat/1.png,train", "paint,dog,0,dog/2.png,train"]


@pytest.mark.parametrize("pack", [False, True], ids=["folders", "zips"])
def test_the_index_says_what_is_train_and_which_number_a_class_has(tmp_path: Path, pack: bool) -> None:
    domain_tree(tmp_path / "pics")
    if pack:
        zip_first_level(tmp_path / "pics")
    write_index(tmp_path / "pics", ROWS)
    found = DOMAINS.load(tmp_path)
    assert (colours(found.train.x), found.train.y.tolist()) == ([[0, 1, 2], [1, 0, 1]], [0, 1])
    assert (colours(found.test.x), found.test.y.tolist()) == ([[1, 1, 3]], [0])
    photo = dataclasses.replace(DOMAINS, domains=("photo",)).load(tmp_path)
    assert (colours(photo.train.x), photo.train.y.tolist(), photo.classes) == ([[1, 0, 1]], [1], 2)


def test_an_index_of_a_tree_of_classes_and_without_labels(tmp_path: Path) -> None:
    write_tree(tmp_path / "pics", {f"{kind}/{n}.png": encoded(n) for kind in "ba" for n in range(3)})
    write_index(tmp_path / "pics", ["b,0.png,train", "a,1.png,train", "b,2.png,test"], header="class,file,split")
    found = ImageFolder("pics", size=None, grey=True).load(tmp_path)
    assert (found.train.x[:, 0, 0, 0].tolist(), found.train.y.tolist()) == ([1, 0], [0, 1])
    assert (found.test.x[:, 0, 0, 0].tolist(), found.test.y.tolist()) == ([2], [1])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (["photo,dog,0,dog/9.png,train"], r"line 5 lists photo/dog/9\.png of class dog: not there"),
        (["photo,cat,1,dog/1.png,train"], r"line 5 lists photo/dog/1\.png of class cat: not there"),
        (["sketch,dog,0,dog/1.png,train"], r"line 5 lists sketch/dog/1\.png of class dog: not there"),
        (["photo,dog,0,../photo/dog/1.png,train"], r"line 5 lists .* not there"),
        (["photo,dog,0,dog/3.png,train"], r"line 5 lists photo/dog/3\.png again"),
        (["photo,dog,0,dog/1.png,val"], "line 5 has split 'val', expected train or test"),
        (["photo,dog,1,dog/1.png,train"], "line 5 has label '1'"),
        (["photo,dog,x,dog/1.png,train"], "line 5 has label 'x'"),
        (["photo,cow,3,cow/1.png,train"], "labels of the 3 classes are not 0 to 2"),
        (["photo,cow,1,cow/1.png,train"], "labels of the 3 classes are not 0 to 2"),
        (["photo,dog,0"], "line 5 has not 5 values"),
        (["photo,dog,0,dog/1.png,train,more"], "line 5 has not 5 values"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, rows: list[str], problem: str) -> None:
    domain_tree(tmp_path / "pics")
    write_index(tmp_path / "pics", ROWS + rows)
    with pytest.raises(DataError, match=rf"index\.csv: .*{problem}"):
        DOMAINS.load(tmp_path)


def test_an_index_without_columns_or_text_is_refused(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    write_index(tmp_path / "pics", ["dog,dog/1.png"], header="class,file")
    with pytest.raises(DataError, match=r"index\.csv: has no column domain, split\. Put the original back, or remove"):
        DOMAINS.load(tmp_path)
    (tmp_path / "pics/index.csv").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match=r"index\.csv: cannot be read"):
        DOMAINS.load(tmp_path)
    write_index(tmp_path / "pics", ROWS[1:])
    with pytest.raises(DataError, match="pics: there are no test images"):
        DOMAINS.load(tmp_path)


# Damaged trees


def test_another_tree_than_told_is_refused(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    with pytest.raises(DataError, match=r"paint: holds cat/.\.png, expected IMAGE .*set dataset\.first_level=domain"):
        ImageFolder("pics").load(tmp_path)
    with pytest.raises(DataError, match=r"cat: holds .\.png, expected CLASS/IMAGE .*set dataset\.first_level=class"):
        ImageFolder("pics/paint", "domain").load(tmp_path)
    write_tree(tmp_path / "pics", {"photo/photo/cat/1.png": encoded(1)})
    with pytest.raises(DataError, match=r"photo: holds photo/cat/1\.png, expected CLASS/IMAGE"):
        DOMAINS.load(tmp_path)


def remove(top: Path) -> None:
    shutil.rmtree(top)


def empty(top: Path) -> None:
    for path in top.iterdir():
        shutil.rmtree(path)


def spoil(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda top: write_tree(top, {name: content})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (remove, r"pics: not found\. Put a folder or zip of images for every domain in .*pics"),
        (empty, "pics: holds no folder and no zip"),
        (spoil("photo/cat/1.png", encoded((1, 2, 3))[:40]), r"photo/cat/1\.png: no image or truncated"),
        (spoil("photo/cat/1.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "1.png: no image"),
        (spoil("photo/cat/1.png", encoded(1, kind="TIFF")), r"photo/cat/1\.png: no image"),
        (spoil("photo.zip", b""), r"photo\.zip: photo is there too"),
        (spoil("sketch.zip", b"PK"), r"sketch\.zip: no zip file or truncated"),
        (spoil("sketch/readme.txt", b""), "sketch: there are no images"),
    ],
    ids=["no folder", "nothing", "cut short", "postscript", "another format", "twice", "no zip", "no images"],
)
def test_a_damaged_tree_is_refused(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    domain_tree(tmp_path / "pics")
    damage(tmp_path / "pics")
    with pytest.raises(DataError, match=problem):
        DOMAINS.load(tmp_path)


def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    zip_first_level(tmp_path / "pics")
    file = tmp_path / "pics/photo.zip"
    file.write_bytes(file.read_bytes().replace(encoded((1, 1, 3)), b"x" * len(encoded((1, 1, 3)))))
    with pytest.raises(DataError, match=r"photo\.zip/dog/3\.png: cannot be read \(Bad CRC"):
        DOMAINS.load(tmp_path)


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(stream, "PNG")
    write_tree(tmp_path / "pics", {"a/0.png": encoded(1), "a/1.png": stream.getvalue()})
    with pytest.raises(DataError, match=r"a/1\.png: pixels of mode I;16, expected at most 8 bits"):
        ImageFolder("pics", test_fraction=0.5).load(tmp_path)


def test_too_few_images_to_hold_some_out(tmp_path: Path) -> None:
    write_tree(tmp_path / "pics", {"a/0.png": encoded(1), "b/1.png": encoded(1)})
    with pytest.raises(DataError, match=r"pics: there are no test images\. Add images, or set .*test_fraction"):
        ImageFolder("pics").load(tmp_path)


def test_real_pacs(real: Path) -> None:
    pacs = build(yaml.safe_load((CONF / "pacs.yaml").read_text(encoding="utf-8")), "dataset")
    found = real_dataset(real, pacs, "pacs")
    assert (found.train.x.shape, found.test.x.shape, found.classes) == ((3292, 3, 64, 64), (823, 3, 64, 64), 7)
    with (real / "pacs/index.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["domain"] == "cartoon"]
    cartoon = dataclasses.replace(pacs, domains=("cartoon",), grey=True, size=16).load(real)
    assert cartoon.train.x.shape == (828, 1, 16, 16)
    assert cartoon.test.x.shape == (207, 1, 16, 16)
    assert cartoon.test.y.tolist() == [int(row["label"]) for row in rows if row["split"] == "test"]
    sizes = {
        domain: len(dataclasses.replace(pacs, domains=(domain,), size=1).load(real).train)
        for domain in ("photo", "sketch")
    }
    assert sizes == {"photo": 840, "sketch": 784}


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
