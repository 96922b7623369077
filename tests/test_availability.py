"""The schedule: who arrives when, and when they were born."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridfl.availability import Arrival, Clients, Schedule
from hybridfl.build import build
from hybridfl.errors import ConfigError


def births(clients: Clients, rounds: int, seed: int = 0) -> list[tuple[int, Arrival]]:
    """(round of birth, arrival) of the whole run."""
    schedule = Schedule(clients, rounds, seed)
    return [(t, arrival) for t in range(rounds) for arrival in schedule.born(t)]


@given(
    number=st.integers(1, 12),
    cohort=st.integers(1, 12),
    delay=st.sampled_from([0.0, 0.5, 3.0, 50.0, 1e300]),
    rounds=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_each_round_consumes_exactly_a_cohort(number: int, cohort: int, delay: float, rounds: int, seed: int) -> None:
    cohort = min(cohort, number)
    seen = births(Clients(number=number, per_round=cohort, delay=delay), rounds, seed)
    for t in range(rounds):
        due = [(born, arrival) for born, arrival in seen if arrival.round == t]
        assert sorted(arrival.slot for _, arrival in due) == list(range(cohort))
        assert len({arrival.client for _, arrival in due}) == cohort  # drawn without replacement
        assert all(0 <= arrival.client < number and 0 <= born <= t for born, arrival in due)
    # Nothing else is born: what would arrive after the last round is never trained.
    assert len(seen) == rounds * cohort
    for t in range(rounds):
        order = [(arrival.round, arrival.slot) for born, arrival in seen if born == t]
        assert order == sorted(order)


def test_no_delay_is_the_synchronous_round() -> None:
    assert all(born == arrival.round for born, arrival in births(Clients(number=9, per_round=4), 20))


def test_births_before_the_first_round_are_moved_into_it() -> None:
    seen = births(Clients(number=9, per_round=4, delay=1e6), 5)
    assert {born for born, _ in seen} == {0}


def test_staleness_is_a_half_normal_rounded_down() -> None:
    """The mean of floor(abs(N(0, s))) is Σ P(abs(N) ≥ k s⁻¹), k ≥ 1; early rounds are left out, they are cut off."""
    delay = 4.0
    seen = births(Clients(number=40, per_round=40, delay=delay), 200, seed=3)
    staleness = [arrival.round - born for born, arrival in seen if arrival.round >= 50]
    expected = sum(math.erfc(k / delay / math.sqrt(2)) for k in range(1, 200))
    deviation = delay / math.sqrt(len(staleness))
    assert abs(sum(staleness) / len(staleness) - expected) < 4 * deviation
    assert min(staleness) == 0
    assert max(staleness) > 2 * delay


def test_the_cohort_is_uniform_over_the_clients() -> None:
    counts = Counter(arrival.client for _, arrival in births(Clients(number=5, per_round=2), 1000))
    assert sorted(counts) == list(range(5))
    assert max(abs(count - 400) for count in counts.values()) < 4 * math.sqrt(1000 * 0.4 * 0.6)


def test_the_schedule_depends_on_the_seed_and_a_longer_run_has_the_same_arrivals() -> None:
    clients = Clients(number=20, per_round=3, delay=2.0)
    assert births(clients, 10, seed=1) == births(clients, 10, seed=1)
    assert births(clients, 10, seed=1) != births(clients, 10, seed=2)
    longer = [(born, arrival) for born, arrival in births(clients, 15, seed=1) if arrival.round < 10]
    assert sorted(longer) == sorted(births(clients, 10, seed=1))


def test_the_delay_does_not_change_who_arrives() -> None:
    late, punctual = (births(Clients(number=20, per_round=3, delay=d), 10) for d in (2.0, 0.0))
    assert sorted(arrival for _, arrival in late) == sorted(arrival for _, arrival in punctual)


def test_nobody_is_born_outside_the_run() -> None:
    schedule = Schedule(Clients(number=3, per_round=1), 2, 0)
    assert schedule.born(2) == schedule.born(-1) == []


@pytest.mark.parametrize(
    ("number", "per_round", "cohort"), [(50, 5, 5), (50, 1.0, 50), (50, 0.1, 5), (50, 0.001, 1), (1, 1, 1)]
)
def test_a_cohort_is_a_number_or_a_fraction(number: int, per_round: float, cohort: int) -> None:
    assert Clients(number=number, per_round=per_round).cohort == cohort


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_round", 51),
        ("per_round", 0),
        ("per_round", 0.0),
        ("per_round", 1.5),
        ("number", 0),
        ("delay", -1),
        ("delay", math.inf),
        ("noisy_labels", 1.1),
        ("validation", 1.0),
    ],
)
def test_impossible_clients_are_refused_under_their_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"_target_": "hybridfl.availability.Clients", key: value}, "clients")
    assert caught.value.key == f"clients.{key}"


def test_noisy_clients_are_a_share_of_all() -> None:
    clients = Clients(number=10, noisy_labels=0.3)
    chosen = clients.noisy(seed=0)
    assert len(set(chosen)) == 3
    assert chosen == sorted(chosen) == clients.noisy(seed=0)
    assert any(clients.noisy(seed) != chosen for seed in range(1, 5))
    assert Clients(number=10).noisy(0) == []
