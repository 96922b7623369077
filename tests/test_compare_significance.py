"""Paired tests, alone and in families: against scipy and formulas written anew, and what a table shows of them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from compare_helpers import Outputs, by_method, table, two_methods
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError
from hybridfl.significance import adjusted, confidences, paired_tests, t_p_value
from hybridfl.statistics import t_interval

samples = st.lists(
    st.lists(st.integers(-50, 80).map(lambda n: n / 100), min_size=2, max_size=6).filter(lambda v: len(set(v)) > 1),
    min_size=1,
    max_size=7,
)


def by_scipy(values: list[float]) -> float:
    return float(stats.ttest_1samp(values, 0).pvalue)


def test_a_p_value_by_hand() -> None:
    # mean 0.2, sd 0.1: t = 0.2 / (0.1 / √3) = 3.4641; with two degrees of freedom P(|T| > t) = 1 − t / √(2 + t²)
    assert t_p_value([0.1, 0.2, 0.3]) == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))
    assert t_p_value([0.25, 0.25, 0.25]) == 0
    assert t_p_value([0.0, 0.0]) == 1
    assert math.isnan(t_p_value([0.1]))


@settings(deadline=None)
@given(samples)
def test_each_by_itself_is_scipys_test_and_the_interval_of_before(given_samples: list[list[float]]) -> None:
    for sample, test in zip(given_samples, paired_tests(given_samples), strict=True):
        assert test.p == pytest.approx(by_scipy(sample), rel=1e-6)
        assert (test.low, test.high) == pytest.approx(t_interval(sample))


def test_rounding_is_no_difference() -> None:
    third = [0.1 + 0.2 - 0.3, 0.0, -2e-17]
    assert paired_tests([third])[0].p == 1
    assert paired_tests([third], "bootstrap")[0].p == 1


def test_corrected_p_values_by_hand() -> None:
    p = [0.04, 0.01, 0.03]
    assert adjusted(p, "none") == p
    assert adjusted(p, "holm") == pytest.approx([0.06, 0.03, 0.06])  # 3 × 0.01, 2 × 0.03, then no less than before
    assert adjusted(p, "bh") == pytest.approx([0.04, 0.03, 0.04])  # 3 / 1 × 0.01, 3 / 2 × 0.03 but at most 3 / 3 × 0.04
    assert adjusted([0.6, 0.7], "holm") == [1, 1]
    assert adjusted([], "holm") == adjusted([], "bh") == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_benjamini_hochberg_is_scipys(p: list[float]) -> None:
    assert adjusted(p, "bh") == pytest.approx(stats.false_discovery_control(p, method="bh"))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_step_by_step(p: list[float]) -> None:
    """As Holm states it: look at the least p at α / m, then at the next at α / (m − 1), and stop at the first that fails."""
    rejected = set()
    for step, place in enumerate(np.argsort(p, kind="stable")):
        if p[place] > 0.05 / (len(p) - step):
            break
        rejected.add(place)
    near = any(abs(q - 0.05 / (len(p) - step)) < 1e-12 for q in p for step in range(len(p)))
    assert near or {i for i, value in enumerate(adjusted(p, "holm")) if value <= 0.05} == rejected


def test_confidences_by_hand() -> None:
    p = [0.2, 0.001, 0.02, 0.9]  # Holm: 0.001 ≤ 0.05 / 4, 0.02 > 0.05 / 3; BH: 0.001 ≤ 0.05 / 4, 0.02 ≤ 2 × 0.05 / 4
    assert confidences(p, "none") == [0.95] * 4
    assert confidences(p, "holm") == pytest.approx([1 - 0.05 / 3, 1 - 0.05 / 4, 1 - 0.05 / 3, 1 - 0.05 / 3])
    assert confidences(p, "bh") == pytest.approx([1 - 2 * 0.05 / 4] * 4)
    assert confidences([0.5, 0.6], "bh") == pytest.approx([0.975] * 2)
    assert confidences([0.01, 0.02], "holm") == pytest.approx([0.975, 0.95])


@settings(max_examples=40, deadline=None)
@given(samples, st.sampled_from(["none", "holm", "bh"]), st.sampled_from(["t", "bootstrap"]))
def test_an_interval_leaves_out_zero_where_its_p_value_is_small(
    given_samples: list[list[float]], correct: str, interval: str
) -> None:
    for test in paired_tests(given_samples, interval, correct):
        slack = 1e-9 if interval == "t" else 0.01  # quantiles of 10,000 draws lie between two of them
        if test.p < 0.05 - slack:
            assert test.low >= 0 or test.high <= 0
        elif test.p > 0.05 + slack:
            assert test.low <= 0 <= test.high


def test_bootstrap_of_two_values_by_hand() -> None:
    """A quarter of the resamples of (−1, 3) have the mean −1, half 1, a quarter 3."""
    test = paired_tests([[-1.0, 3.0]], "bootstrap")[0]
    assert test.p == pytest.approx(0.5, abs=0.03)
    assert (test.low, test.high) == (-1, 3)
    assert paired_tests([[-1.0, 3.0]], "bootstrap")[0] == test
    assert paired_tests([[1.0, 3.0]], "bootstrap")[0].p == pytest.approx(2 / 10_001)


def test_untestable_samples_are_no_members_of_the_family() -> None:
    alone = paired_tests([[0.1, 0.2, 0.3]], correct="holm")[0]
    among = paired_tests([[], [0.1, 0.2, 0.3], [0.5]], correct="holm")
    assert among[1] == alone
    assert all(math.isnan(number) for i in (0, 2) for number in (among[i].p, among[i].low, among[i].high))


# --- in a table -------------------------------------------------------------------------------------------------------


def four_methods(outputs: Outputs) -> dict[str, list[float]]:
    """Gains over fedavg, three seeds: clear, middling, none."""
    gains = {"clear": [0.10, 0.11, 0.12], "middling": [0.05, 0.12, 0.10], "none": [0.01, -0.02, 0.02]}
    for seed in range(3):
        outputs.run(f"f{seed}", "fedavg", seed, [0.5 + 0.01 * seed])
        for method, gain in gains.items():
            outputs.run(f"{method}{seed}", method, seed, [0.5 + 0.01 * seed + gain[seed]])
    return gains


def test_csv_has_the_test_of_every_row(outputs: Outputs) -> None:
    gains = four_methods(outputs)
    found = by_method(outputs.path, correct="holm")
    p = adjusted([by_scipy(gain) for gain in gains.values()], "holm")
    assert [float(found[method]["p"]) for method in gains] == pytest.approx(p)
    assert found["fedavg"]["p"] == ""
    assert {(line["interval"], line["correct"]) for line in found.values()} == {("t", "holm")}
    low, high = t_interval(gains["clear"], 1 - 0.05 / 3)
    assert float(found["clear"]["low"]) == pytest.approx(low)
    assert float(found["clear"]["high"]) == pytest.approx(high)
    plain = by_method(outputs.path)
    assert "p" not in plain["clear"]
    assert float(plain["clear"]["low"]) == pytest.approx(t_interval(gains["clear"])[0])


def test_the_family_is_what_the_table_shows(outputs: Outputs) -> None:
    gains = four_methods(outputs)
    alone = by_method(outputs.path, correct="holm", where=["method=fedavg,clear"])["clear"]
    assert float(alone["p"]) == pytest.approx(by_scipy(gains["clear"]))


def test_all_columns_are_one_family(outputs: Outputs) -> None:
    for alpha, size in ((0.1, 1.0), (1, 0.5)):
        for seed in range(3):
            outputs.run(f"f{alpha}{seed}", "fedavg", seed, [0.5], partitioning__alpha=alpha)
            gain = size * (0.1 + 0.05 * seed)
            outputs.run(f"x{alpha}{seed}", "feddle", seed, [0.5 + gain], partitioning__alpha=alpha)
    lines = [line for line in table(outputs.path, cols="partitioning.alpha", correct="holm") if line["p"]]
    assert [float(line["p"]) for line in lines] == pytest.approx([2 * by_scipy([0.1, 0.15, 0.2])] * 2)


def test_p_values_beside_the_differences(outputs: Outputs) -> None:
    two_methods(outputs)
    plain = render([outputs.path], Options(at="last", format="markdown")).splitlines()
    shown = render([outputs.path], Options(at="last", format="markdown", correct="holm")).splitlines()
    place = plain[0].split("|").index(" − fedavg [95 %] ") + 1
    assert [cell.strip() for cell in (line.split("|")[place] for line in shown[:4])] == [
        "p (Holm)",
        "---:",
        "",
        "0.074",
    ]
    assert "p (" not in "".join(plain)
    assert any("t intervals and p values that hold for the one difference of this table together" in s for s in shown)
    assert "| p |" in render([outputs.path], Options(at="last", format="markdown", interval="t"))
    assert "each by itself" in render([outputs.path], Options(at="last", interval="t"))


def test_a_small_p_value_and_a_bootstrap_of_few(outputs: Outputs) -> None:
    four_methods(outputs)
    text = render([outputs.path], Options(format="latex", interval="bootstrap", correct="bh", at="last"))
    assert re.search(r"clear & .* & \$<\$0\.001 & ", text)
    assert "p (BH)" in text
    assert "A bootstrap of 3 pairs is too narrow" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"interval": "bootstrp"},
            r"--interval: 'bootstrp' is unknown\. Did you mean 'bootstrap'\? Valid: bootstrap, t\.",
        ),
        ({"correct": "hol"}, r"--correct: 'hol' is unknown\. Did you mean 'holm'\? Valid: bh, holm, none\."),
    ],
)
def test_unknown_kinds(outputs: Outputs, options: dict[str, Any], message: str) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    with pytest.raises(ConfigError, match=message):
        render([outputs.path], Options(**options))
