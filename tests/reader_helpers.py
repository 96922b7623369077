"""What tests of several readers ask of a data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridfl.data.dataset import Dataset, Reader

CONF = Path(__file__).parents[1] / "conf" / "dataset"


def real_dataset(real: Path, reader: Reader, folder: str) -> Dataset:
    if not (real / folder).is_dir():
        pytest.skip(f"{folder} is not in HYBRIDFL_DATA")
    return reader.load(real)
