"""FLTrust and Zeno++: by hand, and by their formulas."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from hybrid_helpers import ALL, OWN, cohorts, end, near, plan_of, point, states, talk, trained, update, values, whole

from hybridfl import params as P
from hybridfl.methods.fltrust import FLTrust
from hybridfl.methods.zeno_plus_plus import ZenoPlusPlus
from hybridfl.optimizers import SGD
from hybridfl.types import SERVER, Result

# -- FLTrust -----------------------------------------------------------------------------------------------------------


def test_fltrust_by_hand() -> None:
    """Cosines .6, .8 and below 0; at the server's length 2 the trusted ones are (1.2, 1.6) and (1.6, -1.2)."""
    arrived = [
        update(0, 3, 4, buffer=1),
        update(1, 40, -30, examples=99, buffer=8, birth=0),
        update(2, -1, 9, buffer=50),
    ]
    new, ((*_, job),), now = talk(FLTrust(server_lr=0.5), {"global": point(100, 200)}, [*arrived, update(SERVER, 2, 0)])
    assert (job.participant, job.work) == (SERVER, SGD(steps=40, batch_size=32, lr=0.03))
    assert values(new["global"]) == near(100 + 0.5 * 2 / 1.4, 200)
    assert float(new["global"].buffers["b"]) == pytest.approx((0.6 * 1 + 0.8 * 8) / 1.4)
    assert [value for _, _, value in now.reports] == near(0.6, 0.8, 0)


@pytest.mark.parametrize(
    "arrived", [[], [update(0, -1, 0), update(1, 0, 5), update(2, 0, 0)]], ids=["none", "untrusted"]
)
def test_fltrust_stays_where_nobody_is_trusted(arrived: list[Result]) -> None:
    model = point(1, 2, buffer=3)
    assert talk(FLTrust(), {"global": model}, [*arrived, update(SERVER, 2, 0)])[0]["global"] is model


def test_fltrust_by_its_formula() -> None:
    plan = plan_of()
    params = plan.federation.start.params
    for t, state in enumerate(states(plan, FLTrust(**OWN, server_lr=0.8))[1:]):
        root = P.flatten(trained(plan, params, t, SERVER)) - P.flatten(params)
        moves = [P.flatten(trained(plan, params, t, k)) - P.flatten(params) for k in cohorts(plan)[t]]
        trust = [max(0.0, float(u @ root / (u.norm() * root.norm()))) for u in moves]
        assert sum(trust) > 0
        step = sum(c * u * root.norm() / u.norm() for c, u in zip(trust, moves, strict=True)) / sum(trust)
        params = P.Layout.of(params).unflatten(P.flatten(params) + 0.8 * step)
        assert helpers.close(state["global"].params, params)


def test_a_longer_attack_is_no_stronger_against_fltrust() -> None:
    attacks: list[dict[str, Any]] = [{**ALL, "random_updates": 0.4, "random_scale": scale} for scale in (1.0, 99.0)]
    ends = [end(plan_of(clients=attack), FLTrust()) for attack in attacks]
    assert helpers.close(*ends, 1e-10)
    assert not helpers.close(ends[0], end(plan_of(clients=ALL), FLTrust()), 1e-4)


# -- Zeno++ ------------------------------------------------------------------------------------------------------------


def measured(*values: float) -> list[Result]:
    return [update(SERVER, 0, 0, gradient=point(*values).params)]


ZENO = {"global": point(100, 200, buffer=3), "gradient": {}, "used": 2, "task": 0}


@pytest.mark.parametrize(("eps", "takes_the_second"), [(0.6, True), (0.4, False)])
def test_zeno_by_hand(eps: float, takes_the_second: bool) -> None:
    """v = (3, 4). Scores: .1 · 25 - .05, then 0 - .05 against -.1 ε; then with v = (0, 2) one of -.2 · 2 · .8 and one of 0."""
    arrived = [update(0, -6, -8, buffer=1), update(1, 8, -6, buffer=5), update(2, 3, 4, buffer=50), update(3, 0, 0)]
    method = ZenoPlusPlus(lr=0.1, rho=0.002, eps=eps, refresh=2)
    new, yielded, now = talk(method, ZENO, arrived, measured(3, 4), measured(0, 2))
    end = [100 - 0.3 + 0.4 * takes_the_second, 200 - 0.4 - 0.3 * takes_the_second]
    assert [job.participant for job in yielded[1] + yielded[2]] == [SERVER, SERVER]
    assert values(yielded[1][0].start) == [100, 200]
    assert values(yielded[2][0].start) == near(*end)
    assert values(new["global"]) == near(*end)
    assert float(new["global"].buffers["b"]) == (3 if takes_the_second else 1)
    assert [value for _, _, value in now.reports] == [1, takes_the_second, 0, 0]
    assert (new["used"], new["gradient"]["w"].tolist()) == (2, [0, 2])


def test_zeno_keeps_its_gradient_for_the_next_rounds() -> None:
    state = {"global": point(1, 1), "gradient": point(0, 2).params, "used": 0, "task": 0}
    new, yielded, _ = talk(ZenoPlusPlus(lr=0.5, refresh=9), state, [update(0, 0, -1)])
    assert len(yielded) == 1
    assert values(new["global"]) == near(1, 0)
    assert new["used"] == 1


def test_zeno_renews_a_gradient_of_another_task() -> None:
    """Not only in the first round of a task: that one may have been abandoned."""
    state = {"global": point(1, 1), "gradient": point(0, 2).params, "used": 0, "task": -1}
    new, yielded, _ = talk(ZenoPlusPlus(refresh=9), state, [update(0, 0, -1)], measured(3, 4))
    assert len(yielded) == 2
    assert (new["used"], new["task"], new["gradient"]["w"].tolist()) == (1, 0, [3, 4])


def test_zeno_keeps_the_buffers_where_it_takes_nothing() -> None:
    new, _, _ = talk(ZenoPlusPlus(refresh=2), ZENO, [update(0, 3, 4, buffer=50)], measured(3, 4))
    assert (values(new["global"]), float(new["global"].buffers["b"])) == ([100, 200], 3)


def test_zeno_by_its_formula() -> None:
    plan, method = plan_of(), ZenoPlusPlus(lr=0.4, rho=0.3, eps=0, refresh=2)
    params, v, used, taken = plan.federation.start.params, torch.empty(0), 2, []
    layout = P.Layout.of(params)
    for t, state in enumerate(states(plan, method, 3)[1:]):
        start = params
        for k in cohorts(plan)[t]:
            if used == 2:
                v, used = P.flatten(whole(plan, params, SERVER)), 0
            used += 1
            u = P.flatten(start) - P.flatten(trained(plan, start, t, k))
            g = u * v.norm() / u.norm()
            taken.append(bool(0.4 * v @ g - 0.3 * g @ g >= 0))
            params = layout.unflatten(P.flatten(params) - 0.4 * g) if taken[-1] else params
        assert helpers.close(state["global"].params, params)
    assert {True, False} <= set(taken)
