"""What the readers state of their files: whose they are, where from, and their checksums."""

from __future__ import annotations

import bz2
import pickle
from pathlib import Path
from typing import Any

import data_command_helpers
import numpy as np
import pytest
from data_command_helpers import CONTENTS, TINY

from hybridfl import fetch
from hybridfl.build import build
from hybridfl.config import Composer, choices
from hybridfl.data.cifar import CIFAR10
from hybridfl.data.cifar100 import CIFAR100
from hybridfl.data.downloads import About
from hybridfl.data.idx import MNIST, FashionMNIST
from hybridfl.data.usps import USPS
from hybridfl.errors import ConfigError, DataError

_alone = data_command_helpers._alone


def reader_of(name: str) -> Any:
    with Composer() as composer:
        return build(composer.compose([f"dataset={name}"]).config["dataset"], "dataset")


@pytest.mark.parametrize("name", choices("dataset"))
def test_every_shipped_set_says_what_it_is_and_how_to_get_it(name: str, tmp_path: Path) -> None:
    reader = reader_of(name)
    stated = About.of(reader)
    assert stated.licence != About().licence
    assert stated.files is not None
    assert (stated.files == ()) + bool(stated.downloads) + bool(stated.by_hand) == 1
    assert stated.by_hand == "" or stated.by_hand.endswith(".")
    if stated.files:
        with pytest.raises(DataError, match=f"^{tmp_path / stated.files[0]}: not found. Put "):
            reader.load(tmp_path)


LABELLED = pickle.dumps(
    {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [99], b"coarse_labels": [19]}, protocol=4
)
LINE = bz2.compress(b"10 1:-1 256:0.5")
SMALL = {**TINY, "train": LABELLED, "test": LABELLED, "usps.bz2": LINE, "usps.t.bz2": LINE}
SMALL |= {Path(name).name: content for name, content in CONTENTS.items()}


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "usps"])
def test_what_is_fetched_is_what_the_reader_reads(name: str, tmp_path: Path) -> None:
    reader = reader_of(name)
    places = [place for download in reader.downloads for place in download.files]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(SMALL[Path(place).name])
    assert reader.load(tmp_path).name == name
    for place in places:
        (tmp_path / place).rename("aside")
        with pytest.raises(DataError, match=f"{place}: not found"):
            reader.load(tmp_path)
        Path("aside").rename(tmp_path / place)


@pytest.mark.parametrize("reader", [MNIST, FashionMNIST])
def test_real_originals_have_the_checksums_stated(reader: type[MNIST], real: Path) -> None:
    assert fetch.missing(reader.downloads, real) == []


@pytest.mark.parametrize("reader", [CIFAR10, CIFAR100, USPS])
def test_real_files_that_are_not_the_originals_are_noticed(reader: type[USPS], real: Path) -> None:
    if not (real / next(iter(reader.downloads[0].files))).exists():
        pytest.skip("not in HYBRIDFL_DATA")
    try:
        assert fetch.missing(reader.downloads, real) == []
    except DataError as error:
        assert "has another content than the public original" in str(error)


def test_a_statement_of_the_wrong_type_is_refused() -> None:
    for attribute, value in (("licence", None), ("downloads", []), ("files", "mnist"), ("files", (1,)), ("by_hand", 3)):
        reader = type("Reader", (), {attribute: value})()
        with pytest.raises(ConfigError, match=rf"_target_: Reader\.{attribute} is .*, expected a t"):
            About.of(reader)
