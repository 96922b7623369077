"""What goes to a worker process and comes back, and errors in a task."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import executor_rules
import helpers
import pytest
import torch
import workers_helpers
from cli_helpers import TINY, call, checkpoint_rounds
from torch import Tensor
from workers_helpers import CLIENTS, DEADLY, SHARED, agree, alive, federation, harm, pids, run, same, tasks, until

from hybridfl import plan as planning
from hybridfl.assignment import task_of
from hybridfl.errors import ConfigError, HybridflError
from hybridfl.executors import pool as pools
from hybridfl.executors import workers
from hybridfl.executors.messages import Kind
from hybridfl.executors.parcel import Parcel
from hybridfl.executors.sequential import Sequential
from hybridfl.executors.workers import Workers
from hybridfl.local import Task
from hybridfl.probes import Gram, logits
from hybridfl.types import SERVER, Job, Model

executor = workers_helpers.executor


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


# -- what goes to a worker and comes back ------------------------------------------------------------------------------


def test_a_result_has_the_start_of_its_job_and_what_came_back_as_it_was_sent(executor: Workers) -> None:
    tensor = torch.ones(4)
    probes = {"any": executor_rules.of_any_kind}
    for steps in (0, None):
        given = tasks(steps=steps, probes=probes, ctx={"tensor": tensor})
        for task, outcome in zip(given, run(executor, given), strict=True):
            assert outcome.result.start is task.job.start
            assert outcome.result.probes["any"]["given"] is tensor
            if steps == 0:
                assert all(outcome.result.model.params[n] is t for n, t in task.job.start.params.items())


def test_probes_of_any_structure(executor: Workers) -> None:
    def make() -> list[Task]:
        probes = {"any": executor_rules.of_any_kind, "gram": Gram(), "logits": logits}
        return tasks(probes=probes, ctx={"tensor": torch.ones(2)})

    def compared(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return same(a, b)
        if isinstance(a, dict):
            return list(a) == list(b) and all(compared(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return type(a) is type(b) and len(a) == len(b) and all(map(compared, a, b))
        return type(a) is type(b) and bool(a == b)

    for here, there in zip(run(Sequential(), make()), run(executor, make()), strict=True):
        assert compared(here.result.probes, there.result.probes)
    nested = there.result.probes["any"]["nested"][0]
    assert nested["a"] is nested["again"]


def test_the_state_of_an_optimiser_goes_there_and_back(executor: Workers) -> None:
    from hybridfl.optimizers import SGD, Adam

    for work in (SGD(momentum=0.9), Adam()):

        def make(executor: Any, work: Any = work) -> list[Task]:
            first = run(executor, tasks(work=work, keep_optimizer=True))
            states = [outcome.result.optimizer_state for outcome in first]
            again = tasks(work=work, keep_optimizer=True)
            return [replace(t, job=replace(t.job, optimizer_state=s)) for t, s in zip(again, states, strict=True)]

        ends = [run(each, make(each)) for each in (Sequential(), executor)]
        states = [[outcome.result.optimizer_state for outcome in end] for end in ends]
        assert states[0][0]
        assert helpers.identical(*states)


def test_what_a_rule_does_to_its_tensors_stays_with_the_worker(executor: Workers) -> None:
    tensor = torch.zeros(3)
    run(executor, tasks(loss=executor_rules.writing, ctx={"tensor": tensor}))
    assert tensor.tolist() == [0, 0, 0]


def test_clients_in_other_processes_with_one_thread_and_the_server_in_this_one(executor: Workers) -> None:
    probes = {"process": executor_rules.process, "threads": executor_rules.threads}
    jobs = [Job(k, federation().start, steps=0, probes=probes) for k in (0, SERVER, 1, SERVER, 2)]
    given = [task_of(federation(), job, 0, 1, occurrence=n) for n, job in enumerate(jobs)]
    found = [outcome.result for outcome in run(executor, given)]
    assert [result.participant for result in found] == [0, SERVER, 1, SERVER, 2]
    assert [result.probes["process"] == os.getpid() for result in found] == [False, True, False, True, False]
    assert {int(result.probes["process"]) for result in found} - {os.getpid()} <= pids(executor)
    assert {int(result.probes["threads"]) for result in found} == {1}
    assert run(executor, []) == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is another library's")
def test_a_worker_keeps_the_memory_it_uses_again_and_again() -> None:
    with Workers(1) as executor:
        (outcome,) = run(executor, tasks(steps=0, probes={"faults": executor_rules.page_faults})[:1])
    assert outcome.result.probes["faults"] < 1000  # of 30,720


def test_both_processes_have_the_same_examples_in_memory() -> None:
    def files(pid: int) -> dict[str, tuple[int, ...]]:
        """Memory that is shared without a name: its number, and from where to where."""
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        found = [line.split() for line in lines if "memfd:hybridfl" in line]
        return {words[4]: tuple(int(end, 16) for end in words[0].split("-")) for words in found}

    with Workers(2) as executor:
        run(executor, tasks())
        x = federation().bench.x.data_ptr()
        (ours,) = [n for n, (low, high) in files(os.getpid()).items() if low <= x < high]
        for pid in pids(executor):
            assert ours in files(pid)
            until(lambda pid=pid: len(files(pid)) == 2)  # and the nets; a round's tasks are forgotten


def test_a_worker_works_where_the_program_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its folder, with the modules it finds, whatever they were when the first worker was started."""
    pools.template()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    Path("made_later.py").write_text(Path(executor_rules.__file__).read_text())
    monkeypatch.syspath_prepend(os.getcwd())
    rule = importlib.import_module("made_later").harmful
    with Workers(1) as executor:
        run(executor, tasks(loss=rule, ctx={"harm": "nothing", "once": True, "flag": "relative"}))
    assert Path("relative").exists()


def test_results_hold_no_descriptors(executor: Workers) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    run(executor, tasks())
    before, kept = count(), [run(executor, tasks()) for _ in range(3)]
    assert count() == before
    assert len(kept) == 3
    assert Kind.TASKS not in executor._pool[0].parcels  # whose tensors would be kept until the next round


def test_a_worker_lives_until_the_executor_is_closed() -> None:
    executor = Workers(2)
    run(executor, tasks())
    before = pids(executor)
    assert len(before) == 2
    run(executor, tasks())
    assert pids(executor) == before
    executor.close()
    assert not any(map(alive, before))
    run(executor, tasks())
    assert not pids(executor) & before
    executor.close()


def test_no_more_workers_than_tasks() -> None:
    with Workers(4) as executor:
        run(executor, tasks()[:2])
        assert len(pids(executor)) == 2


def test_another_net_at_a_later_time(executor: Workers) -> None:
    """Widths come to the bench as jobs ask for them."""
    fed = helpers.plan("merging=split_mix", "clients.number=5").federation

    def result(executor: Any, width: float) -> Any:
        net = fed.net_at(width)
        start = Model({n: p.detach().clone() for n, p in net.named_parameters()}, {})
        task = task_of(fed, Job(0, start, width=width), 0, 1, occurrence=0)
        return executor.run(fed.bench, [task])[0].result.model

    for width in (1.0, 0.5, 0.25, 1.0):
        assert helpers.identical(result(executor, width), result(Sequential(), width))


def test_the_longest_tasks_come_first() -> None:
    given = tasks()
    waiting = pools._Round(pools.Pool(1, None), given, Parcel([])).waiting
    work = [given[i].steps * min(8, len(given[i].rows)) for i in waiting]
    assert work == sorted(work)
    assert work[0] < work[-1]
    measured = [replace(task, steps=0, job=replace(task.job, probes={"logits": logits})) for task in given]
    assert [len(task.rows) for task in sorted(measured, key=pools._size)] == sorted(len(task.rows) for task in measured)


# -- errors in a task --------------------------------------------------------------------------------------------------


def test_an_error_in_a_rule_is_that_of_sequential_and_ends_no_worker(executor: Workers) -> None:
    run(executor, tasks())
    before = pids(executor)
    for kind in ("text", "stop"):
        found: list[BaseException] = []
        for each in (Sequential(), executor):
            with pytest.raises((ValueError, SystemExit)) as caught:
                run(each, harm(kind, only=None))
            found.append(caught.value)
        assert (type(found[0]), str(found[0])) == (type(found[1]), str(found[1]))
        assert "executor_rules.py" in str(found[1].__cause__)
        assert "in harmful" in str(found[1].__cause__)
    with pytest.raises(HybridflError, match=r"Unpicklable: cannot travel") as caught:
        run(executor, harm("unpicklable"))
    assert "raise Unpicklable" in str(caught.value.__cause__)
    assert pids(executor) == before
    assert agree(executor, tasks)


def test_the_error_is_that_of_the_first_task_in_order(executor: Workers) -> None:
    given = tasks()
    for k in (1, 3):
        given[k] = harm(f"client {k}", only=k)[k]
    with pytest.raises(ValueError, match="broken by client 1"):
        run(executor, given)


def test_after_an_error_only_tasks_before_it_are_done() -> None:
    *others, longest = sorted(CLIENTS, key=lambda k: pools._size(tasks()[k]))
    order = [*others[:2], longest, *others[2:]]
    given = []
    for k in order:
        ctx = {"harm": "text" if k == longest else "nothing", "once": True, "flag": str(Path(f"client {k}").absolute())}
        given.append(tasks(k, loss=executor_rules.harmful, ctx=ctx)[k])
    with Workers(1) as executor, pytest.raises(ValueError, match="broken by text"):
        run(executor, given)
    assert [Path(f"client {k}").exists() for k in order] == [True, True, True, False, False]


def test_a_failed_run_has_the_workers_traceback_in_its_log() -> None:
    Path("deadly").write_text("text")
    answer = call("train", *DEADLY, *SHARED)
    assert answer.status == 1
    assert "ValueError: broken by text; the traceback is in" in answer.err
    (folder,) = Path("outputs/runs").iterdir()
    log = (folder / "log.txt").read_text()
    assert log.index("in harmful") < log.index("The above exception was the direct cause") < log.index("experiment.py")
    assert checkpoint_rounds(folder) == [2]


LOCAL = {
    "a lambda": lambda *_: torch.zeros(()),
    "a class of the program": type("Own", (), {"__module__": "__main__"})(),
}


@pytest.mark.parametrize("what", LOCAL)
def test_what_cannot_be_sent_is_refused(executor: Workers, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(executor, tasks(loss=LOCAL[what]))
    assert caught.value.key == "executor"
    assert ("lambda" if what == "a lambda" else "Own is defined in the program itself") in str(caught.value)
    assert "executor=sequential" in str(caught.value)
    assert agree(executor, tasks)


def test_a_module_that_workers_cannot_import(executor: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("made_in_memory")
    exec("def rule(*arguments): ...", module.__dict__)
    monkeypatch.setitem(sys.modules, "made_in_memory", module)
    with pytest.raises(HybridflError, match=r"cannot find what its work needs: No module named 'made_in_memory'"):
        run(executor, tasks(loss=module.rule))


def test_a_graphics_card_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "device_of", lambda name: torch.device("cuda"))
    answer = call("train", *TINY, "executor=workers")
    assert answer.status == 2
    wanted = "got workers, which share the cores of a CPU, with device=cuda; nearest valid choice: sequential, or device=cpu."
    assert answer.err == f"hybridfl: executor: {wanted}\n"
    bench = federation().bench
    with pytest.raises(ConfigError, match="with device=meta"):
        Workers().run(replace(bench, x=bench.x.to("meta")), [])


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert workers.cores() == 3
    assert Workers().threads == 1
