"""The benchmark compares like with like: its references train the same model as FedAvg, on the same clients."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from hybridfl.data.dataset import Labels
from hybridfl.errors import ConfigError
from hybridfl.rng import stream

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

from bench_helpers import TINY, given  # noqa: E402
from benchmark import workloads  # noqa: E402
from benchmark.contenders import Hybridfl  # noqa: E402
from benchmark.convolutions import Convolutions  # noqa: E402
from benchmark.references import REFERENCES, Given, Reference  # noqa: E402
from benchmark.targets import Interval, Target, ratio  # noqa: E402
from benchmark.whole_run import Clock  # noqa: E402
from benchmark.workloads import FOR_CPUS, WORKLOADS, WithReplacement, images  # noqa: E402


def engines(number: int, client: int, n: int) -> np.ndarray:
    """The engine's own shuffle of the first job of a client."""
    return stream(0, "local", number, client, "", 0).permutation(n)


def made(kind: str, given: Given) -> Reference:
    reference = REFERENCES[kind](given)
    reference.order = engines
    return reference


def agree(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", FOR_CPUS)
def test_the_plain_loop_trains_the_model_of_fedavg(name: str, tmp_path: Path) -> None:
    ours, theirs = given(TINY[name], tmp_path)
    plain = made("plain", theirs)
    start = plain.weights()
    for number in range(2):
        ours.round(number)
        plain.round(number)
        assert agree(list(ours.snapshot.state["global"].params.values()), plain.weights())
    assert not agree(start, plain.weights())


@pytest.mark.parametrize(("name", "kind"), [("W2", "by_hand"), ("W3", "by_hand"), ("W1", "channels_last")])
def test_the_limits_are_central_training(name: str, kind: str, tmp_path: Path) -> None:
    _, theirs = given(TINY[name], tmp_path)
    central, limit = made("central", theirs), made(kind, theirs)
    for reference in (central, limit):
        reference.round(0)
    assert agree(central.weights(), limit.weights())
    assert not agree(central.weights(), [tensor.detach() for tensor in theirs.net.parameters()])


def test_all_ways_to_convolve_find_the_same_gradients() -> None:
    ways = Convolutions(TINY["W1"])
    expected = ways.alone()
    assert len(ways.ways) == 4
    for name, way in ways.ways.items():
        for tensor, found in zip(expected.values(), way().values(), strict=True):
            assert tensor.abs().max() > 0.1
            assert torch.allclose(found, tensor, rtol=1e-4, atol=1e-3), name


def test_central_training_is_federated_averaging_with_a_single_client(tmp_path: Path) -> None:
    _, theirs = given(replace(TINY["W2"], per_round=1), tmp_path)
    plain, central = made("plain", theirs), made("central", theirs)
    for reference in (plain, central):
        reference.round(0)
    assert agree(plain.weights(), central.weights())


def test_the_workloads_are_those_that_were_described() -> None:
    described = {"W1": (100, 10), "W2": (100, 10), "W3": (1000, 100), "W4": (10_000, 100)}
    assert {name: (WORKLOADS[name].clients, WORKLOADS[name].per_round) for name in FOR_CPUS} == described
    assert all((WORKLOADS[name].train, WORKLOADS[name].test) == (60_000, 10_000) for name in FOR_CPUS)
    for name, least in (("W1", 20), ("W2", 20), ("W3", 60), ("W4", 60)):
        workload = replace(WORKLOADS[name], train=60_000 // 50, test=200, clients=WORKLOADS[name].clients // 50)
        federation = Hybridfl(replace(workload, per_round=2).line(1)).plan.federation
        sizes = [federation.examples(client) for client in range(workload.clients)]
        assert min(sizes) >= least
        assert max(sizes) == 60 if name in ("W3", "W4") else max(sizes) > 60
        assert federation.split.is_shared == (name == "W4")


def test_clients_draw_with_replacement() -> None:
    labels = Labels(np.zeros(10, dtype=np.int64))
    partition = WithReplacement(size=50).split(labels, 3, np.random.default_rng(0))
    assert [len(share) for share in partition.shares] == [50] * 3
    assert all(set(share) <= set(range(10)) for share in partition.shares)


def test_images_are_those_of_seed_0() -> None:
    x, y = images(300, 100)
    assert x.shape == (400, 1, 28, 28)
    assert x.dtype == np.uint8
    assert set(y) == set(range(10))
    again = images(300, 100)
    assert (x == again[0]).all()
    assert (y == again[1]).all()
    assert abs(x.mean() - workloads.MEAN) < 5
    assert abs(x.std() - workloads.STD) < 5


@pytest.mark.parametrize("role", ["noisy_labels", "flipped_labels", "noisy_inputs"])
def test_clients_that_share_examples_cannot_be_given_noise(role: str) -> None:
    partitioning = (
        "~partitioning",
        "+partitioning={_target_:benchmark.workloads.WithReplacement,size:60}",
        "server_data=none",
    )
    kept = [text for text in helpers.TINY if not text.startswith(("partitioning.", "server_data."))]
    line = [*kept, *partitioning, "baseline=fedavg", f"clients.{role}=0.4"]
    with pytest.raises(ConfigError, match=rf"clients.{role}: got 0.4: clients share examples.*nearest valid value: 0"):
        Hybridfl(line)
    Hybridfl([*line[:-1], "clients.random_updates=0.4"])


def test_a_ratio_of_medians_and_its_interval() -> None:
    rng = np.random.default_rng(3)
    slow = rng.normal(1.0, 0.2, 25).clip(0.3)
    found = ratio(list(2 * slow), list(slow))
    assert found == Interval(2.0, 2.0, 2.0)  # what slows both of them down is not in it
    alone = ratio(list(slow))
    assert alone.low < alone.value == np.median(slow) < alone.high
    assert slow.min() < alone.low
    assert alone.high < slow.max()
    assert ratio([1.0, 2.0, 60.0], [2.0, 4.0]) == Interval(0.5, 0.5, 0.5)  # one was stopped a repeat before the other


def test_a_target_is_met_when_the_lower_end_is_below_it() -> None:
    assert Target("", Interval(1.3, 1.25, 1.4), 1.25).met
    assert not Target("", Interval(1.3, 1.26, 1.4), 1.25).met


def test_the_clock_tells_local_work_and_the_method_apart() -> None:
    clock = Clock(first_only=False, local=[0.0], method=[0.0])

    def method(state, now):
        time.sleep(0.02)
        answer = yield ["job"]
        time.sleep(0.02)
        return answer + state

    conversation = clock.round(method)(1, None)
    assert next(conversation) == ["job"]
    time.sleep(0.2)
    with pytest.raises(StopIteration) as stop:
        conversation.send(2)
    assert stop.value.value == 3
    assert 0.04 <= clock.method[0] < 0.2
