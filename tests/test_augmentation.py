"""Augmentation: what each part does to the pixels, what mixup does to a step, who sees it, and from which stream."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_helpers import TINY, call, rows
from local_helpers import N, bench, model_of, task
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl import probes
from hybridfl.data.augmentation import Augment, Augmentation, Augmented, cropped, erased, rectangles
from hybridfl.data.dataset import Dataset, Examples
from hybridfl.errors import ConfigError
from hybridfl.evaluation import Evaluator
from hybridfl.federation import Federation
from hybridfl.local import _recorded, run_task
from hybridfl.methods.base import Facts
from hybridfl.optimizers import SGD, batches
from hybridfl.rng import stream
from hybridfl.types import SERVER, Job, ProbeInput, Results, Round, Served, State

MEAN, STD = (100.0, 130.0, 90.0), (50.0, 60.0, 70.0)


def images(number: int, height: int = 6, width: int = 9, channels: int = 3) -> Dataset:
    """Random pixels, no two of which are likely to be alike, and none black."""
    x = np.random.default_rng(1).integers(1, 256, (number, channels, height, width)).astype(np.uint8)
    examples = Examples(x, np.zeros(number, dtype=np.int64))
    return Dataset("random", examples, examples, 2, MEAN[:channels], STD[:channels])


def standardised(raw: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    """As the federation does it."""
    mean, std = (torch.tensor(v[: raw.shape[1]], dtype=dtype).reshape(1, -1, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(raw).to(dtype) - mean) / std


def fitted(dataset: Dataset, **options: Any) -> Augment:
    augment = Augmentation(**options).fitted(dataset)
    assert augment is not None
    return augment


def rng(seed: int = 0) -> np.random.Generator:
    return stream(seed, "test")


# -- crop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_crop_is_a_window_of_the_raw_image_with_a_black_margin(dtype: torch.dtype) -> None:
    """To the bit: what is padded before it is standardised, as papers do, is the same as afterwards with our black."""
    dataset, padding = images(200), 2
    x = standardised(dataset.train.x, dtype)
    before = x.clone()
    out, partners, share = fitted(dataset, crop=padding)(x, rng())
    assert (partners, share, out.dtype) == (None, 1.0, dtype)
    assert torch.equal(x, before)
    margin = np.pad(dataset.train.x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    seen = set()
    for i in range(200):
        windows = {
            (top, left): standardised(margin[i : i + 1, :, top : top + 6, left : left + 9], dtype)[0]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        }
        (where,) = [place for place, window in windows.items() if torch.equal(window, out[i])]
        seen.add(where)
    assert len(seen) == 25


def test_windows_at_given_places() -> None:
    x = torch.arange(2.0 * 1 * 2 * 3).reshape(2, 1, 2, 3)  # 0 1 2 / 3 4 5 and 6 7 8 / 9 10 11
    black = torch.tensor([[[-1.0]]])
    out = cropped(x, 1, np.array([1, 2]), np.array([1, 0]), black)
    assert out[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert out[1, 0].tolist() == [[-1, 9, 10], [-1, -1, -1]]


# -- flip ------------------------------------------------------------------------------------------------------------


def test_flipping_everything_twice_changes_nothing() -> None:
    dataset = images(20)
    x = standardised(dataset.train.x)
    flip = fitted(dataset, flip=1.0)
    once = flip(x, rng()).x
    assert torch.equal(once, x[..., torch.arange(8, -1, -1)])
    assert torch.equal(flip(once, rng()).x, x)


def test_a_flip_of_a_half_flips_half_of_the_examples() -> None:
    dataset = images(4000, 2, 3)
    x = standardised(dataset.train.x)
    out = fitted(dataset, flip=0.5)(x, rng()).x
    flipped = (out == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(out[~flipped], x[~flipped])
    assert 1850 < flipped.sum() < 2150  # five standard deviations


# -- erase -----------------------------------------------------------------------------------------------------------


def test_an_erased_rectangle_is_within_bounds_and_the_rest_stays() -> None:
    dataset = images(3000, 20, 30)
    x = standardised(dataset.train.x, torch.float64)
    x[x == 0] = 1.0  # nothing but what is erased is 0
    out = fitted(dataset, erase=0.4)(x, rng()).x
    gone = out == 0
    assert torch.equal(out[~gone], x[~gone])
    assert torch.equal(gone.all(1), gone.any(1))  # in all channels the same
    holes = gone[:, 0].numpy()
    hit = holes.any((1, 2))
    assert 1065 < hit.sum() < 1335  # five standard deviations
    corners = []
    for hole in holes[hit]:
        across, along = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        tall, wide = len(across), len(along)
        assert hole[across[0] : across[-1] + 1, along[0] : along[-1] + 1].all()
        assert hole.sum() == tall * wide
        corners.append([across[0], along[0], 20 - across[-1], 30 - along[-1], tall, wide])
        if tall < 20:
            # Sides that round to these may have an area and an aspect as the paper has them.
            assert (tall - 0.5) * (wide - 0.5) <= 0.33 * 600
            assert (tall + 0.5) * (wide + 0.5) >= 0.02 * 600
            assert (tall - 0.5) / (wide + 0.5) <= 1 / 0.3
            assert (tall + 0.5) / (wide - 0.5) >= 0.3
    top, left, bottom, right, tall, wide = np.array(corners).T
    assert (top.min(), left.min(), bottom.min(), right.min()) == (0, 0, 1, 1)
    share = tall * wide / 600
    assert share.min() < 0.04 and share.max() > 0.3
    assert abs(share.mean() - 0.175) < 0.02
    assert (tall / wide).min() < 0.45 and (tall / wide).max() > 2.5
    assert 1.6 < (tall / wide).mean() < 2.1  # upright more often than not, as in the paper


def test_rectangles_lie_within_images_of_any_shape() -> None:
    for height, width in ((1, 1), (1, 40), (40, 2), (3, 3)):
        top, left, tall, wide = rectangles(500, height, width, rng())
        assert tall.min() >= 1 and wide.min() >= 1 and top.min() >= 0 and left.min() >= 0
        assert (top + tall).max() == height and (left + wide).max() == width


def test_erasing_at_given_places() -> None:
    x = torch.ones(3, 2, 2, 3)
    zero, one, two = (np.full(3, value) for value in (0, 1, 2))
    out = erased(x, one, one, one, two, np.array([True, False, True]))
    assert out[0].tolist() == [[[1, 1, 1], [1, 0, 0]]] * 2
    assert out[1].tolist() == [[[1, 1, 1], [1, 1, 1]]] * 2
    assert torch.equal(out[2], out[0])
    assert erased(x, zero, zero, two, one, np.array([True] * 3))[0, 0].tolist() == [[0, 1, 1], [0, 1, 1]]


# -- mixup -----------------------------------------------------------------------------------------------------------


def test_mixup_draws_one_share_a_batch_and_a_permutation() -> None:
    dataset = images(30)
    x = standardised(dataset.train.x, torch.float64)
    mix, shares = fitted(dataset, mixup=1.0), []
    draws = rng()
    for _ in range(400):
        out, partners, share = mix(x, draws)
        assert partners is not None
        assert sorted(partners.tolist()) == list(range(30))
        assert torch.allclose(out, share * x + (1 - share) * x[partners], rtol=0, atol=1e-14)
        shares.append(share)
    assert 0 <= min(shares) < 0.02 and 0.98 < max(shares) <= 1  # Beta(1, 1) is uniform
    assert abs(np.mean(shares) - 0.5) < 0.08
    narrow = [fitted(dataset, mixup=200.0)(x, draws).share for _ in range(50)]
    assert all(0.35 < share < 0.65 for share in narrow)
    either = [fitted(dataset, mixup=1e-6)(x, draws).share for _ in range(50)]
    assert set(np.round(either, 9)) == {0.0, 1.0}


def mixing(share: float) -> Augment:
    """Mixup with this λ and with the next example of the batch."""

    def augment(x: Tensor, rng: np.random.Generator, /) -> Augmented:
        partners = torch.arange(1, len(x) + 1) % len(x)
        return Augmented(share * x + (1 - share) * x[partners], partners, share)

    return augment


def test_a_mixed_step_is_the_hand_written_one() -> None:
    """Three steps through normalisation, dropout left out: the statistics move once a step."""
    table = bench(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    work = SGD(lr=0.3, batch_size=5, steps=3)
    start = model_of(table.net)
    result = run_task(table, task(table, work, augment=mixing(0.3), start=start)).result
    net = table.net.train()
    optimiser, losses = torch.optim.SGD(net.parameters(), lr=0.3), []
    for picked in batches(N - 1, work, stream(0, "local"), 3):
        index = torch.arange(N - 1, 0, -1)[torch.from_numpy(picked)]
        x, y = table.x[index], table.y[index]
        order = [1, 2, 3, 4, 0]
        logits = net(0.3 * x + 0.7 * x[order])
        loss = 0.3 * F.cross_entropy(logits, y) + 0.7 * F.cross_entropy(logits, y[order])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert helpers.close(result.model.params, P.detach(dict(net.named_parameters())), 1e-12)
    assert helpers.close(result.model.buffers, P.detach(dict(net.named_buffers())), 1e-12)
    assert result.model.buffers["1.num_batches_tracked"].item() == 3
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-12)


def test_the_limits_of_mixup_are_plain_steps() -> None:
    table = bench()
    work = SGD(lr=0.3, batch_size=4, steps=5)
    plain = run_task(table, task(table, work)).result.model.params
    assert helpers.identical(run_task(table, task(table, work, augment=mixing(1.0))).result.model.params, plain)
    # λ = 0 trains on the partners alone, who are the same examples in another order.
    assert helpers.close(run_task(table, task(table, work, augment=mixing(0.0))).result.model.params, plain, 1e-14)
    assert not helpers.close(run_task(table, task(table, work, augment=mixing(0.5))).result.model.params, plain, 1e-3)


class Counting(nn.Sequential):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.passes += 1
        out: Tensor = super().forward(x)
        return out


def by_position(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(apply(params, batch.x), ctx["labels"][batch.positions])


def by_label(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(apply(params, batch.x), batch.y)


def twice(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
    """Two passes with dropout of their own, pulled together (as R-Drop does)."""
    one, two = apply(params, batch.x), apply(params, batch.x)
    assert not torch.equal(one, two)
    return F.cross_entropy(one, batch.y) + F.mse_loss(one, two)


def near_the_start(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
    """A pass without gradient first, of the very same parameters; then one of others; then the net's own."""
    with torch.no_grad():
        target = apply(params, batch.x)
    other = apply(ctx["other"], batch.x)
    logits = apply({**params}, batch.x)
    assert logits.requires_grad and not target.requires_grad
    return F.cross_entropy(logits, batch.y) + F.mse_loss(logits, target) + F.mse_loss(logits, other)


@pytest.mark.parametrize(("rule", "passes"), [(by_label, 1), (by_position, 1), (twice, 2), (near_the_start, 3)])
def test_mixup_takes_any_loss_and_runs_the_net_no_more_often(rule: Callable[..., Tensor], passes: int) -> None:
    net = Counting(nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, 3))
    table = bench(net)
    start = model_of(net)
    other = {name: 2 * t for name, t in start.params.items()}
    ctx = {"labels": table.y[torch.arange(N - 1, 0, -1)], "other": other}
    given = task(table, SGD(lr=0.1, batch_size=4, steps=6), start=start, loss=rule, ctx=ctx)
    Counting.passes = 0
    plain = run_task(table, given)
    assert Counting.passes == 6 * passes
    Counting.passes = 0
    mixed = run_task(table, replace(given, augment=mixing(0.5), shuffle=stream(0, "local")))
    assert Counting.passes == 6 * passes
    assert mixed.passes == plain.passes
    assert mixed.passes[1.0] >= 3 * 24
    assert not helpers.close(mixed.result.model.params, plain.result.model.params, 1e-3)
    same = run_task(table, replace(given, augment=mixing(1.0), shuffle=stream(0, "local")))
    assert helpers.identical(same.result.model.params, plain.result.model.params)


def test_targets_found_by_position_are_mixed_like_labels() -> None:
    table = bench()
    ctx = {"labels": table.y[torch.arange(N - 1, 0, -1)]}
    work = SGD(lr=0.3, batch_size=4, steps=6)
    ends = [
        run_task(table, task(table, work, augment=mixing(0.4), loss=rule, ctx=ctx)).result.model.params
        for rule in (None, by_label, by_position)
    ]
    assert helpers.identical(ends[0], ends[1])
    assert helpers.identical(ends[0], ends[2])


def test_two_losses_of_one_pass_are_the_loss_of_two_passes() -> None:
    """Without dropout it makes no difference whether the net runs once or twice."""

    def unseen(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
        return F.cross_entropy(apply({n: t * 1 for n, t in params.items()}, batch.x), batch.y)

    table = bench()
    work = SGD(lr=0.3, batch_size=4, steps=3)
    ends = [
        run_task(table, task(table, work, augment=mixing(0.4), loss=rule)).result.model.params
        for rule in (None, unseen)
    ]
    assert helpers.close(*ends, 1e-14)


def test_only_the_same_tensors_have_an_old_answer() -> None:
    asked: list[float] = []

    def apply(params: P.Params, x: Tensor, width: float | None = None) -> Tensor:
        asked.append(float(params["w"]))
        return params["w"] * x

    first, again = _recorded(apply)
    one, two, x = torch.tensor(1.0), torch.tensor(2.0), torch.ones(2)
    answers = [first({"w": one}, x), first({"w": two}, x)]
    assert again({"w": two}, x) is answers[1]
    assert again({"w": one}, x.clone()) is not answers[0]
    assert again({"w": one, "b": two}, x) is not answers[0]
    assert again({"w": one}, x) is answers[0]
    assert again({"w": one}, x) is not answers[0]  # asked once more than the first time
    assert asked == [1, 2, 1, 1, 1]


# -- who sees it -----------------------------------------------------------------------------------------------------


class Witness:
    """An augmentation of one's own that changes nothing and keeps what it was given and what it drew."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, int]] = []

    def __call__(self, x: Tensor, rng: np.random.Generator, /) -> Augmented:
        self.seen.append((x.clone(), int(rng.integers(2**60))))
        return Augmented(x)

    @property
    def drawn(self) -> list[int]:
        return [number for _, number in self.seen]


class Order(Facts):
    """Gives work to these participants and tags in this order, in one yield or in one each."""

    def __init__(self, *who: tuple[int, str], apart: bool = False, **options: Any) -> None:
        self.who, self.apart, self.options = who, apart, options

    def init(self, federation: Federation) -> State:
        return {"global": federation.fresh_model()}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        jobs = [Job(k, state["global"], tag=tag, **self.options) for k, tag in self.who]
        if self.apart:
            results: list[Any] = []
            yield []
            for job in jobs:
                results += yield [job]
        else:
            results = yield jobs
        ends = {f"{r.participant}{r.tag}": r.model.params for r in results}
        return state | {"ends": ends}

    def serve(self, state: State, participant: int) -> list[Served]:
        return [Served(state["global"])]


EVERYTHING = ("augmentation.crop=1", "augmentation.flip=0.5", "augmentation.erase=0.5", "augmentation.mixup=0.5")


def ends(plan: Any, method: Order, rounds: int = 1) -> Any:
    engine = helpers.engine_of(plan, method)
    snapshot = engine.begin()
    for _ in range(rounds):
        snapshot, _ = engine.step(snapshot)
    return snapshot.state["ends"]


def test_the_numbers_do_not_depend_on_the_order_of_jobs() -> None:
    plan = helpers.plan(*EVERYTHING, "executor=sequential")
    who = [(0, ""), (1, ""), (1, "b"), (SERVER, "")]
    forward, backward = ends(plan, Order(*who)), ends(plan, Order(*reversed(who)))
    apart = ends(plan, Order(*who, apart=True))
    assert forward.keys() == backward.keys() == apart.keys()
    for key, params in forward.items():
        assert helpers.identical(params, backward[key])
        assert helpers.identical(params, apart[key])
    assert not helpers.close(forward["1"], forward["1b"])
    alone = ends(plan, Order((1, "")))
    assert helpers.identical(alone["1"], forward["1"])


def drawn(plan: Any, method: Order, rounds: int = 1) -> list[int]:
    """The first number of each job."""
    plan.federation.augment = witness = Witness()
    ends(plan, method, rounds)
    return witness.drawn


def test_every_job_has_numbers_of_its_own_from_the_stream_of_its_key() -> None:
    plan = helpers.plan("seed=3")
    who = ((0, ""), (0, ""), (0, "b"), (1, ""), (SERVER, ""))
    numbers = drawn(plan, Order(*who, steps=1), rounds=2)
    keys = [(t, *key) for t in range(2) for key in ((0, "", 0), (0, "", 1), (0, "b", 0), (1, "", 0), (SERVER, "", 0))]
    assert numbers == [int(stream(3, "augmentation", *key).integers(2**60)) for key in keys]
    assert len(set(numbers)) == 10


def test_steps_see_it_and_nothing_else_does() -> None:
    """Steps of clients and server, also before round 0; no measurement, no statistic after steps, no evaluation."""
    plan = helpers.plan("start=server", "start_steps=4", "baseline=fedavg")
    federation = plan.federation
    federation.augment = witness = Witness()
    begun = plan.engine().begin()
    assert len(witness.seen) == 4
    engine = helpers.engine_of(plan, Order((0, ""), (SERVER, ""), steps=3, probes={"loss": probes.mean_loss}))
    engine.step(begun)
    assert len(witness.seen) == 4 + 3 + 3
    assert all(x.shape[1:] == (1, 4, 4) and len(x) <= 8 for x, _ in witness.seen)
    engine = helpers.engine_of(plan, Order((0, ""), (SERVER, ""), steps=0, probes={"loss": probes.mean_loss}))
    engine.step(begun)
    Evaluator(federation, plan.method, plan.settings.evaluation).score(begun.state, 0, True)
    assert len(witness.seen) == 10


def test_statistics_are_of_the_examples_themselves() -> None:
    plan = helpers.plan(*EVERYTHING, "executor=sequential")
    federation = plan.federation

    def inputs(seen: ProbeInput) -> Tensor:
        return torch.cat([batch.x for batch in seen.batches])

    class Asking(Order):
        def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
            (result,) = yield [Job(0, state["global"], probes={"x": inputs, "loss": probes.mean_loss})]
            (again,) = yield [Job(0, result.model, steps=0, probes={"loss": probes.mean_loss})]
            assert torch.equal(result.probes["x"], federation.bench.x[torch.from_numpy(federation.owned(0))])
            assert torch.equal(result.probes["loss"], again.probes["loss"])
            return state | {"ends": {}}

    pool = federation.bench.x.clone()
    ends(plan, Asking())
    assert torch.equal(federation.bench.x, pool)


def test_a_step_sees_exactly_what_the_augmentation_gave() -> None:
    """Training on examples that are all halved is training of a net whose inputs are halved."""
    plan = helpers.plan("baseline=fedavg", "rounds=1")
    federation = plan.federation
    plain = helpers.snapshots(plan.engine())[-1].state["global"].params
    federation.augment = lambda x, rng: Augmented(x / 2)
    halved = helpers.snapshots(plan.engine())[-1].state["global"].params
    federation.augment = None
    federation.bench.x.div_(2)
    assert helpers.identical(helpers.snapshots(plan.engine())[-1].state["global"].params, halved)
    assert not helpers.close(halved, plain, 1e-3)


def test_a_pass_is_booked_once() -> None:
    costs = [
        helpers.snapshots(helpers.plan("baseline=fedavg", *options).engine())[-1].costs for options in ((), EVERYTHING)
    ]
    assert costs[0] == costs[1]


def test_without_augmentation_nothing_is_built() -> None:
    assert Augmentation().fitted(images(3)) is None
    assert helpers.plan("augmentation=none").federation.augment is None
    assert helpers.plan("augmentation=mixup").federation.augment is not None


@pytest.mark.parametrize("method", ["merging.objective=mix", "merging.search.kind=es", "baseline=oracle"])
def test_methods_run_with_everything_on(method: str) -> None:
    """Teachers' logits are found by position, so the search with a teacher mixes them too."""
    on, off = (helpers.plan(method, *options) for options in (EVERYTHING, ()))
    ends = [helpers.snapshots(plan.engine())[-1].state["global"].params for plan in (on, off)]
    assert P.all_finite(ends[0])
    assert not helpers.close(*ends, 1e-6)


# -- what is refused, and one's own -----------------------------------------------------------------------------------


WRONG = [
    ("crop=4", "crop", "got 4: of images of 4 × 4 pixels nothing might be left; nearest valid value: 3"),
    ("crop=-1", "crop", "got -1: must be at least 0; nearest valid value: 0"),
    ("flip=1.5", "flip", "got 1.5: must be at most 1; nearest valid value: 1"),
    ("erase=yes", "erase", "got 'yes': expected a number"),
    ("mixup=-0.1", "mixup", "got -0.1: must be at least 0; nearest valid value: 0"),
    ("mixup=inf", "mixup", "got inf: must be finite"),
]


@pytest.mark.parametrize(("typed", "key", "text"), WRONG, ids=[typed for typed, _, _ in WRONG])
def test_wrong_options_are_refused(typed: str, key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^augmentation\.{key}: {text}"):
        helpers.plan(f"augmentation.{typed}")


@pytest.mark.parametrize("option", ["crop", "flip", "erase"])
def test_what_is_no_image_is_only_mixed(option: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    examples = Examples(x, np.zeros(6, dtype=np.int64))
    flat = Dataset("flat", examples, examples, 2, (0.0,), (1.0,))
    with pytest.raises(ConfigError, match=rf"^{option}: got 1: .* shape \(5,\); nearest valid value: 0"):
        Augmentation(**{option: 1}).fitted(flat)
    assert fitted(flat, mixup=1.0)(torch.from_numpy(x), rng()).x.shape == (6, 5)


OWN = """
import torch
from hybridfl.build import PositiveFloat
from hybridfl.data.augmentation import Augmented


class Noise:
    def __init__(self, sd: PositiveFloat = 0.1):
        self.sd = sd

    def fitted(self, dataset):
        return self.noisy

    def noisy(self, x, rng):
        return Augmented(x + self.sd * torch.from_numpy(rng.standard_normal(tuple(x.shape))).to(x))


class Nothing:
    pass
"""


def test_an_augmentation_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noise_of_mine.py").write_text(OWN)
    folder = tmp_path / "conf" / "augmentation"
    folder.mkdir(parents=True)
    (folder / "noise.yaml").write_text("_target_: noise_of_mine.Noise\nsd: 0.1\n")
    (folder / "nothing.yaml").write_text("_target_: noise_of_mine.Nothing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    line = ("--config-dir", "conf", *TINY, "baseline=fedavg", "rounds=1", "augmentation=noise")
    losses = {}
    for sd in ("0.1", "1e-9"):
        answer = call("train", *line, f"augmentation.sd={sd}")
        assert answer.status == 0, answer.both
        losses[sd] = float(rows(answer.folder / "metrics.csv")[-1]["loss"])
    plain = call("train", *TINY, "baseline=fedavg", "rounds=1")
    assert losses["1e-9"] == pytest.approx(float(rows(plain.folder / "metrics.csv")[-1]["loss"]), abs=1e-5)
    assert abs(losses["0.1"] - losses["1e-9"]) > 1e-5
    assert "augmentation.sd: got -1: must be above 0" in call("train", *line, "augmentation.sd=-1").err
    assert "Nothing is no Augmenter: it lacks fitted" in call("train", *line, "augmentation=nothing").err
