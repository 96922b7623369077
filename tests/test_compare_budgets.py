"""``hybridfl compare --budget``: where runs are read at equal cost, and which have nothing to read."""

from __future__ import annotations

import re
from typing import Any

import pytest
from compare_helpers import Outputs, by_method, table, warnings_of

from hybridfl.budgets import parse
from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError
from hybridfl.runs import read_run


def rewrite(folder: Any, costs: dict[str, list[float]]) -> None:
    """Columns of the global scope's metrics with other numbers, one for each evaluation."""
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    rows = [line.split(",") for line in lines]
    for name, values in costs.items():
        for row, value in zip(rows, values, strict=True):
            row[names.index(name)] = "" if value != value else str(value)
    (folder / "metrics.csv").write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")


@pytest.fixture
def two(outputs: Outputs) -> Outputs:
    """fedavg moves 3 MB a round, quick 1 MB; both are 0.1 better every round. macs and seconds are counted too."""
    for seed in (0, 1):
        a = outputs.run(f"a{seed}", "fedavg", seed, {"global": [0.1, 0.2, 0.3, 0.4], "clients": [0.2, 0.3, 0.4, 0.5]})
        b = outputs.run(f"b{seed}", "quick", seed, [0.15, 0.25, 0.35, 0.45])
        every = [1.0, 2.0, 3.0, 4.0]
        rewrite(a, {"macs": [n * 1e9 for n in [*every, *every]], "seconds": [10 * n for n in [*every, *every]]})
        one = {"bytes_up": [n * 1e6 for n in every], "bytes_down": [0] * 4}
        rewrite(b, {**one, "macs": [n * 5e9 for n in every], "seconds": [n / 2 for n in every]})
    return outputs


def read(two: Outputs, *budgets: str, **options: Any) -> dict[str, float]:
    found = by_method(two.path, budget=budgets, **{"at": "auto", **options})
    return {method: float(line["mean"]) for method, line in found.items()}


@pytest.mark.parametrize(
    ("budgets", "fedavg", "quick"),
    [
        (["rounds=2"], 0.2, 0.25),
        (["rounds=3.9"], 0.3, 0.35),
        (["rounds=1k"], 0.4, 0.45),
        (["bytes=6MB"], 0.2, 0.45),  # exactly what two rounds of fedavg cost
        (["bytes=5.999999MB"], 0.1, 0.45),
        (["bytes=3M"], 0.1, 0.35),
        (["bytes=9e6"], 0.3, 0.45),
        (["macs=10G"], 0.4, 0.25),
        (["macs=1e10", "rounds=1"], 0.1, 0.15),
        (["rounds=3", "bytes=6 MB"], 0.2, 0.35),
        (["seconds=0.5min"], 0.3, 0.45),
        (["seconds=10s"], 0.1, 0.45),
    ],
)
def test_the_last_evaluation_within_the_budget(two: Outputs, budgets: list[str], fedavg: float, quick: float) -> None:
    assert read(two, *budgets) == pytest.approx({"fedavg": fedavg, "quick": quick})


def test_every_number_of_the_table_is_within_the_budget(two: Outputs) -> None:
    line = by_method(two.path, budget=["rounds=3"], at="auto", target=0.25)["fedavg"]
    assert (line["at"], line["bytes"], line["rounds_to_target"], line["budget"]) == (
        "last",
        "9000000.0",
        "3.0",
        "rounds=3",
    )
    assert by_method(two.path, budget=["rounds=2"], target=0.25)["fedavg"]["reached"] == "0"
    assert float(by_method(two.path, budget=["rounds=3"])["quick"]["difference"]) == pytest.approx(0.05)
    assert read(two, "rounds=3", at="mean10") == pytest.approx({"fedavg": 0.2, "quick": 0.25})
    text = render([two.path], Options(budget=["rounds=3"], format="markdown"), warn=lambda _: None)
    assert "| fedavg | 2 | 30.0 ± 0.0 | 40.0 |" in text  # the clients' column, cut too
    assert "Equal budgets: only evaluations within rounds=3 count." in text
    assert "budget" not in table(two.path)[0]


def test_a_scope_is_cut_by_its_own_evaluations(two: Outputs) -> None:
    assert read(two, "rounds=2", scope="clients", where=["method=fedavg"]) == {"fedavg": 0.3}


def test_what_is_left_out_and_what_ends_early_is_named(two: Outputs) -> None:
    assert warnings_of(two.path, budget=["bytes=2MB"]) == ["No evaluation within bytes=2MB, left out: fedavg (all 2)."]
    assert list(read(two, "bytes=2MB")) == ["quick"]
    assert warnings_of(two.path, budget=["bytes=6MB"]) == [
        "Read at their end, which is within bytes=6MB: quick (all 2)."
    ]
    for seed in range(2, 6):
        two.run(f"b{seed}", "quick", seed, [0.1])
    assert warnings_of(two.path, budget=["bytes=1MB"])[0] == (
        "No evaluation within bytes=1MB, left out: fedavg (all 2); quick (4 of 6: b2, b3, b4, …)."
    )


def test_a_cost_that_was_not_counted_is_no_evaluation_within_it(two: Outputs) -> None:
    rewrite(two.path / "runs" / "b1", {"macs": [1.0, float("nan"), 3.0, 4.0]})
    two.run("c", "uncounted", 0, [0.9])
    assert warnings_of(two.path, budget=["macs=1T"]) == [
        "No evaluation within macs=1T, left out: uncounted (all 1).",
        "Read at their end, which is within macs=1T: fedavg (all 2); quick (1 of 2: b0).",
    ]
    assert read(two, "macs=1T")["quick"] == pytest.approx((0.45 + 0.15) / 2)
    with pytest.raises(ConfigError, match=r"--budget: got macs=1T: no run has .* These runs have not counted it\."):
        read(two, "macs=1T", where=["method=uncounted"])


def test_a_run_as_it_stood_leaves_the_run_as_it_is(two: Outputs) -> None:
    run = read_run(two.path / "runs" / "a0")
    before = run.bytes
    stood = run.until(2)
    assert (stood.bytes, stood.curves["clients"].rounds, stood.flat) == (6e6, [1, 2], run.flat)
    assert (run.bytes, before, run.curves["clients"].rounds) == (12e6, 12e6, [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("byte=1MB", "got 'byte=1MB': no cost 'byte'. Did you mean 'bytes'? Valid: bytes, local_steps, macs, rounds, "),
        ("bytes", "got 'bytes': not an amount of bytes; nearest valid form: bytes=10MB."),
        ("macs=many", "got 'macs=many': not an amount of macs; nearest valid form: macs=1e12."),
        ("rounds=-3", "got 'rounds=-3': not an amount of rounds; nearest valid form: rounds=30."),
        (
            "bytes=1mb",
            "got 'bytes=1mb': no unit 'mb' of bytes. Did you mean '1MB'? Valid: k, M, G, T, B, kB, MB, GB, TB, ",
        ),
        ("macs=1MB", "got 'macs=1MB': no unit 'MB' of macs. Valid: k, M, G, T, or none."),
        ("seconds=1 day", "got 'seconds=1 day': no unit 'day' of seconds. Valid: s, min, h, or none."),
        ("rounds=0", "got 'rounds=0': a budget is above 0; nearest valid form: rounds=30."),
        ("bytes=2kB", "got bytes=2kB: no run has an evaluation within it. The first evaluations are at bytes=1000000."),
    ],
)
def test_wrong_budgets(two: Outputs, budget: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--budget: {message}")):
        render([two.path], Options(budget=[budget]))


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        *(("bytes=10", 10), ("bytes=10B", 10), ("bytes=1.5kB", 1500), ("bytes=2MiB", 2**21), ("bytes=.5G", 5e8)),
        *(("macs=3T", 3e12), ("macs=1e12", 1e12), ("seconds=2h", 7200), ("sim_seconds=5", 5), ("local_steps=4k", 4000)),
    ],
)
def test_units(text: str, limit: float) -> None:
    assert parse(text).limit == pytest.approx(limit)
