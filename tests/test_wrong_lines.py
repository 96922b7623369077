"""Mistakes as users make them: each row is one, with what must be there first and what the answer must say.

An answer is one message that names the key or file, the value and the nearest valid choice, with exit status 2.
Nothing is trained, and every file on disk, an earlier finished run among them, is byte for byte what it was.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_helpers import TINY, call, done
from wrong_lines_helpers import WORDS, Place, Row, mnist
from wrong_rows_helpers import ROWS

from hybridfl.command_status import PACKAGES
from hybridfl.engine import Engine

# -- the answers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with what all mistakes find there, and the names of its run and sweep."""
    root = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(root)
    try:
        run = done(*TINY, "baseline=fedavg")
        sweep = done("-m", *TINY, "baseline=fedavg", "rounds=1", "seed=0,1")
        assert call("export", run.name, "-o", "w.safetensors").status == 0
    finally:
        os.chdir(before)
    return root, run.name, sweep.name


@pytest.fixture
def place(finished: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A copy of it, to be damaged, in which the line is typed."""
    original, run, sweep = finished
    root = tmp_path / "place"
    shutil.copytree(original, root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYBRIDFL_DATA", "no-data")
    modules = set(sys.modules)
    yield Place(root, root / "outputs/runs" / run, root / "outputs/sweeps" / sweep, monkeypatch)
    for name in [name for name in set(sys.modules) - modules if name.endswith("_here") or name == "no_data"]:
        del sys.modules[name]


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file with what is in it, and every folder, but for the caches of imported modules."""
    found = [path for path in sorted(root.rglob("*")) if "__pycache__" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in found}


def refuse(*_: object) -> None:
    raise AssertionError("trained, though the line is wrong")


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_mistake_is_answered_in_one_line_and_nothing_is_lost(place: Place, row: Row) -> None:
    if row.prepare:
        row.prepare(place)
    place.patch.setattr(Engine, "step", refuse)
    names = {**WORDS, "RUN": place.run.name, "SWEEP": place.sweep.name}
    before = contents(place.root)

    def spelt(text: str) -> str:
        for word, meant in names.items():
            text = text.replace(word, meant)
        return text

    answer = call(*shlex.split(spelt(row.line)))
    assert answer.status == row.status, answer.both
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1, answer.err
    assert "Traceback" not in answer.err
    assert len(answer.err) < 900
    begin, *parts = map(spelt, row.parts)
    assert answer.err.startswith(f"hybridfl: {begin}"), answer.err
    for part in parts:
        assert part in answer.err
    assert contents(place.root) == before


def test_rows_have_names_and_lines_of_their_own() -> None:
    assert len(ROWS) > 100
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({(row.line, id(row.prepare)) for row in ROWS}) == len(ROWS)


def test_the_words_of_the_lines_are_right(place: Place) -> None:
    mnist(place)
    for line in ("train TINY", "train DATA dataset=mnist rounds=1"):
        for word, meant in WORDS.items():
            line = line.replace(word, meant)
        answer = call(*shlex.split(line), "--dry-run")
        assert answer.status == 0, answer.both


def test_every_package_that_is_needed_can_be_named() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    needed = {text.partition(">")[0] for text in project["dependencies"]}
    assert set(PACKAGES.values()) == needed
