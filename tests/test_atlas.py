"""The atlas: what is kept, what goes first, and how its anchors are brought to one length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridfl.merging.atlas import Entry, add, evict, scales, segments
from hybridfl.params import Layout

torch.set_num_threads(1)  # several threads on a shared machine are slower

NOW = 9


def entry(client: int, added: int = 5, birth: int = 5, c: float = 1.0, update: tuple[float, ...] = (1.0, 0.0)) -> Entry:
    return {
        "update": torch.tensor(update),
        "client": client,
        "birth": birth,
        "added": added,
        "coefficients": torch.tensor([c]),
    }


def clients(atlas: list[Entry]) -> list[int]:
    return [e["client"] for e in atlas]


@pytest.mark.parametrize(("per_client", "expected"), [("newest", [1, 0, 2]), ("all", [0, 1, 0, 2])])
def test_newest_keeps_one_entry_a_client(per_client, expected) -> None:
    old, new = [entry(0), entry(1)], [entry(0, added=NOW), entry(2, added=NOW)]
    atlas = add(old, new, per_client)
    assert clients(atlas) == expected
    assert atlas[-2:] == new
    assert clients(old) == [0, 1]


# Client 0 and 1 differ in what the rule looks at, and 0 goes; everything else speaks for removing 1.
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "coef": ({"c": 0.1, "added": 8, "birth": 8}, {"c": -0.5, "added": 3, "birth": 2}),
    "age": ({"added": 3, "birth": 3, "c": 2.0}, {"added": 4, "birth": 1, "c": 0.0}),
    "staleness": ({"birth": 1, "added": 6, "c": 2.0}, {"birth": 2, "added": 4, "c": 0.0}),
    "cosine": (
        {"update": (9.0, 9.5), "added": 8, "birth": 8, "c": 2.0},
        {"update": (0.1, -0.05), "added": 3, "birth": 2, "c": 0.0},
    ),
}
DOWNHILL = torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("swapped", [False, True])
def test_each_rule_removes_its_own_worst(rule, swapped) -> None:
    worse, better = RULES[rule]
    fresh = entry(7, added=NOW, birth=0, c=0.0, update=(-1.0, 1.0))
    atlas = [entry(0, **worse), entry(1, **better), fresh]
    kept, removed = evict(atlas[::-1] if swapped else atlas, 2, NOW, rule, DOWNHILL)
    assert clients(removed) == [0]
    assert sorted(clients(kept)) == [1, 7]


def test_nothing_goes_while_there_is_room_and_the_order_stays() -> None:
    atlas = [entry(3, c=0.0), entry(1), entry(2)]
    assert evict(atlas, 3, NOW, "coef") == (atlas, [])
    kept, removed = evict(atlas, 2, NOW, "coef")
    assert (clients(kept), clients(removed)) == ([1, 2], [3])


def test_what_arrived_now_stays_even_above_the_size() -> None:
    atlas = [entry(0), *(entry(k, added=NOW, c=0.0) for k in (1, 2, 3))]
    kept, removed = evict(atlas, 2, NOW, "coef")
    assert (clients(kept), clients(removed)) == ([1, 2, 3], [0])


@pytest.mark.parametrize("rule", ["coef", "cosine", "staleness"])
def test_of_equals_the_first_to_have_arrived_goes_whatever_the_order(rule) -> None:
    atlas = [entry(1, added=7), entry(4, added=3), entry(0, added=7)]
    for order in (atlas, atlas[::-1]):
        assert clients(evict(order, 2, NOW, rule, DOWNHILL)[1]) == [4]
        assert sorted(clients(evict(order, 1, NOW, rule, DOWNHILL)[1])) == [0, 4]


def test_a_coefficient_per_block_counts_by_its_mean_size() -> None:
    small, large = entry(0), entry(1)
    small["coefficients"], large["coefficients"] = torch.tensor([0.4, 0.0]), torch.tensor([-0.3, -0.3])
    assert clients(evict([large, small], 1, NOW, "coef")[1]) == [0]


def test_cosine_looks_at_whole_models_from_the_origin() -> None:
    origin = torch.tensor([10.0, -10.0])
    uphill, downhill = entry(0, update=(9.0, -9.0)), entry(1, update=(10.1, -10.1))
    lying = entry(2, update=(10.0, -9.9))
    kept, _ = evict([downhill, uphill, lying], 1, NOW, "cosine", DOWNHILL, origin)
    assert clients(kept) == [1]
    with pytest.raises(ValueError, match="cosine"):
        evict([uphill, downhill], 1, NOW, "cosine")


# -- lengths ----------------------------------------------------------------------------------------------------------

LAYOUT = Layout.of({"a.weight": torch.zeros(1, 2), "a.bias": torch.zeros(1), "b.weight": torch.zeros(2)})
# Lengths 13 and 26; in block a 5 and 10, in block b 12 and 24.
DIRECTIONS = [torch.tensor([3.0, 0.0, 4.0, 0.0, 12.0]), torch.tensor([0.0, 10.0, 0.0, 24.0, 0.0])]
ZERO = torch.zeros(5)


def lengths(directions: list[Tensor], factors: Tensor) -> list[float]:
    return [float((d * f).norm()) for d, f in zip(directions, factors.expand(-1, 1), strict=True)]


@pytest.mark.parametrize(
    ("norm", "expected", "unit"),
    [
        ("none", [13.0, 26.0], 1.0),
        ("mean", [19.5, 19.5], 1.0),
        ("unit", [1.0, 1.0], 19.5),
        ("fresh", [26.0, 26.0], 1.0),
    ],
)
def test_anchors_come_to_one_length(norm, expected, unit) -> None:
    factors, length = scales(DIRECTIONS, [False, True], norm, LAYOUT)
    assert lengths(DIRECTIONS, factors) == pytest.approx(expected)
    assert length == pytest.approx(unit)


def test_layers_come_to_their_own_mean_length() -> None:
    factors, length = scales(DIRECTIONS, [True, True], "layer", LAYOUT)
    torch.testing.assert_close(factors, torch.tensor([[7.5 / 5, 18 / 12], [7.5 / 10, 18 / 24]]))
    assert length == 1.0


def test_fresh_is_the_mean_over_all_that_arrived() -> None:
    factors, _ = scales([*DIRECTIONS, DIRECTIONS[0] * 10], [True, True, False], "fresh", LAYOUT)
    assert lengths([*DIRECTIONS, DIRECTIONS[0] * 10], factors) == pytest.approx([19.5] * 3)


@pytest.mark.parametrize("norm", ["mean", "unit", "fresh", "layer", "none"])
def test_a_zero_update_keeps_the_factor_one(norm) -> None:
    factors, length = scales([DIRECTIONS[0], ZERO], [True, True], norm, LAYOUT)
    assert torch.equal(factors[1], torch.ones_like(factors[1]))
    assert torch.isfinite(factors).all()
    assert scales([ZERO], [True], norm, LAYOUT)[1] == 1.0
    assert length > 0


def test_segments_cover_the_vector_once() -> None:
    assert segments(LAYOUT, 1) == ((0, 5, 0),)
    assert segments(LAYOUT, 2) == ((0, 2, 0), (2, 3, 0), (3, 5, 1))
