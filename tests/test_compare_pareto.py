"""``hybridfl compare --pareto``: which rows are on the front, in the table, the CSV and the figure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from compare_helpers import Outputs, by_method, table
from hypothesis import given
from hypothesis import strategies as st

from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError
from hybridfl.pareto import UNITS, unbeaten

POINTS = {"cheap": (0.5, 1), "poor": (0.5, 2), "middle": (0.7, 3), "twin": (0.7, 3), "bad": (0.6, 4), "best": (0.8, 5)}
"""Method → accuracy and megabytes. The front is cheap, middle and its twin, best."""
FRONT = {"cheap", "middle", "twin", "best"}


def run_of(outputs: Outputs, method: str, accuracy: float, cost: float, seed: int = 0, **changes: Any) -> None:
    """A run of one evaluation that moved ``cost`` MB, all up, in as many seconds, with 1000 times as many macs."""
    name = f"{method}{seed}{''.join(str(value) for value in changes.values())}"
    folder = outputs.run(name, method, seed, [accuracy], **changes)
    header, line = (folder / "metrics.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), line.split(","), strict=True))
    cells |= {"bytes_up": f"{cost}e6", "bytes_down": "0", "macs": f"{cost}e9", "seconds": str(cost)}
    (folder / "metrics.csv").write_text(f"{header}\n{','.join(cells.values())}\n")


@pytest.fixture
def shop(outputs: Outputs) -> Outputs:
    for method, (accuracy, cost) in POINTS.items():
        run_of(outputs, method, accuracy, cost)
    run_of(outputs, "oracle", 0.9, 0.5, method__moves_raw_data=True)
    return outputs


@pytest.mark.parametrize(("kind", "size"), [("bytes", 1e6), ("macs", 1e9), ("seconds", 1)])
def test_the_front_by_hand(shop: Outputs, kind: str, size: float) -> None:
    found = by_method(shop.path, pareto=kind)
    assert {method for method, line in found.items() if line["front"] == "true"} == FRONT
    assert {method: float(line["cost"]) for method, line in found.items()} == pytest.approx(
        {method: cost * size for method, (_, cost) in POINTS.items()} | {"oracle": 0.5 * size}
    )
    assert {line["paid"] for line in found.values()} == {kind}
    assert "front" not in by_method(shop.path)["cheap"]


def test_low_is_good_where_the_metric_says_so(shop: Outputs) -> None:
    for method in POINTS:  # the loss is 1 − accuracy in these runs
        assert by_method(shop.path, pareto="bytes", metric="loss")[method]["front"] == str(method in FRONT).lower()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_on_the_front_is_who_nobody_beats(points: list[tuple[int, int]]) -> None:
    for on, (gain, cost) in zip(unbeaten(points), points, strict=True):
        assert on == (not any((g > gain and c <= cost) or (g >= gain and c < cost) for g, c in points))


def test_rounding_beats_nobody() -> None:
    assert unbeaten([(0.3, 1.0), (0.1 + 0.2, 1.0), (0.3, 1.0 + 1e-15)]) == [True, True, True]


def test_every_setting_has_its_own_front(outputs: Outputs) -> None:
    for alpha, high in ((0.1, "a"), (1, "b")):
        for method in "ab":
            run_of(outputs, method, (0.9 if method == high else 0.8) - alpha / 10, 2, partitioning__alpha=alpha)
    lines = table(outputs.path, pareto="bytes")
    assert {(line["method"], line["partitioning.alpha"]) for line in lines if line["front"] == "true"} == {
        ("a", "0.1"),
        ("b", "1"),
    }


def test_settings_of_a_method_share_its_front(outputs: Outputs) -> None:
    for steps in (10, 20):
        run_of(outputs, "a", steps / 100, 2, method__steps=steps, client_optimizer__lr=0.1)
    run_of(outputs, "b", 0.15, 2, client_optimizer__lr=0.5)  # a rate of its own makes no setting
    lines = table(outputs.path, pareto="bytes")
    assert [(line["method"], line["method.steps"], line["front"]) for line in lines] == [
        ("a", "10", "false"),
        ("a", "20", "true"),
        ("b", "", "false"),
    ]


def test_a_cost_that_was_not_counted_is_on_no_front(shop: Outputs) -> None:
    shop.run("x", "uncounted", 0, [0.99])
    found = by_method(shop.path, pareto="macs")
    assert (found["uncounted"]["cost"], found["uncounted"]["front"]) == ("", "false")
    assert found["best"]["front"] == "true"


def test_costs_are_means_over_seeds_and_within_the_budget(outputs: Outputs) -> None:
    for seed, cost in enumerate((1, 4)):
        run_of(outputs, "a", 0.5, cost, seed)
    outputs.run("b", "b", 0, [0.4, 0.9])
    found = by_method(outputs.path, pareto="bytes", budget=["bytes=5MB"], at="auto")
    assert {method: float(line["cost"]) for method, line in found.items()} == {"a": 2.5e6, "b": 3e6}
    assert [found[method]["front"] for method in "ab"] == ["true", "false"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.rstrip().split("|")[1:-1]]


def test_a_column_of_its_own(shop: Outputs) -> None:
    lines = render([shop.path], Options(at="last", format="markdown", pareto="bytes")).splitlines()
    assert cells(lines[0])[-2:] == ["MB", "front"]
    assert cells(lines[0]).count("MB") == 1
    assert {cells(line)[0]: cells(line)[-2:] for line in lines[2:9]} == {
        **{method: [str(cost), "●" if method in FRONT else ""] for method, (_, cost) in POINTS.items()},
        "oracle†": ["0.5", ""],
    }
    assert any(line.startswith("front ●: no rival has as good a mean accuracy for as few MB") for line in lines)
    macs = render([shop.path], Options(at="last", format="latex", pareto="macs"))
    assert r"MB & GMAC & front \\" in macs
    assert r" & 3 & 3 & $\bullet$ \\" in macs
    assert macs.isascii()


def test_the_figure(outputs: Outputs, tmp_path: Path) -> None:
    for alpha in (0.1, 1):
        for seed in (0, 1):
            for method, (accuracy, cost) in POINTS.items():
                run_of(
                    outputs,
                    method,
                    accuracy + 0.01 * seed,
                    0 if method == "cheap" else 30**cost,
                    seed,
                    partitioning__alpha=alpha,
                )
            raw = {"method__moves_raw_data": True}
            run_of(outputs, "oracle", 0.9, 0.5, seed, partitioning__alpha=alpha, **raw)
    said: list[str] = []
    for name in ("front.svg", "front.png"):
        render([outputs.path], Options(at="last", pareto="bytes", plot=tmp_path / name), said.append)
    assert said[-1] == f"figure: {tmp_path / 'front.png'}"
    assert (tmp_path / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (tmp_path / "front.svg").read_text()
    ElementTree.fromstring(text)
    comments = re.findall(r"<!-- (.*?) -->", text)
    for name in (*POINTS, "oracle†", "MB", "accuracy in %, global"):
        assert comments.count(name) == 2, name
    assert {"partitioning.alpha=0.1", "partitioning.alpha=1"} <= set(comments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pareto": "byte"},
            "--pareto: 'byte' is unknown. Did you mean 'bytes'? Valid: bytes, local_steps, macs, seconds, ",
        ),
        ({"pareto": "macs", "ranks": True}, "--pareto: got macs beside --ranks; leave one of them out"),
        ({"pareto": "macs", "pivot": ["seed"]}, "--pareto: got macs beside --pivot; leave one of them out"),
        ({"pareto": "macs", "cols": "seed"}, "--pareto: got macs beside --cols; leave one of them out"),
        ({"plot": Path("x.png")}, "--plot: got x.png, and this table has no figure; --ranks and --pareto have one."),
    ],
)
def test_options_that_do_not_go_together(shop: Outputs, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        render([shop.path], Options(**options))


def test_a_figure_has_room_for_so_many_settings(outputs: Outputs, tmp_path: Path) -> None:
    for number in range(13):
        run_of(outputs, "a", 0.5, 1, clients__number=number)
        run_of(outputs, "b", 0.6, 1, clients__number=number)
    options = Options(pareto="bytes", plot=tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"--plot: got 13 settings, and a figure has room for 12; .*--where"):
        render([outputs.path], options, warn=lambda _: None)


def test_every_cost_has_a_unit() -> None:
    assert set(UNITS) == {"bytes", "macs", "local_steps", "seconds", "sim_seconds"}
    assert all(size > 0 for _, size in UNITS.values())
