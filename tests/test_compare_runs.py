"""Which runs ``hybridfl compare`` counts, and what it says of the others."""

from __future__ import annotations

import pytest
from compare_helpers import Outputs, table, warnings_of

from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError, HybridflError


def test_unfinished_runs_are_left_out_aloud(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    for name, status in (("b", "failed"), ("c", "running"), ("d", "interrupted")):
        outputs.run(name, "fedavg", 2, [0.9], status=status)
    (outputs.run("e", "fedavg", 3, [0.9]) / "status.json").write_text('{"status": "do')
    assert table(outputs.path)[0]["seeds"] == "1"
    assert warnings_of(outputs.path) == ["4 of 5 runs left out: 1 failed, 2 unfinished, 1 unreadable."]


def test_nothing_done(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5], status="failed")
    with pytest.raises(HybridflError, match=r"No finished run in '.*outputs': 1 failed\.") as caught:
        render([outputs.path])
    assert caught.value.exit_status == 1


def test_the_newest_finished_attempt_counts(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.1])
    outputs.run("a-2", "fedavg", 1, [0.2])
    outputs.run("a-10", "fedavg", 1, [0.3])
    outputs.run("a-11", "fedavg", 1, [0.4], status="failed")
    for path in (outputs.path, outputs.sweep(("a-2", "done"))):
        line = table(path)[0]
        assert (line["runs"], line["mean"]) == ("1", "0.3")
        assert warnings_of(path) == []
    assert table(outputs.path / "runs" / "a-2")[0]["mean"] == "0.2"


def test_rows_in_the_order_of_the_sweep_else_by_name(outputs: Outputs) -> None:
    for name, method in (("1", "scaffold"), ("2", "fedavg"), ("3", "feddle"), ("4", "atlas")):
        outputs.run(name, method, 1, [0.5])
    sweep = outputs.sweep(("3", "done"), ("1", "done"), ("", "skipped"), ("2", "done"))
    assert [line["method"] for line in table(sweep)] == ["feddle", "scaffold", "fedavg"]
    assert warnings_of(sweep) == ["1 of 4 runs left out: 1 skipped."]
    assert [line["method"] for line in table(outputs.path)] == ["atlas", "fedavg", "feddle", "scaffold"]
    text = render([outputs.path, sweep], Options(format="csv"))
    assert [line.partition(",")[0] for line in text.splitlines()[1:]] == ["feddle", "scaffold", "fedavg", "atlas"]


def test_numbers_sort_as_numbers(outputs: Outputs) -> None:
    for index, number in enumerate((100, 9, 10)):
        outputs.run(str(index), "fedavg", 1, [0.5], clients__number=number)
    assert [line["clients.number"] for line in table(outputs.path)] == ["9", "10", "100"]


def test_a_deleted_run_of_a_sweep_is_missing(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    sweep = outputs.sweep(("a", "done"), ("gone", "done"), ("", "failed"))
    assert warnings_of(sweep) == ["2 of 3 runs left out: 1 failed, 1 missing."]


def test_the_same_config_in_another_version_is_no_second_seed(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    outputs.run("b", "fedavg", 1, [0.5])
    assert table(outputs.path)[0]["runs"] == "1"
    assert warnings_of(outputs.path)[0].startswith("1 run left out: same config and seed as a newer one")


def test_a_wrong_path_is_named_with_its_neighbours(outputs: Outputs) -> None:
    outputs.run("abcdef", "fedavg", 1, [0.5])
    for wrong in (outputs.path / "runs" / "abcdee", outputs.path / "abcdee"):
        with pytest.raises(ConfigError, match=r"abcdee: does not exist; .*runs\.csv.*Did you mean 'abcdef'") as caught:
            render([wrong])
        assert caught.value.exit_status == 2
    empty = outputs.path.parent / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"empty: is not a run folder .*Valid: abcdef, outputs\."):
        render([empty])
