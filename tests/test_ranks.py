"""Ranks: the numbers of one process, wrong input said once, and the parts they are made of."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import helpers
import pytest
import torch
from cli_helpers import SMALL_DATA, TINY, call, done, rows, status_of, tables
from ranks_helpers import FEDAVG, done_in_ranks, launch, launch_lines, odd

from hybridfl import parcels
from hybridfl.assignment import task_of
from hybridfl.errors import ConfigError
from hybridfl.executors.ranks import Ranks, shared_out
from hybridfl.executors.vectorized import Vectorized
from hybridfl.group import Group
from hybridfl.local import TRAINING_PASSES
from hybridfl.probes import mean_loss
from hybridfl.types import SERVER, Job, Model
from hybridfl.world import World, world_of


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


# -- the same numbers -------------------------------------------------------------------------------------------------


RUNS = {
    "feddle": [*TINY, "clients.delay=3", "merging.coef.init=warm", "clients.random_updates=0.3"],
    "optimal_averaging": [*FEDAVG, "merging=optimal_averaging", "dtype=float64", "clients.per_round=4"],
    "split_mix": [*FEDAVG, "merging=split_mix", "clients.per_round=4", "dtype=float64"],
    "lorm": [*FEDAVG, "merging=lorm", "dataset.classes=4", "tasks.number=2", "clients.dropout=0.2"],
    "dimat": [*FEDAVG, "merging=dimat", "topology=ring", "initial=different", "start=solo", "start_steps=3"],
    "server_only": [*FEDAVG, "baseline=server_only", "baseline.momentum=0.9", "dtype=float64"],
    "start": [*FEDAVG, "baseline=fedavg", "start=server", "start_steps=3", "rounds=1"],
    "batch_norm": [
        *(text for text in FEDAVG if not text.startswith("model.")),
        *("baseline=fedbuff", "model=resnet20", "model.norm=batch", "model.batch_norm=local", "model.width=0.25"),
        *("dataset.shape=[1,8,8]", "client_optimizer.steps=2", "clients.concurrency=3", "dtype=float64", "rounds=3"),
    ],
}


def test_the_tables_are_those_of_one_process(tmp_path: Path) -> None:
    lines = [["train", *line, "executor=ranks", f"output_dir={name}"] for name, line in RUNS.items()]
    # One launch for all, as starting takes longer than running.
    launched = launch_lines(tmp_path, [lines, lines])
    alone = {name: done(*line, "executor=sequential") for name, line in RUNS.items()}
    assert launched.join(120) == [0, 0], launched.said(0)
    assert launched.said(0).count("run: ") == len(RUNS)
    assert launched.said(1) == ""
    for name, expected in alone.items():
        run = tmp_path / name / "runs" / expected.name
        assert tables(run) == tables(expected), name
        assert "in their last digits" not in (run / "log.txt").read_text()


def test_ranks_in_lock_step(tmp_path: Path) -> None:
    line = [*FEDAVG, "baseline=fedprox", "clients.per_round=5", "dtype=float64"]
    alone = done(*line, "executor=sequential", "output_dir=alone")
    run = done_in_ranks(tmp_path, *line, "executor@executor.inner=vectorized")
    assert status_of(run)["executor"] == "Vectorized"
    pairs = list(zip(rows(run / "metrics.csv"), rows(alone / "metrics.csv"), strict=True))
    assert len(pairs) >= 12
    for one, other in pairs:
        assert one["scope"] == other["scope"]
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-10)


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    run = done(*TINY)
    launched = launch(tmp_path, "train", *TINY, "executor=ranks")
    assert launched.join() == [0, 0]
    assert "already done" in launched.said(0)
    assert launched.said(0).splitlines()[-1] == f"run: {run}"
    assert launched.said(1) == ""


def test_last_digits_that_differ_between_ranks_are_those_of_the_first(tmp_path: Path) -> None:
    line = odd("drift")
    alone = done(*line, "executor=sequential", "output_dir=alone")
    run = done_in_ranks(tmp_path, *line)
    assert tables(run) == tables(alone)
    assert (run / "log.txt").read_text().count("differ in their last digits") == 1


def test_a_dry_run_is_told_once(tmp_path: Path) -> None:
    launched = launch(tmp_path, "train", "--dry-run", *TINY, "executor=ranks")
    assert launched.join() == [0, 0]
    assert launched.said(0).count("checked: it can start") == 1
    assert launched.said(1) == ""
    assert not Path("outputs").exists()


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["executor=ranks", "clients.nummer=3"], "clients.nummer: unknown key. Did you mean 'clients.number'?"),
        (["executor=sequential"], "executor: got sequential, but this is one of 2 processes started together"),
        (["-m", "seed=0,1", "executor=ranks"], "-m: a sweep is work for one process, and this is one of 2"),
        (["executor=ranks", "executor.backend=nccl"], "executor.backend: got nccl, which needs a GPU for every rank"),
    ],
)
def test_wrong_input_is_said_once(tmp_path: Path, line: list[str], told: str) -> None:
    launched = launch(tmp_path, "train", *SMALL_DATA, "device=cpu", *line)
    assert launched.join() == [2, 2]
    assert launched.said(0).startswith(f"hybridfl: {told}")
    assert len(launched.said(0).splitlines()) == 1
    assert launched.said(1) == ""


def test_what_is_wrong_on_one_rank_alone(tmp_path: Path) -> None:
    launched = launch(tmp_path, "train", *TINY, "executor=ranks", ranks=3, own=[[], ["rounds=0"], []])
    assert launched.join() == [2, 2, 2]
    host = socket.gethostname()
    assert launched.said(1).startswith(f"hybridfl: rank 1 of 3 ({host}): rounds: got 0: must be at least 1")
    assert launched.said(0) == launched.said(2) == ""


def test_ranks_of_different_runs(tmp_path: Path) -> None:
    launched = launch(tmp_path, "train", *TINY, "executor=ranks", own=[["seed=0"], ["seed=1"]])
    assert launched.join() == [2, 2]
    assert launched.said(0).startswith("hybridfl: rank 0 has the run ")
    assert "their configs, data, devices or versions of the code differ." in launched.said(0)
    assert launched.said(1) == ""
    assert not Path("outputs").exists()


def test_the_environment() -> None:
    whole = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "one", "MASTER_PORT": "29500"}
    assert world_of(whole) == World(3, 8, 1, "one", 29500)
    assert world_of({}) is None
    assert world_of(whole | {"WORLD_SIZE": "1"}) is None
    for key, value in (("MASTER_ADDR", None), ("RANK", "first"), ("MASTER_PORT", "")):
        broken = {k: v for k, v in (whole | {key: value}).items() if v is not None}
        with pytest.raises(ConfigError, match="start with torchrun, or unset RANK and WORLD_SIZE"):
            world_of(broken)


def test_ranks_within_ranks() -> None:
    answer = call("train", *TINY, "executor=ranks", "executor@executor.inner=ranks")
    assert answer.status == 2
    assert answer.err.startswith("hybridfl: executor.inner: got ranks within ranks;")


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "MASTER_ADDR": "one", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    found = {}
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        if rank < 2:
            found[rank] = [Ranks().device(name) for name in ("auto", "cuda", "cpu", "cuda:0")]
            continue
        with pytest.raises(ConfigError, match="this machine has 2 GPUs and at least 3 ranks"):
            Ranks().device("cuda")
    assert found == {0: ["cuda", "cuda", "cpu", "cuda:0"], 1: ["cuda:1", "cuda:1", "cpu", "cuda:0"]}
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    gpu = torch.device("cuda:1")
    assert [Ranks().backend_for(gpu, name) for name in ("auto", "cuda", "cuda:1")] == ["nccl", "nccl", "gloo"]
    assert Ranks(backend="gloo").backend_for(gpu, "cuda") == "gloo"
    assert Ranks().backend_for(torch.device("cpu"), "auto") == "gloo"


# -- parts ------------------------------------------------------------------------------------------------------------


def test_tasks_are_shared_out_by_their_work() -> None:
    federation = helpers.plan("baseline=fedavg", "clients.number=6", "partitioning.alpha=0.3").federation
    start = federation.fresh_model()
    jobs = [Job(k, start, steps=steps) for k, steps in enumerate([10, 1, 1, 5, 4, 1])]
    jobs += [Job(SERVER, start, steps=0, probes={"loss": mean_loss})]
    tasks = [task_of(federation, job, 0, 3, 0) for job in jobs]
    examples = [len(task.rows) for task in tasks]
    costs = [TRAINING_PASSES * job.steps * min(8, n) for job, n in zip(jobs[:6], examples, strict=False)] + [
        examples[6]
    ]
    shares = shared_out(tasks, 2)
    assert sorted(shares[0] + shares[1]) == list(range(7))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[i] for i in share) for share in shares]
    # Whoever ends last had the least to do before its last task.
    assert abs(loads[0] - loads[1]) <= max(costs)
    assert max(loads) <= sum(costs) / 2 + max(costs) / 2
    assert shared_out(tasks[:1], 3) == [[0], [], []]
    assert shared_out([], 2) == [[], []]


def test_a_parcel_holds_what_was_packed() -> None:
    shared, known = torch.arange(6.0).view(2, 3), torch.ones(3)
    value = {
        "images": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "turned": torch.randn(3, 4, dtype=torch.float64).t(),
        "piece": torch.arange(10)[::3],
        "twice": [shared, shared],
        "model": Model({"w": shared, "k": known}, {"n": torch.tensor(3)}),
        "kinds": [torch.tensor([True, False]), torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)],
        "grad": torch.ones(2, requires_grad=True),
        "loss": float("nan"),
        3: (None, "text", 2**70),
    }
    cpu = torch.device("cpu")
    parcel = parcels.pack(value, cpu, [shared.clone(), known])
    mine = torch.full((3,), 7.0)
    found = parcels.unpack(parcel, cpu, [torch.zeros(1), mine])
    assert found["twice"][0] is found["twice"][1] is found["model"].params["w"]
    assert found["model"].params["k"] is mine
    assert found["images"].stride() == value["images"].stride()
    assert found["turned"].stride() == value["turned"].stride()
    assert not found["grad"].requires_grad
    assert isinstance(found["model"], Model)
    assert found.pop("loss") != value.pop("loss")
    found["model"].params["k"] = known
    assert helpers.identical(found, value)
    parcel.zero_()
    assert torch.equal(found["twice"][0], shared)  # in memory of its own


def test_a_checksum_sees_the_last_bit() -> None:
    tensor = torch.randn(4, 5, dtype=torch.float64)
    value = {"a": [tensor, 1.5], "m": Model({"w": tensor.t()}, {})}
    first = parcels.checksum(value)
    assert first == parcels.checksum({"a": [tensor.clone(), 1.5], "m": Model({"w": tensor.t().clone()}, {})})
    nudged = tensor.clone()
    nudged[2, 3] = torch.nextafter(nudged[2, 3], torch.tensor(9.0, dtype=torch.float64))
    others = [
        {"a": [nudged, 1.5], "m": Model({"w": tensor.t()}, {})},
        {"a": [tensor, 1.5 + 2**-52], "m": Model({"w": tensor.t()}, {})},
        {"a": [tensor, 1.5], "m": Model({"w": tensor.t().reshape(4, 5)}, {})},
        {"b": [tensor, 1.5], "m": Model({"w": tensor.t()}, {})},
        {"a": [tensor], "m": Model({"w": tensor.t()}, {})},
    ]
    assert len({first, *map(parcels.checksum, others)}) == 6


def test_a_process_by_itself_has_nothing_to_exchange() -> None:
    group, value = Group(), object()
    assert group.gather("x", 3) == [3]
    assert group.share(value) is value
    assert group.agreed(value, of=object()) is value
    group.look()
    assert group.end(3) == 3
    with pytest.raises(ValueError), group.telling():
        raise ValueError
    assert Ranks(inner=Vectorized(threads=2)).threads == 2


def test_what_is_stored_is_what_was_typed(tmp_path: Path) -> None:
    run = done(*TINY, "executor=ranks", "rounds=1")
    assert json.loads((run / "status.json").read_text())["executor"] == "Sequential"
    shutil.rmtree(run)
    assert done(*TINY, "rounds=1") == run
