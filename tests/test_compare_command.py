"""``hybridfl compare`` as a command: wrong input, and what it prints where."""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
from typing import Any

import pytest
from compare_helpers import Outputs, two_methods

from hybridfl import compare
from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError, HybridflError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rows": "method,partitioning.alfa"},
            r"--rows: no run has the config key 'partitioning\.alfa'\. Did you mean ",
        ),
        ({"cols": "partitioning.alfa"}, r"--cols: .*Did you mean 'partitioning\.alpha'"),
        ({"metric": "acuracy"}, r"--metric: no run has the metric 'acuracy'\. Did you mean 'accuracy'"),
        ({"scope": "glob"}, r"--scope: no run has the scope 'glob'\. Did you mean 'global'"),
        ({"at": "best"}, r"--at: .*server_data\.validation=0\.2 adds them"),
        ({"at": "mean"}, r"--at: 'mean' is unknown\. Did you mean 'mean10'"),
        ({"format": "tex"}, r"--format: 'tex' is unknown\. Did you mean 'latex'"),
        ({"target": 85.0}, r"--target: 85 is not an accuracy in \(0, 1\]"),
    ],
)
def test_wrong_options_name_the_nearest_right_one(outputs: Outputs, options: dict[str, Any], message: str) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    with pytest.raises(ConfigError, match=message):
        render([outputs.path], Options(**options))


def test_runs_without_evaluations(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [])
    with pytest.raises(HybridflError, match="None of the finished runs has an evaluation"):
        render([outputs.path])


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(words)


def test_standard_output_holds_the_table_only(outputs: Outputs, capsys: pytest.CaptureFixture[str]) -> None:
    two_methods(outputs)
    outputs.run("c", "fedavg", 4, [0.9], status="failed")
    assert compare.run(parse(str(outputs.path), "--format", "csv", "--at", "last", "--target", "0.65")) == 0
    out, err = capsys.readouterr()
    assert [line["method"] for line in csv.DictReader(io.StringIO(out))] == ["fedavg", "feddle"]
    assert err == "1 of 7 runs left out: 1 failed.\n"


def test_the_default_path_is_outputs(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    monkeypatch.chdir(outputs.path.parent)
    assert compare.run(parse()) == 0
    assert "fedavg" in capsys.readouterr().out


def test_importing_the_commands_is_cheap() -> None:
    code = (
        "import sys, hybridfl.compare, hybridfl.show, hybridfl.progress;"
        "print([name for name in ('pandas', 'scipy', 'rich', 'torch', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
