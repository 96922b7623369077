"""Searches: Optuna's trials are runs like others, a stopped search goes on, and nothing is chosen by test data."""

from __future__ import annotations

import csv
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import TINY, call, done, rows, said, start

from hybridfl import launchers
from hybridfl.config import Composer
from hybridfl.engine import Engine
from hybridfl.errors import ConfigError
from hybridfl.search import Metric
from hybridfl.search_space import space_of
from hybridfl.sweepers import Optuna

optuna = pytest.importorskip("optuna", reason="the extra optuna is not installed")

BASE = (*TINY, "rounds=2", "baseline=fedavg", "server_data.validation=0.25")
SPACE = ("client_optimizer.lr=tag(log,interval(0.01,1))", "client_optimizer.batch_size=choice(8,16)")
SEARCH = ("-m", *BASE, *SPACE, "hydra/sweeper=optuna")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every run that is really started."""
    seeds: list[int] = []
    begin = Engine.begin

    def counted(engine: Engine) -> object:
        seeds.append(engine.federation.seed)
        return begin(engine)

    monkeypatch.setattr(Engine, "begin", counted)
    return seeds


def trials(folder: Path) -> list[Any]:
    study = optuna.load_study(study_name="hybridfl", storage=f"sqlite:///{folder / 'study.db'}")
    return [(trial.params, trial.value, trial.state.name) for trial in study.trials]


def mean_of(run: Path, scope: str, column: str) -> float:
    with open(run / "metrics.csv", newline="") as file:
        found = [float(row[column]) for row in csv.DictReader(file) if row["scope"] == scope]
    return sum(found[-10:]) / len(found[-10:])


# -- trials ----------------------------------------------------------------------------------------------------------


def test_a_search_goes_on_to_its_number_of_trials_as_if_it_had_not_stopped(tmp_path: Path, begun: list[int]) -> None:
    line = (*SEARCH, "hydra.sweeper.seed=3")
    first = done(*line, "hydra.sweeper.n_trials=11")
    assert len(begun) == 11
    again = done(*line, "hydra.sweeper.n_trials=13")
    assert again == first
    assert len(begun) == 13
    found = trials(first)
    assert [state for *_, state in found] == ["COMPLETE"] * 13
    whole = done(*line, "hydra.sweeper.n_trials=13", "output_dir=elsewhere")
    assert trials(whole) == found  # ten at random, three by what was found
    assert len({params["client_optimizer.lr"] for params, *_ in found}) == 13
    other = done(*SEARCH, "hydra.sweeper.seed=4", "hydra.sweeper.n_trials=1")
    assert other != first
    assert trials(other)[0][0] != found[0][0]


def test_a_trial_is_a_run_valued_by_validation_examples(tmp_path: Path, begun: list[int]) -> None:
    answer = call("train", *SEARCH, "hydra.sweeper.n_trials=3")
    assert answer.status == 0
    found = trials(answer.folder)
    runs = [tmp_path / "outputs" / "runs" / job["run"] for job in rows(answer.folder / "runs.csv")]
    assert [value for _, value, _ in found] == pytest.approx([mean_of(run, "validation", "accuracy") for run in runs])
    best = max(range(3), key=lambda k: found[k][1])
    told = answer.out.splitlines()
    at = told.index(f"best: trial {best} of 3, validation accuracy {100 * found[best][1]:.1f} %:")
    line = told[at + 1].replace("'", "").split()
    assert line[:2] == ["hybridfl", "train"]
    assert call(*line[1:]).folder == runs[best]
    assert len(begun) == 3  # the best was there already
    for (params, *_), job in zip(found, rows(answer.folder / "runs.csv"), strict=True):
        assert job["status"] == "done"
        assert job["overrides"].split()[-2:] == [f"{key}={value}" for key, value in params.items()]


def test_a_loss_is_minimised(tmp_path: Path) -> None:
    answer = call("train", *SEARCH, "hydra.sweeper.n_trials=2", "hydra.sweeper.metric=global.loss")
    losses = [mean_of(tmp_path / "outputs/runs" / j["run"], "global", "loss") for j in rows(answer.folder / "runs.csv")]
    assert [value for _, value, _ in trials(answer.folder)] == pytest.approx(losses)
    assert f"best: trial {losses.index(min(losses))} of 2, global loss {min(losses):.6g}:" in answer.out


SLOW = """
import os, time
from pathlib import Path
from hybridfl.methods.fedavg import FedAvg


class Slow(FedAvg):
    def round(self, state, now):
        if now.index == 1:
            Path(f"at-{os.getpid()}").touch()
            while not Path("go").exists():
                time.sleep(0.01)
        return (yield from super().round(state, now))
"""


def test_a_killed_search_goes_on_with_the_trials_under_way(tmp_path: Path) -> None:
    (tmp_path / "my_conf" / "baseline").mkdir(parents=True)
    (tmp_path / "my_conf" / "baseline" / "slow.yaml").write_text("# For tests.\n_target_: searched_slow.Slow\n")
    (tmp_path / "searched_slow.py").write_text(SLOW)
    line = ("--config-dir", "my_conf", *SEARCH, "baseline=slow", "hydra.sweeper.n_trials=3", "checkpoint_seconds=0")
    process = start(tmp_path, "train", *line, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    last = time.monotonic() + 60
    while len(list(tmp_path.glob("at-*"))) < 2:
        assert time.monotonic() < last, said(tmp_path, process)
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder,) = Path("outputs/sweeps").iterdir()
    before = trials(folder.resolve())
    assert [state for *_, state in before] == ["RUNNING"] * 2
    assert [job["status"] for job in rows(folder / "runs.csv")] == ["pending"] * 2
    runs = {path.name for path in Path("outputs/runs").iterdir()}
    Path("go").touch()
    assert done(*line) == folder.resolve()
    after = trials(folder.resolve())
    assert [state for *_, state in after] == ["COMPLETE"] * 3
    assert [params for params, *_ in after[:2]] == [params for params, *_ in before]
    assert {job["run"] for job in rows(folder / "runs.csv")[:2]} == runs


def test_a_trial_that_fails_is_one_of_them(begun: list[int]) -> None:
    line = [word for word in SEARCH if not word.startswith("client_optimizer.batch")]
    answer = call("train", *line, "baseline=fedavg,fedbuff", "clients.delay=2", "hydra.sweeper.n_trials=8")
    assert answer.status == 0
    jobs = rows(answer.folder / "runs.csv")
    assert {(job["method"], job["status"]) for job in jobs} == {("fedavg", "skipped"), ("fedbuff", "done")}
    states = [(params["baseline"], state) for params, _, state in trials(answer.folder)]
    assert sorted(set(states)) == [("fedavg", "FAIL"), ("fedbuff", "COMPLETE")]
    assert len(states) == 8
    assert len(begun) == [state for _, state in states].count("COMPLETE")


def test_a_search_without_a_method_that_suits(begun: list[int]) -> None:
    answer = call("train", *SEARCH, "baseline=fedavg,fedprox", "clients.delay=2", "hydra.sweeper.n_trials=4")
    assert (answer.status, begun) == (2, [])
    assert "is synchronous" in answer.err


# -- the space -------------------------------------------------------------------------------------------------------


def test_the_space_in_hydras_syntax() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    words = {
        "a=tag(log,interval(0.001,1))": FloatDistribution(0.001, 1, log=True),
        "b=interval(-1,2)": FloatDistribution(-1, 2),
        "c=int(interval(1,5))": IntDistribution(1, 5),
        "d=tag(log,int(interval(1,100)))": IntDistribution(1, 100, log=True),
        "e=choice(x,2)": CategoricalDistribution(["x", "2"]),
        "f=[4],[8,8]": CategoricalDistribution(["[4]", "[8,8]"]),
        "g=range(1,10,2)": IntDistribution(1, 9, step=2),
        "h=range(0.1,0.35,0.1)": CategoricalDistribution([0.1, 0.2, 0.3]),
        "baseline=glob(feda*)": CategoricalDistribution(["fedadagrad", "fedadam", "fedasync", "fedavg"]),
    }
    with Composer():
        space = space_of(["x=1", *words, "y=[1,2]"])
    assert space.fixed == ("x=1", "y=[1,2]")
    found = [str(distribution) for distribution in space.distributions.values()]
    expected = [str(one) for one in words.values()]
    assert found[:-1] == expected[:-1]
    assert found[-1].startswith(expected[-1][:70])
    ends = {key: dimension.ends for key, dimension in space.dimensions.items()}
    assert (ends["a"], ends["c"], ends["e"], ends["g"]) == ((0.001, 1.0), (1, 5), ("x", "2"), (1, 9))
    values = {key: low for key, (low, _) in ends.items()}
    assert space.line(values)[:5] == ["x=1", "y=[1,2]", "a=0.001", "b=-1.0", "c=1"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("seed=0,1", "seed: got '0,1': a search would choose the luckiest seed"),
        ("", "hydra/sweeper: got 'optuna', and there is nothing to search"),
        ("rounds=interval(5,1)", "rounds: got 'interval(5,1)': interval(a,b) needs a < b."),
        ("client_optimizer.lr=tag(log,interval(0,1))", "client_optimizer.lr: got"),
        ("client_optimizer.lr=interval(-1,1)", "client_optimizer.lr: got -1.0"),
        ("client_optimizer.lr=0.1,-1", "client_optimizer.lr: got -1"),
        ("client_optimizer.l=0.1,0.2", "client_optimizer.l: unknown key."),
        ("rounds=1,2 hydra.sweeper.metric=valid", "hydra.sweeper.metric: got 'valid'. Did you mean 'validation'?"),
        (
            "rounds=1,2 hydra.sweeper.metric=global.acc",
            "hydra.sweeper.metric: got 'global.acc'. Did you mean 'macs'?",
        ),
        ("rounds=1,2 hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials: got 0"),
        ("rounds=1,2 server_data.validation=0", "server_data.validation: got no validation examples"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_trial(words: str, problem: str) -> None:
    answer = call("train", "-m", *BASE, "hydra/sweeper=optuna", *words.split())
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: {problem}"), answer.err
    assert not list(Path().glob("outputs/runs/*"))


def test_options_of_a_search_without_one() -> None:
    answer = call("train", "-m", *BASE, "seed=0,1", "hydra.sweeper.n_trials=3")
    assert "hydra.sweeper.n_trials: is for a search: type hydra/sweeper=optuna." in answer.err


def test_an_interval_is_for_a_search() -> None:
    answer = call("train", "-m", *BASE, "client_optimizer.lr=tag(log,interval(0.1,1))")
    assert (answer.status, "a search chooses among them: hydra/sweeper=optuna" in answer.err) == (2, True)


def test_any_metric_that_is_typed_does_without_validation_examples() -> None:
    folder = done(*SEARCH, "server_data.validation=0", "hydra.sweeper.metric=global", "hydra.sweeper.n_trials=1")
    assert [state for *_, state in trials(folder)] == ["COMPLETE"]
    assert str(Metric.of(Optuna())) == "validation accuracy"
    assert Metric.of(Optuna(metric="clients.spread")).direction == "minimize"
    assert Metric.of(Optuna(metric="clients.spread", direction="maximize")).direction == "maximize"
    with pytest.raises(ConfigError, match=r"^hydra.sweeper.metric: got 'round'"):
        Metric.of(Optuna(metric="round"))


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda module: None)
    answer = call("train", *SEARCH)
    assert (answer.status, "pip install 'hybridfl[optuna]'" in answer.err) == (2, True)
