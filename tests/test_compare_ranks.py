"""Ranks over many settings: against Demšar's published example, tables and scipy, and as ``hybridfl compare --ranks`` shows them."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from compare_helpers import Outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybridfl import comparison_figures
from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError, HybridflError
from hybridfl.ranking import average_ranks, block_ranks, critical_difference, friedman, groups

DEMSAR = """
    .763 .768 .771 .798   .599 .591 .590 .569   .954 .971 .968 .967   .628 .661 .654 .657   .882 .888 .886 .898
    .936 .931 .916 .931   .661 .668 .609 .685   .583 .583 .563 .625   .775 .838 .866 .875   1 1 1 1
    .940 .962 .965 .962   .619 .666 .614 .669   .972 .981 .9751 .975   .957 .978 .946 .970
"""
"""Areas under the curve of four variants of C4.5 on fourteen data sets: Demšar 2006, table 6, whose ranks part the last
two of the thirteenth by a digit that it does not print."""


def demsar() -> list[list[float]]:
    values = list(map(float, DEMSAR.split()))
    return [block_ranks(values[place : place + 4], True) for place in range(0, len(values), 4)]


def test_the_published_example() -> None:
    ranks = demsar()
    assert average_ranks(ranks) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    # 3.143 and 2.893 differ from 1.964 by less than 1.25, so that Nemenyi's test finds nothing here
    assert [sorted(members) for members in groups(average_ranks(ranks), critical_difference(4, 14))] == [[0, 1, 2, 3]]
    # the paper's 9.28 and 3.69 are without the correction for ties; with it the statistic is divided by 1 − Σ(t³ − t) / nk(k² − 1)
    ties = sum(sum(row.count(rank) ** 3 - row.count(rank) for rank in set(row)) for row in ranks)
    uncorrected = 12 * 14 / (4 * 5) * (sum(r**2 for r in average_ranks(ranks)) - 4 * 25 / 4)
    assert uncorrected == pytest.approx(9.28, abs=0.01)
    assert friedman(ranks).chi2 == pytest.approx(uncorrected / (1 - ties / (14 * 4 * 15)))
    assert friedman(ranks).degrees == (3, 39)


@pytest.mark.parametrize(
    ("methods", "q"),
    [*zip(range(2, 11), (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164), strict=True)],
)
def test_critical_values_of_the_published_table(methods: int, q: float) -> None:
    """Demšar 2006, table 5 (a), at 5 %."""
    blocks = 12
    assert critical_difference(methods, blocks) == pytest.approx(q * math.sqrt(methods * (methods + 1) / 72), abs=2e-3)


def test_ranks_in_a_block() -> None:
    assert block_ranks([0.5, 0.9, 0.7], True) == [3, 1, 2]
    assert block_ranks([0.5, 0.9, 0.7], False) == [1, 3, 2]
    assert block_ranks([0.5, 0.9, 0.5, 0.1], True) == [2.5, 1, 2.5, 4]
    assert block_ranks([0.1 + 0.2, 0.3], True) == [1.5, 1.5]


scores = st.integers(2, 5).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 6), min_size=k, max_size=k), min_size=2, max_size=7)
)


@settings(deadline=None, max_examples=40)
@given(scores)
def test_friedman_is_an_analysis_of_variance_of_the_ranks(values: list[list[int]]) -> None:
    """χ² as in scipy, and F of a two-way analysis of variance written out in numpy."""
    ranks = [block_ranks(list(map(float, row)), True) for row in values]
    found, array = friedman(ranks), np.array(ranks)
    if all(len(set(row)) == 1 for row in ranks):
        assert (found.chi2, found.f, found.p) == (0, 0, 1)
        return
    if len(ranks[0]) > 2:
        assert found.chi2 == pytest.approx(stats.friedmanchisquare(*array.T).statistic)
    n, k = array.shape
    between = n * ((array.mean(axis=0) - array.mean()) ** 2).sum() / (k - 1)
    rest = (array - array.mean(axis=0) - array.mean(axis=1, keepdims=True) + array.mean()) ** 2
    if rest.sum() < 1e-9:
        assert math.isinf(found.f)
    else:
        f = between / (rest.sum() / ((k - 1) * (n - 1)))
        assert found.f == pytest.approx(f, abs=1e-9)
        if not found.exact:
            assert found.p == pytest.approx(stats.f.sf(f, k - 1, (k - 1) * (n - 1)), abs=1e-9)


@pytest.mark.parametrize("first", [(1.0, 2.0, 3.0), (1.5, 1.5, 3.0), (1.0, 2.5, 2.5)])
def test_the_chance_of_one_order_everywhere_is_exact(first: tuple[float, ...]) -> None:
    orders = list(itertools.permutations(first))
    all_three = [orders.count(a) for a in set(orders)]
    chance = sum((count / len(orders)) ** 3 for count in all_three)
    assert friedman([list(first)] * 3).p == pytest.approx(chance)
    assert friedman([[1.0, 2.0]] * 2).p == 0.5


@pytest.mark.parametrize(
    "ranks",
    [
        [(1.0, 2.0, 3.0), (1.0, 3.0, 2.0), (2.0, 1.0, 3.0), (1.0, 2.0, 3.0)],
        [(1.0, 2.0, 3.0, 4.0), (2.0, 1.0, 3.0, 4.0)],
        [(1.5, 1.5, 3.0), (1.0, 2.0, 3.0), (2.0, 2.0, 2.0), (1.0, 2.5, 2.5)],
    ],
)
def test_few_blocks_are_counted(ranks: list[tuple[float, ...]]) -> None:
    """Every order of every block, the first too, with scipy's statistic."""

    def statistic(orders: Any) -> float:
        return float(stats.friedmanchisquare(*np.array(orders).T).statistic)

    every = [statistic(orders) for orders in itertools.product(*(list(itertools.permutations(row)) for row in ranks))]
    found = friedman(ranks)
    assert found.exact
    assert found.p == pytest.approx(np.mean(np.array(every) >= statistic(ranks) - 1e-9))


def test_many_blocks_have_the_p_value_of_f() -> None:
    found = friedman(demsar())
    assert not found.exact
    assert found.p == pytest.approx(stats.f.sf(found.f, 3, 39))


def test_groups_by_hand() -> None:
    assert groups([1.0, 2.0, 3.0, 6.0], 2.5) == [[0, 1, 2], [3]]
    assert groups([3.0, 1.0, 2.0], 1.5) == [[1, 2], [2, 0]]
    assert groups([1.0, 3.0], 2.0) == [[0], [1]]  # a difference as large as the critical one is significant
    assert groups([2.0, 2.0, 2.0], 0.5) == [[0, 1, 2]]


# --- in a table -------------------------------------------------------------------------------------------------------

SETTINGS = [(alpha, delay) for alpha in (0.1, 1) for delay in (0, 2, 4)]


@pytest.fixture
def grid(outputs: Outputs) -> Outputs:
    """Six settings of two seeds: a before b before c, save that b and c tie once; fedavg lacks one, the oracle is ideal."""
    for place, (alpha, delay) in enumerate(SETTINGS):
        for seed in (0, 1):
            scores = {"a": 0.9, "b": 0.7, "c": 0.7 if place == 0 else 0.6, "fedavg": 0.5, "oracle": 1.0}
            for method, score in scores.items():
                if (method, place) != ("fedavg", 5):
                    raw = {"method__moves_raw_data": True} if method == "oracle" else {}
                    value = score - 0.1 * alpha + (0.02 * seed if method != "c" else 0.02 * (1 - seed))
                    name = f"{method}{place}{seed}"
                    outputs.run(
                        name,
                        method,
                        seed,
                        [value],
                        partitioning__alpha=alpha,
                        clients__delay=delay,
                        method__steps=3,
                        **raw,
                    )
    return outputs


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def markdown(path: Path, **options: Any) -> list[str]:
    return render(
        [path], Options(format="markdown", at="last", ranks=True, **options), warn=lambda _: None
    ).splitlines()


def test_ranks_over_all_settings_that_differ(grid: Outputs) -> None:
    lines = markdown(grid.path)
    assert [cells(line) for line in (lines[0], *lines[2:5])] == [
        ["method", "average rank", "group", "first in", "accuracy global"],
        ["a", "**1.00**", "a", "6", "85.5"],
        ["b", "**2.08**", "ab", "0", "65.5"],
        ["c", "2.92", "b", "0", "57.2"],
    ]
    assert lines[7].startswith("Blocks: partitioning.alpha / clients.delay. Ranks within each, 1 is best")
    difference = 2.343 * math.sqrt(12 / 36)
    assert f"less than {difference:.3g}, Nemenyi's" in lines[9]
    assert lines[-1] == "Not ranked: fedavg (in 5 of 6 blocks); oracle (moves raw data)."


def test_the_raw_numbers(grid: Outputs) -> None:
    text = render([grid.path], Options(format="csv", at="last", ranks=True), warn=lambda _: None)
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == 3 * 6
    ranks = [[float(line["rank"]) for line in lines if line["method"] == method] for method in "abc"]
    assert sorted(map(sorted, ranks)) == [[1] * 6, [2] * 5 + [2.5], [2.5] + [3] * 5]
    chi2 = stats.friedmanchisquare(*ranks).statistic
    f = 5 * chi2 / (12 - chi2)
    p = friedman([*zip(*ranks, strict=True)]).p
    assert p < 0.01
    for line in lines:
        assert float(line["friedman_chi2"]) == pytest.approx(chi2)
        assert float(line["friedman_f"]) == pytest.approx(f)
        assert float(line["p"]) == pytest.approx(p)
        assert (line["metric"], line["scope"], line["at"]) == ("accuracy", "global", "last")
    tied = [line for line in lines if (line["partitioning.alpha"], line["clients.delay"]) == ("0.1", "0")]
    assert [(line["method"], line["rank"], line["group"]) for line in tied] == [
        ("a", "1.0", "a"),
        ("b", "2.5", "ab"),
        ("c", "2.5", "b"),
    ]
    assert [float(line["mean"]) for line in tied] == pytest.approx([0.9, 0.7, 0.7])


def test_blocks_can_be_chosen(grid: Outputs) -> None:
    lines = markdown(grid.path, pivot=["clients.delay"], where=["partitioning.alpha=0.1"])
    assert "means over seeds, then over 3 blocks." in lines[7]
    assert "Blocks: clients.delay." in lines[8]
    assert [cells(line)[0] for line in lines[2:6]] == ["a", "b", "c", "fedavg"]


def test_low_losses_rank_first(grid: Outputs) -> None:
    assert cells(markdown(grid.path, metric="loss")[2])[:2] == ["a", "**1.00**"]


def test_settings_of_a_method_are_methods_and_other_rows_make_methods_blocks(outputs: Outputs) -> None:
    for alpha in (0.1, 1):
        for steps in (10, 20):
            outputs.run(
                f"x{alpha}{steps}", "x", 0, [steps / 100 + alpha / 10], partitioning__alpha=alpha, method__steps=steps
            )
            outputs.run(f"y{alpha}{steps}", "y", 0, [steps / 50], partitioning__alpha=alpha, clients__rate=steps)
    lines = markdown(outputs.path, where=["method=x"])
    assert [cells(line)[:3] for line in lines[2:4]] == [["x", "20", "**1.00**"], ["x", "10", "**2.00**"]]
    swapped = markdown(outputs.path, rows="clients.rate", where=["method=y"])
    assert [cells(line)[0] for line in swapped[2:4]] == ["20", "10"]


def test_no_difference_is_said(outputs: Outputs) -> None:
    for alpha, best in ((0.1, "x"), (1, "y")):
        for method in "xy":
            outputs.run(f"{method}{alpha}", method, 0, [0.6 if method == best else 0.5], partitioning__alpha=alpha)
    lines = markdown(outputs.path)
    assert "p = 1.000 (exact)." in "".join(lines)
    assert any(line.startswith("The Friedman test finds no difference between the methods") for line in lines)
    assert [cells(line)[1:3] for line in lines[2:4]] == [["**1.50**", "a"], ["**1.50**", "a"]]


def test_the_caption_is_latex(grid: Outputs) -> None:
    text = render([grid.path], Options(format="latex", ranks=True))
    assert text.isascii()
    assert r"Friedman $\chi$$^2$ = " in text
    assert r"Dem\v{s}ar" in text


def test_too_few_blocks_or_methods(grid: Outputs) -> None:
    with pytest.raises(
        HybridflError, match=r"there are 1 block \(partitioning\.alpha\) and 4 such methods\. Not ranked: ora"
    ):
        markdown(grid.path, pivot=["partitioning.alpha"], where=["partitioning.alpha=1", "clients.delay=0"])
    with pytest.raises(
        HybridflError, match=r"there are 6 blocks .* and 1 such methods\. Not ranked: fedavg \(in 5 of 6"
    ):
        markdown(grid.path, where=["method=a,fedavg"])
    with pytest.raises(ConfigError, match=r"--ranks: the runs differ in no setting beside the rows.*--pivot"):
        markdown(grid.path, where=["partitioning.alpha=1", "clients.delay=0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correct": "holm", "ranks": True}, "--correct: got holm beside --ranks, whose tests are its own"),
        ({"plot": Path("cd.png")}, "--plot: got cd.png, and this table has no figure; --ranks"),
        (
            {"plot": Path("cd.pdf"), "ranks": True},
            "--plot: got cd.pdf: not a .png or .svg; nearest valid value: cd.png.",
        ),
        ({"plot": Path("nowhere/cd.png"), "ranks": True}, "--plot: got nowhere/cd.png: there is no folder nowhere."),
    ],
)
def test_options_that_do_not_go_together(grid: Outputs, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        render([grid.path], Options(**options))


def test_the_diagram(grid: Outputs, tmp_path: Path) -> None:
    said: list[str] = []
    for name in ("cd.svg", "again.svg", "cd.png"):
        render([grid.path], Options(at="last", ranks=True, plot=tmp_path / name), said.append)
    assert f"figure: {tmp_path / 'cd.svg'}" in said
    assert (tmp_path / "cd.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (tmp_path / "cd.svg").read_text()
    ElementTree.fromstring(text)
    comments = re.findall(r"<!-- (.*?) -->", text)
    for shown in ("a  1.00", "b  2.08", "2.92  c", "critical difference 1.35", "1", "2", "3"):
        assert shown in comments
    assert not any("fedavg" in comment for comment in comments)
    # one bar joins a and b, one b and c
    assert text.count("stroke: #c44e1f") == 2


def test_the_diagram_is_to_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(comparison_figures, "_save", lambda figure, path: kept.append(figure))
    methods = [("a", 1.2), ("b", 2.0), ("c", 2.8)]
    comparison_figures.critical_difference_diagram(methods, 0.9, [[0, 1], [1, 2]], "title", Path("x.png"))
    axes = kept[0].axes[0]
    drawn = [(list(line.get_xdata()), line.get_linewidth()) for line in axes.lines]
    assert ([1, 1, 1, 1.9, 1.9, 1.9], 1) in drawn
    assert [x for x, width in drawn if width > 3] == [[1.2, 2.0], [2.0, 2.8]]
    assert axes.get_xlim() == (1, 3)
