"""``hybridfl compare --pivot``: columns by several keys, and what is marked as best or no worse."""

from __future__ import annotations

import re
from typing import Any

import pytest
from compare_helpers import Outputs, table, warnings_of
from scipy import stats

from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError

SCORES = {
    "fedavg": (0.50, 0.52, 0.54),
    "close": (0.55, 0.66, 0.62),  # the best by mean − 0.03, 0.08, −0.04: no difference to it
    "best": (0.58, 0.58, 0.70),
    "oracle": (0.90, 0.90, 0.90),
}
"""Of three seeds each where alpha is 0.1."""


@pytest.fixture
def grid(outputs: Outputs) -> Outputs:
    for method, scores in SCORES.items():
        raw = {"method__moves_raw_data": True} if method == "oracle" else {}
        for seed, score in enumerate(scores):
            for alpha, delay in ((0.1, 0), (0.1, 4), (1, 0)):
                # at alpha 1 the order is turned round, and fedavg has the best mean of all but the oracle
                value = score if alpha < 1 or method == "oracle" else 1 - score
                name = f"{method}{seed}{alpha}{delay}"
                outputs.run(name, method, seed, [value], partitioning__alpha=alpha, clients__delay=delay, **raw)
    return outputs


def markdown(path: Any, **options: Any) -> list[str]:
    return render([path], Options(format="markdown", at="last", **options), warn=lambda _: None).splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_one_column_a_combination_of_values(grid: Outputs) -> None:
    lines = markdown(grid.path, pivot=["partitioning.alpha", "clients.delay"])
    assert cells(lines[0]) == ["method", "0.1 / 0", "0.1 / 4", "1 / 0"]
    assert [cells(line)[0] for line in lines[2:6]] == ["best", "close", "fedavg", "oracle†"]
    assert lines == markdown(grid.path, pivot=["partitioning.alpha,clients.delay"])
    assert cells(markdown(grid.path, pivot=["clients.delay", "partitioning.alpha"])[0])[1:] == [
        "0 / 0.1",
        "0 / 1",
        "4 / 0.1",
    ]


def test_columns_are_in_the_order_of_numbers(outputs: Outputs) -> None:
    for place, (number, rate) in enumerate([(100, 1), (9, 10), (9, 2), (10, None)]):
        outputs.run(str(place), "fedavg", 0, [0.5], clients__number=number, clients__rate=rate)
    line = markdown(outputs.path, pivot=["clients.number,clients.rate"])[0]
    assert cells(line)[1:] == ["9 / 2", "9 / 10", "10 / null", "100 / 1"]


def test_the_best_and_what_is_no_worse_are_bold(grid: Outputs) -> None:
    lines = markdown(grid.path, pivot=["partitioning.alpha", "clients.delay"])
    rows = {cells(line)[0]: cells(line)[1:] for line in lines[2:6]}
    assert rows["best"] == ["**62.0 ± 6.9**", "**62.0 ± 6.9**", "**38.0 ± 6.9**"]
    assert rows["close"] == ["**61.0 ± 5.6**", "**61.0 ± 5.6**", "**39.0 ± 5.6**"]
    # 10 ± 5.3 points below the best, p = 0.08; at alpha 1 it is the best itself, as far above
    assert rows["fedavg"] == ["**52.0 ± 2.0**", "**52.0 ± 2.0**", "**48.0 ± 2.0**"]
    assert rows["oracle†"] == ["90.0 ± 0.0"] * 3
    assert "Columns: partitioning.alpha / clients.delay. 3 seeds a cell.  " in lines
    assert any("not significantly different from it (paired t test, 5 %)." in line for line in lines)


def test_csv_says_what_is_marked_and_why(grid: Outputs) -> None:
    lines = table(grid.path, pivot=["partitioning.alpha"], where=["clients.delay=0"])
    found = {(line["method"], line["partitioning.alpha"]): line for line in lines}
    wanted = stats.ttest_rel(SCORES["fedavg"], SCORES["best"]).pvalue
    assert float(found["fedavg", "0.1"]["p_to_best"]) == pytest.approx(wanted)
    below = stats.ttest_rel(SCORES["best"], SCORES["fedavg"]).pvalue
    assert float(found["best", "1"]["p_to_best"]) == pytest.approx(below)
    assert {key for key, line in found.items() if line["p_to_best"] == ""} == {
        *(("best", "0.1"), ("fedavg", "1")),
        *(("oracle", "0.1"), ("oracle", "1")),
    }
    assert {key for key, line in found.items() if line["best"] == "false"} == {
        key
        for key, line in found.items()
        if key[0] == "oracle" or (line["p_to_best"] and float(line["p_to_best"]) <= 0.05)
    }


def test_what_is_clearly_worse_is_not_marked(outputs: Outputs) -> None:
    for seed in range(3):
        for alpha in (0.1, 1):
            for method, score in (("a", 0.9), ("b", 0.8), ("c", 0.9)):
                value = score + 0.01 * seed * (method != "b")
                outputs.run(f"{method}{seed}{alpha}", method, seed, [value], partitioning__alpha=alpha)
    rows = [cells(line)[1] for line in markdown(outputs.path, pivot=["partitioning.alpha"])[2:5]]
    assert rows == ["**91.0 ± 1.0**", "80.0 ± 0.0", "**91.0 ± 1.0**"]
    lower = [cells(line)[1] for line in markdown(outputs.path, pivot=["partitioning.alpha"], metric="loss")[2:5]]
    assert [cell.startswith("**") for cell in lower] == [True, False, True]


def test_a_correction_is_over_all_comparisons_of_the_table(outputs: Outputs) -> None:
    """One comparison has p = 0.04 by itself; with the one of the other column it is no longer significant."""
    for seed, gap in enumerate((0.05, 0.10, 0.12)):
        for alpha, size in ((0.1, 1.0), (1, -0.2)):
            outputs.run(f"a{seed}{alpha}", "a", seed, [0.5], partitioning__alpha=alpha)
            outputs.run(f"b{seed}{alpha}", "b", seed, [0.5 + gap * size], partitioning__alpha=alpha)
    p = stats.ttest_1samp((0.05, 0.10, 0.12), 0).pvalue
    assert 0.025 < p < 0.05
    options: dict[str, Any] = {"pivot": ["partitioning.alpha"]}
    assert [line["best"] for line in table(outputs.path, **options)] == ["false", "true", "true", "false"]
    held = table(outputs.path, **options, correct="holm")
    assert [line["best"] for line in held] == ["true"] * 4
    assert float(held[0]["p_to_best"]) == pytest.approx(2 * p)
    assert any(
        "Holm over the 2 comparisons of this table" in line
        for line in markdown(outputs.path, **options, correct="holm")
    )


def test_seeds_are_told_where_they_differ(outputs: Outputs) -> None:
    for seed in range(3):
        outputs.run(f"a{seed}", "fedavg", seed, [0.5])
        if seed:
            outputs.run(f"b{seed}", "feddle", seed, [0.6])
        outputs.run(f"c{seed}", "scaffold", seed, [0.7])
    lines = markdown(outputs.path, pivot=["partitioning.alpha"])
    assert [cells(line)[1] for line in lines[2:5]] == ["50.0 ± 0.0", "60.0 ± 0.0 (n=2)", "**70.0 ± 0.0**"]
    assert "Columns: partitioning.alpha. 3 seeds a cell, or n.  " in lines
    assert r"60.0 $\pm$ 0.0 (n=2)" in render([outputs.path], Options(pivot=["partitioning.alpha"], format="latex"))


def test_one_seed_is_no_test(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    outputs.run("b", "feddle", 1, [0.6])
    lines = markdown(outputs.path, pivot=["partitioning.alpha"])
    assert [cells(line)[1] for line in lines[2:4]] == ["50.0", "**60.0**"]
    assert "Bold: the best of a column; without two pairs nothing is tested." in lines
    assert "Columns: partitioning.alpha. 1 seed a cell.  " in lines


def test_other_rows_and_methods_as_columns(grid: Outputs) -> None:
    where = ["clients.delay=0", "method=fedavg,oracle"]
    lines = markdown(grid.path, pivot=["method"], rows="partitioning.alpha", where=where)
    assert [cells(line) for line in (lines[0], *lines[2:4])] == [
        ["partitioning.alpha", "fedavg", "oracle†"],
        ["0.1", "**52.0 ± 2.0**", "90.0 ± 0.0"],
        ["1", "**48.0 ± 2.0**", "90.0 ± 0.0"],
    ]


def test_what_else_differs_is_never_averaged_over(grid: Outputs) -> None:
    lines = markdown(grid.path, pivot=["partitioning.alpha"])
    assert cells(lines[0]) == ["method", "clients.delay", "0.1", "1"]
    assert warnings_of(grid.path, pivot=["partitioning.alpha"]) == [
        "The runs differ in clients.delay: added to the rows."
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pivot": ["partitioning.alfa"]}, "--pivot: no run has the config key 'partitioning.alfa'. Did you mean "),
        (
            {"pivot": ["seed"], "cols": "rounds"},
            "--cols: got rounds beside --pivot; nearest valid choice: --pivot rounds.",
        ),
        ({"pivot": ["method.name"]}, "--pivot: got method, which makes the rows; name another, or other rows with "),
    ],
)
def test_wrong_pivots(outputs: Outputs, options: dict[str, Any], message: str) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    with pytest.raises(ConfigError, match=re.escape(message)):
        render([outputs.path], Options(**options))
