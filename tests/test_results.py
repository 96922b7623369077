"""The tables of a study: where runs go in them, what is shown, and the page they make."""

from __future__ import annotations

import io
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from hybridfl.config import Composer
from hybridfl.runs import Curve, Run

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "results"]:
        del sys.modules[name]


def run(seed: int, accuracies: list[float], moved: list[float], raw: bool = False) -> Run:
    rounds = range(1, len(accuracies) + 1)
    lines = [f"{number},{value},{spent},0,0" for number, value, spent in zip(rounds, accuracies, moved, strict=True)]
    config = {"seed": seed, "rounds": len(rounds), "method": {"name": "m", "moves_raw_data": raw}}
    found = Run(Path(f"m-{seed}"), config, {"status": "done"})
    header = ["round", "accuracy", "bytes_up", "bytes_down", "bytes_peer"]
    found.__dict__["curves"] = {"global": Curve(header, lines)}
    return found


def test_means_deviations_and_what_is_missing() -> None:
    from results.cells import Grid
    from results.sheets import accuracy_sheet, least_bytes, within

    cheap = [run(0, [0.1, 0.5], [1, 2]), run(1, [0.1, 0.7], [1, 2])]
    dear = [run(0, [0.2, 0.9], [2, 4])]
    moving = [run(0, [0.2, 1.0], [2, 4], raw=True)]
    grid = Grid(
        "method",
        ("cheap", "dear", "oracle"),
        ("a", "b"),
        {("cheap", "a"): cheap, ("dear", "a"): dear, ("oracle", "a"): moving},
        {("cheap", "a"): 2, ("dear", "a"): 2, ("oracle", "a"): 1, ("dear", "b"): 2},
    )
    sheet = accuracy_sheet(grid)
    # means of both evaluations; nothing planned is blank, nothing finished a dash, too few are counted
    assert sheet.body == [["cheap", "35.0 ± 7.1", ""], ["dear", "55.0 (1/2)", "–"], ["oracle†", "60.0", ""]]
    # the oracle is not in the contest
    assert sheet.bold == {(1, 1)}
    assert not grid.is_whole
    assert least_bytes(list(grid.cells.values())) == 2
    assert accuracy_sheet(grid, within(2)).body == [
        ["cheap", "35.0 ± 7.1", ""],
        ["dear", "20.0 (1/2)", "–"],
        ["oracle†", "20.0", ""],
    ]


def test_the_best_setting_is_chosen_by_validation_and_equal_ones_by_their_loss() -> None:
    from results.cells import Grid
    from results.tuning import block, sheet

    def scored(accuracy: float, loss: float) -> list[Run]:
        found = run(0, [1.0], [1])
        found.__dict__["curves"]["validation"] = Curve(["round", "accuracy", "loss"], [f"1,{accuracy},{loss}"])
        return [found]

    cells = {
        ("none", "search.lr=0.1"): scored(0.5, 2.0),
        ("none", "search.lr=0.2"): scored(0.5, 1.0),
        ("fedavg", "client_optimizer.lr=1, mu=2"): scored(0.3, 1.0),
    }
    planned = dict.fromkeys([*cells, ("late", "search.lr=0.1")], 1)
    grid = Grid(
        "variant",
        ("none", "fedavg", "late"),
        ("search.lr=0.1", "search.lr=0.2", "client_optimizer.lr=1, mu=2"),
        cells,
        planned,
    )
    assert sheet(grid).body == [
        ["none", "1", "search.lr=0.1 50.0, search.lr=0.2 50.0", "search.lr=0.2"],
        ["fedavg", "1", "client_optimizer.lr=1, mu=2 30.0", "client_optimizer.lr=1, mu=2"],
    ]
    assert block(grid, "feddle").splitlines() == [
        "tuned:",
        "  feddle: {merging.search.lr: 0.2}",
        "  fedavg: {client_optimizer.lr: 1, baseline.mu: 2}",
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two presets at their smallest, as the make target would run them."""
    place = tmp_path_factory.mktemp("study")
    presets = ["feddle_e6_atlas_size", "feddle_e10_start"]
    command = [
        "--scale",
        "smoke",
        "--presets",
        *presets,
        "--output-dir",
        "runs",
        "--out",
        "page",
        "ui=none",
        "rounds=2",
    ]
    script, told = str(SCRIPTS / "table_feddle.py"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(told), redirect_stdout(io.StringIO()):
        patch.chdir(place)
        patch.setattr(sys, "argv", [script, *command])
        patch.syspath_prepend(str(SCRIPTS))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
    assert not ended.value.code, told.getvalue()
    assert "feddle_e6_atlas_size: 4 jobs" in told.getvalue()
    return place


def test_the_page_of_a_study(page: Path) -> None:
    text = (page / "page" / "feddle.md").read_text()
    assert "Not all runs" not in text
    assert "| variant | atlas.size=3 | atlas.size=6 |" in text
    assert "| method | trained by the server | trained on digits |" in text
    assert "| feddle_joint |" in text
    assert "| above-fedbuff |" in text
    assert "`clients.number=10`" in text
    assert "`start=server`" in text
    for name in ("feddle_e6_atlas_size", "feddle_e10_start"):
        assert f"({name}.png)" in text
        assert (page / "page" / f"{name}.png").stat().st_size > 5000
        assert r"\begin{tabular}" in (page / "runs" / "tables" / f"{name}.tex").read_text()


def test_a_study_that_was_stopped_is_shown_as_far_as_it_is(page: Path) -> None:
    from results.cells import grid
    from results.sheets import accuracy_sheet

    line = ["experiment=feddle_e10_start", "scale=smoke", "ui=none", "rounds=2"]
    with Composer() as composer:
        whole = grid(composer, line, page / "runs")
        lost = whole.cells["feddle", "trained by the server"][0].folder
        lost.rename(page / "aside")
        try:
            found = grid(composer, line, page / "runs")
        finally:
            (page / "aside").rename(lost)
    assert whole.is_whole
    assert not found.is_whole
    assert found.rows == ("feddle", "feddle_joint", "calibrated_finetune", "fedavg_server_finetune")
    assert accuracy_sheet(found).body[0][1].endswith("(1/2)")


def test_jobs_that_cannot_run_have_no_place(page: Path) -> None:
    from results.cells import grid

    line = ["experiment=feddle_e10_start", "scale=smoke", "baseline=fedprox,fedbuff", "seed=0"]
    with Composer() as composer:
        found = grid(composer, line, page / "runs")
    cells = ("trained by the server", "trained on digits")
    assert (found.rows, found.planned) == (("fedbuff",), {("fedbuff", cell): 1 for cell in cells})
