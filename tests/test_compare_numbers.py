"""The numbers of ``hybridfl compare``: exact truths by hand, and the columns of its CSV."""

from __future__ import annotations

import math
from typing import Any

import pytest
from compare_helpers import Outputs, by_method, table, two_methods, warnings_of
from hypothesis import given
from hypothesis import strategies as st

from hybridfl import statistics
from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError
from hybridfl.statistics import Observation


def test_mean_and_sample_sd() -> None:
    assert statistics.mean_sd([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7)))
    assert statistics.mean_sd([4.0])[0] == 4.0
    assert math.isnan(statistics.mean_sd([4.0])[1])
    assert math.isnan(statistics.mean_sd([])[0])


def test_t_interval_by_hand() -> None:
    # t(0.975, 2 degrees of freedom) = 4.302653 from any printed table; sd = 0.1
    low, high = statistics.t_interval([0.1, 0.2, 0.3])
    assert low == pytest.approx(0.2 - 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert high == pytest.approx(0.2 + 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert all(map(math.isnan, statistics.t_interval([0.1])))


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(-1, 1))
def test_interval_moves_with_the_values(values: list[float], shift: float) -> None:
    low, high = statistics.t_interval(values)
    moved = statistics.t_interval([value + shift for value in values])
    assert low <= statistics.mean_sd(values)[0] <= high
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_tail_mean_takes_the_end_and_hides_no_gap() -> None:
    assert statistics.tail_mean([9.0, 1.0, 3.0], 2) == 2.0
    assert statistics.tail_mean([1.0, 3.0], 10) == 2.0
    assert math.isnan(statistics.tail_mean([1.0, math.nan], 10))
    assert math.isnan(statistics.tail_mean([], 1))


def test_best_round_is_the_earliest_of_equals() -> None:
    assert statistics.best_round([5, 10, 15], [0.2, 0.7, 0.7]) == 10
    assert statistics.best_round([5, 10], [math.nan, 0.1]) == 10
    assert statistics.best_round([5], [math.nan]) is None


def observation(seed: int, value: float, split: str | None = "s", curve: Any = ()) -> Observation:
    return Observation(seed, None if split is None else (seed, split), value, value, curve, 7.0)


def test_pairs_share_seed_and_split() -> None:
    ours = [observation(1, 0.5), observation(2, 0.6), observation(3, 0.7, "other"), observation(4, 0.9, None)]
    theirs = [observation(2, 0.4), observation(1, 0.4), observation(3, 0.1), observation(4, 0.1, None)]
    assert statistics.paired_differences(ours, theirs) == pytest.approx([0.1, 0.2])


def test_a_pair_with_an_undefined_value_has_no_difference() -> None:
    ours = [observation(1, 0.5), observation(2, math.nan), observation(3, 0.7)]
    theirs = [observation(1, math.nan), observation(2, 0.4), observation(3, 0.1)]
    assert statistics.paired_differences(ours, theirs) == pytest.approx([0.6])


def test_target_is_reached_at_the_first_evaluation_at_least_as_good() -> None:
    climbing = observation(1, 0.9, curve=[(5, 0.4, 10.0), (10, 0.8, 20.0), (15, 0.7, 30.0), (20, 0.9, 40.0)])
    assert climbing.reach(0.8) == (10, 20.0)
    assert climbing.reach(0.91) is None
    summary = statistics.summarise([climbing, observation(2, 0.1)], [], 0.8)
    assert (summary.rounds_to_target, summary.bytes_to_target) == (10, 20.0)
    assert (summary.reached, summary.runs) == (1, 2)


def test_csv_columns(outputs: Outputs) -> None:
    two_methods(outputs)
    header = render([outputs.path], Options(format="csv")).splitlines()[0]
    assert header.startswith(
        "method,seeds,mean,sd,difference,low,high,rounds_to_target,reached,bytes_to_target,bytes,runs,pairs"
    )


def test_numbers_of_a_table(outputs: Outputs) -> None:
    two_methods(outputs)
    found = by_method(outputs.path, target=0.65)
    ours, theirs = found["feddle"], found["fedavg"]
    assert (ours["seeds"], ours["pairs"], ours["target"]) == ("3", "3", "0.65")
    assert float(ours["mean"]) == pytest.approx(0.7)
    assert float(ours["sd"]) == pytest.approx(0.1)
    assert float(ours["difference"]) == pytest.approx(0.2)
    assert float(ours["low"]) == pytest.approx(-0.0484138, abs=1e-6)
    assert float(ours["high"]) == pytest.approx(0.4484138, abs=1e-6)
    assert (ours["rounds_to_target"], ours["reached"], ours["bytes_to_target"]) == ("2.0", "2", "6000000.0")
    assert float(ours["bytes"]) == 6e6
    assert (theirs["difference"], theirs["low"], theirs["pairs"]) == ("", "", "0")
    assert (theirs["rounds_to_target"], theirs["reached"], theirs["bytes_to_target"]) == ("", "0", "")


def test_one_seed_has_no_sd_and_one_pair_no_interval(outputs: Outputs) -> None:
    outputs.run("a", "feddle", 1, [0.6])
    outputs.run("b", "fedavg", 1, [0.5])
    line = by_method(outputs.path)["feddle"]
    assert (line["sd"], line["low"], line["high"], line["pairs"]) == ("", "", "", "1")
    assert float(line["difference"]) == pytest.approx(0.1)


def test_no_difference_between_unpaired_runs(outputs: Outputs) -> None:
    outputs.run("a", "feddle", 1, [0.6])
    outputs.run("b", "fedavg", 2, [0.5])
    outputs.run("c", "scaffold", 2, [0.5], split="elsewhere")
    assert [line["difference"] for line in table(outputs.path)] == ["", "", ""]


def test_at_last_mean10_and_best_on_validation(outputs: Outputs) -> None:
    accuracy = [0.0, 0.9, *[0.1 * k for k in range(10)]]
    outputs.run("a", "fedavg", 1, {"global": accuracy, "validation": [0.1, 0.3, *[0.2] * 10]})
    read = {at: float(table(outputs.path, at=at)[0]["mean"]) for at in ("last", "mean10", "best")}
    assert read == pytest.approx({"last": 0.9, "mean10": 0.45, "best": 0.9})
    # never the best on test: round 2 is taken for its validation accuracy, though its loss is not the lowest
    assert float(table(outputs.path, at="best", metric="loss")[0]["mean"]) == pytest.approx(0.1)


def test_default_target_is_nine_tenths_of_the_best_mean(outputs: Outputs) -> None:
    two_methods(outputs)
    assert {line["target"] for line in table(outputs.path)} == {"0.63"}
    assert {line["target"] for line in table(outputs.path, metric="loss")} == {"0.63"}
    text = render([outputs.path], Options(at="last"))
    assert "Target: accuracy 63 % = 90 % of the best mean" in text


def test_reference_can_be_chosen(outputs: Outputs) -> None:
    two_methods(outputs)
    found = by_method(outputs.path, reference="feddle")
    assert float(found["fedavg"]["difference"]) == pytest.approx(-0.2)
    assert found["feddle"]["difference"] == ""
    with pytest.raises(ConfigError, match=r"--reference: no row 'fedle'\. Did you mean 'feddle'"):
        render([outputs.path], Options(reference="fedle"))


def test_without_fedavg_the_first_row_is_the_reference(outputs: Outputs) -> None:
    outputs.run("z", "oracle", 1, [0.9])
    outputs.run("y", "scaffold", 1, [0.5])
    assert [(line["method"], line["pairs"]) for line in table(outputs.path)] == [("oracle", "0"), ("scaffold", "1")]


def test_fedavg_is_the_reference_and_not_what_is_built_on_it(outputs: Outputs) -> None:
    outputs.run("a", "finetune", 1, [0.9], method__base={"name": "fedavg"})
    outputs.run("b", "finetune", 1, [0.7], method__base={"name": "fedprox"})
    outputs.run("c", "fedavg", 1, [0.5])
    found = {(line["method"], line["method.base.name"]): line["difference"] for line in table(outputs.path)}
    assert found["fedavg", ""] == ""
    assert float(found["finetune", "fedavg"]) == pytest.approx(0.4)
    assert float(found["finetune", "fedprox"]) == pytest.approx(0.2)


def test_a_method_without_a_global_model_keeps_its_row(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, {"global": [0.5], "clients": [0.6]})
    outputs.run("b", "local_only", 1, {"clients": [0.8]})
    line = by_method(outputs.path)["local_only"]
    assert (line["seeds"], line["mean"], line["reached"]) == ("1", "", "0")
    assert float(by_method(outputs.path, scope="clients")["local_only"]["difference"]) == pytest.approx(0.2)
    assert warnings_of(outputs.path) == [
        "accuracy in scope global is not defined for local_only (1 of 1 run): left out of the means."
    ]


def test_a_diverged_seed_is_named_not_hidden(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5, math.nan])
    outputs.run("b", "fedavg", 2, [0.5, 0.7])
    line = table(outputs.path)[0]
    assert (line["seeds"], line["runs"], line["mean"]) == ("1", "2", "0.7")
    assert "fedavg (1 of 2 runs)" in warnings_of(outputs.path)[0]


def test_without_a_global_model_the_table_is_of_what_there_is(outputs: Outputs) -> None:
    outputs.run("a", "dimat", 0, {"served": [0.3], "clients": [0.6], "clients/class=1": [0.2]})
    outputs.run("b", "local_only", 0, {"served": [0.4], "clients": [0.5]})
    assert [(row["scope"], row["mean"]) for row in table(outputs.path)] == [("clients", "0.6"), ("clients", "0.5")]
    assert {row["scope"] for row in table(outputs.path, scope="served")} == {"served"}
    outputs.run("c", "fedavg", 0, {"global": [0.7], "clients": [0.9]})
    assert {row["method"]: row["mean"] for row in table(outputs.path)} == {
        "dimat": "",
        "local_only": "",
        "fedavg": "0.7",
    }
