"""Who is there in which round, who arrives when, and when they were born."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridfl.availability import Clients, Cycle
from hybridfl.build import build
from hybridfl.errors import ConfigError
from hybridfl.schedule import Arrival, Schedule


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
@settings(max_examples=40, deadline=None)
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


def test_the_schedules_of_before_there_were_other_options() -> None:
    assert [(t, *arrival[:3]) for t, arrival in births(Clients(number=9, per_round=0.34, delay=2.0), 4, seed=7)] == [
        *((0, 0, 0, 6), (0, 0, 1, 3), (0, 0, 2, 0), (0, 1, 1, 5), (0, 1, 2, 0), (0, 3, 1, 2)),
        *((1, 1, 0, 6), (1, 2, 1, 0), (1, 2, 2, 8), (1, 3, 0, 4), (2, 2, 0, 1), (2, 3, 2, 5)),
    ]
    assert [arrival.client for _, arrival in births(Clients(), 2)] == [39, 49, 11, 8, 40, 38, 45, 16, 22, 12]
    text = repr([(t, *arrival[:3]) for t, arrival in births(Clients(number=30, per_round=4, delay=3.0), 200, seed=5)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "8710648f482e53e5"


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
        ("per_round", {0: 0}),
        ("held_out", -1),
        ("held_out", [1, 1]),
        ("concurrency", 0),
        ("concurrency", 51),
        ("dropout", 1.5),
        ("failure", -0.5),
        ("random_scale", -1.0),
        ("assign", "random"),
        ("timing", 3),
    ],
)
def test_impossible_clients_are_refused_under_their_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"_target_": "hybridfl.availability.Clients", key: value}, "clients")
    assert caught.value.key.removesuffix(".0") == f"clients.{key}"


@pytest.mark.parametrize(
    ("options", "key", "problem"),
    [
        (
            {"per_round": 5, "cycle": {"groups": 5}},
            "per_round",
            "got 5, but only 2 clients are available",
        ),
        ({"per_round": 8, "held_out": 3}, "per_round", "got 8, but only 7 .* nearest valid value: 7"),
        ({"per_round": {0: 5, 3: 11}}, "per_round.3", "got 11, but there are 10 clients; nearest valid value: 10"),
        ({"per_round": {0: 5, 3: 1.5}}, "per_round.3", "got 1.5: must be at most 1"),
        ({"per_round": {4: 2, 7: 3}}, "per_round", "got {4: 2, 7: 3}: .* nearest valid value: {0: 2}"),
        ({"per_round": {}}, "per_round", "got {}: .* nearest valid value: {0: 5}"),
        ({"per_round": {0: 2, "x": 3}}, "per_round", "got 'x' for the round .* nearest valid value: 0"),
        ({"per_round": {0: 2, 1.5: 3}}, "per_round", r"got 1\.5 for the round"),
        ({"per_round": {0: 2, -3: 3}}, "per_round", "got -3 for the round"),
        ({"per_round": {0: 2, True: 3}}, "per_round", "got True for the round"),
        ({"cycle": {"groups": 11}}, "cycle.groups", "got 11, but 10 clients train; nearest valid value: 10"),
        ({"held_out": 10}, "held_out", "got 10: none of 10 clients is left to train; nearest valid value: 9"),
        ({"held_out": 1.0}, "held_out", "got 1.0: none of 10 clients is left"),
        ({"held_out": [3, 10]}, "held_out", r"got \[3, 10\]: .* 0 to 9; nearest valid value: \[3, 9\]"),
        ({"held_out": [3, 3]}, "held_out", r"got \[3, 3\]: .* nearest valid value: \[3\]"),
        ({"held_out": [3, "x"]}, "held_out[1]", "got 'x': expected a whole number"),
        ({"concurrency": 3, "delay": 1.5}, "concurrency", r"got 3 beside delay=1\.5: .* nearest valid value: null"),
        ({"concurrency": 11}, "concurrency", "got 11, but there are 10 clients; nearest valid value: 10"),
        ({"concurrency": 3, "per_round": 1, "cycle": {"groups": 4}}, "concurrency", "got 3, .* nearest valid value: 2"),
        (
            {"noisy_labels": 0.5, "flipped_labels": 0.3, "random_updates": 0.5},
            "random_updates",
            r"got 0\.5 beside noisy_labels=0\.5, flipped_labels=0\.3: .* nearest valid value: 0\.2",
        ),
        ({"timing": {"speeds": 11}}, "timing.speeds", "nearest valid value: 10"),
        ({"timing": {"sped": 1}}, "timing.sped", "Did you mean 'speeds'"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_what_would(options: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        build({"_target_": "hybridfl.availability.Clients", "number": 10, "per_round": 2} | options, "clients")
    assert caught.value.key == f"clients.{key}"


def test_shares_that_sum_to_one_are_all_clients() -> None:
    shares = {"noisy_labels": 0.1, "flipped_labels": 0.2, "noisy_inputs": 0.3, "random_updates": 0.4}
    assert len(Clients(number=10, **shares).roles(0)) == 10  # type: ignore[arg-type]


# -- a schedule of sizes ---------------------------------------------------------------------------------------------


def test_the_cohort_changes_with_the_round() -> None:
    clients = Clients(number=20, per_round={7: 0.5, 0: 3, 4: 1})
    sizes = [3] * 4 + [1] * 3 + [10] * 3
    assert [clients.cohort_of(t) for t in range(10)] == sizes
    assert clients.cohort == 10
    counts = Counter(arrival.round for _, arrival in births(clients, 10))
    assert [counts[t] for t in range(10)] == sizes
    # What was drawn before the change is what is drawn without it.
    assert births(clients, 4) == births(Clients(number=20, per_round=3), 4)


def test_a_mapping_comes_from_the_command_line_as_it_is() -> None:
    options = {"_target_": "hybridfl.availability.Clients", "per_round": {0: 5, 30: 0.2}}
    assert build(options, "clients").per_round == {0: 5, 30: 0.2}


# -- cycles ----------------------------------------------------------------------------------------------------------


@given(number=st.integers(1, 30), groups=st.integers(1, 6), length=st.integers(1, 3), held_out=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_block_is_available_in_its_turn(number: int, groups: int, length: int, held_out: int) -> None:
    held_out = min(held_out, number - 1)
    training = number - held_out
    groups = min(groups, training)
    clients = Clients(number=number, per_round=1.0, held_out=held_out, cycle=Cycle(groups, length))
    trainers = clients.trainers(0)
    assert len(trainers) == training
    for t in range(2 * groups * length):
        turn = t // length % groups
        block = [client for i, client in enumerate(trainers) if groups * i // training == turn]
        assert trainers[clients.block(t)] == block
        assert clients.cohort_of(t) == len(block) <= clients.cohort
        # A fraction of 1 is everybody who is there.
        assert sorted(a.client for _, a in births(clients, t + 1) if a.round == t) == block


def test_a_fraction_is_one_of_those_available() -> None:
    clients = Clients(number=40, per_round=0.5, held_out=(0, 1, 2, 3), cycle=Cycle(groups=3))
    assert {clients.cohort_of(t) for t in range(6)} == {6}


# -- held out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("held_out", "count"), [(0, 0), (3, 3), (0.25, 3), ((4, 0), 2)])
@pytest.mark.parametrize("concurrency", [None, 6])
def test_clients_held_out_never_train(held_out: Any, count: int, concurrency: int | None) -> None:
    clients = Clients(number=12, per_round=4, held_out=held_out, concurrency=concurrency)
    for seed in range(3):
        chosen = clients.held_out_clients(seed)
        assert len(chosen) == len(set(chosen)) == count
        assert chosen == sorted(chosen)
        seen = {arrival.client for _, arrival in births(clients, 60, seed)}
        assert seen == set(range(12)) - set(chosen)


def test_which_clients_are_held_out() -> None:
    assert Clients(number=12, held_out=(4, 0)).held_out_clients(5) == [0, 4]
    drawn = [tuple(Clients(number=12, held_out=3).held_out_clients(seed)) for seed in range(10)]
    assert len(set(drawn)) > 5
    # One more held out leaves the others held out.
    assert set(drawn[0]) < set(Clients(number=12, held_out=4).held_out_clients(0))
