"""Readers of idx files: exact contents of small files written here, and refusal of broken ones."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from hybridfl.data.dataset import Dataset, Examples, checked
from hybridfl.data.idx import IMAGES, LABELS, MNIST, FashionMNIST
from hybridfl.errors import ConfigError, DataError


def write_idx(file: Path, magic: int, array: np.ndarray, *, tail: bytes = b"") -> None:
    header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes() + tail, mtime=0))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A root with an MNIST of 4 train and 2 test images, 2x3."""
    for part, size in (("train", 4), ("t10k", 2)):
        images = np.arange(size * 6).reshape(size, 2, 3)
        write_idx(tmp_path / f"mnist/{part}-images-idx3-ubyte.gz", IMAGES, images)
        write_idx(tmp_path / f"mnist/{part}-labels-idx1-ubyte.gz", LABELS, np.arange(size) + 6)
    return tmp_path


# Examples and fingerprint


def tiny(value: float = 0.0) -> Dataset:
    part = Examples(np.full((2, 1, 1, 1), value, dtype=np.float32), np.array([0, 1]))
    return Dataset("tiny", part, part, 2, (0.0,), (1.0,))


def test_fingerprint_depends_on_every_byte_and_shape() -> None:
    assert tiny().fingerprint == tiny().fingerprint
    assert len(tiny().fingerprint) == 16
    reshaped = Examples(np.zeros((2, 1, 1, 1), dtype=np.uint8), np.array([0, 1]))
    relabelled = Examples(np.zeros((2, 1, 1, 1), dtype=np.float32), np.array([1, 0]))
    others = [tiny(1.0)] + [dataclasses.replace(tiny(), test=part) for part in (reshaped, relabelled)]
    assert len({tiny().fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("x", "y", "problem"),
    [
        (np.zeros((2, 1, 1), np.uint8), np.array([0, 1]), "four axes"),
        (np.zeros((2, 1, 1, 1), np.float64), np.array([0, 1]), "type float64"),
        (np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1, 1]), "2 images but 3 labels"),
        (np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 2]), "label 2 is out of range, expected 0 to 1"),
        (np.zeros((2, 1, 1, 1), np.uint8), np.array([-1, 0]), "label -1 is out of range"),
        (np.zeros((2, 1, 1, 1), np.uint8), np.array([0.0, 1.0]), "whole numbers"),
        (np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, np.int64), "no images"),
    ],
)
def test_checked_names_the_file_and_the_problem(x: np.ndarray, y: np.ndarray, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        checked(x, y, 2, "some/file")
    assert "some/file" in str(caught.value)


# IDX


def test_idx_is_read_exactly(mnist: Path) -> None:
    found = MNIST().load(mnist)
    assert found.train.x.shape == (4, 1, 2, 3)
    assert found.train.x.dtype == np.uint8
    np.testing.assert_array_equal(found.train.x.ravel(), np.arange(24))
    np.testing.assert_array_equal(found.train.y, [6, 7, 8, 9])
    np.testing.assert_array_equal(found.test.y, [6, 7])
    assert found.train.y.dtype == np.int64
    assert found.train.x.flags.writeable, "torch warns about read-only arrays"
    assert found.mean == pytest.approx((33.3285,))


def test_limit_keeps_the_first_and_refuses_more_than_there_are(mnist: Path) -> None:
    np.testing.assert_array_equal(MNIST(limit=3).load(mnist).train.y, [6, 7, 8])
    assert len(MNIST(limit=3).load(mnist).test) == 2
    with pytest.raises(ConfigError, match=r"limit: got 5.*nearest valid value: 4"):
        MNIST(limit=5).load(mnist)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: not found\. Put .*HYBRIDFL_DATA.*fashion_mnist/"):
        FashionMNIST().load(tmp_path)


def images_file(root: Path) -> Path:
    return root / "mnist/train-images-idx3-ubyte.gz"


def cut_gzip(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-12])


def no_gzip(file: Path) -> None:
    file.write_bytes(b"not a gzip file")


def flipped_bits(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[14:18] = b"\xff\xff\xff\xff"
    file.write_bytes(bytes(content))


def short_pixels(file: Path) -> None:
    header = struct.pack(">4I", IMAGES, 4, 2, 3)
    file.write_bytes(gzip.compress(header + bytes(23)))


def long_pixels(file: Path) -> None:
    write_idx(file, IMAGES, np.zeros((4, 2, 3)), tail=b"z")


def huge_sizes(file: Path) -> None:
    file.write_bytes(gzip.compress(struct.pack(">4I", IMAGES, *[2**32 - 1] * 3)))


def no_header(file: Path) -> None:
    file.write_bytes(gzip.compress(b"\x00\x00"))


def labels_instead(file: Path) -> None:
    write_idx(file, LABELS, np.zeros(30))


def one_image_fewer(file: Path) -> None:
    write_idx(file, IMAGES, np.zeros((3, 2, 3)))


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut_gzip, "train-images.*truncated"),
        (no_gzip, "train-images.*cannot be read"),
        (flipped_bits, "train-images.*cannot be read"),
        (short_pixels, "train-images.*truncated, 1 bytes are missing"),
        (long_pixels, "train-images.*1 bytes too many"),
        (huge_sizes, "train-images.*truncated"),
        (no_header, "train-images.*2 bytes are no IDX header"),
        (labels_instead, "train-images.*magic number 2049, expected 2051"),
        (one_image_fewer, "train-labels.*3 images but 4 labels"),
        (a_folder, "train-images.*cannot be read"),
    ],
)
def test_a_damaged_idx_file_is_refused(mnist: Path, damage, problem: str) -> None:
    damage(images_file(mnist))
    with pytest.raises(DataError, match=problem):
        MNIST().load(mnist)


def test_an_idx_label_out_of_range_is_refused(mnist: Path) -> None:
    write_idx(mnist / "mnist/t10k-labels-idx1-ubyte.gz", LABELS, np.array([3, 10]))
    with pytest.raises(DataError, match=r"t10k-labels.*label 10 is out of range, expected 0 to 9"):
        MNIST().load(mnist)


def test_train_and_test_images_of_different_size_are_refused(mnist: Path) -> None:
    write_idx(mnist / "mnist/t10k-images-idx3-ubyte.gz", IMAGES, np.zeros((2, 3, 3)))
    with pytest.raises(DataError, match=r"train images are \(1, 2, 3\), test images \(1, 3, 3\)"):
        MNIST().load(mnist)
