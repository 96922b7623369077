"""FedLAW and soups: whole rounds against plain torch in float64, and their parts by hand."""

from __future__ import annotations

import copy
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusion_helpers import CLIENTS, EXAMPLES, OneRound, asked, plan, point
from torch import Tensor

from hybridfl import params as P
from hybridfl.assignment import task_of
from hybridfl.errors import ConfigError
from hybridfl.local import run_task
from hybridfl.merging import scaled_softmax
from hybridfl.merging.soup import greedy_soup
from hybridfl.methods.fedavg import FedAvg
from hybridfl.methods.fedlaw import FedLAW
from hybridfl.methods.soup import Soup
from hybridfl.optimizers import Adam
from hybridfl.params import Params
from hybridfl.types import Model, Result, Results, Round

# -- FedLAW ----------------------------------------------------------------------------------------------------------


def some(number: int) -> list[Params]:
    rng = np.random.default_rng(3)
    return [
        {n: torch.from_numpy(rng.normal(size=s)) for n, s in {"a": (2, 3), "b": (4,)}.items()} for _ in range(number)
    ]


def test_learned_weights_begin_at_the_mean_and_have_the_gradient_of_autograd() -> None:
    models, shares = some(3), [0.2, 0.5, 0.3]
    merge, theta, frozen = scaled_softmax.of(models, shares)
    assert helpers.close(merge(theta, frozen), P.mean(models, shares), 1e-14)
    assert merge.macs(frozen) == 3 * 10
    theta = {"x": torch.tensor([0.3, -1.0, 0.4]).double(), "y": torch.tensor(0.7).double()}
    stacked = torch.stack([P.flatten(model) for model in models])

    def slopes(through_map: bool) -> tuple[Tensor, ...]:
        x, y = (theta[name].clone().requires_grad_() for name in ("x", "y"))
        if through_map:
            merged = torch.cat([t.reshape(-1) for t in merge({"x": x, "y": y}, frozen).values()])
        else:
            merged = y.exp() * (x.softmax(0) @ stacked)
        return (merged, *torch.autograd.grad((merged.sin() * torch.arange(10)).sum(), [x, y]))

    for found, expected in zip(slopes(True), slopes(False), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_fedlaw_is_plain_torch_on_weights_and_length() -> None:
    played = OneRound(FedLAW(epochs=5, batch_size=5, lr=0.1, decay_every=2), plan())
    stacked = torch.stack([P.flatten(model) for model in played.models])
    shares = torch.tensor(played.sizes).double() / sum(played.sizes)
    x, y = shares.log().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x, y], lr=0.1, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    layout = P.Layout.of(played.models[0])
    for stage, epochs in enumerate((2, 2, 1)):
        index = [*played.batches(Adam(epochs=epochs, batch_size=5), "weights", stage)]
        assert len(index) == 3 * epochs
        for step, picked in enumerate(index):
            rows = torch.from_numpy(picked)
            optimizer.zero_grad()
            merged = layout.unflatten(y.exp() * (x.softmax(0) @ stacked))
            F.cross_entropy(played.logits(merged, played.x[rows]), played.y[rows]).backward()
            optimizer.step()
            if step % 3 == 2:
                schedule.step()
    x, y = x.detach(), y.detach()
    expected = layout.unflatten(y.exp() * (x.softmax(0) @ stacked))
    assert helpers.close(played.model.params, expected, 1e-10)
    assert played.reported("weight") == pytest.approx(x.softmax(0).tolist(), abs=1e-10)
    assert played.reported("gamma") == pytest.approx([float(y.exp())], abs=1e-10)
    assert abs(float(y)) > 0.1
    assert float((x.softmax(0) - shares).abs().max()) > 0.05
    maps = 2 * 15 * CLIENTS * stacked.shape[1]
    assert played.after.costs.server_macs == 3 * 5 * EXAMPLES * played.federation.forward_macs + maps


def test_fedlaw_sends_what_fedavg_sends_and_hardly_learning_it_is_that() -> None:
    learned, averaged = OneRound(FedLAW(epochs=1, lr=1e-14), plan()), OneRound(FedAvg(), plan())
    assert helpers.close(learned.model.params, averaged.model.params)
    sent = [(c.bytes_up, c.bytes_down, c.local_steps) for c in (learned.after.costs, averaged.after.costs)]
    assert sent[0] == sent[1]


def test_fedlaw_merges_late_updates_around_the_present_global_model() -> None:
    (job,) = asked(FedLAW())
    assert [float(anchor) for anchor in job.frozen["anchors"]] == [101, 105]
    assert float(job.parametrization(job.start.params, job.frozen)["w"]) == pytest.approx(102, abs=1e-12)


# -- soups -----------------------------------------------------------------------------------------------------------


def line(*values: float) -> list[Params]:
    return [point(value).params for value in values]


def test_the_greedy_recipe_by_hand() -> None:
    tried = []

    def score(params: Params) -> float:
        tried.append(float(params["w"]))
        return -abs(tried[-1] - 3)

    assert float(greedy_soup(line(1.3, 4, 2.5, 10), score)["w"]) == 3.25
    # 2.6 is nearer to 3 than 2.5 was, but not than 3.25 is.
    assert tried == [1.3, 4, 2.5, 10, (2.5 + 4) / 2, pytest.approx(2.6), (2.5 + 4 + 10) / 3]
    assert float(greedy_soup(line(7), score)["w"]) == 7
    # What makes it neither better nor worse stays, and equals go in their order.
    assert float(greedy_soup(line(1, 2, 6), lambda params: 0.0)["w"]) == 3


def test_a_greedy_soup_in_a_round() -> None:
    """Found again by the accuracy on the server's examples, in plain torch."""
    one = plan("server_data.examples=30")
    played = OneRound(Soup(), one)

    def score(params: Params) -> float:
        return float((played.logits(params, played.x).argmax(1) == played.y).double().mean())

    expected = greedy_soup(played.models, score)
    assert helpers.close(played.model.params, expected)
    assert score(expected) >= max(map(score, played.models))
    kept = played.reported("kept")
    assert 1 <= sum(kept) <= CLIENTS
    assert helpers.close(expected, P.mean(played.models, kept))
    assert played.passes == 30 * (2 * CLIENTS - 1)


def test_a_soup_leaves_out_what_spoils_it() -> None:
    """Two clients answer what the labels are, the third, in the middle, the opposite with more weight."""
    federation = plan().federation
    good = federation.start.params
    results = Results()
    for k, factor in enumerate((1.0, -5.0, 1.2)):
        params = {name: tensor * (factor if name.startswith("head") else 1) for name, tensor in good.items()}
        results.append(Result(k, "", federation.start, Model(params, {}), 9, 1, 0.0))
    truth = torch.func.functional_call(federation.net, good, (federation.bench.x,)).argmax(1)
    bench = copy.copy(federation.bench)
    object.__setattr__(bench, "y", truth)
    recipe = Soup().round({"global": federation.start}, now := Round(0, 1, [0, 1, 2], 3, federation.work, 0))
    next(recipe)
    jobs = recipe.send(results)
    with pytest.raises(StopIteration) as stop:
        while True:
            jobs = recipe.send(Results(_measured(federation, bench, job) for job in jobs))
    assert [number for _, _, number in now.reports] == [1, 0, 1]
    assert helpers.close(stop.value.value["global"].params, P.mean([results[0].model.params, results[2].model.params]))


def _measured(federation: Any, bench: Any, job: Any) -> Result:
    return run_task(bench, task_of(federation, job, 0, 1, 0)).result


def test_soups_of_late_models_are_around_the_present_global_model() -> None:
    assert [float(job.start.params["w"]) for job in asked(Soup())] == [101, 105]


def test_only_a_greedy_soup_needs_server_data() -> None:
    assert Soup("uniform").requires == frozenset()
    played = OneRound(Soup("uniform"), plan("server_data=none"))
    assert helpers.close(played.model.params, P.mean(played.models))
    with pytest.raises(ConfigError, match=r"^server_data: merging=soup requires server_data and server_labels"):
        helpers.plan("merging=soup", "server_data=none")
    with pytest.raises(ConfigError, match=r"^server_data: baseline=soup requires server_labels"):
        helpers.plan("baseline=soup", "server_data.labelled=false")
