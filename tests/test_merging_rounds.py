"""The merging operators as the server's merge, in rounds."""

from __future__ import annotations

from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridfl import params as P
from hybridfl.assignment import task_of
from hybridfl.config import Composer, choices
from hybridfl.errors import ConfigError
from hybridfl.local import run_task
from hybridfl.merging.alignment import specification
from hybridfl.merging.permutation import permuted
from hybridfl.merging.slerp import slerp
from hybridfl.merging.weighted_mean import weighted_mean
from hybridfl.methods.dare import Dare
from hybridfl.methods.fisher import Fisher
from hybridfl.methods.regmean import RegMean
from hybridfl.methods.task_arithmetic import TaskArithmetic
from hybridfl.methods.ties import Ties
from hybridfl.optimizers import SGD
from hybridfl.params import Params
from hybridfl.types import Model, Result, Results, Round

# -- as the server's merge -------------------------------------------------------------------------------------------


def global_params(method: str, *overrides: str) -> Params:
    snapshot = helpers.snapshots(helpers.plan(method, *overrides).engine())[-1]
    params: Params = snapshot.state["global"].params
    return params


@pytest.mark.parametrize("line", [["merging=task_arithmetic"], ["merging=dare", "merging.drop=0"]])
def test_a_merge_that_only_adds_the_updates_is_fedavg(line: list[str]) -> None:
    assert helpers.close(global_params(*line), global_params("baseline=fedavg"))


def trained_clients() -> tuple[Any, list[tuple[Params, Tensor, Tensor]]]:
    """The federation, and of every client of round 0 what it trains and its training examples."""
    plan = helpers.plan("baseline=local_only", "rounds=1")
    federation, state = plan.federation, helpers.snapshots(plan.engine())[-1].state
    clients = []
    for arrival in plan.engine().schedule.born(0):
        (served,) = plan.method.serve(state, arrival.client)
        index = torch.from_numpy(federation.owned(arrival.client))
        clients.append((served.model.params, federation.bench.x[index], federation.bench.y[index]))
    assert len(clients) == 3
    return federation, clients


def test_regmean_in_a_round() -> None:
    """Every client's layers and Grams are those of the model it returns, on its own training examples."""
    merged = global_params("merging=regmean", "merging.alpha=1.0", "merging.weights=uniform", "rounds=1")
    gradient = torch.zeros(3, 64, dtype=torch.float64)
    _, clients = trained_clients()
    for params, x, _ in clients:
        hidden = torch.relu(x.flatten(1) @ params["body.1.weight"].T + params["body.1.bias"])
        gradient += (merged["head.weight"] - params["head.weight"]) @ hidden.T @ hidden
    assert float(gradient.abs().max()) < 1e-11
    mean = weighted_mean([params for params, _, _ in clients])
    assert helpers.close({"b": merged["head.bias"]}, {"b": mean["head.bias"]})
    assert not torch.allclose(merged["head.weight"], mean["head.weight"], atol=1e-4)


def test_fisher_in_a_round() -> None:
    federation, clients = trained_clients()
    pulled, mass = torch.zeros(2, 3, dtype=torch.float64)
    for params, x, y in clients:
        error = F.softmax(torch.func.functional_call(federation.net, params, (x,)), 1) - F.one_hot(y, 3)
        fisher = error.square().sum(0)  # n_k times the mean
        pulled, mass = pulled + fisher * params["head.bias"], mass + fisher
    merged = global_params("merging=fisher", "merging.floor=0", "rounds=1")
    assert torch.allclose(merged["head.bias"], pulled / mass, rtol=0, atol=1e-12)


def test_slerp_in_a_round() -> None:
    """One client after the other, each by its share of the examples so far."""
    _, clients = trained_clients()
    a, b, c = [params for params, _, _ in clients]
    sizes = [len(y) for _, _, y in clients]
    pair = slerp([a, b], sizes[1] / (sizes[0] + sizes[1]))
    expected = slerp([pair, c], sizes[2] / sum(sizes))
    found = global_params("merging=slerp", "rounds=1")
    assert helpers.close(found, expected)
    mean = weighted_mean([a, b, c], sizes)
    assert not torch.allclose(found["head.weight"], mean["head.weight"], rtol=0, atol=1e-6)
    uniform = global_params("merging=slerp", "merging.weights=uniform", "rounds=1")
    assert helpers.close(uniform, slerp([slerp([a, b], 1 / 2), c], 1 / 3))


@pytest.mark.parametrize("match", ["weight", "activation"])
def test_rebasin_undoes_a_permutation_of_a_clients_units(match: str) -> None:
    plan = helpers.plan("merging=rebasin", f"merging.match={match}", "rounds=1", "model.hidden=[7,5]")
    federation, method = plan.federation, plan.method
    state, now = method.init(federation), Round(0, 1, [0, 1], 2, federation.work, federation.seed)
    spec = specification(federation.net, (1, 4, 4))
    start: Model = state["global"]
    order = [torch.from_numpy(np.random.default_rng(k).permutation(n)) for k, n in enumerate((7, 5))]
    moved = Model({name: tensor + 0.01 for name, tensor in start.params.items()}, {})
    conversation = method.round(state, now)
    jobs = next(conversation)
    clients = [permuted(start, spec, order), moved]
    results = Results(
        Result(job.participant, "", job.start, model, 10 * (k + 1), 1, 0.0)
        for k, (job, model) in enumerate(zip(jobs, clients, strict=True))
    )
    assert not helpers.close(clients[0].params, start.params, 1e-3)
    (asked,) = conversation.send(results)
    outcome = run_task(federation.bench, task_of(federation, asked, 0, 1, 0))
    with pytest.raises(StopIteration) as stop:
        conversation.send(Results([outcome.result]))
    merged = stop.value.value["global"].params
    expected = {name: tensor + 0.01 * 2 / 3 for name, tensor in start.params.items()}
    assert helpers.close(merged, expected)
    told = {who: value for name, who, value in now.reports if name == "fixed_points"}
    assert told[0] == pytest.approx(sum(int((o == torch.arange(len(o))).sum()) for o in order) / 12)
    assert told[1] == 1


def test_rebasin_without_movement_of_units_is_fedavg() -> None:
    assert helpers.close(global_params("merging=rebasin"), global_params("baseline=fedavg"))


def test_rebasin_by_activations_needs_server_data_and_a_net_that_can_be_permuted() -> None:
    with pytest.raises(ConfigError, match="requires server_data"):
        helpers.plan("merging=rebasin", "merging.match=activation", "server_data=none")
    helpers.plan("merging=rebasin", "server_data=none")
    with pytest.raises(ConfigError, match=r"^model"):
        helpers.plan("merging=rebasin", "model=vit", "model.patch=2", "model.dim=8", "model.heads=2")


def test_statistics_are_paid_for() -> None:
    """RegMean sends d² numbers of 8 bytes for each layer and Fisher as many numbers as there are weights."""
    costs = {
        name: helpers.snapshots(helpers.plan(name, "rounds=1").engine())[-1].costs
        for name in ("baseline=fedavg", "merging=regmean", "merging=fisher")
    }
    federation = helpers.plan("baseline=fedavg").federation
    size = P.nbytes(federation.start.params.values())
    sent = {name: cost.bytes_up - costs["baseline=fedavg"].bytes_up for name, cost in costs.items()}
    assert sent == {"baseline=fedavg": 0, "merging=regmean": 3 * 8 * (16**2 + 64**2), "merging=fisher": 3 * size}
    clients = [arrival.client for arrival in helpers.plan("baseline=fedavg").engine().schedule.born(0)]
    passes = federation.forward_macs * sum(federation.examples(client) for client in clients)
    macs = {name: cost.macs - costs["baseline=fedavg"].macs for name, cost in costs.items()}
    assert macs == {"baseline=fedavg": 0, "merging=regmean": passes, "merging=fisher": 3 * passes}


def point(value: float) -> Model:
    return Model({"weight": torch.tensor([[value]], dtype=torch.float64)}, {})


def late(*arrived: tuple[float, float, int]) -> Results:
    """``(start, end, examples)`` of a model of one number; statistics of all kinds are 1."""
    found = Results()
    for client, (start, end, examples) in enumerate(arrived):
        model = point(start), point(end)
        one = torch.ones(1, 1, dtype=torch.float64)
        found.append(
            Result(client, "", *model, examples, 1, 0.0, {"gram": {"": one * examples}, "fisher": {"weight": one}})
        )
    return found


@pytest.mark.parametrize(
    "method", [TaskArithmetic(), Ties(density=1.0), Dare(drop=0.0), Fisher(), RegMean()], ids=lambda m: type(m).__name__
)
def test_late_updates_are_merged_around_the_present_global_model(method: Any) -> None:
    """From 10 to 11 and from 20 to 25: (30 · 1 + 10 · 5) / 40 = 2 beyond 100."""
    state = {"global": point(100)}
    generator = method.round(state, Round(3, 9, [0, 1], 2, SGD(), 0))
    next(generator)
    with pytest.raises(StopIteration) as stop:
        generator.send(late((10, 11, 30), (20, 25, 10)))
    assert float(stop.value.value["global"].params["weight"]) == pytest.approx(102, abs=1e-12)
    assert float(state["global"].params["weight"]) == 100


@pytest.mark.parametrize(("weights", "expected"), [("examples", 100 + 3 * 2), ("uniform", 100 + 3 * 3)])
def test_scale_and_weights_by_hand(weights: Any, expected: float) -> None:
    for method in (TaskArithmetic(3.0, weights), Ties(1.0, 3.0, weights), Dare(0.0, 3.0, weights)):
        state = {"global": point(100)}
        generator = method.round(state, Round(3, 9, [0, 1], 2, SGD(), 0))
        next(generator)
        with pytest.raises(StopIteration) as stop:
            generator.send(late((10, 11, 30), (20, 25, 10)))
        assert float(stop.value.value["global"].params["weight"]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", sorted({*choices("baseline")} & {*choices("merging")}))
def test_a_baseline_of_the_same_name_is_the_same_method(name: str) -> None:
    with Composer() as composer:
        baseline = composer.compose([f"baseline={name}"])
        merging = composer.compose([f"merging={name}"])
    assert (baseline.method_key, baseline.method_name) == ("baseline", name)
    assert baseline.config["baseline"] == merging.config["merging"]
    assert baseline.config["merging"] != baseline.config["baseline"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["merging=ties", "merging.density=0"], r"^merging\.density: got 0: must be above 0"),
        (["merging=ties", "merging.scale=0"], r"^merging\.scale: got 0: must be above 0"),
        (["baseline=ties", "baseline.density=2"], r"^baseline\.density: .*nearest valid value: 1"),
        (["merging=dare", "merging.drop=1"], r"^merging\.drop: got 1: must be below 1"),
        (["merging=fisher", "merging.labels=true"], r"^merging\.labels: got true.*given, sampled"),
        (["merging=regmean", "merging.alpha=1.1"], r"^merging\.alpha: .*nearest valid value: 1"),
        (["merging=task_arithmetic", "merging.weights=size"], r"^merging\.weights: got 'size'.*examples, uniform"),
    ],
)
def test_impossible_options_are_refused(line: list[str], problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        helpers.plan(*line)
