"""FedDF and FedBE: whole rounds of distillation against plain torch in float64, and their parts by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusion_helpers import CLIENTS, EXAMPLES, OneRound, late, plan, point
from torch import Tensor

from hybridfl import params as P
from hybridfl.errors import ConfigError
from hybridfl.merging.ensemble import mean_logits, mean_probabilities
from hybridfl.merging.posterior import dirichlet, gaussian
from hybridfl.methods.fedavg import FedAvg
from hybridfl.methods.fedbe import FedBE
from hybridfl.methods.feddf import FedDF
from hybridfl.methods.feddle import Feddle, Search
from hybridfl.optimizers import SGD, Adam
from hybridfl.params import Params
from hybridfl.snapshot import Snapshot
from hybridfl.types import SERVER, Result, Results, Round

UNLABELLED = ("server_data.labelled=false",)
ELSEWHERE = ("server_data=dataset", "dataset@server_data.dataset=synthetic", "server_data.dataset.classes=7")
ELSEWHERE += ("server_data.dataset.shape=[1,4,4]", "server_data.labels=own")


def distilled(played: OneRound, teacher: Tensor, optimizer: Any, student: Params, index: Iterator[np.ndarray]) -> None:
    """Plain cross-entropy against the teacher's probabilities, which has the gradient of the divergence."""
    for picked in index:
        rows = torch.from_numpy(picked)
        optimizer.zero_grad()
        F.cross_entropy(played.logits(student, played.x[rows]), teacher[rows]).backward()
        optimizer.step()


def leaves(params: Params) -> Params:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}


# -- FedDF -----------------------------------------------------------------------------------------------------------


def test_feddf_is_plain_distillation_of_the_mean_logits() -> None:
    played = OneRound(FedDF(steps=6, batch_size=5, lr=0.01), plan())
    teacher = torch.stack([played.logits(model, played.x) for model in played.models]).mean(0).softmax(1).detach()
    student = leaves(played.mean())
    index = played.batches(Adam(steps=6, batch_size=5), "student")
    distilled(played, teacher, torch.optim.Adam(student.values(), lr=0.01), student, index)
    assert helpers.close(played.model.params, student, 1e-10)
    assert not helpers.close(played.model.params, played.mean(), 1e-3)
    assert played.passes == CLIENTS * EXAMPLES + 3 * 6 * 5
    assert played.after.costs.local_steps == sum(result.steps for result in played.clients)


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    """One client: the mean and the ensemble are its model. Adam's second step would blow up rounding errors."""
    alone = plan("clients.number=1", "clients.per_round=1")
    ends = [
        helpers.snapshots(helpers.engine_of(alone, method, rounds=2))[-1].state["global"].params
        for method in (FedAvg(), FedDF(steps=1), FedBE("dirichlet", steps=5, average_every=5))
    ]
    assert helpers.close(ends[0], ends[1], 1e-10)
    assert helpers.close(ends[0], ends[2], 1e-12)


@pytest.mark.parametrize("method", [FedDF(steps=3), FedBE(steps=4, average_every=2, samples=1)], ids=["feddf", "fedbe"])
def test_distillation_reads_no_labels(method: Any) -> None:
    ends = [
        helpers.engine_of(p, method).step(Snapshot(0, method.init(p.federation)))[0]
        for p in (plan(), plan(*UNLABELLED))
    ]
    assert helpers.identical(ends[0].state, ends[1].state)
    assert not {"server_labels", "server_own_labels"} & plan(*UNLABELLED).federation.provides
    elsewhere = plan(*ELSEWHERE)
    assert int(elsewhere.federation.bench.y[torch.from_numpy(elsewhere.federation.owned(SERVER))].max()) > 2
    engine = helpers.engine_of(elsewhere, method, rounds=2)
    assert P.all_finite(helpers.snapshots(engine)[-1].state)


@pytest.mark.parametrize("method", [FedDF(), FedBE(samples=2)], ids=["feddf", "fedbe"])
def test_late_models_teach_as_they_are_and_the_student_is_the_moved_global_model(method: Any) -> None:
    conversation = method.round({"global": point(100.0)}, Round(3, 9, [0, 1], 2, SGD(), 0))
    next(conversation)
    jobs = conversation.send(late())
    teachers = [float(job.start.params["w"]) for job in jobs]
    logits = {"logits": torch.zeros(4, 3).double()}
    taught = Results(Result(SERVER, "teacher", job.start, job.start, 4, 0, 0.0, logits) for job in jobs)
    (student,) = conversation.send(taught)
    assert float(student.start.params["w"]) == pytest.approx(102, abs=1e-12)
    if isinstance(method, FedDF):
        assert teachers == [11, 25]
    else:
        assert teachers[:3] == [pytest.approx(102, abs=1e-12), 11, 25]
        assert all(abs(drawn - 102) < 12 for drawn in teachers[3:])  # a deviation of √3
        assert len({*teachers}) == 5


@pytest.mark.parametrize(
    "method",
    [FedDF(steps=3), FedBE(steps=4, average_every=2, samples=1), Feddle(objective="kd", search=Search(steps=3))],
    ids=["feddf", "fedbe", "feddle"],
)
def test_distillation_in_a_stream_of_tasks(method: Any) -> None:
    """Logits of classes that are not the task's are so low that several of them have no sum."""
    engine = helpers.engine_of(plan("tasks.number=3"), method, rounds=3)
    seen = engine.begin()
    for _ in range(3):
        seen, record = engine.step(seen)
        assert record.notes == []


# -- FedBE -----------------------------------------------------------------------------------------------------------

TWO = [{"a": torch.tensor([0.0, 4.0, 1.0]).double()}, {"a": torch.tensor([2.0, 4.0, 9.0]).double()}]


def test_gaussian_draws_have_the_weighted_mean_and_variance() -> None:
    rng = np.random.default_rng(0)
    draws = torch.stack([gaussian(TWO, [3, 1], rng)["a"] for _ in range(5000)])
    assert torch.allclose(draws.mean(0), torch.tensor([0.5, 4.0, 3.0]).double(), rtol=0, atol=0.2)
    assert torch.allclose(draws.std(0), torch.tensor([0.75, 0.0, 12.0]).double().sqrt(), rtol=0.04, atol=0)
    assert abs(float(torch.corrcoef(draws[:, [0, 2]].T)[0, 1])) < 0.05


def test_dirichlet_draws_mix_the_models() -> None:
    rng = np.random.default_rng(0)
    drawn = torch.stack([dirichlet(TWO, [1, 1], rng)["a"] for _ in range(4000)])
    share = drawn[:, 0] / 2
    assert torch.allclose(drawn, (1 - share[:, None]) * TWO[0]["a"] + share[:, None] * TWO[1]["a"], rtol=0, atol=1e-14)
    # With two models and α = 1 the share is uniform.
    assert abs(float(share.mean()) - 0.5) < 0.02
    assert abs(float(share.std()) - 12**-0.5) < 0.01
    near = [float(dirichlet(TWO, [3, 1], rng, 1e8)["a"][0]) for _ in range(5)]
    assert near == pytest.approx([0.5] * 5, abs=1e-2)


def test_the_mean_prediction_is_that_of_probabilities_even_where_classes_are_ruled_out() -> None:
    logits = [torch.randn(5, 4, generator=torch.Generator().manual_seed(k)).double() for k in range(3)]
    mean = torch.stack([one.softmax(1) for one in logits]).mean(0)
    assert torch.allclose(mean_probabilities(logits).exp(), mean, rtol=0, atol=1e-15)
    assert torch.allclose(mean_probabilities(logits).softmax(1), mean, rtol=0, atol=1e-15)
    assert torch.equal(mean_logits(logits), torch.stack(logits).mean(0))
    for one in logits:
        one[:, 1] = torch.finfo(one.dtype).min / 2
    assert bool(torch.isfinite(mean_logits(logits)).all())
    assert bool((mean_logits(logits).softmax(1)[:, 1] == 0).all())
    ruled = mean_probabilities(logits)
    assert bool(torch.isfinite(ruled).all())
    assert bool((ruled.softmax(1)[:, 1] == 0).all())


def test_fedbe_is_plain_distillation_of_the_mean_prediction_with_averaged_weights() -> None:
    method = FedBE(samples=2, steps=6, batch_size=5, lr=0.1, momentum=0.9, average_every=2)
    played = OneRound(method, plan())
    taught = played.jobs[1]
    assert [job.tag for job in taught] == ["teacher"] * (1 + CLIENTS + 2)
    ensemble = [job.start.params for job in taught]
    assert helpers.close(ensemble[0], played.mean())
    assert all(map(helpers.identical, ensemble[1:4], played.models))
    spread = P.mean([{n: (t - ensemble[0][n]) ** 2 for n, t in m.items()} for m in played.models], played.sizes)
    for drawn in ensemble[4:]:
        scaled = P.flatten(P.subtract(drawn, ensemble[0])) / P.flatten(spread).sqrt()
        assert abs(float(scaled.mean())) < 0.15
        assert abs(float(scaled.std()) - 1) < 0.1
    assert not helpers.close(ensemble[4], ensemble[5], 1e-3)
    teacher = torch.stack([played.logits(model, played.x).softmax(1) for model in ensemble]).mean(0).detach()
    student = leaves(played.mean())
    optimizer = torch.optim.SGD(student.values(), lr=0.1, momentum=0.9)
    visited = []
    for cycle in range(3):
        index = played.batches(SGD(steps=2, batch_size=5), "student", cycle)
        distilled(played, teacher, optimizer, student, index)
        visited.append(P.clone(student))
    assert helpers.close(played.model.params, P.mean(visited), 1e-12)
    assert not helpers.close(played.model.params, visited[-1], 1e-4)
    assert played.passes == 6 * EXAMPLES + 3 * 6 * 5


def test_dirichlet_draws_of_a_round_are_mixtures_of_its_clients() -> None:
    played = OneRound(FedBE("dirichlet", samples=1, steps=2, average_every=2), plan())
    basis = torch.stack([P.flatten(model) for model in played.models], dim=1)
    drawn = P.flatten(played.jobs[1][-1].start.params)
    share = torch.linalg.lstsq(basis, drawn.unsqueeze(1)).solution.squeeze(1)
    assert torch.allclose(basis @ share, drawn, rtol=0, atol=1e-12)
    assert float(share.sum()) == pytest.approx(1, abs=1e-10)
    assert float(share.min()) > 0


def test_averaging_needs_a_divisor_of_the_steps() -> None:
    with pytest.raises(ConfigError, match=r"^baseline\.average_every: got 15, .* steps=40; nearest valid value: 10\.$"):
        helpers.plan("baseline=fedbe", "baseline.average_every=15")
