"""``hybridfl show``: the right run is found, and what it prints is what the folder holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from hybridfl import finding, runs, show, store
from hybridfl.errors import ConfigError, DataError

CONFIG = """\
seed: 1
overrides: baseline=fedavg seed=1
partitioning: {alpha: 0.1, _target_: hybridfl.data.partitioning.Dirichlet}
method: {name: fedavg, _target_: hybridfl.methods.fedavg.FedAvg}
nothing: {}
digest: abc123
"""
METRICS = """\
round,scope,accuracy,loss,worst10,spread,examples,bytes_up,bytes_down,bytes_peer,macs,server_macs,local_steps,seconds
1,global,0.5,1.25,,,100,1000000,2000000,,5e9,,10,1.5
1,clients,0.6,1.5,0.3,0.125,500,1000000,2000000,,5e9,,10,1.5
2,global,0.75,1.0,,,100,2000000,4500000,,1e10,,20,3.0
"""


def make(output_dir: Path, name: str, metrics: str | None = METRICS, **status: Any) -> Path:
    folder = output_dir / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    state = {"status": "done", "round": 2, "rounds": 2, "error": None, "split": "5p11t", **status}
    (folder / "status.json").write_text(json.dumps(state))
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    return folder


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    assert show.run(parser.parse_args(words)) == 0
    return capsys.readouterr().out


def test_everything_about_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path, "abc123")
    (folder / "checkpoints").mkdir()
    assert printed(capsys, "abc123", "--output-dir", str(tmp_path)).splitlines() == [
        "run        abc123",
        "method     fedavg",
        "overrides  baseline=fedavg seed=1",
        "status     done, round 2 of 2",
        "split      5p11t",
        "bytes      2 MB up, 4.5 MB down",
        "compute    1e+10 MACs, 20 local steps",
        "time       3.0 s",
        f"folder     {folder}",
        "files      checkpoints/, config.yaml, metrics.csv, status.json",
        "",
        "scope    round  accuracy %  worst10 %  spread %  loss  examples",
        "global       2        75.0          –         –     1       100",
        "clients      1        60.0       30.0      12.5   1.5       500",
    ]


def test_simulated_time_is_shown_where_there_is_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = METRICS.splitlines()
    extended = [f"{lines[0]},sim_seconds", f"{lines[1]},40.5", f"{lines[3]},81.25"]
    make(tmp_path, "abc", "\n".join(extended) + "\n")
    assert "time       3.0 s, 81.2 s simulated\n" in printed(capsys, "abc", "--output-dir", str(tmp_path))
    make(tmp_path, "def", "\n".join([extended[0], f"{lines[1]},"]) + "\n")
    assert "time       1.5 s\n" in printed(capsys, "def", "--output-dir", str(tmp_path))


def test_a_failed_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "abc", metrics=None, status="failed", round=0, error="clients.number: 0 is\ntoo few")
    text = printed(capsys, "abc", "--output-dir", str(tmp_path))
    assert "status     failed, round 0 of 2\nerror      clients.number: 0 is\n           too few\n" in text
    assert text.endswith("no evaluation yet\n")


def test_a_folder_without_status_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (make(tmp_path, "abc") / "status.json").unlink()
    assert "status     unknown, round 0 of ?" in printed(capsys, "abc", "--output-dir", str(tmp_path))


def test_a_run_is_found_by_path_digest_and_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, "abc123")
    make(tmp_path, "abd456")
    for name in (str(folder), "abc123", "abc"):
        assert finding.find_run(name, tmp_path).folder == folder
    monkeypatch.chdir(folder)
    assert finding.find_run(".", tmp_path / "elsewhere").digest == "abc123"


def test_a_digest_means_its_newest_finished_attempt(tmp_path: Path) -> None:
    make(tmp_path, "abc")
    make(tmp_path, "abc-2")
    make(tmp_path, "abc-10", status="interrupted")
    assert finding.find_run("ab", tmp_path).folder.name == "abc-2"
    assert finding.find_run("abc", tmp_path).folder.name == "abc-2"
    assert finding.find_run("abc-10", tmp_path).attempt == 10


def test_a_whole_digest_is_not_ambiguous_with_a_longer_one(tmp_path: Path) -> None:
    make(tmp_path, "ab")
    make(tmp_path, "abc")
    assert finding.find_run("ab", tmp_path).digest == "ab"


def test_an_ambiguous_prefix_lists_its_runs(tmp_path: Path) -> None:
    make(tmp_path, "abc123")
    make(tmp_path, "abd456")
    with pytest.raises(
        ConfigError, match=r"ab: several runs in '.*runs' begin so: abc123, abd456\. Type more"
    ) as caught:
        finding.find_run("ab", tmp_path)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("name", ["abc124", "outputs/runs/abc124"])
def test_an_unknown_run_names_the_nearest(tmp_path: Path, name: str) -> None:
    make(tmp_path, "abc123")
    with pytest.raises(ConfigError, match=rf"{name}: no run folder, .*Did you mean 'abc123'\? Valid: abc123\."):
        finding.find_run(name, tmp_path)


@pytest.mark.parametrize("name", ["abc", ""])
def test_no_runs_at_all(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"no run in '.*runs' is called so\.$"):
        finding.find_run(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [("config.yaml", "a: [1"), ("status.json", '{"status"'), ("config.yaml", "- 1"), ("status.json", "3")],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, text: str) -> None:
    (make(tmp_path, "abc") / file).write_text(text)
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        finding.find_run("abc", tmp_path)


def test_values_of_keys_and_groups(tmp_path: Path) -> None:
    run = runs.read_run(make(tmp_path, "abc"))
    assert run.value("partitioning.alpha") == 0.1
    assert run.value("method") == run.value("method.name") == "fedavg"
    assert run.value("partitioning") == "Dirichlet"
    assert run.value("nothing") == {}
    assert run.value("clients.number") is runs.ABSENT


def test_half_a_line_of_a_run_at_work_is_no_evaluation(tmp_path: Path) -> None:
    curve = runs.read_run(make(tmp_path, "abc", METRICS + "2,cli", status="running")).curves["global"]
    assert curve.rounds == [1, 2]
    assert curve.bytes == [3e6, 6.5e6]


def test_a_killed_run_is_not_said_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path, "abc", status="running")
    assert "stopped (the same command continues it)" in printed(capsys, str(folder))
    with store.claim(tmp_path, "abc", False, print):
        assert "status     running, " in printed(capsys, str(folder))
