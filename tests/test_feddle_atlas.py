"""The atlas in Feddle: who stays, who goes, and what an entry is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from feddle_helpers import FREE, coefficients, planned, play, searched_c, server_data
from torch import Tensor

from hybridfl import params as P
from hybridfl.merging import atlas as A
from hybridfl.types import SERVER


def test_the_size_is_six_cohorts_by_default_and_keeps_what_arrived() -> None:
    assert planned().method.init(planned().federation)["size"] == 6 * 3
    played = play("merging.atlas.size=4", "merging.atlas.per_client=all", rounds=4)
    assert [len(state["atlas"]) for state in played.states] == [0, 3, 4, 4, 4]
    assert played.reported("dropped") == [[0], [2], [3], [3]]
    for round, state in enumerate(played.states[1:]):
        assert sum(entry["added"] == round for entry in state["atlas"]) == 3


def test_the_smallest_coefficient_of_the_last_merge_goes() -> None:
    played = play("merging.atlas.size=5", "merging.atlas.per_client=all", rounds=3)
    for before, after in zip(played.states[1:], played.states[2:], strict=False):
        kept = sum(entry["added"] == before["atlas"][-1]["added"] + 1 for entry in after["atlas"])
        old = sorted(before["atlas"], key=lambda entry: float(entry["coefficients"].abs()))
        survivors = {id(entry["update"]) for entry in old[-(5 - kept) :]}
        assert {id(entry["update"]) for entry in after["atlas"]} >= survivors
        assert len(after["atlas"]) == 5


def test_newest_replaces_and_all_keeps() -> None:
    newest, every = (play(f"merging.atlas.per_client={per}", rounds=4) for per in ("newest", "all"))
    assert len(every.states[-1]["atlas"]) == 12
    owners = [entry["client"] for entry in newest.states[-1]["atlas"]]
    assert len(owners) == len(set(owners)) == len({entry["client"] for entry in every.states[-1]["atlas"]})


def test_drop_below_removes_weak_entries_but_never_fresh_ones() -> None:
    """Coefficients 0, 1/12, 1/3 … are 0, 1/4, 1 times a fresh one's."""
    weak = searched_c(lambda c: torch.tensor([[0.2], [0.5], [-0.6], [0.0], [2.0], [0.3]][: len(c)]).to(c) / 3)
    case = ["merging.atlas.per_client=all", FREE]
    all_of_it = play(*case, rounds=2, alter=weak)
    kept = play(*case, "merging.atlas.drop_below=0.4", rounds=2, alter=weak)
    torch.testing.assert_close(kept.flat, all_of_it.flat)
    clients = [entry["client"] for entry in all_of_it.states[-1]["atlas"]]
    assert [entry["client"] for entry in kept.states[-1]["atlas"]] == clients[1:]
    assert kept.reported("dropped") == [[0], [1]]
    assert all_of_it.reported("dropped") == [[0], [0]]


def test_drop_below_does_not_depend_on_the_unit_of_the_coefficients() -> None:
    case = ["merging.atlas.per_client=all", "merging.atlas.drop_below=0.3", "merging.search.lr=0.1"]
    mean, unit = (play(*case, f"merging.norm={norm}", rounds=4) for norm in ("mean", "unit"))
    assert mean.reported("dropped") == unit.reported("dropped")
    assert sum(n for (n,) in mean.reported("dropped")) > 0


def test_models_as_anchors_point_from_where_the_global_model_is_now() -> None:
    """With the default coefficients: the mean of the models that arrived, however old they are."""
    case = ["clients.delay=2", "merging.norm=none", "merging.search.steps=0"]
    models = play(*case, "merging.anchor=model", rounds=4)
    fresh = [entry["update"] for entry in models.states[-1]["atlas"] if entry["added"] == 3]
    assert len(fresh) == 3
    assert any(entry["birth"] < entry["added"] for entry in models.states[-1]["atlas"])
    torch.testing.assert_close(models.flat, torch.stack(fresh).mean(0), atol=1e-12, rtol=0)
    assert (models.flat - play(*case, rounds=4).flat).abs().max() > 1e-3


@pytest.mark.parametrize("anchor", ["delta", "model"])
@pytest.mark.parametrize("objective", ["ce", "head"])
def test_cosine_evicts_what_points_away_from_the_servers_downhill(anchor, objective, monkeypatch) -> None:
    used: list[Tensor] = []
    evict = A.evict
    monkeypatch.setattr(A, "evict", lambda *arguments: (used.append(arguments[4]), evict(*arguments))[1])
    case = ["merging.atlas.size=4", f"merging.anchor={anchor}", f"merging.objective={objective}"]
    case += ["merging.atlas.evict=cosine", "merging.atlas.per_client=all"]
    played = play(*case, rounds=2)
    first, last = played.states[1:]
    x, y = server_data(played)
    params = {n: t.clone().requires_grad_() for n, t in (first["global"].params | first["head"]).items()}
    loss = F.cross_entropy(torch.func.functional_call(played.plan.federation.net, params, (x,)), y)
    gradient = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    downhill = -P.flatten({n: g * (n not in first["head"]) for n, g in gradient.items()})
    torch.testing.assert_close(used[-1], downhill)
    origin = P.flatten(first["global"].params) * (anchor == "model")
    cosines = [float(F.cosine_similarity(e["update"] - origin, downhill, dim=0)) for e in first["atlas"]]
    best = first["atlas"][max(range(3), key=cosines.__getitem__)]
    assert last["atlas"][0]["client"] == best["client"]
    assert [entry["added"] for entry in last["atlas"]] == [0, 1, 1, 1]


STARTS = {
    "fresh": lambda old, shares: [0.0] * 3 + [1 / 3] * 3,
    "examples": lambda old, shares: [0.0] * 3 + shares,
    "warm": lambda old, shares: old + [1 / 3] * 3,
    "zero": lambda old, shares: [0.0] * 6,
    "uniform": lambda old, shares: [1 / 6] * 6,
}


@pytest.mark.parametrize("init", STARTS)
def test_the_start_of_the_search(init) -> None:
    case = [FREE, "merging.atlas.per_client=all", f"merging.coef.init={init}"]
    played = play(*case, rounds=2)
    (start,) = (t.job.start.params["c"] for t, _ in played.seen if t.job.tag == "search" and t.round == 1)
    old = coefficients(played.states[1]).squeeze(1).tolist()
    sizes = [outcome.result.examples for outcome in played.trained(1)]
    wanted = STARTS[init](old, [n / sum(sizes) for n in sizes])
    torch.testing.assert_close(start.squeeze(1), torch.tensor(wanted, dtype=torch.float64))


def test_updates_are_those_of_the_clients_and_stale_ones_stay_as_they_are() -> None:
    played = play("clients.delay=2", rounds=4)
    returned = [P.flatten(outcome.result.delta) for _, outcome in played.seen if outcome.result.steps]
    for entry in played.states[-1]["atlas"]:
        assert any(torch.equal(entry["update"], delta) for delta in returned)
    assert any(entry["birth"] < entry["added"] for entry in played.states[-1]["atlas"])


def test_the_method_serves_the_global_model_to_all() -> None:
    played = play(rounds=1)
    for participant in (SERVER, 0, 5):
        ((model, weight, *_),) = played.plan.method.serve(played.states[-1], participant)
        assert model is played.states[-1]["global"]
        assert weight == 1
