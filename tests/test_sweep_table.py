"""The table of a sweep: cells of presets, and files written before there were any."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_helpers import TINY, done, rows

from hybridfl.compare import render
from hybridfl.errors import DataError
from hybridfl.sweep_table import COLUMNS, Row, read_rows, typed_line, write_line, write_rows

PRESET = """\
# @package _global_
# A study with cells, two of which share a job, and one with two.
scale: small
sweeps:
  small:
    each: {baseline: fedavg, seed: 0}
    cells:
      base: {}
      "two, a round": {clients.per_round: 2}
      the same: {}
      both: {seed: [0, 1]}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_job_names_every_cell_it_belongs_to(tmp_path: Path) -> None:
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "study.yaml").write_text(PRESET)
    without = [word for word in TINY if not word.startswith(("clients.per_round", "rounds"))]
    line = ("--config-dir", "my_conf", *without, "experiment=study", "rounds=1", "clients.delay=0")
    sweep = done("-m", *line)
    assert [(job["cell"], job["status"]) for job in rows(sweep / "runs.csv")] == [
        ("base | the same | both", "done"),
        ("two, a round", "done"),
        ("both", "done"),
    ]
    assert [row.cells for row in read_rows(sweep)] == [("base", "the same", "both"), ("two, a round",), ("both",)]


def test_without_cells_the_column_is_empty() -> None:
    sweep = done("-m", *TINY, "baseline=fedavg", "rounds=1")
    assert [job["cell"] for job in rows(sweep / "runs.csv")] == [""]
    assert read_rows(sweep)[0].cells == ()


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    written = [
        Row("a", "done", "fedavg", "a=1 b='x,y'", "", ("one", "two")),
        Row("", "skipped", "none", "", 'two "lines"\nof it'),
    ]
    write_rows(tmp_path, written)
    assert read_rows(tmp_path) == written
    assert (tmp_path / "runs.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_files_without_cells_are_read() -> None:
    sweep = done("-m", *TINY, "baseline=fedavg,fedprox", "rounds=1")
    table = render([sweep])
    text = (sweep / "runs.csv").read_text()
    old = "\n".join(line.removesuffix(",").removesuffix(",cell") for line in text.splitlines()) + "\n"
    assert old.splitlines()[0] == "run,status,method,overrides,error"
    now = read_rows(sweep)
    (sweep / "runs.csv").write_text(old)
    assert read_rows(sweep) == now
    assert render([sweep]) == table


def test_the_line_is_kept_as_a_shell_needs_it(tmp_path: Path) -> None:
    assert typed_line(tmp_path) == "(unknown)"
    write_line(tmp_path, ["seed=0,1", "output_dir=a b"], None)
    assert typed_line(tmp_path) == "hybridfl train -m seed=0,1 'output_dir=a b'"
    write_line(tmp_path, ["seed=0,1"], Path("my conf"))
    assert typed_line(tmp_path) == "hybridfl train -m --config-dir 'my conf' seed=0,1"


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"runs.csv: cannot be read"):
        read_rows(tmp_path)
