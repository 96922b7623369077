"""Trackers hold what metrics.csv holds, every round once, whatever stops the run or breaks the tracker."""

from __future__ import annotations

import csv
import json
import math
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import TINY, call, done, rows, tables

import hybridfl.experiment
from hybridfl.config import choices
from hybridfl.costs import Costs
from hybridfl.runs import COSTS, read_run
from hybridfl.tracking import LAST_NAME, named, past

LINE = (*TINY, "executor=sequential", "rounds=6", "checkpoint_seconds=1000", "ui=none")
REAL = [name for name in choices("tracker") if name != "none"]
# What foreign packages warn of at import is their business.
pytestmark = pytest.mark.filterwarnings("default")


class Recorder:
    """A tracker of the tests: a file of JSON lines for each run; breaks in the function named."""

    def __init__(self, folder: str = "recorded", breaks: str = "") -> None:
        self.folder, self.breaks = Path(folder), breaks

    def check(self) -> None:
        pass

    def open(self, run: Any) -> Recorder:
        self.folder.mkdir(exist_ok=True)
        self.file = self.folder / f"{run.name}.jsonl"
        self.last = max((round for round, _ in recorded(self.file)), default=0)
        self.say("open")
        return self

    def say(self, what: str) -> None:
        if what == self.breaks:
            raise OSError(f"no {what} today")
        with (self.folder / "said.txt").open("a") as file:
            file.write(f"{what}\n")

    def log(self, round: int, values: Mapping[str, float]) -> None:
        if round > 2:
            self.say("log")
        with self.file.open("a") as file:
            file.write(json.dumps([round, dict(values)]) + "\n")

    def close(self, ending: str) -> None:
        self.say(ending)


def recorded(file: Path) -> list[tuple[int, dict[str, float]]]:
    return (
        [(round, values) for round, values in map(json.loads, file.read_text().splitlines())] if file.exists() else []
    )


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "my_conf" / "tracker" / "recorder.yaml"
    file.parent.mkdir(parents=True)
    file.write_text('# For tests (no paper)\n_target_: test_trackers.Recorder\nfolder: recorded\nbreaks: ""\n')


OWN = ("--config-dir", "my_conf", "tracker=recorder")


def stopped(monkeypatch: pytest.MonkeyPatch, how: type[BaseException], round: int, *line: str) -> Path:
    """A run that ends so in the middle of a round; its folder."""
    commit = hybridfl.experiment._Attempt._commit

    def stopping(self: Any, after: Any, *rest: Any) -> Any:
        found = commit(self, after, *rest)
        if after.round == round:
            raise how
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hybridfl.experiment._Attempt, "_commit", stopping)
        assert call("train", *line).status == (130 if how is KeyboardInterrupt else 1)
    (folder,) = Path("outputs/runs").iterdir()
    return folder.resolve()


def expected(run: Path) -> dict[int, dict[str, float]]:
    """What a tracker must hold, from metrics.csv itself."""
    return {round: named(found) for round, found in past(run / "metrics.csv")}


# -- names -----------------------------------------------------------------------------------------------------------


def test_the_names_of_a_round() -> None:
    costs = {"bytes_up": 10, "seconds": "0.5", "sim_seconds": ""}
    row = {"round": "3", "scope": "clients/domain=usps", "accuracy": "0.25", "loss": math.nan, "spread": ""}
    found = named([{"round": 3, "scope": "global", "accuracy": 0.5, **costs}, row | costs])
    assert found == {
        "global/accuracy": 0.5,
        "clients/domain:usps/accuracy": 0.25,
        "costs/bytes_up": 10.0,
        "costs/seconds": 0.5,
    }
    assert list(found)[-1] == LAST_NAME
    assert named([{"scope": "global/domain=art (old)", "loss": 1}]) == {"global/domain:art _old_/loss": 1.0}


def test_costs_are_all_that_is_the_same_in_every_scope() -> None:
    assert (*(name for name in Costs.__dataclass_fields__), "seconds", "sim_seconds") == COSTS


# -- any tracker -----------------------------------------------------------------------------------------------------


def test_a_tracker_holds_what_metrics_csv_holds_and_decides_nothing() -> None:
    run = done(*LINE, *OWN, "evaluate_every=2")
    told = recorded(Path("recorded") / f"{run.name}.jsonl")
    assert [round for round, _ in told] == [2, 4, 6]
    last = {row["scope"]: row for row in rows(run / "metrics.csv") if row["round"] == "6"}
    assert told[-1][1]["global/accuracy"] == float(last["global"]["accuracy"])
    assert told[-1][1]["clients/worst10"] == float(last["clients"]["worst10"])
    assert told[-1][1]["costs/bytes_up"] == float(last["global"]["bytes_up"])
    assert dict(told) == expected(run)
    assert Path("recorded/said.txt").read_text().split() == ["open", "log", "log", "done"]
    assert done(*LINE, "evaluate_every=2") == run  # the same run, which is not done again


@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError])
def test_a_continued_run_has_every_round_once(monkeypatch: pytest.MonkeyPatch, how: type[BaseException]) -> None:
    run = stopped(monkeypatch, how, 4, *LINE, *OWN)
    assert done(*LINE, *OWN) == run
    told = recorded(Path("recorded") / f"{run.name}.jsonl")
    assert [round for round, _ in told] == [1, 2, 3, 4, 5, 6]
    assert {round: values | {"costs/seconds": 0} for round, values in told} == {
        round: values | {"costs/seconds": 0} for round, values in expected(run).items()
    }
    endings = [word for word in Path("recorded/said.txt").read_text().split() if word != "log"]
    assert endings == ["open", "interrupted" if how is KeyboardInterrupt else "failed", "open", "done"]


def test_a_tracker_that_comes_late_is_told_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, KeyboardInterrupt, 4, *LINE)
    run = done(*LINE, *OWN)
    assert [round for round, _ in recorded(Path("recorded") / f"{run.name}.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("breaks", ["open", "log", "done"])
def test_a_tracker_that_breaks_is_told_of_once_and_costs_nothing(breaks: str) -> None:
    once = tables(done(*LINE, "output_dir=once"))
    answer = call("train", *LINE, *OWN, f"tracker.breaks={breaks}")
    assert answer.status == 0
    assert tables(answer.folder) == once
    (note,) = [line for line in answer.both.splitlines() if "Recorder" in line]
    told = f"Recorder failed: no {breaks} today; nothing more is sent to it, and no result is lost: hybridfl track outputs/"
    assert told in note
    assert told in (answer.folder / "log.txt").read_text()
    assert len(recorded(Path("recorded") / f"{answer.folder.name}.jsonl")) == {"open": 0, "log": 2, "done": 6}[breaks]


# -- hybridfl track --------------------------------------------------------------------------------------------------


def test_finished_runs_are_sent_later_and_once() -> None:
    first, second = done(*LINE), done(*LINE, "seed=1")
    answer = call("track", *OWN)
    assert (answer.status, answer.out) == (0, "2 of 2 runs are in Recorder.\n")
    files = {run: Path("recorded") / f"{run.name}.jsonl" for run in (first, second)}
    assert all(dict(recorded(file)) == expected(run) for run, file in files.items())
    before = files[first].read_text()
    assert call("track", str(first), *OWN).out == "1 of 1 runs are in Recorder.\n"
    assert files[first].read_text() == before


def test_runs_that_cannot_be_sent_are_counted() -> None:
    done(*LINE)
    answer = call("track", *OWN, "tracker.breaks=log")
    assert (answer.status, answer.out) == (1, "0 of 1 runs are in Recorder.\n")
    assert "no log today" in answer.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "tracker: got none, which sends nothing; valid: mlflow, tensorboard, wandb."),
        (["rounds=3"], "rounds=3: is no option of the tracker; write tracker=NAME or tracker.KEY=VALUE."),
        (["tracker=wand"], "tracker: got 'wand'. Did you mean 'wandb'?"),
        (["tracker=wandb", "tracker.mode=ofline"], "tracker.mode: got 'ofline'. Did you mean 'offline'?"),
        (["nowhere", *OWN], "nowhere: does not exist"),
    ],
)
def test_what_cannot_be_sent_is_refused(words: list[str], text: str) -> None:
    answer = call("track", *words)
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: {text}")


# -- the shipped ones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_a_missing_extra_is_named_before_the_first_round(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("torch.utils.tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    answer = call("train", *LINE, f"tracker={name}")
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: tracker: got {name}, which needs the extra of that name: ")
    assert f"pip install 'hybridfl[{name}]'" in answer.err
    assert not Path("outputs").exists()
    finished = done(*LINE)
    assert call("track", f"tracker={name}").status == 2
    assert call("export", str(finished), "-o", "model.safetensors").status == 0


def test_a_run_with_a_tracker_is_exported_where_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = done(*LINE)
    text = (run / "config.yaml").read_text()
    changed = text.replace("hybridfl.trackers.none.NoTracker", "hybridfl.trackers.wandb.WandB")
    assert changed != text
    (run / "config.yaml").write_text(changed)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert call("export", str(run), "-o", "model.safetensors").status == 0


def in_tensorboard(run: Path) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    assert "digest" in events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    return by_round(
        {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    )


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Of a log in LevelDB's format (blocks of 32 KiB; checksum, length and kind before each part) after W&B's 7 bytes."""
    assert data.startswith(b":W&B")
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):  # still being written
            return
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def in_wandb(run: Path) -> dict[int, dict[str, float]]:
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob(f"wandb/offline-run-*/run-{run.name}.wandb")
    records: list[Any] = []
    deadline = time.monotonic() + 30
    # W&B's own process closes the file a moment after the run has been told that it is finished.
    while not records or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
        records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(file.read_bytes())]
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "run":
            assert (record.run.run_id, record.run.project) == (run.name, "hybridfl")
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    found.setdefault(name, []).append((record.history.step.num, value))
    return by_round(found)


def in_mlflow(run: Path) -> dict[int, dict[str, float]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run.parent.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hybridfl")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.tags["hybridfl.run"] == run.name
    assert found.info.status == "FINISHED"
    assert found.data.params["client_optimizer.lr"] == str(read_run(run).flat["client_optimizer.lr"])
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return by_round({name: [(metric.step, metric.value) for metric in history] for name, history in histories.items()})


def by_round(series: Mapping[str, list[tuple[int, float]]]) -> dict[int, dict[str, float]]:
    """No round may be there twice."""
    found: dict[int, dict[str, float]] = {}
    for name, points in series.items():
        for round, value in points:
            assert name not in found.setdefault(round, {}), f"{name} is there twice in round {round}"
            found[round][name] = value
    return found


READ: dict[str, Callable[[Path], dict[int, dict[str, float]]]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
}


def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses that this process tries to reach."""
    tried: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError("no network in this test")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return tried


@pytest.mark.parametrize("name", READ)
def test_a_real_tracker_is_read_back_after_a_stop(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip(name, reason=f"the extra hybridfl[{name}] is not installed")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # MLflow would not call its makers in a test anyway
    tried = offline(monkeypatch)
    stopped(monkeypatch, RuntimeError, 4, *LINE, f"tracker={name}")
    run = done(*LINE, f"tracker={name}")
    whole = expected(run)
    assert list(whole) == [1, 2, 3, 4, 5, 6]

    def same() -> None:
        found = READ[name](run)
        assert found.keys() == whole.keys()
        for round, values in whole.items():
            # TensorBoard's scalars are in single precision.
            seconds = {"costs/seconds": found[round]["costs/seconds"]}  # of a round done again
            assert found[round] == pytest.approx(values | seconds, rel=1e-6 if name == "tensorboard" else 0, abs=0)

    same()
    assert call("track", f"tracker={name}").status == 0
    same()
    assert tried == []


@pytest.mark.parametrize("name", READ)
def test_a_finished_run_is_sent_and_where_it_was_lost_again(name: str) -> None:
    pytest.importorskip(name, reason=f"the extra hybridfl[{name}] is not installed")
    run = done(*LINE, "rounds=2")
    assert call("track", f"tracker={name}").status == 0
    for folder in ("tensorboard", "wandb"):
        shutil.rmtree(run / folder, ignore_errors=True)
    Path("outputs/mlflow.db").unlink(missing_ok=True)
    if name != "mlflow":  # which keeps its connection to the database
        assert call("track", str(run), f"tracker={name}").status == 0
        assert READ[name](run).keys() == {1, 2}


def test_every_shipped_tracker_is_read_back_here() -> None:
    assert set(READ) == set(REAL)


def test_past_rounds_are_those_of_the_file(tmp_path: Path) -> None:
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["round", "scope"], [2, "global"], [2, "clients"], [10, "global"]])
    found = [(round, [row["scope"] for row in rows]) for round, rows in past(tmp_path / "metrics.csv")]
    assert found == [(2, ["global", "clients"]), (10, ["global"])]
