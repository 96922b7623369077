"""HeteroFL and its slimmable variant: slices of one net, against slices and means by hand."""

from __future__ import annotations

import helpers
import pytest
import torch
import torch.nn.functional as F
from run_helpers import recorded, rows
from torch import Tensor

from hybridfl.errors import ConfigError
from hybridfl.methods.split_mix import masked_cross_entropy
from hybridfl.params import Params
from hybridfl.plan import Plan
from hybridfl.types import SERVER, Batch, State

WIDTHS = (0.25, 0.5, 1.0)
TIERS = ("clients.tiers=[0.25,0.5,1.0]", "clients.number=6", "clients.per_round=6")
PARAMETERS = {w: (16 * h + h) + (h * 3 + 3) for w, h in ((0.25, 2), (0.5, 4), (1.0, 8))}
MACS = {w: 16 * h + h * 3 for w, h in ((0.25, 2), (0.5, 4), (1.0, 8))}


def hetero(name: str, *overrides: str) -> Plan:
    line = (f"baseline={name}", "baseline.serve_widths=[0.25,0.5,1.0]", "server_data=none", "partitioning=iid")
    hidden = () if any(text.startswith("model=") for text in overrides) else ("model.hidden=[8]",)
    return helpers.plan(*line, *hidden, *overrides)


def by_hand(params: Params, x: Tensor, hidden: int) -> Tensor:
    """Logits of the first ``hidden`` neurons."""
    a = F.linear(x.flatten(1), params["body.1.weight"][:hidden], params["body.1.bias"][:hidden]).relu()
    return F.linear(a, params["head.weight"][:, :hidden], params["head.bias"])


# -- averaging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("heterofl", (1, 1, 1)),
        ("slimmable_heterofl", (1, 1, 1)),
        ("slimmable_heterofl baseline.duplicate_weights=true", (1, 2, 3)),
    ],
)
def test_the_narrowest_slice_receives_all_clients(name: str, copies: tuple[int, ...]) -> None:
    chosen, *more = name.split()
    engine, recorder = recorded(hetero(chosen, *TIERS, *more, "dataset.train=123"), 1)
    before, after = (s.state["global"].params for s in helpers.snapshots(engine))
    results = [outcome.result for outcome in recorder.outcomes]
    assert sorted(r.participant for r in results) == list(range(6))
    assert {r.examples for r in results} == {20, 21}
    sent = {r.participant: r.model.params["body.1.weight"] for r in results}
    assert [len(sent[k]) for k in range(6)] == [2, 2, 4, 4, 8, 8]
    for neuron in range(8):
        having = [r for r in results if len(r.model.params["body.1.weight"]) > neuron]
        weights = [r.examples * copies[r.participant // 2] for r in having]
        mean = sum(w * r.model.params["body.1.weight"][neuron] for w, r in zip(weights, having, strict=True))
        torch.testing.assert_close(after["body.1.weight"][neuron], mean / sum(weights), rtol=0, atol=1e-14)
        assert len(having) == (6, 6, 4, 4, 2, 2, 2, 2)[neuron]
    assert not helpers.close(before, after, 1e-6)


def test_what_no_device_can_train_stays() -> None:
    plan = hetero("heterofl", "clients.tiers=[0.25,0.5]")
    before, *_, after = (s.state["global"].params for s in helpers.snapshots(helpers.engine_of(plan)))
    assert torch.equal(before["body.1.weight"][4:], after["body.1.weight"][4:])
    assert torch.equal(before["head.weight"][:, 4:], after["head.weight"][:, 4:])
    assert (before["body.1.weight"][:4] != after["body.1.weight"][:4]).any()
    assert (before["head.bias"] != after["head.bias"]).all()


@pytest.mark.parametrize("name", ["heterofl", "slimmable_heterofl"])
def test_devices_that_run_everything_make_it_fedavg(name: str) -> None:
    wide = hetero(name, "client_optimizer.momentum=0.9")
    line = ("server_data=none", "partitioning=iid", "model.hidden=[8]", "client_optimizer.momentum=0.9")
    plain = helpers.plan("baseline=fedavg", *line)
    runs = [helpers.snapshots(helpers.engine_of(plan)) for plan in (wide, plain)]
    for ours, theirs in zip(*runs, strict=True):
        assert helpers.close(ours.state["global"].params, theirs.state["global"].params)
        assert ours.costs == theirs.costs
    ours, theirs = rows(wide, runs[0][-1]), rows(plain, runs[1][-1])
    for scope, row in theirs.items():
        assert ours[scope]["accuracy"] == row["accuracy"]
        assert ours[scope]["loss"] == pytest.approx(row["loss"], abs=1e-12)


# -- slices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heterofl", "slimmable_heterofl"])
def test_a_width_is_scored_as_its_slice(name: str) -> None:
    plan = hetero(name, *TIERS)
    last = helpers.snapshots(helpers.engine_of(plan))[-1]
    found, (x, y) = rows(plan, last), plan.federation.test
    for width, hidden in ((0.25, 2), (0.5, 4), (1, 8)):
        logits = by_hand(last.state["global"].params, x, hidden)
        row = found[f"global/width={width:g}"]
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-12)
        assert (row["parameters"], row["inference_macs"]) == (PARAMETERS[width], MACS[width])
    assert found["global"]["loss"] == found["global/width=1"]["loss"]
    assert found["clients"]["parameters"] == round(sum(PARAMETERS.values()) / 3)


@pytest.mark.parametrize(
    ("name", "trained"), [("heterofl", [[0], [1], [2]]), ("slimmable_heterofl", [[0], [0, 1], [0, 1, 2]])]
)
def test_costs_are_those_of_the_slices(name: str, trained: list[list[int]]) -> None:
    plan = hetero(name, *TIERS, "client_optimizer.steps=3")
    _, after = helpers.snapshots(helpers.engine_of(plan, rounds=1))
    assert after.costs.bytes_up == after.costs.bytes_down == 2 * 8 * sum(PARAMETERS.values())
    passes = sum(MACS[WIDTHS[i]] for group in trained for i in group)
    assert after.costs.macs == 2 * 3 * 8 * 3 * passes  # clients, steps, examples, forward and backward
    assert after.costs.local_steps == 6 * 3


@pytest.mark.parametrize("masked", [False, True])
def test_the_slimmable_loss_is_the_sum_of_the_slices_losses(masked: bool) -> None:
    plan = hetero("slimmable_heterofl", *TIERS, f"baseline.masked_loss={str(masked).lower()}")
    federation, state = plan.federation, plan.method.init(plan.federation)
    engine, recorder = recorded(plan, 1)
    helpers.snapshots(engine)
    jobs = {job.participant: job for job in recorder.rounds[0]}
    x, y = federation.bench.x[:6], torch.tensor([0, 2, 0, 2, 2, 0])
    batch = Batch(x, y, torch.arange(6))
    for client, hidden in ((0, [2]), (3, [2, 4]), (5, [2, 4, 8])):
        job = jobs[client]
        assert job.inner_widths == WIDTHS[: len(hidden)]
        params = {n: t.clone().requires_grad_() for n, t in job.start.params.items()}

        def apply(p: Params, x: Tensor, width: float | None = None) -> Tensor:
            out: Tensor = torch.func.functional_call(federation.net_at(width or 0), p, (x,))
            return out

        loss = job.loss(apply, params, params, batch, job.ctx)  # type: ignore[misc]
        again = {n: t.detach().clone().requires_grad_() for n, t in state["global"].params.items()}
        logits = [by_hand(again, x, h) for h in hidden]
        if masked:
            logits = [out * torch.tensor([1.0, 0.0, 1.0]) for out in logits]
        expected = sum(F.cross_entropy(out, y) for out in logits)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-13)
        ours, theirs = (torch.autograd.grad(v, list(p.values())) for v, p in ((loss, params), (expected, again)))
        for one, other in zip(ours, theirs, strict=True):
            corner = tuple(slice(0, size) for size in one.shape)
            torch.testing.assert_close(one, other[corner], rtol=0, atol=1e-13)


def test_the_masked_loss_of_heterofl() -> None:
    engine, recorder = recorded(hetero("heterofl", "baseline.masked_loss=true"), 1)
    helpers.snapshots(engine)
    assert {job.loss for job in recorder.rounds[0]} == {masked_cross_entropy}


def test_a_convolutional_net_in_slices() -> None:
    """Under GroupNorm a slice's channels are normalised as they are in the whole net: groups are nested."""
    plan = hetero("heterofl", "clients.tiers=[0.5,1.0]", "model=cnn", "model.channels=[4,8]", "model.groups=4")
    state: State = plan.method.init(plan.federation)
    whole, part = plan.method.serve(state, SERVER, 1.0)[0], plan.method.serve(state, SERVER, 0.5)[0]
    x = plan.federation.test[0]
    stages = slice(0, 4)  # convolution, GroupNorm, ReLU, pooling
    outputs = []
    for served in (whole, part):
        body = plan.federation.net_at(served.width).get_submodule("body")
        tensors = {n.removeprefix("body."): t for n, t in served.model.params.items() if n.startswith("body.")}
        first = torch.nn.Sequential(*list(body.children())[stages])
        outputs.append(torch.func.functional_call(first, {n: t for n, t in tensors.items() if n[0] in "01"}, (x,)))
    torch.testing.assert_close(outputs[0][:, :2], outputs[1], rtol=0, atol=1e-12)


# -- BatchNorm ---------------------------------------------------------------------------------------------------------

NORMED = ("model=resnet20", "model.channels=[4,8]", "model.blocks=[1,1]", "model.norm=batch", "dataset.shape=[1,8,8]")


@pytest.mark.parametrize("policy", ["average", "local"])
def test_widths_trained_together_cannot_share_statistics(policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.batch_norm: got {policy}: .* nearest valid choice: batch"):
        hetero("slimmable_heterofl", *TIERS, *NORMED, f"model.batch_norm={policy}")
    hetero("slimmable_heterofl", *NORMED, f"model.batch_norm={policy}")  # one width


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *(("heterofl", policy) for policy in ("average", "local", "reestimate", "batch", "frozen")),
        *(("slimmable_heterofl", policy) for policy in ("reestimate", "batch", "frozen")),
    ],
)
def test_slices_under_batch_norm(name: str, policy: str) -> None:
    plan = hetero(name, *TIERS, *NORMED, f"model.batch_norm={policy}", "client_optimizer.steps=2")
    engine = helpers.engine_of(plan, rounds=2)
    last = helpers.snapshots(engine)[-1]
    found = rows(plan, last)
    assert {f"clients/width={width:g}" for width in WIDTHS} <= set(found)
    assert ("global" in found) == (policy != "local")
    assert all(0 <= row["accuracy"] <= 1 for row in found.values())
    assert last.bad_rounds == 0
