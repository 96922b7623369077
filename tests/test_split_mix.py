"""Split-Mix: who trains which base, what is mixed, and what it costs."""

from __future__ import annotations

import math
from collections import Counter

import helpers
import pytest
import torch
import torch.nn.functional as F
from run_helpers import recorded, rows, stored
from torch import nn

from hybridfl.errors import ConfigError
from hybridfl.methods.split_mix import bases, masked_cross_entropy
from hybridfl.params import nbytes, tensors
from hybridfl.plan import Plan
from hybridfl.types import SERVER, Batch

MIX = ("merging=split_mix", "merging.base_width=0.25", "merging.serve_widths=[0.25,0.5,1.0]", "server_data=none")
SMALL = ("model.hidden=[8,8]", "client_optimizer.epochs=1")


def split_mix(*overrides: str) -> Plan:
    return helpers.plan(*MIX, *SMALL, *overrides)


# -- the order of the bases --------------------------------------------------------------------------------------------


def test_a_base_that_nobody_trained_stays() -> None:
    """A client a round, each with a budget of one base: three of four are the same to the bit."""
    engine, recorder = recorded(split_mix("clients.tiers=[0.25]", "clients.per_round=1"), 4)
    before, *later = helpers.snapshots(engine)
    for jobs, after in zip(recorder.rounds, later, strict=True):
        trained = [
            i
            for i, pair in enumerate(zip(before.state["bases"], after.state["bases"], strict=True))
            if not helpers.identical(*pair)
        ]
        (job,) = jobs
        assert [f"base {i}" if i else "" for i in trained] == [job.tag]
        before = after


def test_clients_draw_from_one_cycle_that_goes_on_over_rounds_and_a_resume() -> None:
    """Three clients a round, four bases: cycles end within rounds, and each has every base once."""
    plan = split_mix("clients.tiers=[0.25]")
    engine, recorder = recorded(plan, 8)
    snapshots = helpers.snapshots(engine)
    drawn = [job.tag for jobs in recorder.rounds for job in jobs]
    cycles = [tuple(drawn[i : i + 4]) for i in range(0, 24, 4)]
    assert [len(set(cycle)) for cycle in cycles] == [4] * 6
    assert len(set(cycles)) > 1

    again, recorder = recorded(plan, 8)
    snapshot = stored(snapshots[3])
    for _ in range(5):
        snapshot, _ = again.step(snapshot)
    assert [job.tag for jobs in recorder.rounds for job in jobs] == drawn[9:]
    assert helpers.identical(snapshot.state, snapshots[-1].state)


def test_a_wider_client_trains_others_beside_the_one_whose_turn_it_is() -> None:
    plan = split_mix("clients.tiers=[0.25,0.5,1.0]", "clients.number=6", "clients.per_round=6")
    engine, recorder = recorded(plan, 6)
    helpers.snapshots(engine)
    assert plan.federation.widths == (0.25, 0.25, 0.5, 0.5, 1.0, 1.0)
    turns, partners = [], set()
    for jobs in recorder.rounds:
        assert Counter(job.participant for job in jobs) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4}
        for client in dict.fromkeys(job.participant for job in jobs):
            own = [job.tag for job in jobs if job.participant == client]
            assert len(set(own)) == len(own)
            turns.append(own[0])
            partners |= {tuple(own)} if len(own) == 2 else set()
        assert all(job.width == 0.25 for job in jobs)
    assert all(len(set(turns[i : i + 4])) == 4 for i in range(0, len(turns), 4))
    assert len(partners) > 4  # not always the same pairs


def test_a_base_is_the_mean_over_those_who_trained_it() -> None:
    plan = split_mix("clients.tiers=[0.25,1.0]", "clients.per_round=5")
    engine, recorder = recorded(plan, 1)
    _, after = helpers.snapshots(engine)
    for number in range(4):
        own = [o.result for o in recorder.outcomes if o.result.tag == (f"base {number}" if number else "")]
        total = sum(r.examples for r in own)
        for name, tensor in after.state["bases"][number].params.items():
            expected = sum(r.model.params[name] * (r.examples / total) for r in own)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-14)


def test_bases_start_apart() -> None:
    plan = split_mix()
    first = [model.params["head.weight"] for model in plan.method.init(plan.federation)["bases"]]
    assert len({tuple(t.flatten().tolist()) for t in first}) == 4
    assert all(t.shape == (3, 2) for t in first)


def test_initial_weights_in_the_scale_of_the_full_width_net() -> None:
    plain, scaled = split_mix(), split_mix("merging.rescale_init=true")
    for a, b in zip(*(p.method.init(p.federation)["bases"] for p in (plain, scaled)), strict=True):
        for name, tensor in a.params.items():
            factor = math.sqrt(0.25) if name in ("body.3.weight", "head.weight") else 1.0
            assert torch.equal(b.params[name], tensor * factor)


# -- what is served ------------------------------------------------------------------------------------------------------


def test_all_bases_are_a_block_diagonal_net_with_the_last_layer_divided_by_their_number() -> None:
    plan = split_mix("clients.tiers=[0.25,1.0]")
    snapshot = helpers.snapshots(helpers.engine_of(plan))[-1]
    parts = [model.params for model in snapshot.state["bases"]]
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    first, second, last = net[1], net[3], net[5]
    with torch.no_grad():
        first.weight.copy_(torch.cat([p["body.1.weight"] for p in parts]))
        first.bias.copy_(torch.cat([p["body.1.bias"] for p in parts]))
        second.weight.copy_(torch.block_diag(*(p["body.3.weight"] for p in parts)))
        second.bias.copy_(torch.cat([p["body.3.bias"] for p in parts]))
        last.weight.copy_(torch.cat([p["head.weight"] for p in parts], 1) / 4)
        last.bias.copy_(sum(p["head.bias"] for p in parts) / 4)
        x, y = plan.federation.test
        logits = net(x)
    found = rows(plan, snapshot)
    for scope in ("global", "global/width=1"):
        assert found[scope]["accuracy"] == (logits.argmax(1) == y).double().mean().item()
        assert found[scope]["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-12)
    assert found["global/width=0.25"]["loss"] != found["global/width=0.5"]["loss"] != found["global"]["loss"]


def test_a_width_is_served_by_the_first_bases() -> None:
    plan = split_mix("clients.tiers=[0.25,0.5,1.0]", "clients.number=6")
    state = plan.method.init(plan.federation)

    def served(participant: int, width: float | None = None) -> list[int]:
        ensemble = plan.method.serve(state, participant, width)
        assert all((s.weight, s.width) == (1.0, 0.25) for s in ensemble)
        return [next(i for i, b in enumerate(state["bases"]) if b is s.model) for s in ensemble]

    assert served(0) == [0]
    assert served(2) == [0, 1]
    assert served(4) == served(SERVER) == served(0, 1.0) == [0, 1, 2, 3]
    assert served(4, 0.5) == served(SERVER, 0.5) == [0, 1]
    assert [s.tag for s in plan.method.serve(state, SERVER)] == ["", "base 1", "base 2", "base 3"]


@pytest.mark.parametrize(
    ("width", "base", "number"),
    [(1.0, 0.125, 8), (0.3, 0.1, 3), (0.7, 0.1, 7), (1.0, 0.1, 10), (0.375, 0.25, 1), (1.0, 0.3, 3), (0.2, 0.25, 0)],
)
def test_how_many_bases_fit(width: float, base: float, number: int) -> None:
    assert bases(width, base) == number


def test_parameters_and_operations_by_width() -> None:
    plan = split_mix("clients.tiers=[0.25,1.0]", "clients.number=4")
    found = rows(plan, helpers.engine_of(plan).begin())
    parameters, macs = (16 * 2 + 2) + (2 * 2 + 2) + (2 * 3 + 3), 16 * 2 + 2 * 2 + 2 * 3
    for width, number in ((0.25, 1), (0.5, 2), (1, 4)):
        for scope in ("global", "clients"):
            row = found[f"{scope}/width={width:g}"]
            assert (row["parameters"], row["inference_macs"]) == (number * parameters, number * macs)
    assert found["global"]["parameters"] == 4 * parameters
    assert found["clients"]["parameters"] == round((2 * 1 + 2 * 4) / 4 * parameters)


# -- costs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tier", "number"), [("0.25", 1), ("0.5", 2), ("1.0", 4)])
def test_a_client_is_sent_the_bases_it_trains_and_no_more(tier: str, number: int) -> None:
    plan = split_mix(f"clients.tiers=[{tier}]", "clients.per_round=2", "client_optimizer.steps=3")
    _, after = helpers.snapshots(helpers.engine_of(plan, rounds=1))
    size, macs = (34 + 6 + 9) * 8, 32 + 4 + 6
    assert after.costs.bytes_down == after.costs.bytes_up == 2 * number * size
    assert after.costs.local_steps == 2 * number * 3
    assert after.costs.macs == 2 * number * 3 * 8 * macs * 3  # clients, bases, steps, examples, forward and backward
    assert nbytes(tensors(after.state["bases"][0])) == size


def test_one_base_of_full_width_is_fedavg() -> None:
    line = (*SMALL, "client_optimizer.momentum=0.9", "server_data=none")
    plans = (
        helpers.plan(*line, "baseline=fedavg"),
        helpers.plan(*line, "merging=split_mix", "merging.base_width=1", "merging.serve_widths=[1.0]"),
    )
    runs = [helpers.snapshots(helpers.engine_of(plan)) for plan in plans]
    for one, mix in zip(*runs, strict=True):
        assert helpers.identical(one.state["global"], mix.state["bases"][0])
        assert one.costs == mix.costs
        ours, theirs = rows(plans[1], mix), rows(plans[0], one)
        assert {scope: ours[scope] for scope in theirs} == theirs
        assert ours["global/width=1"] == theirs["global"] | {"scope": "global/width=1"}


def test_clients_that_are_held_out_are_in_no_width() -> None:
    plan = split_mix("clients.held_out=[4]")
    found = rows(plan, helpers.engine_of(plan).begin())
    assert found["clients/width=1"]["examples"] == found["clients"]["examples"]
    assert found["held_out"]["examples"] > 0


# -- masking -------------------------------------------------------------------------------------------------------------


def test_classes_that_a_batch_lacks_are_left_out_of_the_loss() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0], [0.5, -3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 2]), torch.arange(2))
    loss = masked_cross_entropy(lambda params, x, width=None: logits, {}, {}, batch, {})
    one = math.log(math.exp(1) + math.exp(0) + math.exp(2)) - 1
    two = math.log(math.exp(0.5) + math.exp(0) + math.exp(4)) - 4
    assert loss.item() == pytest.approx((one + two) / 2, abs=1e-14)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, [0, 2]] != 0).all()


def test_the_masked_loss_is_that_of_the_jobs() -> None:
    for value, rule in (("true", masked_cross_entropy), ("false", None)):
        engine, recorder = recorded(split_mix(f"merging.masked_loss={value}"), 1)
        helpers.snapshots(engine)
        assert {job.loss for job in recorder.rounds[0]} == {rule}


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        (["clients.tiers=[0.125,1.0]"], "merging.base_width", "got 0.25, but a client can only run a width of 0.125; "
         "nearest valid value: 0.125."),
        (["merging.serve_widths=[1.0,0.2]"], "merging.serve_widths[1]", "got 0.2: narrower than a base; nearest valid "
         "value: 0.25."),
        (["merging.base_width=0"], "merging.base_width", "got 0: must be above 0"),
        (["start=server", "server_data=share", "server_data.examples=12"], "start", "must be random"),
    ],
)  # fmt: skip
def test_what_is_refused(overrides: list[str], key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_mix(*overrides)
    assert caught.value.key == key
    assert text in caught.value.problem


def test_a_net_without_widths_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model: has no width, and 0\.25 of it is asked for"):
        helpers.plan(*MIX, "model=mlp", f"model._target_={__name__}.Fixed", "~model.hidden", "~model.width")


class Fixed(nn.Module):
    """A linear classifier."""

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.body = nn.Flatten()
        self.head = nn.Linear(math.prod(input_shape), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(x))
        return logits
