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


def test_a_run_from_before_a_column_has_nothing_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["baseline=fedavg", "rounds=1", "clients.number=4", "clients.per_round=2", "ui=none"]
    assert main(["train", "-m", *line, "seed=0,1"]) == 0
    older, newer = (Path("outputs/runs") / name for name in sorted(frame().run.unique()))
    lines = (older / "metrics.csv").read_text().splitlines()
    assert lines[0].endswith(",seconds,sim_seconds")
    (older / "metrics.csv").write_text("".join(f"{line.rpartition(',')[0]}\n" for line in lines))
    times = frame().set_index("run").sim_seconds
    assert times[older.name].isna().all()
    assert (times[newer.name] == 1).all()
    assert main(["compare", "--metric", "sim_seconds"]) == 0
    assert main(["show", older.name]) == 0


def test_a_path_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        frame(tmp_path / "nowhere")
