"""Finished runs as a pandas table: every row, with the config beside it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hybridfl.cli import main
from hybridfl.errors import ConfigError
from hybridfl.frame import frame


def test_rows_of_all_runs_with_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["baseline=fedavg", "rounds=2", "clients.number=4", "clients.per_round=2", "ui=none"]
    assert main(["train", "-m", *line, "partitioning.alpha=0.5,5"]) == 0
    table = frame(keys=("method", "partitioning.alpha"))
    assert list(table.columns[:4]) == ["run", "method", "partitioning.alpha", "round"]
    assert set(table["partitioning.alpha"]) == {0.5, 5}
    with pytest.raises(ConfigError, match="alpha"):
        frame(keys="partitioning.alhpa")
    with pytest.raises(ConfigError, match="clients"):
        frame(table="client")
    one = table[(table["partitioning.alpha"] == 5) & (table.scope == "global")]
    assert list(one["round"]) == [1, 2]
    assert math.isclose(one.bytes_up.iloc[1], 2 * one.bytes_up.iloc[0])
    assert len(frame("outputs", table="clients")) == 2 * 2 * 4


def test_a_path_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        frame(tmp_path / "nowhere")
