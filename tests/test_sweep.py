"""Sweeps: shared runs, skipped baselines, failures that stay alone, presets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_helpers import TINY, call, checkpoint_rounds, done, rows, said, start, status_of, tables

from hybridfl import experiment
from hybridfl.config import choices
from hybridfl.engine import Engine


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # A module of one test must not be found by the next.
    for name in [name for name in sys.modules if name.startswith("sweep_")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of the method with every run that is really started."""
    names: list[str] = []
    begin = Engine.begin

    def counted(engine: Engine) -> object:
        names.append(type(engine.method).__name__)
        return begin(engine)

    monkeypatch.setattr(Engine, "begin", counted)
    return names


# -- folder ----------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_sweep(tmp_path: Path, begun: list[str]) -> None:
    line = (*TINY, "seed=0,1", "baseline=none,fedavg")
    sweep = done("-m", *line)
    assert sweep.parent == tmp_path / "outputs" / "sweeps"
    jobs = rows(sweep / "runs.csv")
    assert list(jobs[0]) == ["run", "status", "method", "overrides", "error", "cell"]
    assert [(job["method"], job["status"], job["error"]) for job in jobs] == [
        ("feddle", "done", ""),
        ("fedavg", "done", ""),
        ("feddle", "done", ""),
        ("fedavg", "done", ""),
    ]
    assert [job["overrides"].split()[-2:] for job in jobs] == [
        [f"seed={seed}", f"baseline={name}"] for seed in (0, 1) for name in ("none", "fedavg")
    ]
    runs = {path.name for path in (tmp_path / "outputs" / "runs").iterdir()}
    assert {job["run"] for job in jobs} == runs
    assert len(runs) == 4
    assert (sweep / "overrides.txt").read_text().split() == list(line)
    assert begun == ["Feddle", "FedAvg"] * 2


def test_a_sweep_ends_by_printing_its_table() -> None:
    answer = call("train", "-m", *TINY, "baseline=none,fedavg", "ui=none")
    *table, last = answer.out.splitlines()
    assert last.startswith("sweep: ")
    assert any(line.split()[:1] == ["feddle"] for line in table)
    assert any(line.split()[:1] == ["fedavg"] for line in table)


def test_the_same_line_is_the_same_sweep_and_trains_nothing(begun: list[str]) -> None:
    line = ("-m", *TINY, "seed=0,1", "baseline=fedavg")
    first = done(*line)
    table = (first / "runs.csv").read_text()
    del begun[:]
    assert done(*line) == first
    assert begun == []
    assert (first / "runs.csv").read_text() == table
    assert done("-m", *TINY, "seed=0,2", "baseline=fedavg") != first


def test_a_single_run_and_a_sweep_share_runs(begun: list[str]) -> None:
    single = done(*TINY, "baseline=fedavg")
    sweep = done("-m", *TINY, "baseline=fedavg,fedprox")
    assert begun == ["FedAvg", "FedProx"]
    assert rows(sweep / "runs.csv")[0]["run"] == single.name
    del begun[:]
    assert done(*TINY, "baseline=fedprox").name == rows(sweep / "runs.csv")[1]["run"]
    assert begun == []


def test_a_glob_takes_every_baseline(begun: list[str]) -> None:
    sweep = done("-m", *TINY, "baseline=glob(fed*)", "rounds=1")
    expected = [name for name in choices("baseline") if name.startswith("fed")]
    assert {"fedavg", "fedavg_server_finetune", "fedbuff", "fedprox"} <= set(expected)
    assert [job["method"] for job in rows(sweep / "runs.csv")] == expected
    assert len(begun) == len(expected)


def test_an_interrupted_sweep_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, begun: list[str]) -> None:
    step = Engine.step

    def stopped(engine: Engine, before: object) -> object:
        if engine.federation.seed == 1:
            raise KeyboardInterrupt
        return step(engine, before)  # type: ignore[arg-type]

    line = ("-m", *TINY, "baseline=fedavg", "seed=0,1,2")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopped)
        assert call("train", *line).status == 130
    (sweep,) = Path("outputs/sweeps").iterdir()
    assert [job["status"] for job in rows(sweep / "runs.csv")] == ["done", "pending", "pending"]
    assert [status_of(run)["status"] for run in Path("outputs/runs").iterdir()].count("interrupted") == 1
    del begun[:]
    assert done(*line) == sweep.resolve()
    assert [job["status"] for job in rows(sweep / "runs.csv")] == ["done"] * 3
    assert len(begun) == 1  # the interrupted one has a checkpoint


# -- skipped and failed ----------------------------------------------------------------------------------------------


def test_a_baseline_without_what_it_requires_is_skipped_with_the_reason(begun: list[str]) -> None:
    without = [word for word in TINY if not word.startswith("server_data.")]
    answer = call("train", "-m", *without, "server_data=none", "baseline=fedavg,server_only,local_only", "ui=plain")
    assert answer.status == 0
    skipped = [line for line in answer.both.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 1
    assert "baseline=server_only" in skipped[0]
    assert "server_data: baseline=server_only requires server_data and server_labels" in skipped[0]
    assert begun == ["FedAvg", "LocalOnly"]
    jobs = rows(answer.folder / "runs.csv")
    assert [(job["method"], job["status"], bool(job["run"])) for job in jobs] == [
        ("fedavg", "done", True),
        ("server_only", "skipped", False),
        ("local_only", "done", True),
    ]
    assert "requires server_data" in jobs[1]["error"]


def test_a_synchronous_baseline_is_skipped_when_there_is_a_delay(begun: list[str]) -> None:
    sweep = done("-m", *TINY, "clients.delay=2", "baseline=none,fedavg,fedbuff")
    assert [job["status"] for job in rows(sweep / "runs.csv")] == ["done", "skipped", "done"]
    assert begun == ["Feddle", "FedBuff"]


BROKEN = """
from hybridfl.methods.fedavg import FedAvg


class Broken(FedAvg):
    def round(self, state, now):
        if now.index == 1:
            raise ValueError("the second round is too much")
        return (yield from super().round(state, now))
"""


def broken_method(folder: Path, module: str) -> None:
    (folder / f"{module}.py").write_text(BROKEN)
    (folder / "my_conf" / "baseline").mkdir(parents=True)
    (folder / "my_conf" / "baseline" / "broken.yaml").write_text(
        f"# Fails in its second round.\n_target_: {module}.Broken\n"
    )


def test_a_failing_job_shows_at_once_and_the_others_go_on(tmp_path: Path, begun: list[str]) -> None:
    broken_method(tmp_path, "sweep_broken")
    line = ("-m", "--config-dir", "my_conf", *TINY, "baseline=fedavg,broken,fedprox")
    answer = call("train", *line)
    assert answer.status == 1
    jobs = rows(answer.folder / "runs.csv")
    assert [job["status"] for job in jobs] == ["done", "failed", "done"]
    assert jobs[1]["error"].startswith("ValueError: the second round is too much; the traceback is in ")
    assert begun == ["FedAvg", "Broken", "FedProx"]
    # At once: before the next job says its first word.
    said_in_order = answer.both.splitlines()
    (failed,) = [number for number, text in enumerate(said_in_order) if text.startswith("failed: ")]
    assert "baseline=broken: ValueError: the second round is too much" in said_in_order[failed]
    assert any("fedavg" in text and "done" in text for text in said_in_order[:failed])
    assert not any("fedprox seed" in text for text in said_in_order[:failed])
    assert "1 of the sweep's jobs failed" in answer.err
    assert "Traceback" not in answer.both
    # The traceback is in the job's own folder, and only there.
    run = tmp_path / "outputs" / "runs" / jobs[1]["run"]
    assert "Traceback" in (run / "log.txt").read_text()
    assert "sweep_broken.py" in (run / "log.txt").read_text()
    assert status_of(run)["status"] == "failed"
    assert status_of(run)["error"] == "ValueError: the second round is too much"
    assert [row["round"] for row in rows(run / "metrics.csv")][-1] == "1"
    # The good ones are in the table.
    assert {line.split()[0] for line in answer.out.splitlines()} >= {"fedavg", "fedprox"}


def test_a_failing_run_alone_has_status_1_and_its_traceback(tmp_path: Path) -> None:
    broken_method(tmp_path, "sweep_alone")
    answer = call("train", "--config-dir", "my_conf", *TINY, "baseline=broken")
    assert answer.status == 1
    assert "ValueError: the second round is too much" in answer.err
    (run,) = Path("outputs/runs").iterdir()
    assert "Traceback" in (run / "log.txt").read_text()
    assert checkpoint_rounds(run) == [1]
    assert "run: " not in answer.out


def test_fail_fast_stops_at_the_first_failure(tmp_path: Path, begun: list[str]) -> None:
    broken_method(tmp_path, "sweep_fast")
    answer = call("train", "-m", "--config-dir", "my_conf", *TINY, "baseline=fedavg,broken,fedprox", "fail_fast=true")
    assert answer.status == 1
    assert begun == ["FedAvg", "Broken"]
    assert [job["status"] for job in rows(answer.folder / "runs.csv")] == ["done", "failed", "pending"]


def test_a_sweep_whose_jobs_all_fail(tmp_path: Path) -> None:
    broken_method(tmp_path, "sweep_all")
    answer = call("train", "-m", "--config-dir", "my_conf", *TINY, "baseline=broken", "seed=0,1")
    assert answer.status == 1
    assert "2 of the sweep's jobs failed" in answer.err
    assert answer.folder.is_dir()


# -- one job must not leak into the next -----------------------------------------------------------------------------


def test_a_run_after_another_equals_the_run_alone(tmp_path: Path) -> None:
    second = (*TINY, "merging.search.kind=es", "start=server", "start_steps=5", "clients.noisy_labels=0.4")
    process = start(tmp_path, "train", *second, "output_dir=alone")
    first = ("model=cnn", "dataset=synthetic", "dataset.train=300", "rounds=1", "clients.number=5", "seed=7")
    first += ("client_optimizer=adamw", "client_optimizer.steps=1", "merging.search.steps=1")
    done(*first, "clients.noisy_labels=0.4", "executor.threads=2", "dtype=float64")
    after = done(*second)
    process.join()
    assert process.exitcode == 0, said(tmp_path, process)
    assert tables(tmp_path / "alone" / "runs" / after.name) == tables(after)


READER = """
from hybridfl.data.synthetic import Synthetic


class Reader:  # no dataclass: two of them look alike
    def __init__(self, separation: float = 1.0) -> None:
        self.separation = separation

    def __repr__(self) -> str:
        return "Reader()"

    def load(self, root):
        return Synthetic(train=200, test=100, separation=self.separation).load(root)
"""


def test_two_readers_that_look_alike_are_read_apart(tmp_path: Path) -> None:
    (tmp_path / "sweep_reader.py").write_text(READER)
    (tmp_path / "my_conf" / "dataset").mkdir(parents=True)
    (tmp_path / "my_conf" / "dataset" / "mine.yaml").write_text(
        "# Mine.\n_target_: sweep_reader.Reader\nseparation: 1.0\n"
    )
    without = [word for word in TINY if not word.startswith("dataset")]
    line = ("--config-dir", "my_conf", *without, "dataset=mine", "baseline=fedavg", "rounds=1")
    sweep = done("-m", *line, "dataset.separation=0.0,50.0")
    losses = [
        float(rows(tmp_path / "outputs" / "runs" / job["run"] / "metrics.csv")[0]["loss"])
        for job in rows(sweep / "runs.csv")
    ]
    assert losses[0] != losses[1]


# -- presets ---------------------------------------------------------------------------------------------------------

PRESET = """\
# @package _global_
# FedAvg with two seeds.
defaults:
  - override /baseline: fedavg
  - override /partitioning: iid
hydra:
  sweeper:
    params:
      seed: 0,1
clients:
  per_round: 3
"""


@pytest.fixture
def preset(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "study.yaml").write_text(PRESET)
    without = [word for word in TINY if not word.startswith("clients.per_round")]
    return ("--config-dir", "my_conf", *without, "experiment=study")


def test_a_preset_that_is_a_sweep_warns_without_m(preset: tuple[str, ...], begun: list[str]) -> None:
    answer = call("train", *preset)
    assert answer.status == 0
    assert "brings a sweep, which only train -m runs" in answer.err
    assert begun == ["FedAvg"]
    config = (answer.folder / "config.yaml").read_text()
    assert "per_round: 3" in config
    assert "partitioning.IID" in config


def test_a_preset_that_is_a_sweep_runs_with_m(preset: tuple[str, ...], begun: list[str]) -> None:
    answer = call("train", "-m", *preset)
    assert answer.status == 0
    assert "only -m" not in answer.both
    jobs = rows(answer.folder / "runs.csv")
    assert [job["overrides"].split()[0] for job in jobs] == ["seed=0", "seed=1"]
    assert begun == ["FedAvg"] * 2


def test_the_command_line_goes_before_the_preset(preset: tuple[str, ...], begun: list[str]) -> None:
    sweep = done("-m", *preset, "seed=5", "clients.per_round=2", "baseline=fedavg,fedprox")
    jobs = rows(sweep / "runs.csv")
    assert [("seed=5" in job["overrides"], job["method"]) for job in jobs] == [(True, "fedavg"), (True, "fedprox")]
    config = (sweep.parent.parent / "runs" / jobs[0]["run"] / "config.yaml").read_text()
    assert "per_round: 2" in config


def test_a_preset_without_a_sweep_does_not_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    plain = PRESET[: PRESET.index("hydra:")] + PRESET[PRESET.index("clients:") :]
    (tmp_path / "my_conf" / "experiment" / "plain.yaml").write_text(plain)
    monkeypatch.setattr(experiment._Attempt, "work", lambda _: None)
    answer = call("train", "--config-dir", "my_conf", "dataset=synthetic", "experiment=plain")
    assert (answer.status, answer.err) == (0, "")
