"""LoRM: a run does what its parts say."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from cli_helpers import call
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.errors import ConfigError
from hybridfl.methods.lorm import LoRM
from hybridfl.params import Params
from hybridfl.plan import Plan
from hybridfl.snapshot import Snapshot
from hybridfl.types import Job, Result, Results, Round, State

# -- in a run --------------------------------------------------------------------------------------------------------

STREAM = ("merging=lorm", "dataset.classes=6", "tasks.number=3", "rounds=9", "clients.per_round=5")
HEAVY = ("client_optimizer.lr=0.5", "client_optimizer.batch_size=16")


class Spied:
    """The method, which notes what it hands out and what comes back."""

    def __init__(self, method: LoRM) -> None:
        self.method = method
        self.rounds: list[list[tuple[list[Job], Results]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        exchange: list[tuple[list[Job], Results]] = []
        self.rounds.append(exchange)
        conversation = self.method.round(state, now)
        results = None
        while True:
            try:
                jobs = conversation.send(results)  # type: ignore[arg-type]
            except StopIteration as stop:
                return stop.value
            results = yield jobs
            exchange.append((jobs, results))


def played(*overrides: str) -> tuple[Plan, Spied, list[Snapshot]]:
    plan = helpers.plan(*STREAM, *HEAVY, *overrides)
    assert isinstance(plan.method, LoRM)
    spied = Spied(plan.method)
    return plan, spied, helpers.snapshots(helpers.engine_of(plan, spied))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run() -> tuple[Plan, Spied, list[Snapshot]]:
    return played()


def test_one_factor_moves_in_a_round_and_the_other_not_a_bit(run: tuple[Plan, Spied, list[Snapshot]]) -> None:
    _, spied, snapshots = run
    for number, exchange in enumerate(spied.rounds):
        jobs, results = exchange[0]
        moving, still = ("lora_B", "lora_A") if number % 3 % 2 == 0 else ("lora_A", "lora_B")
        for job, result in zip(jobs, results, strict=True):
            assert set(job.start.params) == {f"body.1.{moving}", "head.weight", "head.bias"}
            assert set(job.frozen["factors"]) == {f"body.1.{still}"}
            assert not torch.equal(result.model.params[f"body.1.{moving}"], job.start.params[f"body.1.{moving}"])
        after = snapshots[number + 1].state["theta"]
        assert torch.equal(after[f"body.1.{still}"], jobs[0].frozen["factors"][f"body.1.{still}"])
        assert not torch.equal(after[f"body.1.{moving}"], jobs[0].start.params[f"body.1.{moving}"])
        assert helpers.identical(snapshots[number].state["base"], snapshots[number + 1].state["base"])


def test_a_task_begins_with_fresh_factors(run: tuple[Plan, Spied, list[Snapshot]]) -> None:
    _, spied, _ = run
    starts = [spied.rounds[number][0][0][0] for number in (0, 3, 6)]
    assert not any(job.start.params["body.1.lora_B"].any() for job in starts)
    randoms = [job.frozen["factors"]["body.1.lora_A"] for job in starts]
    assert len({float(a[0, 0]) for a in randoms}) == 3


@pytest.mark.parametrize("order", ["[A]", "[A,B]"])
def test_the_factor_that_is_trained_first_starts_at_zero(order: str) -> None:
    _, spied, snapshots = played(f"merging.order={order}", "rounds=3")
    first = spied.rounds[0][0][0][0]
    assert not first.start.params["body.1.lora_A"].any()
    assert first.frozen["factors"]["body.1.lora_B"].all()
    weights = [snapshot.state["global"].params["body.1.weight"] for snapshot in snapshots[:2]]
    assert not torch.allclose(*weights, rtol=0, atol=1e-3)


def test_rows_of_classes_of_other_tasks_never_change(run: tuple[Plan, Spied, list[Snapshot]]) -> None:
    plan, _, snapshots = run
    for number, (before, after) in enumerate(itertools.pairwise(snapshots)):
        now = plan.federation.tasks.classes[number // 3]
        others = [label for label in range(6) if label not in now]
        for name in ("head.weight", "head.bias"):
            old, new = before.state["global"].params[name], after.state["global"].params[name]
            assert torch.equal(old[others], new[others])
            assert not torch.equal(old[list(now)], new[list(now)])


def inputs_of_layers(plan: Plan, params: Params, client: int, task: int) -> tuple[Tensor, Tensor]:
    """What goes into the dense layer and the head, on a client's training examples of a task."""
    bench, owned = plan.federation.bench, plan.federation.owned(client)
    index = torch.from_numpy(owned)
    index = index[torch.isin(bench.y[index], torch.tensor(plan.federation.tasks.classes[task]))]
    x = bench.x[index].flatten(1)
    return x, torch.relu(x @ params["body.1.weight"].T + params["body.1.bias"])


def test_rounds_and_tasks_by_hand(run: tuple[Plan, Spied, list[Snapshot]]) -> None:
    """The whole run from what the clients sent, with matrices and pseudo-inverses."""
    plan, spied, snapshots = run
    base = snapshots[0].state["global"].params
    residuals, task_grams = [], []
    for number, exchange in enumerate(spied.rounds):
        jobs, results = exchange[0]
        task, kind = number // 3, "B" if number % 3 % 2 == 0 else "A"
        frozen = jobs[0].frozen["factors"]
        backbone, heads, pulled, pulled_head = [], [], 0.0, 0.0
        for result in results:
            own = result.model.params | frozen
            merged = base | {"body.1.weight": base["body.1.weight"] + own["body.1.lora_B"] @ own["body.1.lora_A"]}
            x, hidden = inputs_of_layers(plan, merged, result.participant, task)
            gram, head = x.square().sum(0).diag(), hidden.T @ hidden
            backbone.append(gram)
            heads.append(0.5 * head + 0.5 * head.diag().diag())
            product = own["body.1.lora_B"] @ own["body.1.lora_A"]
            pulled = pulled + (product @ gram if kind == "B" else own["body.1.lora_A"] @ gram)
            pulled_head = pulled_head + own["head.weight"] @ heads[-1]
        theta = snapshots[number + 1].state["theta"]
        total = torch.stack(backbone).sum(0)
        if kind == "B":
            a = frozen["body.1.lora_A"]
            expected = pulled @ a.T @ torch.linalg.pinv(a @ total @ a.T)
        else:
            expected = pulled @ torch.linalg.pinv(total)
        assert torch.allclose(theta[f"body.1.lora_{kind}"], expected, rtol=0, atol=1e-8)
        summed = torch.stack(heads).sum(0)
        assert torch.allclose(theta["head.weight"] @ summed, pulled_head, rtol=0, atol=1e-7)
        shares = results.shares("examples")
        bias = sum(s * r.model.params["head.bias"] for s, r in zip(shares, results, strict=True))
        assert torch.allclose(theta["head.bias"], bias, rtol=0, atol=1e-12)
        residual = theta["body.1.lora_B"] @ theta["body.1.lora_A"]
        if number % 3 == 2:
            assert len(exchange) == 2
            ends = [inputs_of_layers(plan, base, r.participant, task)[0].square().sum(0) for r in results]
            residuals.append(residual)
            task_grams.append(torch.stack(ends).sum(0).diag())
            weights = sum(r @ g for r, g in zip(residuals, task_grams, strict=True))
            update = weights @ torch.linalg.pinv(torch.stack(task_grams).sum(0))
            found = snapshots[number + 1].state["global"].params["body.1.weight"] - base["body.1.weight"]
            assert torch.allclose(found, update, rtol=0, atol=1e-8)
        else:
            assert len(exchange) == 1


def test_the_memory_does_not_grow_with_the_tasks() -> None:
    sizes = []
    for tasks in (2, 6):
        snapshots = helpers.snapshots(helpers.plan(*STREAM, f"tasks.number={tasks}", "rounds=6").engine())
        memory = snapshots[-1].state["memory"]
        assert memory["body.1"]["tasks"] == tasks - 1
        sizes.append(sum(tensor.numel() for tensor in P.tensors(memory)))
    assert sizes[0] == sizes[1]


def test_a_task_whose_last_round_was_lost_is_remembered_with_its_last_grams() -> None:
    plan = helpers.plan(*STREAM, *HEAVY)
    engine = plan.engine()
    before = helpers.snapshots(engine)[2]
    after, _ = engine.step(replace(before, round=3))
    memory, state = after.state["memory"]["body.1"], before.state
    assert memory["tasks"] == 1
    residual = state["theta"]["body.1.lora_B"] @ state["theta"]["body.1.lora_A"]
    assert torch.allclose(memory["residuals"], residual, rtol=0, atol=1e-12)
    assert torch.equal(memory["gram"], state["grams"]["body.1"])


def test_the_backbone_goes_out_once_and_factors_each_round(run: tuple[Plan, Spied, list[Snapshot]]) -> None:
    _, _, snapshots = run
    down = [b.costs.bytes_down - a.costs.bytes_down for a, b in itertools.pairwise(snapshots)]
    up = [b.costs.bytes_up - a.costs.bytes_up for a, b in itertools.pairwise(snapshots)]
    state = snapshots[1].state
    whole, base = P.nbytes(state["theta"].values()), P.nbytes(state["base"].values())
    head = P.nbytes(t for name, t in state["theta"].items() if name.startswith("head"))
    factor = {f: P.nbytes([state["theta"][f"body.1.lora_{f}"]]) for f in "AB"}
    grams = 8 * (16 + 64 * 64)
    assert down[:4] == [5 * (whole + base), 5 * whole, 2 * 5 * whole, 5 * whole]
    assert up[:3] == [
        5 * (factor["B"] + head + grams),
        5 * (factor["A"] + head + grams),
        5 * (factor["B"] + head + grams + 8 * 16),
    ]


def test_grams_on_the_mean_of_all_tasks_as_in_the_authors_code() -> None:
    plan, spied, snapshots = played("merging.gram.model=task_mean", "model.hidden=[5,4]", "rounds=6", "tasks.number=2")
    assert len(spied.rounds[0]) == 1
    (jobs, results), (asked, measured) = spied.rounds[3]
    assert not any(job.probes for job in jobs)
    assert all(job.is_measurement for job in asked)
    base, memory = snapshots[0].state["global"].params, snapshots[4].state["memory"]
    for result, found in zip(results, measured, strict=True):
        own = result.model.params | jobs[0].frozen["factors"]
        params = dict(base)
        for layer in ("body.1", "body.3"):
            residual = own[f"{layer}.lora_B"] @ own[f"{layer}.lora_A"]
            params[f"{layer}.weight"] = base[f"{layer}.weight"] + (memory[layer]["residuals"] + residual) / 2
        _, hidden = inputs_of_layers(plan, params, result.participant, 1)
        assert torch.allclose(found.probes["gram"]["body.3"], hidden.square().sum(0), rtol=0, atol=1e-9)
    paid = snapshots[4].costs.bytes_down - snapshots[3].costs.bytes_down
    assert paid == 5 * P.nbytes(snapshots[4].state["theta"].values())


@pytest.mark.parametrize(
    ("option", "same_as_default"),
    [
        ("factor_merge=fedavg", False),
        ("head_merge=fedavg", False),
        ("gram.backbone_offdiag=1.0", False),
        ("gram.head_offdiag=0", False),
        ("task_merge=mean", False),
        ("task_merge=sum", False),
        ("task_merge=none", False),
        ("order=[B]", False),
        ("order=[A]", False),
        ("order=[A,B]", False),
        ("lora.rank=1", False),
        ("gram.passes=3", True),
        ("solve_dtype=float64", True),
    ],
)
def test_every_switch_switches(run: tuple[Plan, Spied, list[Snapshot]], option: str, same_as_default: bool) -> None:
    _, _, expected = run
    _, _, found = played(f"merging.{option}")
    same = helpers.close(found[-1].state["global"].params, expected[-1].state["global"].params, 1e-9)
    assert same == same_as_default


def test_only_means_is_fedavg_of_the_factor() -> None:
    """With means in place of all closed forms a round with one task is FFA-LoRA's."""
    line = ["merging.order=[B]", "merging.factor_merge=fedavg", "merging.head_merge=fedavg", "merging.task_merge=mean"]
    plan = helpers.plan("merging=lorm", *line, *HEAVY)
    jobs: list[Job] = []
    spied = Spied(plan.method)  # type: ignore[arg-type]
    after = helpers.snapshots(helpers.engine_of(plan, spied))[1]  # type: ignore[arg-type]
    jobs, results = spied.rounds[0][0]
    assert not any(job.probes for job in jobs)
    assert after.state["memory"] == {}
    assert helpers.close(results.mean("examples").params, {n: after.state["theta"][n] for n in jobs[0].start.params})


def test_augmented_passes_see_augmented_inputs() -> None:
    line = ["augmentation=standard", "augmentation.crop=1", "merging.gram.passes=2"]
    _, spied, _ = played("rounds=3", *line)
    _, plainly, _ = played("rounds=3")
    grams: list[list[Result]] = [list(one.rounds[0][0][1]) for one in (spied, plainly)]
    for twice, once in zip(*grams, strict=True):
        ratio = float(twice.probes["gram"]["body.1"].sum() / once.probes["gram"]["body.1"].sum())
        assert 0.8 < ratio < 2  # zeros are shifted in


def test_it_warns_of_one_task_and_of_a_random_backbone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["merging=lorm", "rounds=1", "dataset=synthetic", "dataset.train=400", "dataset.test=60", "ui=plain"]
    told = call("train", *line).both
    assert "this run has one task; try tasks.number=5" in told
    assert "this one is random; try start=FILE" in told


class Grouped(nn.Module):
    """With a layer that has no Gram matrix."""

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten())
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def test_a_layer_without_a_gram_matrix_is_refused_or_averaged() -> None:
    own = [f"model={{_target_: {__name__}.Grouped}}"]
    with pytest.raises(ConfigError, match=r"merging.lora.targets: 'body.1' is no linear layer .* factor_merge=fedavg"):
        helpers.plan("merging=lorm", "~model", f"+{own[0]}")
    left_out = helpers.plan("merging=lorm", "~model", f"+{own[0]}", "merging.lora.targets=[body.0]")
    assert left_out.method.init(left_out.federation)["layers"] == ["body.0"]


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"merging.order: got \[\]: name the factor"):
        helpers.plan("merging=lorm", "merging.order=[]")
