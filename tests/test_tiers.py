"""Device tiers: the grammar of budgets, and who gets which width."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import lognorm

from hybridfl.availability import Clients
from hybridfl.build import build
from hybridfl.errors import ConfigError
from hybridfl.tiers import Assign, Tiers, allot, ladder


@pytest.mark.parametrize(
    ("tiers", "groups"),
    [
        (None, [1.0]),
        (8, [0.125]),
        ("8", [0.125]),
        ("8-4-2-1", [0.125, 0.25, 0.5, 1.0]),
        ("1-2-4-8", [0.125, 0.25, 0.5, 1.0]),
        ("8d3", [0.375]),
        ("4-2-4d3-1", [0.25, 0.5, 0.75, 1.0]),
        ("8-1-1-1", [0.125, 1.0, 1.0, 1.0]),
        ((1.0, 0.3), [0.3, 1.0]),
    ],
)
def test_groups_are_equal_and_ascend(tiers: Tiers, groups: list[float]) -> None:
    assert list(ladder(tiers, len(groups))) == groups
    assert list(ladder(tiers, 5 * len(groups))) == [width for width in groups for _ in range(5)]


def test_a_number_that_the_groups_do_not_divide() -> None:
    """Of 50 clients and four groups, client i is in group ⌊4 i / 50⌋: 13, 12, 13 and 12 of them."""
    widths = ladder("8-4-2-1", 50)
    assert list(widths) == [[0.125, 0.25, 0.5, 1.0][int(4 * i / 50)] for i in range(50)]
    assert Counter(widths) == {0.125: 13, 0.25: 12, 0.5: 13, 1.0: 12}
    assert ladder("8-4-2-1", 2) == (0.125, 0.5)


def by_distribution(sigma: float, median: float, clients: int) -> list[float]:
    """The allotment of Split-Mix's own code, with scipy's distribution function: a width from its cut to the next."""
    widths = np.arange(1, 9) / 8
    law = lognorm(s=sigma, scale=median)
    shares = 1 - np.append(law.sf(widths), 0.0) / law.sf(1 / 8)
    cuts = [int(clients * share) for share in shares]
    return [widths[j] for j in range(8) for _ in range(cuts[j], cuts[j + 1])]


@given(sigma=st.floats(0.1, 2.0), median=st.floats(0.05, 2.0), clients=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_a_log_normal_budget(sigma: float, median: float, clients: int) -> None:
    widths = list(ladder(f"ln{sigma:.3f}_{median:.3f}", clients))
    expected = by_distribution(round(sigma, 3), round(median, 3), clients)
    # At a boundary the last digit of the distribution function may move a client by one step.
    assert sum(one != other for one, other in zip(widths, expected, strict=True)) <= 1
    assert widths == sorted(widths)
    assert set(widths) <= {j / 8 for j in range(1, 9)}


@pytest.mark.parametrize(("text", "median"), [("ln0.5_0.4", 0.4), ("ln0.2_0.6", 0.6), ("ln.3_.5", 0.5)])
def test_a_log_normal_budget_has_its_mean_near_the_median(text: str, median: float) -> None:
    """The law's mean is above its median; rounding down to eighths and cutting at 1 take about as much off."""
    widths = np.array(ladder(text, 1000))
    assert abs(widths.mean() - median) < 1 / 16
    below = float((widths + 1 / 8 <= median).mean())
    assert below <= 0.5 <= float((widths <= median).mean())


def test_a_narrow_law_is_one_width() -> None:
    assert set(ladder("ln0.001_0.6", 20)) == {0.5}
    assert set(ladder("ln0.001_3", 20)) == {1.0}


# -- who gets what ---------------------------------------------------------------------------------------------------


def test_in_the_order_of_the_clients_or_shuffled() -> None:
    by_index = Clients(number=8, per_round=1, tiers="8-1")
    shuffled = Clients(number=8, per_round=1, tiers="8-1", assign="shuffled")
    assert by_index.widths(0) == by_index.widths(1) == (0.125,) * 4 + (1.0,) * 4
    assert sorted(shuffled.widths(0)) == list(by_index.widths(0))
    assert shuffled.widths(0) == shuffled.widths(0) != by_index.widths(0)
    assert len({shuffled.widths(seed) for seed in range(10)}) > 5
    assert Clients(number=8, per_round=1).widths(0) == (1.0,) * 8


def test_a_domain_is_as_wide_as_its_number_says() -> None:
    clients = Clients(number=7, per_round=1, tiers="8-4-2-1", assign="domain")
    domains = [3, 0, 0, 1, 2, 3, 1]
    assert clients.widths(0, domains) == (1.0, 0.125, 0.125, 0.25, 0.5, 1.0, 0.25)
    # Five domains: ⌊4 d / 5⌋ is 0, 0, 1, 2, 3.
    assert clients.widths(0, [0, 1, 2, 3, 4, 4, 0]) == (0.125, 0.125, 0.25, 0.5, 1.0, 1.0, 0.125)
    # A domain without a client takes no tier.
    assert clients.widths(0, [0, 0, 2, 2, 5, 5, 9]) == (0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0)


def test_domains_are_asked_for() -> None:
    clients = Clients(number=4, per_round=1, tiers=8, assign="domain")
    with pytest.raises(ConfigError, match=r"^clients\.assign: got domain, but .* nearest valid value: index\.$"):
        clients.widths(0)
    assert Clients(number=4, per_round=1, assign="domain").widths(0) == (1.0,) * 4


@pytest.mark.parametrize("assign", ["index", "shuffled", "domain"])
def test_a_whole_number_from_the_command_line(assign: Assign) -> None:
    assert set(allot(8, assign, 4, 0, [0, 0, 1, 1])) == {0.125}


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        ("8-x", "clients.tiers", "got '8-x': expected denominators"),
        ("8-0", "clients.tiers", "nearest valid value: 8-4-2-1"),
        ("2d3", "clients.tiers", "got '2d3'"),
        ("", "clients.tiers", "got ''"),
        ("8-", "clients.tiers", "got '8-'"),
        ("ln0.5", "clients.tiers", "nearest valid value: ln0.5_0.4"),
        ("ln0_0.4", "clients.tiers", "got 'ln0_0.4'"),
        ("ln0.001_0.01", "clients.tiers", "no width is as large as 1/8; nearest valid value: 8"),
        (0, "clients.tiers", "got 0: must be at least 1; nearest valid value: 1"),
        ([], "clients.tiers", "got []"),
        ([0.5, 1.5], "clients.tiers[1]", "got 1.5: must be at most 1"),
        ([0.0], "clients.tiers[0]", "must be above 0"),
    ],
)
def test_what_is_no_budget(value: object, key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"_target_": "hybridfl.availability.Clients", "tiers": value}, "clients")
    assert caught.value.key == key
    assert text in caught.value.problem
