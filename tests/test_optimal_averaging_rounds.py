"""Rounds with mixtures of local and global models: their limits, what is measured, sent and refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_helpers import SMALL_DATA, call, done, rows, tables

from hybridfl import params as P
from hybridfl.errors import ConfigError
from hybridfl.local import predict
from hybridfl.merging.averaging import mixed, parabola, plug_in, pooled, squared
from hybridfl.optimizers import SGD
from hybridfl.plan import Plan
from hybridfl.rng import stream
from hybridfl.snapshot import Snapshot
from hybridfl.types import SERVER, Model

AVERAGING = "merging=optimal_averaging"
SHORT = (AVERAGING, "merging.local_epochs=2", "rounds=2")
HARD = ("dataset.separation=0.3", "partitioning.alpha=100", "merging.local_epochs=20")
VALIDATED = ("clients.validation=0.3", "partitioning.min_examples=10")


def end(*overrides: str) -> tuple[Plan, Snapshot, dict[tuple[str, int | None], float]]:
    """A plan, its state after the last round, and what that round reported."""
    plan = helpers.plan(*SHORT, *overrides)
    engine = plan.engine()
    seen = engine.begin()
    for _ in range(engine.rounds):
        seen, record = engine.step(seen)
    return plan, seen, {(name, who): value for name, who, value in record.reports}


def served(plan: Plan, seen: Snapshot, client: int) -> Model:
    (found,) = plan.method.serve(seen.state, client)
    return found.model


def other(plan: Plan, seen: Snapshot, name: str, client: int) -> Model:
    method: Any = plan.method
    (found,) = method.alternative(name, seen.state, client)
    model: Model = found.model
    return model


# -- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "name"), [(0, "local"), (1, "global")])
def test_the_limits_are_the_two_models_to_the_bit(weight: int, name: str) -> None:
    plan, seen, told = end("merging.estimator=fixed", f"merging.weight={weight}")
    for client in range(5):
        assert helpers.identical(list(served(plan, seen, client)), list(other(plan, seen, name, client)))
        assert told["weight", client] == weight


def test_the_global_model_is_that_of_the_base_alone() -> None:
    plan, seen, _ = end("baseline@merging.base=fedprox", "merging.base.mu=0.7", "merging.every=1")
    alone = helpers.plan("baseline=fedprox", "baseline.mu=0.7", "rounds=2")
    expected = helpers.snapshots(alone.engine())[-1].state["global"]
    assert helpers.identical(list(served(plan, seen, SERVER)), list(expected))
    assert helpers.identical(list(other(plan, seen, "global", 3)), list(expected))


def test_the_local_model_is_trained_from_the_global_one() -> None:
    plan, seen, _ = end("client_optimizer.lr_decay=0.5")
    federation, shared = plan.federation, served(plan, seen, SERVER)
    work = SGD(epochs=2, batch_size=8)
    central = helpers.Central(federation, shared, lr=0.1)  # the rate of round 0
    expected = central.train(helpers.job_batches(federation, work, federation.owned(2), 1, 2, "local"))
    assert helpers.close(other(plan, seen, "local", 2).params, expected)


def half_models(plan: Plan, seen: Snapshot, client: int) -> list[P.Params]:
    """The client's models of its two halves, by plain PyTorch."""
    federation, found = plan.federation, []
    rows = federation.owned(client)
    order = stream(0, "method: halves", 1, client).permutation(len(rows))
    for number in range(2):
        mine = set(rows[order % 2 == number].tolist())
        central = helpers.Central(federation, served(plan, seen, SERVER), lr=0.1)
        picked = helpers.job_batches(federation, SGD(epochs=2, batch_size=8), rows, 1, client, f"half {number}")
        found.append(central.train([np.array([i for i in b if i in mine]) for b in picked if mine & set(b.tolist())]))
    return found


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("estimator", ["pooled", "split_half"])
def test_split_half_by_hand(estimator: str, granularity: str) -> None:
    """From models trained by plain PyTorch to the mixture, with own data taken off."""
    how = ("merging.variance=split_half", "merging.metric=identity")
    plan, seen, told = end(f"merging.estimator={estimator}", f"merging.granularity={granularity}", *how)
    shared = served(plan, seen, SERVER).params
    groups = [list(shared)] if granularity == "model" else [list(shared)[:2], list(shared)[2:]]

    def length(delta: P.Params) -> list[float]:
        return [math.fsum(float(delta[n].square().sum()) for n in names) for names in groups]

    local = [other(plan, seen, "local", k).params for k in range(5)]
    v = np.array([length(P.subtract(*half_models(plan, seen, k))) for k in range(5)]) / 4
    D = np.array([length(P.subtract(model, shared)) for model in local])
    sizes = [plan.federation.examples(k) for k in range(5)]
    own = [n / sum(sizes) for n in sizes]
    alone = [plug_in(v[k], D[k], own[k]) for k in range(5)]
    weights = pooled(v, D, sizes, own) if estimator == "pooled" else alone
    for k in range(5):
        a = weights[k].a
        by_name = {name: a[i] for i, names in enumerate(groups) for name in names}
        expected = {n: (1 - by_name[n]) * local[k][n] + by_name[n] * shared[n] for n in shared}
        assert helpers.close(served(plan, seen, k).params, expected, 1e-9)
        assert told["weight", k] == pytest.approx(a.mean())
        assert told["variance", k] == pytest.approx(v[k].sum())
        assert told["bias", k] == pytest.approx(weights[k].bias.sum())
        assert told["predicted", k] == pytest.approx(weights[k].benefit.sum())
    assert len({told["weight", k] for k in range(5)}) == 5


def fold_models(plan: Plan, seen: Snapshot, client: int, folds: int) -> list[P.Params]:
    """The client's models without one fold each, by plain PyTorch on the batches of its local work."""
    federation, found = plan.federation, []
    rows = federation.owned(client)
    order = stream(0, "method: folds", 1, client).permutation(len(rows))
    picked = helpers.job_batches(federation, SGD(epochs=2, batch_size=8), rows, 1, client, "local")
    for number in range(folds):
        left = set(rows[order % folds != number].tolist())
        central = helpers.Central(federation, served(plan, seen, SERVER), lr=0.1)
        found.append(central.train([np.array([i for i in b if i in left]) for b in picked if left & set(b.tolist())]))
    return found


def curvature(plan: Plan, shared: P.Params, delta: P.Params, client: int) -> float:
    """Δ'HΔ at the global model: the variance, under its predictions, of what Δ adds to the logits, mean of examples."""
    net, x = plan.federation.bench.net, plan.federation.bench.x[plan.federation.owned(client)]
    names, tensors = list(shared), tuple(shared.values())

    def logits(*values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))
        return found

    jacobians = torch.autograd.functional.jacobian(logits, tensors)
    added = sum((j * delta[n]).flatten(2).sum(2) for n, j in zip(names, jacobians, strict=True))
    q = torch.softmax(logits(*tensors), 1)
    return float(((q * added**2).sum(1) - (q * added).sum(1) ** 2).mean())


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("estimator", ["pooled", "jackknife"])
def test_the_jackknife_in_the_curvature_of_the_loss_by_hand(estimator: str, granularity: str) -> None:
    plan, seen, told = end(
        f"merging.estimator={estimator}", f"merging.granularity={granularity}", "merging.folds=3", *HARD[:2]
    )
    shared = served(plan, seen, SERVER).params
    groups = [list(shared)] if granularity == "model" else [list(shared)[:2], list(shared)[2:]]
    sizes = [plan.federation.examples(k) for k in range(5)]

    def lengths(delta: P.Params, k: int) -> list[float]:
        kept = [{n: d if n in names else torch.zeros_like(d) for n, d in delta.items()} for names in groups]
        return [curvature(plan, shared, part, k) for part in kept]

    v, D = np.zeros((5, len(groups))), np.zeros((5, len(groups)))
    for k in range(5):
        models = fold_models(plan, seen, k, 3)
        mean = P.mean(models)
        v[k] = np.sum([lengths(P.subtract(model, mean), k) for model in models], axis=0) * 2 / 3
        D[k] = lengths(P.subtract(other(plan, seen, "local", k).params, shared), k)
    own = [n / sum(sizes) for n in sizes]
    weights = pooled(v, D, sizes, own) if estimator == "pooled" else [plug_in(v[k], D[k], own[k]) for k in range(5)]
    for k in range(5):
        assert told["variance", k] == pytest.approx(v[k].sum())
        assert told["bias", k] == pytest.approx(weights[k].bias.sum())
        assert told["weight", k] == pytest.approx(weights[k].a.mean())
    assert any(told["weight", k] < 1 for k in range(5))


def test_no_more_folds_than_examples() -> None:
    """The smallest client leaves out one example at a time."""
    plan, seen, told = end("merging.metric=identity", "merging.folds=30", "partitioning.alpha=0.5")
    sizes = [plan.federation.examples(k) for k in range(5)]
    smallest = int(np.argmin(sizes))
    assert sizes[smallest] < 30
    models = fold_models(plan, seen, smallest, sizes[smallest])
    mean = P.mean(models)
    length = sum(float(squared(P.subtract(model, mean), None, [list(mean)])[0]) for model in models)
    assert told["variance", smallest] == pytest.approx(length * (1 - 1 / sizes[smallest]))


def fisher_of(plan: Plan, model: Model, client: int) -> P.Params:
    """The mean of squared gradients, one example at a time."""
    bench, total = plan.federation.bench, {n: torch.zeros_like(t) for n, t in model.params.items()}
    rows = plan.federation.owned(client).tolist()
    for row in rows:
        leaves = {n: t.clone().requires_grad_() for n, t in model.params.items()}
        loss = F.cross_entropy(torch.func.functional_call(bench.net, leaves, (bench.x[[row]],)), bench.y[[row]])
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total[name] += grad.square() / len(rows)
    return total


@pytest.mark.parametrize(("metric", "ridge"), [("identity", "0.3"), ("fisher", "0.3"), ("fisher", "null")])
def test_fisher_variance_by_hand(metric: str, ridge: str) -> None:
    options = ("merging.estimator=fisher", "merging.own_data=false")
    plan, seen, told = end(*options, f"merging.metric={metric}", f"merging.ridge={ridge}")
    shared = served(plan, seen, SERVER).params
    for k in range(5):
        local, n = other(plan, seen, "local", k), plan.federation.examples(k)
        f = P.flatten(fisher_of(plan, local, k))
        m = f if metric == "fisher" else torch.ones_like(f)
        r = 1 / (0.1 * 2 * math.ceil(n / 8)) if ridge == "null" else float(ridge)
        v = float((m * f / (n * (f + r) ** 2)).sum())
        D = float((m * P.flatten(P.subtract(local.params, shared)).square()).sum())
        assert told["variance", k] == pytest.approx(v)
        assert told["weight", k] == pytest.approx(min(1, v / D))


def mean_loss(plan: Plan, model: Model, rows: torch.Tensor | np.ndarray, part: str) -> float:
    federation, index = plan.federation, torch.as_tensor(rows)
    x, y = (federation.bench.x, federation.bench.y) if part == "val" else federation.test
    return float(F.cross_entropy(predict(federation.net, model, x[index], 100), y[index]))


@pytest.mark.parametrize("estimator", ["grid", "val3", "oracle"])
def test_weights_by_losses(estimator: str) -> None:
    """Losses of the mixtures, computed again on validation examples, or on the client's own test examples."""
    plan, seen, told = end(f"merging.estimator={estimator}", *VALIDATED, "merging.points=5", *HARD)
    assert plan.method.upper_bound == (estimator == "oracle")
    part, shared = ("test" if estimator == "oracle" else "val"), served(plan, seen, SERVER)
    for k in range(5):
        rows = plan.federation.split.clients_test[k] if part == "test" else plan.federation.owned(k, "val")
        local = other(plan, seen, "local", k)

        def loss(a: float, local: Model = local, rows: np.ndarray = rows) -> float:
            params = {n: (1 - a) * local.params[n] + a * shared.params[n] for n in shared.params}
            return mean_loss(plan, Model(params, {}), rows, part)

        grid = [0.0, 0.25, 0.5, 0.75, 1.0]
        if estimator == "val3":
            a, gain = parabola(loss(0), loss(0.5), loss(1))
        else:
            a = min(grid, key=loss)
            gain = loss(0) - loss(a)
        assert told["weight", k] == pytest.approx(a, abs=1e-9)
        assert told["predicted", k] == pytest.approx(gain, abs=1e-9)
        assert helpers.close(
            served(plan, seen, k).params, mixed(local.params, shared.params, np.array([a]), [list(shared.params)])
        )
    assert len({told["weight", k] for k in range(5)}) > 1


def test_between_personalisations_everybody_has_the_global_model() -> None:
    plan = helpers.plan(AVERAGING, "merging.every=2", "merging.local_steps=1", "rounds=5", "clients.held_out=[4]")
    seen = helpers.snapshots(plan.engine())
    assert [sorted(snapshot.state["personal"]) for snapshot in seen] == [
        [],
        [],
        list("0123"),
        [],
        list("0123"),
        list("0123"),
    ]
    assert helpers.identical(list(served(plan, seen[3], 0)), list(served(plan, seen[3], SERVER)))
    assert helpers.identical(list(served(plan, seen[5], 4)), list(served(plan, seen[5], SERVER)))
    assert not helpers.identical(list(served(plan, seen[5], 0)), list(served(plan, seen[5], SERVER)))
    assert plan.method.alternative("local", seen[3].state, 0) == []  # type: ignore[attr-defined]


def test_statistics_of_batchnorm_are_the_local_models() -> None:
    options = (
        "model=resnet20",
        "model.width=0.25",
        "model.norm=batch",
        "dataset.shape=[1,8,8]",
        "merging.local_steps=1",
    )
    plan, seen, _ = end(*options, "merging.estimator=fixed")
    shared, local, mine = served(plan, seen, SERVER), other(plan, seen, "local", 1), served(plan, seen, 1)
    assert shared.buffers
    assert helpers.identical(mine.buffers, local.buffers)
    assert not helpers.identical(mine.buffers, shared.buffers)
    plan, seen, _ = end(*options, "merging.estimator=fixed", "merging.weight=1")
    assert helpers.identical(served(plan, seen, 1).buffers, served(plan, seen, SERVER).buffers)


# -- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts", "numbers"),
    [
        (("merging.estimator=fixed",), 0, 0),
        (("merging.estimator=split_half", "merging.metric=identity"), 2, 0),
        (("merging.estimator=pooled", "merging.metric=identity"), 5, 1),
        (("merging.estimator=pooled", "merging.folds=3"), 3, 1),
        (("merging.estimator=pooled", "merging.folds=3", "merging.granularity=layer"), 3, 2),
        (("merging.estimator=val3", *VALIDATED), 0, 0),
    ],
    ids=str,
)
def test_costs(options: tuple[str, ...], parts: int, numbers: int) -> None:
    """The global model goes to all; v and D of a block come back and its weight is answered, 8 bytes each."""
    plan, seen, _ = end(*options)
    alone = [option for option in options if not option.startswith("merging.")]
    base = helpers.snapshots(helpers.plan("baseline=fedavg", "rounds=2", *alone).engine())[-1].costs
    federation, size = plan.federation, P.nbytes(plan.federation.start.params.values())
    examples = [federation.examples(k) for k in range(5)]
    assert seen.costs.bytes_up - base.bytes_up == 5 * 2 * numbers * 8
    assert seen.costs.bytes_down - base.bytes_down == 5 * (size + numbers * 8)
    # Two halves see together what the whole sees, and of k folds each all but one k-th, in as many steps each.
    trainings = 1 + (1 if parts == 2 else max(parts - 1, 0))
    passes = trainings * 3 * 2 * sum(examples)
    mapped = 0
    if parts == 3:
        # Along 3 + 1 vectors by block one derivative each, its own passes at three; then predictions, and a gradient. The
        # vectors are added to the global model once.
        passes += (3 * 4 * numbers + 1 + 3) * sum(examples)
        mapped = 5 * 4 * sum(tensor.numel() for tensor in federation.start.params.values())
    if "merging.estimator=val3" in options:
        passes += 3 * sum(federation.examples(k, "val") for k in range(5))
    assert seen.costs.macs - base.macs == passes * federation.forward_macs + mapped
    steps = sum(2 * math.ceil(n / 8) for n in examples)
    assert seen.costs.local_steps - base.local_steps == (1 + parts) * steps


# -- what is refused -------------------------------------------------------------------------------------------------


TINIEST = ["dataset.train=20", "server_data=none", "partitioning.alpha=0.01", "partitioning.min_examples=1"]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["merging.base=fedprox"], "merging.base: got 'fedprox', and it is a config group; write baseline@merging.base=fedprox."),
        (["baseline@merging.base=local_only"], "merging.base: got LocalOnly: needs a method with a single global model, such as fedavg."),
        (["baseline@merging.base=heterofl"], "merging.base: got HeteroFL: needs a method with one global model for all, such as fedavg."),
        (["baseline@merging.base=half_average"], "merging.base: got OptimalAveraging: needs a method with one global model for all, such as fedavg."),
        (["model=resnet20", "model.norm=batch", "dataset.shape=[1,8,8]", "model.batch_norm=local"], "merging.base: needs whole models, but under model.batch_norm=local clients keep a part; try model.batch_norm=average."),
        (["merging.estimator=grid"], "merging.estimator: got grid, but a client has no examples in its 'val' part; give clients.validation, such as clients.validation=0.2."),
        (["merging.estimator=val3", "merging.granularity=layer"], "merging.granularity: got layer, but estimator=val3 finds one weight; nearest valid value: model."),
        (["clients.number=1", "clients.per_round=1"], "merging.estimator: got pooled, which needs two clients that train; nearest valid value: fixed."),
        (TINIEST, "merging.variance: got jackknife, but a client has 1 example, which cannot be divided; nearest valid value: fisher."),
        ([*TINIEST, "merging.estimator=split_half"], "merging.estimator: got split_half, but a client has 1 example, which cannot be divided; nearest valid value: fisher."),
        (["merging.estimator=fisher"], "merging.metric: got gauss_newton, which measures models, and a variance by fisher has none; nearest valid value: fisher."),
        (["merging.variance=fisher"], "merging.metric: got gauss_newton, which measures models, and a variance by fisher has none; nearest valid value: fisher."),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_refused(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        helpers.plan(AVERAGING, *overrides)
    assert str(refusal.value) == text


# -- from the command line -------------------------------------------------------------------------------------------

LINE = (*SMALL_DATA, "clients.number=5", "clients.per_round=2", "rounds=2", "merging.local_epochs=1", "ui=none")


def test_the_tables_show_weights_and_benefits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = done(AVERAGING, *LINE, "baseline@merging.base=fedprox", "merging.base.mu=0.5")
    table = rows(run / "clients.csv")
    first, last = ([row for row in table if row["round"] == t] for t in ("1", "2"))
    assert {row["weight"] for row in first} == {""}
    assert len(last) == 5
    for row in last:
        assert 0 <= float(row["weight"]) <= 1
        assert min(float(row[name]) for name in ("variance", "bias", "predicted")) >= 0
        for name in ("local", "global"):
            assert float(row[f"benefit_{name}"]) == pytest.approx(float(row[f"loss_{name}"]) - float(row["loss"]))
    scopes = {row["scope"] for row in rows(run / "metrics.csv") if row["round"] == "2"}
    assert {"global", "clients", "clients/model=local", "clients/model=global"} <= scopes
    again = call("train", AVERAGING, *LINE, "baseline@merging.base=fedprox", "merging.base.mu=0.5", "rerun=true")
    assert tables(again.folder) == tables(run)
