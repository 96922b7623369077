"""Tables: a run killed at any byte and resumed leaves the file of an uninterrupted one."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridfl.store import StoreError
from hybridfl.tables import Table

ROOT = Path(__file__).parent.parent
COLUMNS = ("round", "scope", "accuracy", "note", "seconds")

Rows = list[dict[str, Any]]

RUN: dict[int, Rows] = {
    -1: [{"scope": "global", "accuracy": 0.1, "seconds": 0.5}],
    0: [{"scope": "global", "accuracy": 1 / 3, "seconds": 0.5}, {"scope": "clients", "accuracy": None}],
    1: [],
    2: [{"scope": 'a "quoted", name', "accuracy": float("nan"), "note": "naïve\nline"}] * 3,
    10: [{"scope": "global", "accuracy": float("inf"), "note": True}, {"scope": "served", "accuracy": 2}],
}


def run(path: Path, rounds: dict[int, Rows], after: int | None = None) -> Table:
    table = Table(path, COLUMNS, after=after)
    for round, rows in rounds.items():
        if after is None or round > after:
            table.append(round, rows)
    return table


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def complete(path: Path) -> bytes:
    run(path, RUN)
    return path.read_bytes()


# -- what is written -------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_table(path: Path) -> None:
    assert complete(path).decode() == (
        "round,scope,accuracy,note,seconds\n"
        "-1,global,0.1,,0.5\n"
        "0,global,0.3333333333333333,,0.5\n"
        "0,clients,,,\n"
        '2,"a ""quoted"", name",,naïve line,\n'
        '2,"a ""quoted"", name",,naïve line,\n'
        '2,"a ""quoted"", name",,naïve line,\n'
        "10,global,inf,true,\n"
        "10,served,2,,\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (True, "true"),
        (np.bool_(False), "false"),
        (np.int64(7), "7"),
        (np.float64(0.1), "0.1"),
        (np.float32(0.5), "0.5"),
        (np.float64("nan"), ""),
        (np.str_("name"), "name"),
        (1e-300, "1e-300"),
        (-0.0, "-0.0"),
        (10**20, "100000000000000000000"),
        ("a\r\nb", "a b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_the_text_of_a_value(path: Path, value: object, text: str) -> None:
    Table(path, ("round", "value")).append(3, [{"value": value}])
    assert path.read_text() == f"round,value\n3,{text}\n"


@given(st.floats(allow_nan=False))
def test_floats_come_back_exactly(value: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        Table(path, ("round", "value")).append(0, [{"value": value}])
        back = float(path.read_text().split(",")[-1])
    assert (back, math.copysign(1, back)) == (value, math.copysign(1, value))


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_text_comes_back_but_for_line_breaks(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        rows = [{"value": text} for text in texts]
        Table(path, ("round", "value")).append(0, rows)
        again = Table(path, ("round", "value"))
        again.append(0, rows)
        assert again.differences == []
        with open(path, encoding="utf-8", newline="") as file:
            back = [row["value"] for row in csv.DictReader(file)]
    plain = [(text, found) for text, found in zip(texts, back, strict=True) if not set(text) & {"\r", "\n"}]
    assert all(text == found for text, found in plain)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"colour": 1}, "no column 'colour'"),
        ({"accuracy": [1]}, "column accuracy: .* not list"),
        ({"round": 4}, "a row of round 4 given as one of round 3"),
    ],
)
def test_wrong_rows_are_refused_and_nothing_is_written(path: Path, row: dict[str, Any], problem: str) -> None:
    table = Table(path, COLUMNS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=problem):
        table.append(3, [{"scope": "global"}, row])
    assert path.read_bytes() == before


def test_rounds_come_in_order(path: Path) -> None:
    table = Table(path, COLUMNS, after=4)
    with pytest.raises(ValueError, match="round 4 comes after round 4"):
        table.append(4, [])
    table.append(6, [])
    with pytest.raises(ValueError, match="round 5 comes after round 6"):
        table.append(5, [])


@pytest.mark.parametrize("columns", [(), ("scope", "round"), ("round", "a", "a")])
def test_columns_that_make_no_table(path: Path, columns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must be distinct and begin with 'round'"):
        Table(path, columns)


# -- killed and resumed ----------------------------------------------------------------------------------------------


def test_killed_at_any_byte_and_resumed_from_any_checkpoint_before(path: Path) -> None:
    whole = complete(path)
    ends: dict[int | None, int] = {
        None: 0
    }  # a checkpoint after a round is written when the rows of the round are there
    for round in RUN:
        lines = [line for line in whole.splitlines(keepends=True)[1:] if int(line.split(b",")[0]) <= round]
        ends[round] = len(whole.splitlines(keepends=True)[0]) + sum(map(len, lines))
    tried = 0
    for length in range(len(whole) + 1):
        for after, end in ends.items():
            if length < end:
                continue
            path.write_bytes(whole[:length])
            table = run(path, RUN, after)
            assert path.read_bytes() == whole, (length, after)
            assert table.differences == []
            tried += 1
    assert tried > len(whole)


def test_killed_twice(path: Path) -> None:
    whole = complete(path)
    for first in range(0, len(whole), 7):
        path.write_bytes(whole[:first])
        run(path, {round: rows for round, rows in RUN.items() if round < 2})
        path.write_bytes(path.read_bytes()[: max(first, len(path.read_bytes()) - 3)])
        run(path, RUN)
        assert path.read_bytes() == whole


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
TABLES = st.dictionaries(
    st.integers(0, 20),
    st.lists(st.fixed_dictionaries({"a": VALUES, "b": VALUES}), max_size=3),
    max_size=4,
).map(lambda rounds: dict(sorted(rounds.items())))


@settings(max_examples=30)
@given(rounds=TABLES, cut=st.floats(0, 1))
def test_any_table_killed_anywhere(rounds: dict[int, Rows], cut: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        for _ in range(2):
            table = Table(path, ("round", "a", "b"))
            for round, rows in rounds.items():
                table.append(round, rows)
            if not path.with_suffix(".whole").exists():
                whole = path.read_bytes()
                path.with_suffix(".whole").touch()
                path.write_bytes(whole[: int(cut * len(whole))])
        assert path.read_bytes() == whole
        assert table.differences == []


def test_rows_beyond_what_is_computed_again_stay(path: Path) -> None:
    whole = complete(path)
    table = run(path, {round: rows for round, rows in RUN.items() if round < 10}, after=0)
    assert path.read_bytes() == whole
    assert table.differences == []


def test_an_ignored_column_may_differ_and_the_old_row_stays(path: Path) -> None:
    whole = complete(path)
    slower = {round: [row | {"seconds": 9.5} for row in rows] for round, rows in RUN.items()}
    assert run(path, slower).differences == []
    assert path.read_bytes() == whole


def test_a_difference_is_reported_and_the_old_row_stays(path: Path) -> None:
    whole = complete(path)
    changed = RUN | {0: [RUN[0][0], {"scope": "clients", "accuracy": 0.25}]}
    assert run(path, changed, after=-1).differences == [
        "metrics.csv, round 0, row 2, column accuracy: was '', now '0.25'"
    ]
    assert path.read_bytes() == whole


def test_other_numbers_of_rows_are_reported(path: Path) -> None:
    whole = complete(path)
    other = {0: RUN[0][:1], 1: RUN[-1], 10: RUN[10]}
    assert run(path, other, after=-1).differences == [
        "metrics.csv, round 0: was 2 rows, now 1",
        "metrics.csv, round 1: was 0 rows, now 1",
        "metrics.csv, round 2: was 3 rows, now none",
    ]
    assert path.read_bytes() == whole


def test_a_torn_last_round_with_a_difference_is_completed(path: Path) -> None:
    lines = complete(path).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    table = run(path, RUN | {10: [{"scope": "global", "accuracy": 0.5, "note": True}, RUN[10][1]]}, after=2)
    assert table.differences == ["metrics.csv, round 10, row 1, column accuracy: was 'inf', now '0.5'"]
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "torn", [b"10,global", b"10,global\n", b"x,,,,\n", b"\0" * 40, b"\xff\n", b"\n", b"7,a\n7,b,c"]
)
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes) -> None:
    whole = complete(path)
    path.write_bytes(whole + torn)
    Table(path, COLUMNS)
    assert path.read_bytes() == whole


def test_only_rounds_after_the_checkpoint_are_kept_in_memory(path: Path) -> None:
    lines = "".join(f"{round},a,0.5,,\n" for round in range(50_000))
    path.write_text("round,scope,accuracy,note,seconds\n" + lines)
    table = Table(path, COLUMNS, after=49_997)
    assert list(table._there) == [49_998, 49_999]


# -- other files and full disks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"round,scope\n", b"my notes", b"round,scope,accuracy,note,seconds\r\n0,a,,,\r\n", b"\n"]
)
def test_a_file_with_other_columns_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"metrics\.csv has other columns"):
        Table(path, COLUMNS)
    assert path.read_bytes() == content


def test_a_line_in_the_middle_that_is_no_row(path: Path) -> None:
    content = complete(path).replace(b"2,", b"two,", 1)
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"metrics\.csv, line 5: a row must begin with its round, found b'two,"):
        Table(path, COLUMNS)
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"Cannot write .*gone/metrics\.csv: No such file"):
        Table(tmp_path / "gone" / "metrics.csv", COLUMNS)


def test_a_table_deleted_under_the_run_is_not_started_anew_without_its_header(path: Path) -> None:
    table = Table(path, COLUMNS)
    path.unlink()
    with pytest.raises(StoreError, match="No such file"):
        table.append(0, RUN[0])
    assert not path.exists()


def test_sync_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    table = Table(path, COLUMNS)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    table.sync()
    assert synced == [path.stat().st_ino]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(path: Path) -> None:
    table = Table(path, COLUMNS)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"metrics\.csv: No space left on device"):
        table.append(0, RUN[0])


def test_a_disk_that_fills_up_within_a_round_and_is_cleared(path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from hybridfl.store import StoreError
from hybridfl.tables import Table
path, rows = Path(sys.argv[1]), [{"value": index} for index in range(100)]
table = Table(path, ("round", "value"))
table.append(0, rows)
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 101, resource.RLIM_INFINITY))
try:
    table.append(1, rows)
except StoreError as error:
    print(error)
assert path.stat().st_size == size
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"Cannot write {path}: File too large." in done.stdout
    rows = [{"value": index} for index in range(100)]
    table = Table(path, ("round", "value"), after=0)
    table.append(1, rows)
    assert table.differences == []
    assert path.read_text().splitlines() == ["round,value", *(f"{r},{i}" for r in (0, 1) for i in range(100))]
