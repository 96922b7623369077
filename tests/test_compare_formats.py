"""The formats of ``hybridfl compare``."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from compare_helpers import Outputs, table

from hybridfl import formats
from hybridfl.compare import Options, render


def test_terminal_shows_every_number(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # no terminal, under pytest -s as well
    for seed in (1, 2):
        outputs.run(f"a{seed}", "fedavg", seed, {"global": [0.5], "clients": [0.6], "served": [0.7]})
        outputs.run(f"b{seed}", "oracle", seed, [0.8 + 0.1 * seed], method__moves_raw_data=True)
    lines = render([outputs.path], Options(target=0.95)).splitlines()
    assert lines[0].split("   ")[0].strip() == "method"
    for part in ("accuracy global", "clients", "worst10", "served", "− fedavg [95 %]", "rounds to 95 %", "MB to 95 %"):
        assert part in lines[0]
    assert " ".join(lines[2].split()) == "fedavg 2 50.0 ± 0.0 60.0 30.0 70.0 – (0/2) – 3"
    assert " ".join(lines[3].split()) == "oracle† 2 95.0 ± 7.1 – – – +45.0 [-18.5, +108.5] 1 (1/2) 3 3"
    assert lines[4].startswith("accuracy in %, scope global, mean of the last 10 evaluations")
    assert lines[-1] == "† moves raw data to another owner."
    assert "\x1b" not in "".join(lines)


def test_the_best_mean_is_bold_on_a_terminal(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    outputs.run("a", "fedavg", 1, [0.5])
    outputs.run("b", "feddle", 1, [0.75])
    text = render([outputs.path])
    assert re.search(r"\x1b\[1m *75\.0\x1b\[0m", text)
    assert not re.search(r"\x1b\[1m *50\.0", text)


def test_pivot_marks_the_best_of_each_column(outputs: Outputs) -> None:
    for method, scores in (("fedavg", (0.5, 0.8)), ("feddle", (0.6, 0.7))):
        for alpha, score in zip((0.1, 0.5), scores, strict=True):
            outputs.run(f"{method}{alpha}", method, 1, [score], partitioning__alpha=alpha)
    pivot: dict[str, Any] = {"cols": "partitioning.alpha", "format": "markdown"}
    assert render([outputs.path], Options(**pivot)).splitlines()[:5] == [
        "| method | 0.1 | 0.5 |",
        "| :--- | ---: | ---: |",
        "| fedavg | 50.0 | **80.0** |",
        "| feddle | **60.0** | 70.0 |",
        "",
    ]
    lower_is_better = render([outputs.path], Options(**pivot, metric="loss")).splitlines()
    assert lower_is_better[2:4] == ["| fedavg | 0.5 | **0.2** |", "| feddle | **0.4** | 0.3 |"]


def test_a_cell_without_runs_is_empty(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5], partitioning__alpha=0.1)
    outputs.run("b", "feddle", 1, [0.5], partitioning__alpha=0.5)
    text = render([outputs.path], Options(cols="partitioning.alpha", format="markdown"))
    assert text.splitlines()[2:4] == ["| fedavg | 50.0 |  |", "| feddle |  | 50.0 |"]
    assert len(table(outputs.path, cols="partitioning.alpha")) == 2


def test_methods_as_columns_keep_their_mark(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    outputs.run("b", "oracle", 1, [0.6], method__moves_raw_data=True)
    text = render([outputs.path], Options(rows="partitioning.alpha", cols="method", format="markdown"))
    assert text.splitlines()[0] == "| partitioning.alpha | fedavg | oracle† |"


def test_what_moves_raw_data_is_no_rival(outputs: Outputs) -> None:
    """An upper bound sets no target and is not the best."""
    outputs.run("a", "fedavg", 1, [0.5])
    outputs.run("b", "fedprox", 1, [0.4])
    outputs.run("c", "oracle", 1, [0.9], method__moves_raw_data=True)
    assert {line["target"] for line in table(outputs.path)} == {"0.45"}
    assert "**50.0**" in render([outputs.path], Options(format="markdown"))
    assert "**90.0**" not in render([outputs.path], Options(format="markdown"))


@pytest.mark.parametrize("other", [{"clients__delay": 4}, {"start": "server"}, {"rounds": 99}, {"model__hidden": [8]}])
def test_runs_of_another_start_or_schedule_are_no_pair(outputs: Outputs, other: dict[str, Any]) -> None:
    for seed in (1, 2):
        outputs.run(f"a{seed}", "fedavg", seed, [0.5])
        outputs.run(f"b{seed}", "fedprox", seed, [0.6])
        outputs.run(f"c{seed}", "feddle", seed, [0.7], **other)
    pairs = {line["method"]: line["pairs"] for line in table(outputs.path)}
    assert pairs == {"fedavg": "0", "fedprox": "2", "feddle": "0"}


def test_latex_is_escaped(outputs: Outputs) -> None:
    for seed in (1, 2):
        outputs.run(f"a{seed}", "fedavg", seed, [0.5])
        outputs.run(f"b{seed}", "local_only", seed, [0.4], method__moves_raw_data=True)
        outputs.run(f"c{seed}", "fedprox", seed, [0.45])
    text = render([outputs.path], Options(format="latex"))
    assert r"local\_only$^\dagger$ & 2 & 40.0 $\pm$ 0.0" in text
    assert r"$-$10.0 [$-$10.0, $-$10.0]" in text
    assert r"\textbf{50.0 $\pm$ 0.0}" in text
    assert r"accuracy in \%," in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert text.isascii()
    assert formats.latex_escape("a_b & 5 % #1 {x} $ ~ ^ \\") == (
        r"a\_b \& 5 \% \#1 \{x\} \$ \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )


def test_markdown_escapes_bars(outputs: Outputs) -> None:
    outputs.run("a", "fed|avg", 1, [0.5])
    assert "| fed\\|avg |" in render([outputs.path], Options(format="markdown"))
