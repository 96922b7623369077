"""Launchers of a sweep: the same numbers in other processes, and what happens when those die or are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import TINY, call, checkpoint_rounds, done, rows, said, start, status_of, tables

from hybridfl import launchers, sweep_work
from hybridfl.config import Composed, Composer
from hybridfl.launchers import Basic, Joblib, SubmititLocal, SubmititSlurm
from hybridfl.plan import DataCache, settings_of
from hybridfl.sweep_jobs import cores_of, with_cores
from hybridfl.sweep_line import sweep_line
from hybridfl.sweep_pool import Pool
from hybridfl.sweep_work import workforce

SLOW = """
import os, time
from pathlib import Path
from hybridfl.methods.fedavg import FedAvg


class Slow(FedAvg):
    '''Says who works on which seed, and waits in its second round for a file.'''

    def round(self, state, now):
        if now.index == 1:
            with open("workers.txt", "a") as file:
                file.write(f"{self.seed} {os.getpid()}\\n")
            while not Path(f"go-{self.seed}").exists():
                time.sleep(0.01)
        return (yield from super().round(state, now))

    def init(self, federation):
        self.seed = federation.seed
        return super().init(federation)
"""
READER = """
import os
from hybridfl.data.synthetic import Synthetic


class Reader:
    def load(self, root):
        with open("read.txt", "a") as file:
            file.write(f"{os.getpid()}\\n")
        return Synthetic(train=200, test=100).load(root)
"""
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
SLOWLY = ("--config-dir", "my_conf", *TINY, "baseline=slow")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    for name in [name for name in sys.modules if name.startswith("launched_")]:
        monkeypatch.delitem(sys.modules, name)
    for group, name, text in (("baseline", "slow", "launched_slow.Slow"), ("dataset", "read", "launched_data.Reader")):
        (tmp_path / "my_conf" / group).mkdir(parents=True)
        (tmp_path / "my_conf" / group / f"{name}.yaml").write_text(f"# For tests.\n_target_: {text}\n")
    (tmp_path / "launched_slow.py").write_text(SLOW)
    (tmp_path / "launched_data.py").write_text(READER)


def until(found: Callable[[], Any], seconds: float = 60) -> Any:
    """What ``found`` gives as soon as that is something."""
    last = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.02)
    return value


def working(*seeds: int) -> Callable[[], dict[int, int]]:
    """The processes by seed, once all of these seeds have one: which of several starts first is chance."""

    def found() -> dict[int, int]:
        lines = Path("workers.txt").read_text().split("\n")[:-1] if Path("workers.txt").exists() else []
        pairs = dict(tuple(map(int, line.split())) for line in lines)
        return pairs if set(seeds) <= pairs.keys() else {}

    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def composed(*overrides: str) -> Composed:
    with Composer() as composer:
        return composer.compose(overrides)


# -- the line --------------------------------------------------------------------------------------------------------


def test_words_for_the_launcher_are_told_from_those_for_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda module: module)
    line = sweep_line(["seed=0,1", "hydra/launcher=joblib", "rounds=2", "hydra.launcher.n_jobs=3"])
    assert line.overrides == ("seed=0,1", "rounds=2")
    assert line.launcher == Joblib(3)
    assert sweep_line(["seed=0,1"]).launcher == Basic()
    local = sweep_line(["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.launcher.setup=[a,b]"])
    assert local.launcher == SubmititLocal(timeout_min=5, setup=("a", "b"))
    assert sweep_line(["hydra.sweeper.params.seed=1"]).overrides == ("hydra.sweeper.params.seed=1",)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("hydra/launcher=jobli", "hydra/launcher: got 'jobli'. Did you mean 'joblib'? Valid: basic, joblib,"),
        ("hydra/launcher=joblib hydra.launcher.njobs=2", "hydra.launcher.njobs: unknown key. Did you mean 'n_jobs'?"),
        ("hydra/launcher=joblib hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs: got 0; nearest valid values: 1, or"),
        ("hydra/launcher=joblib hydra.launcher.n_jobs=a", "hydra.launcher.n_jobs: got 'a': expected a whole number"),
        ("hydra/launcher=joblib hydra.launcher.n_jobs=1,2", "hydra.launcher.n_jobs: got '1,2': there is one for all"),
        ("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs: unknown key."),
        ("+hydra/launcher=joblib", "+hydra/launcher: there is one always; write hydra/launcher=VALUE."),
        ("hydra/launcher=submitit_local hydra.launcher.timeout_min=0", "hydra.launcher.timeout_min: got 0"),
        ("hydra/launcher=submitit_slurm", "hydra/launcher: got 'submitit_slurm', and this machine has no srun"),
        ("hydra/sweeper=optun", "hydra/sweeper: got 'optun'."),
    ],
)
def test_wrong_words_are_refused(words: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda module: module)
    monkeypatch.setattr(launchers, "which", lambda name: None)
    answer = call("train", "-m", *TINY, "seed=0,1", *words.split())
    assert (answer.status, answer.err.partition(problem)[0]) == (2, "hybridfl: ")
    assert not Path("outputs").exists()


def test_a_launcher_is_for_sweeps() -> None:
    answer = call("train", *TINY, "hydra/launcher=joblib")
    assert answer.status == 2
    assert "hydra/launcher: got 'joblib', which is for a sweep: type -m" in answer.err


@pytest.mark.parametrize(("name", "extra"), [("joblib", "joblib"), ("submitit_local", "submitit")])
def test_a_missing_extra_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda module: None)
    answer = call("train", "-m", *TINY, "seed=0,1", f"hydra/launcher={name}")
    assert answer.status == 2
    assert f"got '{name}', which needs the extra '{extra}': pip install 'hybridfl[{extra}]'" in answer.err
    assert not Path("outputs").exists()


# -- cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "n_jobs", "executor", "number", "each"),
    [
        (8, -1, "executor=sequential", 8, 1),
        (8, -2, "executor=sequential", 7, 1),
        (8, -20, "executor=sequential", 1, 1),
        (8, 3, "executor=auto", 3, 2),
        (8, -1, "executor.threads=3", 2, 4),
        (8, 8, "executor.threads=3", 2, 4),
        (8, -1, "executor=workers executor.number=4", 2, 4),
        (2, 5, "executor.threads=4", 1, 4),
    ],
)
def test_cores_are_shared_without_handing_out_any_twice(
    cores: int, n_jobs: int, executor: str, number: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.setattr(sweep_work, "_cores", lambda: cores)
    one = composed(*executor.split())
    force = workforce(Joblib(n_jobs), [one] * 20, settings_of(one)[0], tmp_path, DataCache())
    pool: Pool = force.work.__self__  # type: ignore[attr-defined]
    assert (force.number, pool.number, pool.cores) == (number, number, each)
    assert bool(force.notes) == (n_jobs > number)
    share = with_cores(one, pool.cores)
    assert number * cores_of(share) <= max(cores, cores_of(one))


def test_there_are_no_more_workers_than_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_work, "_cores", lambda: 8)
    one = composed()
    assert workforce(Joblib(), [one] * 3, settings_of(one)[0], tmp_path, DataCache()).number == 3
    assert workforce(SubmititLocal(cpus_per_task=3), [one] * 3, settings_of(one)[0], tmp_path, DataCache()).number == 2
    slurm = SubmititSlurm(array_parallelism=7)
    assert workforce(slurm, [one] * 9, settings_of(one)[0], tmp_path, DataCache()).number == 7


def test_the_share_of_the_cores_is_for_executors_that_take_all() -> None:
    auto = composed("executor=auto")
    assert with_cores(auto, 3).config["executor"]["number"] == 3
    assert with_cores(composed("executor.threads=2"), 5).config["executor"]["number"] == 2
    assert auto.config["executor"]["number"] is None
    for typed in ("executor.number=2", "executor=sequential"):
        one = composed(*typed.split())
        assert with_cores(one, 3) is one


def test_devices_are_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(3, 1, ["2", "5"])
    assert [pool._environment(slot) for slot in range(3)] == [{"CUDA_VISIBLE_DEVICES": k} for k in "252"]
    assert Pool(1, 1)._environment(0) == {}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep_work._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a")
    assert sweep_work._gpus() == ["3", "GPU-a"]


# -- workers ---------------------------------------------------------------------------------------------------------


def test_workers_have_the_numbers_of_one_process_and_read_data_once(tmp_path: Path) -> None:
    without = [word for word in TINY if not word.startswith("dataset")]
    line = ("--config-dir", "my_conf", *without, "dataset=read", "baseline=fedavg,none", "seed=0,1")
    alone = done("-m", *line, "output_dir=alone")
    assert Path("read.txt").read_text().split() == [str(os.getpid())]
    shared = done("-m", *line, *JOBLIB)
    jobs = rows(shared / "runs.csv")
    assert [(job["run"], job["status"]) for job in jobs] == [(job["run"], "done") for job in rows(alone / "runs.csv")]
    for job in jobs:
        assert tables(tmp_path / "outputs" / "runs" / job["run"]) == tables(tmp_path / "alone" / "runs" / job["run"])
    readers = Path("read.txt").read_text().split()[2:]  # those besides this process, which read them once a sweep
    assert 1 <= len(readers) <= 2
    assert len(set(readers)) == len(readers)
    assert str(os.getpid()) not in readers


def test_a_killed_worker_fails_its_job_only(tmp_path: Path) -> None:
    for seed in (0, 2):
        Path(f"go-{seed}").touch()
    process = start(tmp_path, "train", "-m", *SLOWLY, "seed=1,0,2", *JOBLIB)
    pid = until(working(1))[1]
    os.kill(pid, signal.SIGKILL)
    process.join()
    told = said(tmp_path, process)
    assert process.exitcode == 1, told
    assert "baseline=slow seed=1: its worker process was killed by SIGKILL; is there too little memory?" in told
    assert "1 of the sweep's jobs failed" in told
    (sweep,) = Path("outputs/sweeps").iterdir()
    assert [job["status"] for job in rows(sweep / "runs.csv")] == ["failed", "done", "done"]
    Path("go-1").touch()
    assert done("-m", *SLOWLY, "seed=1,0,2") == sweep.resolve()
    assert [job["status"] for job in rows(sweep / "runs.csv")] == ["done"] * 3


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_stop_with_the_sweep_after_their_checkpoints(how: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "train", "-m", *SLOWLY, "seed=0,1,2", *JOBLIB)
    pids = until(working(0, 1))
    assert process.pid is not None
    os.kill(process.pid, how)
    process.join()
    assert process.exitcode == (-9 if how == signal.SIGKILL else 130), said(tmp_path, process)
    if how != signal.SIGKILL:
        assert not any(map(is_alive, pids.values()))
    until(lambda: not any(map(is_alive, pids.values())))
    runs = list(Path("outputs/runs").iterdir())
    assert [status_of(run)["status"] for run in runs] == ["interrupted"] * 2
    assert [checkpoint_rounds(run) for run in runs] == [[1]] * 2
    (sweep,) = Path("outputs/sweeps").iterdir()
    assert [job["status"] for job in rows(sweep / "runs.csv")] == ["pending"] * 3


def test_a_worker_that_is_told_to_stop_leaves_its_job_for_later(tmp_path: Path) -> None:
    Path("go-1").touch()
    process = start(tmp_path, "train", "-m", *SLOWLY, "seed=0,1", *JOBLIB)
    os.kill(until(working(0))[0], signal.SIGTERM)
    process.join()
    told = said(tmp_path, process)
    assert process.exitcode == 1
    assert "1 of the sweep's jobs are left; the same line goes on with them." in told
    (sweep,) = Path("outputs/sweeps").iterdir()
    assert [job["status"] for job in rows(sweep / "runs.csv")] == ["pending", "done"]


def test_fail_fast_stops_the_other_workers(tmp_path: Path) -> None:
    text = SLOW.replace("time.sleep(0.01)", "assert self.seed or not Path('workers.txt').read_text().count('1 ')")
    (tmp_path / "launched_slow.py").write_text(text)
    answer = call("train", "-m", *SLOWLY, "seed=0,1,2", "fail_fast=true", *JOBLIB)
    assert answer.status == 1
    assert [job["status"] for job in rows(answer.folder / "runs.csv")] == ["failed", "pending", "pending"]
    assert not any(map(is_alive, working(0)().values()))


# -- other processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", [(), JOBLIB])
def test_a_run_that_another_process_works_on_is_put_off_and_waited_for(launcher: Sequence[str], tmp_path: Path) -> None:
    line = ("--config-dir", "my_conf", *TINY, "rounds=1", "baseline=fedavg,fedprox")
    folder = done(*line[:-1], "baseline=fedavg")
    (folder / "status.json").unlink()
    code = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print(); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, folder / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin
    assert holder.stdout
    holder.stdout.readline()
    free = threading.Timer(2, holder.communicate)
    free.start()
    answer = call("train", "-m", *line, *launcher)
    free.join()
    assert answer.status == 0
    (put_off,) = [text for text in answer.out.splitlines() if text.startswith("put off: ")]
    assert "baseline=fedavg" in put_off
    assert put_off.endswith(": another process works on it.")
    if not launcher:
        assert answer.out.index("fedprox seed=0") < answer.out.index("Another process works on")
    assert [job["status"] for job in rows(answer.folder / "runs.csv")] == ["done", "done"]


# -- submitit --------------------------------------------------------------------------------------------------------


def test_submitit_runs_jobs_of_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra submitit is not installed")
    Path("go-0").touch()
    text = SLOW.replace("time.sleep(0.01)", "raise ValueError('no file for me')")
    (tmp_path / "launched_slow.py").write_text(text)
    answer = call("train", "-m", *SLOWLY, "seed=0,1", "hydra/launcher=submitit_local")
    assert answer.status == 1
    jobs = rows(answer.folder / "runs.csv")
    assert [job["status"] for job in jobs] == ["done", "failed"]
    assert jobs[1]["error"].startswith("ValueError: no file for me; the traceback is in ")
    assert os.getpid() not in working(0, 1)().values()
    alone = done(*SLOWLY, "seed=0", "output_dir=alone")
    assert tables(alone) == tables(tmp_path / "outputs" / "runs" / jobs[0]["run"])
    logs = [file.read_text() for file in (answer.folder / "submitit").glob("*_log.out")]
    assert any("round 4/4" in log for log in logs)


def test_submitit_jobs_stop_with_the_sweep_and_killed_ones_fail(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra submitit is not installed")
    Path("go-2").touch()
    line = ("train", "-m", *SLOWLY, "seed=0,1,2", "hydra/launcher=submitit_local")
    process = start(tmp_path, *line)
    pids = until(working(0, 1))
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: "failed: " in said(tmp_path, process))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130, said(tmp_path, process)
    assert not any(map(is_alive, working(0, 1)().values()))
    (sweep,) = Path("outputs/sweeps").iterdir()
    jobs = rows(sweep / "runs.csv")
    assert jobs[0]["status"] == "failed"
    assert jobs[0]["error"].startswith("its process ended without a result; its log is ")
    assert jobs[1]["status"] == "pending"
    assert status_of(tmp_path / "outputs" / "runs" / jobs[1]["run"])["status"] == "interrupted"


def test_an_interrupt_while_a_job_is_submitted_is_heard_afterwards() -> None:
    from hybridfl.sweep_submitit import _without_interrupts

    reached = []
    with pytest.raises(KeyboardInterrupt), _without_interrupts():
        signal.raise_signal(signal.SIGINT)
        child = [
            sys.executable,
            "-c",
            "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))",
        ]
        reached.append(subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip())
    assert reached == ["True"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_what_slurm_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit", reason="the extra submitit is not installed")
    from hybridfl.sweep_submitit import Submitted

    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    words = "timeout_min=90 partition=gpu mem_gb=8 gpus_per_node=1 additional_parameters={nice:5} setup=[module load x]"
    monkeypatch.setattr(launchers, "which", lambda name: "/bin/srun")
    typed = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{word}" for word in words.split(" ", 5))]
    options = sweep_line(typed).launcher
    assert isinstance(options, SubmititSlurm)
    submitted = Submitted(options, tmp_path, 4)
    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(**submitted._parameters(3, 0))
    text = executor._make_submission_file_text("the command", "uid")
    asked = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"time=90", "partition=gpu", "mem=8GB", "gpus-per-node=1", "cpus-per-task=3", "nice=5"} <= asked
    assert {"job-name=hybridfl", "signal=USR2@120"} <= asked
    assert "module load x" in text
