"""Which settings become rows and columns: settings are never averaged over."""

from __future__ import annotations

import pytest
from compare_helpers import Outputs, table, warnings_of

from hybridfl import keys
from hybridfl.config import NOT_IDENTITY


def test_other_settings_become_rows(outputs: Outputs) -> None:
    for index, alpha in enumerate((0.5, 0.1)):
        outputs.run(f"a{index}", "fedavg", 1, [alpha], partitioning__alpha=alpha, split=f"s{alpha}")
        outputs.run(f"b{index}", "feddle", 1, [alpha + 0.2], partitioning__alpha=alpha, split=f"s{alpha}")
    found = {(line["method"], line["partitioning.alpha"]): line for line in table(outputs.path)}
    assert {key: float(line["mean"]) for key, line in found.items()} == pytest.approx(
        {("fedavg", "0.1"): 0.1, ("fedavg", "0.5"): 0.5, ("feddle", "0.1"): 0.3, ("feddle", "0.5"): 0.7}
    )
    # each alpha has a reference row of its own
    assert [line["difference"] != "" for line in found.values()] == [False, False, True, True]
    assert warnings_of(outputs.path) == ["The runs differ in partitioning.alpha: added to the rows."]


def test_settings_of_a_method_are_compared_within_it(outputs: Outputs) -> None:
    outputs.run("a", "feddle", 1, [0.6], method__search={"steps": 10}, method__keep=3)
    outputs.run("b", "feddle", 1, [0.7], method__search={"steps": 20}, method__keep=3)
    outputs.run("c", "fedavg", 1, [0.5])
    found = {(line["method"], line["method.search.steps"]): line for line in table(outputs.path)}
    assert list(found) == [("fedavg", ""), ("feddle", "10"), ("feddle", "20")]
    assert "method.keep" not in found["fedavg", ""]
    assert float(found["feddle", "20"]["difference"]) == pytest.approx(0.2)
    other = {line["method.search.steps"]: line["difference"] for line in table(outputs.path, reference="feddle,20")}
    assert other["20"] == ""
    assert float(other["10"]) == pytest.approx(-0.1)


def test_seeds_paths_and_devices_are_no_settings(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5], output_dir="here", executor={"name": "sequential"}, device="cpu")
    outputs.run("b", "fedavg", 2, [0.7], output_dir="there", executor={"name": "vectorized"}, device="cuda")
    assert [line["seeds"] for line in table(outputs.path)] == ["2"]
    assert warnings_of(outputs.path) == []


def test_a_fixed_partitioning_seed_is_one_setting_and_two_are_two(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 0, [0.5], partitioning__seed=0)
    outputs.run("b", "fedavg", 1, [0.7], partitioning__seed=0)
    assert [line["seeds"] for line in table(outputs.path)] == ["2"]
    outputs.run("c", "fedavg", 1, [0.9], partitioning__seed=7)
    assert [line["partitioning.seed"] for line in table(outputs.path)] == ["0", "7"]


def test_a_group_is_told_by_its_name(outputs: Outputs) -> None:
    for name, classes in (("digits", 10), ("cifar100", 100)):
        outputs.run(name, "fedavg", 1, [0.5], dataset={"classes": classes, "name": name})
    assert [line["dataset.name"] for line in table(outputs.path)] == ["cifar100", "digits"]
    assert "dataset.classes" not in table(outputs.path)[0]
    assert [line["dataset"] for line in table(outputs.path, cols="dataset")] == ["cifar100", "digits"]
    assert warnings_of(outputs.path, cols="dataset") == []


def test_a_group_without_a_name_is_told_by_its_class(outputs: Outputs) -> None:
    shares = {"_target_": "hybridfl.data.server_data.Share", "examples": 100}
    outputs.run("a", "fedavg", 1, [0.5], server_data=shares)
    outputs.run("b", "fedavg", 1, [0.5], server_data={"_target_": "hybridfl.data.server_data.NoServerData"})
    assert [line["server_data"] for line in table(outputs.path)] == ["NoServerData", "Share"]
    assert "server_data.examples" not in table(outputs.path)[0]
    outputs.run("c", "fedavg", 1, [0.5], server_data=shares | {"examples": 200})
    lines = table(outputs.path)
    assert [(line["server_data"], line["server_data.examples"]) for line in lines] == [
        ("NoServerData", ""),
        ("Share", "100"),
        ("Share", "200"),
    ]
    outputs.run("d", "fedavg", 1, [0.5], server_data=shares | {"_target_": "mine.Share"})
    assert {line["server_data._target_"] for line in table(outputs.path)} == {
        "hybridfl.data.server_data.NoServerData",
        "hybridfl.data.server_data.Share",
        "mine.Share",
    }


def test_what_is_outside_a_runs_identity_is_no_setting() -> None:
    assert NOT_IDENTITY < keys.NOT_RESULTS


def test_a_setting_tied_to_the_column_does_not_tear_the_rows_apart(outputs: Outputs) -> None:
    for name, classes in (("digits", 10), ("cifar100", 100)):
        outputs.run(name, "fedavg", 1, [0.5], dataset={"name": name}, model__classes=classes)
    assert "model.classes" not in table(outputs.path, cols="dataset")[0]
    assert warnings_of(outputs.path, cols="dataset") == [
        "The runs of different columns differ in model.classes as well."
    ]


def test_a_setting_mixed_within_a_cell_becomes_a_row_beside_columns(outputs: Outputs) -> None:
    for index, (alpha, rate) in enumerate([(0.1, 1), (0.1, 2), (0.5, 1), (0.5, 2)]):
        outputs.run(str(index), "fedavg", 1, [0.1 * index], partitioning__alpha=alpha, clients__rate=rate)
    lines = table(outputs.path, cols="partitioning.alpha")
    assert [(line["clients.rate"], line["partitioning.alpha"], line["runs"]) for line in lines] == [
        ("1", "0.1", "1"),
        ("1", "0.5", "1"),
        ("2", "0.1", "1"),
        ("2", "0.5", "1"),
    ]


def test_differences_stay_within_a_column(outputs: Outputs) -> None:
    for alpha, base in ((0.1, 0.2), (0.5, 0.6)):
        for method, gain in (("fedavg", 0.0), ("feddle", alpha)):
            outputs.run(f"{method}{alpha}", method, 1, [base + gain], partitioning__alpha=alpha)
    lines = table(outputs.path, cols="partitioning.alpha")
    found = {(line["method"], line["partitioning.alpha"]): line["difference"] for line in lines}
    assert float(found["feddle", "0.1"]) == pytest.approx(0.1)
    assert float(found["feddle", "0.5"]) == pytest.approx(0.5)
