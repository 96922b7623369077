"""What ``hybridfl report`` collects: numbers by hand, and what is left out."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_helpers import Outputs, two_methods

from hybridfl.finding import find_runs
from hybridfl.formats import as_sheet
from hybridfl.report import curves, participants, sheets, splits
from hybridfl.report.content import content
from hybridfl.report.page import as_script, page
from hybridfl.report.rows import rounded, thinned
from hybridfl.tabulate import Options, tabulate


def collected(outputs: Outputs) -> dict[str, Any]:
    """As the page has it."""
    found: dict[str, Any] = json.loads(as_script(content([outputs.path], "t", warn=lambda _: None)))
    return found


def split_of(folder: Path, digest: str, roles: dict[int, str], **more: Any) -> None:
    """A ``split.json`` of two clients and three classes."""
    clients = [{"class_counts": counts, "domain_counts": [sum(counts)]} for counts in ([1, 2, 0], [0, 0, 5])]
    server = {"sizes": {"train": 3, "val": 1}}
    stored = {"digest": digest, "data": "da7a", "roles": roles, "clients": clients, "server": server, **more}
    (folder / "split.json").write_text(json.dumps(stored))


# --- rows and tables --------------------------------------------------------------------------------------------------


def test_the_tables_are_those_of_compare(outputs: Outputs) -> None:
    two_methods(outputs)
    found = collected(outputs)
    runs = find_runs([outputs.path])
    first, loss = found["tables"][:2]
    for table, options in ((first, Options()), (loss, Options(metric="loss"))):
        sheet = as_sheet(tabulate(runs, options))
        assert (table["header"], table["body"], table["caption"]) == (sheet.header, sheet.body, sheet.caption)
        assert [tuple(place) for place in table["bold"]] == sorted(sheet.bold)
    assert [row["method"] for row in found["rows"]] == ["fedavg", "feddle"]
    assert found["rows"][1]["seeds"] == ["1", "2", "3"]


def test_the_numbers_of_the_intervals_by_hand(outputs: Outputs) -> None:
    for seed, (ours, theirs) in enumerate([(0.6, 0.5), (0.7, 0.5), (0.8, 0.5)], 1):
        outputs.run(f"a{seed}", "feddle", seed, [ours])
        outputs.run(f"b{seed}", "fedavg", seed, [theirs])
    table = collected(outputs)["tables"][0]
    # 0.2 ± t(0.975, 2) · 0.1 / √3 with t = 4.302653
    assert table["differences"] == [None, pytest.approx([0.2, -0.0484138, 0.4484138], rel=1e-4)]
    assert table["reference"] == "fedavg"


def test_settings_are_named_by_what_tells_them_apart(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5], clients__alpha=1, partitioning__alpha=0.1)
    outputs.run("b", "fedavg", 1, [0.5], clients__alpha=2, partitioning__alpha=1)
    outputs.run("c", "fedavg", 2, [0.5], clients__alpha=2, partitioning__alpha=1.0)
    outputs.run("d", "feddle", 1, [0.5], clients__alpha=2, partitioning__alpha=1.0, method__search={"steps": 5})
    outputs.run("e", "feddle", 1, [0.6], clients__alpha=2, partitioning__alpha=1.0, method__search={"steps": 6})
    rows = collected(outputs)["rows"]
    same = "partitioning.alpha=1 clients.alpha=2"
    assert [(row["method"], row["setting"], row["seeds"]) for row in rows] == [
        ("fedavg", "partitioning.alpha=0.1 clients.alpha=1", ["1"]),
        ("fedavg", same, ["1", "2"]),
        ("feddle steps=5", same, ["1"]),
        ("feddle steps=6", same, ["1"]),
    ]


def test_what_moves_raw_data_is_marked(outputs: Outputs) -> None:
    outputs.run("a", "oracle", 1, [0.5], method__moves_raw_data=True)
    assert [(row["method"], row["raw"]) for row in collected(outputs)["rows"]] == [("oracle†", True)]


def test_a_section_without_data_is_not_there(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    assert {name for name, value in collected(outputs).items() if isinstance(value, dict | list)} == {
        *("tables", "curves", "configs", "rows", "notes")
    }


def test_without_a_global_model_the_clients_come_first(outputs: Outputs) -> None:
    outputs.run("a", "local_only", 1, {"clients": [0.8]})
    assert collected(outputs)["tables"][0]["name"] == "accuracy, clients, mean of the last 10 evaluations"


def test_what_is_left_out_is_said(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    outputs.run("b", "fedavg", 2, [0.5], status="failed")
    assert collected(outputs)["notes"] == ["1 of 2 runs left out: 1 failed."]


def test_tables_beyond_the_limit_are_named(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs.run("a", "fedavg", 1, {"global": [0.5], "clients": [0.6]})
    assert len(collected(outputs)["tables"]) > 2
    monkeypatch.setattr(sheets, "ROWS", 1)
    found = collected(outputs)
    assert [table["name"].rpartition(",")[0] for table in found["tables"]] == ["accuracy, global", "accuracy, clients"]
    assert "Tables left out, as there are 1 rows: loss global" in found["notes"][0]


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_by_hand(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, {"global": [0.1, 0.5, 0.6], "clients": [0.2, 0.2, 0.2]})
    outputs.run("b", "fedavg", 2, {"global": [0.3, 0.5, float("nan")], "clients": [0.2, 0.2, 0.2]})
    found = collected(outputs)["curves"]
    names = [(one["metric"], one["scope"]) for one in found["series"]]
    assert names == [(m, s) for s in ("global", "clients") for m in ("accuracy", "loss")] + [("worst10", "clients")]
    assert found["axes"] == {"round": "round", "bytes": "MB sent"}
    (row,) = found["rows"]
    assert row["x"] == {"round": [1, 2, 3], "bytes": [3, 6, 9]}
    line = row["y"][0]
    assert line == {
        "mean": [0.2, 0.5, 0.6],
        "sd": [pytest.approx(np.std([1, 3], ddof=1) / 10, rel=0.02), 0, None],
        "runs": [2, 2, 1],
    }
    assert row["y"][names.index(("worst10", "clients"))]["mean"] == [0.1, 0.1, 0.1]


def test_a_row_without_the_scope_has_no_curve(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, {"global": [0.5], "clients": [0.6]})
    outputs.run("b", "local_only", 1, {"clients": [0.8]})
    rows = collected(outputs)["curves"]["rows"]
    assert rows[1]["y"][0] is None
    assert rows[1]["y"][2]["mean"] == [0.8]


def test_runs_without_any_number_have_no_curves(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [float("nan")])
    assert "curves" not in collected(outputs)


def test_long_curves_are_thinned_evenly(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [i / 1000 for i in range(1000)])
    line = collected(outputs)["curves"]["rows"][0]
    rounds = line["x"]["round"]
    assert (rounds[0], rounds[-1], len(rounds)) == (1, 1000, curves.POINTS)
    assert {b - a for a, b in itertools.pairwise(rounds)} == {5, 6}
    assert line["y"][0]["mean"] == [pytest.approx((round - 1) / 1000, abs=1e-3) for round in rounds]


def test_with_very_many_rows_detail_goes_first(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs.run("a", "fedavg", 1, {"global": [i / 100 for i in range(100)], "global/domain=a": [0.5] * 100})
    monkeypatch.setattr(curves, "ALL_POINTS", 3 * curves.FEWEST - 1)
    found = collected(outputs)
    assert {one["scope"] for one in found["curves"]["series"]} == {"global"}
    assert len(found["curves"]["rows"][0]["x"]["round"]) == 29
    assert any("Curves of scopes with details" in note for note in found["notes"])


@pytest.mark.parametrize(("count", "most"), [(0, 5), (5, 5), (6, 5), (1000, 7), (3, 2)])
def test_thinning_keeps_both_ends(count: int, most: int) -> None:
    kept = thinned(count, most)
    assert len(kept) == min(count, most)
    assert kept == sorted(set(kept))
    assert kept[:1] == list(range(count))[:1]
    assert kept[-1:] == list(range(count))[-1:]


def test_rounding() -> None:
    assert [rounded(v, 3) for v in (0.123456, 1234.6, 2.0, float("nan"), float("inf"))] == [0.123, 1230, 2, None, None]


# --- parts and streams ------------------------------------------------------------------------------------------------


def test_parts_of_a_scope_by_hand(outputs: Outputs) -> None:
    for seed, gain in ((1, 0.0), (2, 0.2)):
        scopes = {
            "global": [0.5],
            "global/domain=a": [0.4 + gain],
            "global/domain=b": [0.9],
            "clients/width=0.5": [0.3],
        }
        outputs.run(f"a{seed}", "fedavg", seed, scopes)
    outputs.run("b", "server_only", 1, {"global": [0.5]})
    domain, width = collected(outputs)["parts"]
    assert (domain["scope"], domain["kind"], domain["names"]) == ("global", "domain", ["a", "b"])
    assert domain["cells"] == [[[0.5, "50.0 ± 14.1"], [0.9, "90.0 ± 0.0"]], [[None, "–"], [None, "–"]]]
    assert (width["kind"], width["cells"][0]) == ("width", [[0.3, "30.0 ± 0.0"]])


def test_the_matrix_of_a_stream_by_hand(outputs: Outputs) -> None:
    for seed, first in ((1, 0.8), (2, 0.6)):
        scopes = {"global": [0.9, 0.9, 0.5, 0.5], "global/task=0": [0.9, first, 0.5, 0.3], "global/task=1": []}
        folder = outputs.run(f"a{seed}", "fedavg", seed, scopes, tasks__number=2, rounds=4)
        with (folder / "metrics.csv").open("a") as file:
            file.write("3,global/task=1,0.6,0.4,,,9,,,,,,,\n4,global/task=1,0.7,0.3,,,9,,,,,,,\n")
    outputs.run("b", "oracle", 1, {"global": [0.5] * 4}, tasks__number=2, rounds=4)
    (stream,) = collected(outputs)["streams"]
    (row,) = stream["rows"]
    assert (stream["scope"], row["row"]) == ("global", 0)
    assert row["mean"] == [[0.7], [0.3, 0.7]]
    assert row["sd"] == [[0.14], [0, 0]]
    assert row["forgetting"] == ["40.0 ± 14.1", "40.0 ± 14.1"]


# --- participants and splits ------------------------------------------------------------------------------------------


def test_coefficients_by_role_by_hand(outputs: Outputs) -> None:
    folder = outputs.run("a", "feddle", 1, [0.5])
    outputs.run("b", "fedavg", 1, [0.5])
    split_of(folder, "s", {1: "noisy_labels"})
    lines = ["1,coefficient,0,0.5", "1,coefficient,1,-0.1", "1,loss,,9", "2,coefficient,-1,0.25", "2,coefficient,2,0.1"]
    lines += ["2,coefficient,0,0.3", "2,coefficient,,7", "2,coefficient,1,"]
    (folder / "method.csv").write_text("\n".join(["round,name,participant,value", *lines]) + "\n")
    (one,) = collected(outputs)["coefficients"]
    assert (one["row"], one["seed"], one["rounds"], one["roles"]) == (1, "1", [1, 2], {"1": "noisy_labels"})
    assert one["values"] == [[1, 0, 0.5], [1, 1, -0.1], [2, -1, 0.25], [2, 2, 0.1], [2, 0, 0.3]]
    assert one["means"] == {"honest": [0.5, 0.2], "noisy_labels": [-0.1, None], "server": [None, 0.25]}


def test_every_row_has_a_run_before_any_has_two(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("feddle", "other"):
        for seed in (1, 2):
            folder = outputs.run(f"{name}{seed}", name, seed, [0.5])
            (folder / "method.csv").write_text("round,name,participant,value\n1,coefficient,0,1\n2,coefficient,0,1\n")
            (folder / "clients.csv").write_text("round,client,accuracy,loss,examples\n1,0,0.5,1,9\n1,1,0.6,1,9\n")
    monkeypatch.setattr(participants, "VALUES", 5)
    found = collected(outputs)
    assert [one["row"] for one in found["coefficients"]] == [one["row"] for one in found["clients"]["runs"]] == [0, 1]
    assert any(note.startswith("Coefficients of 2 runs are left out") for note in found["notes"])
    assert any(note.startswith("Accuracies of the clients of 2 runs are left out") for note in found["notes"])


def test_clients_are_those_of_the_last_evaluation(outputs: Outputs) -> None:
    folder = outputs.run("a", "fedavg", 1, {"global": [0.5], "clients": [0.4]})
    split_of(folder, "s", {3: "random_updates", 9: "held_out"})
    rows = ["1,0,0.1,1,9", "11,0,0.25,1,9", "11,3,0.75,1,9", "11,5,,,"]
    (folder / "clients.csv").write_text("\n".join(["round,client,accuracy,loss,examples", *rows]) + "\n")
    found = collected(outputs)["clients"]
    (one,) = found["runs"]
    assert (one["clients"], one["accuracy"], one["roles"]) == ([0, 3], [0.25, 0.75], {"3": "random_updates"})
    assert found["means"] == {"accuracy": [0.4], "worst10": [0.2]}


def test_a_split_is_shown_once_for_each_distribution_of_roles(outputs: Outputs) -> None:
    noisy = {"clients__noisy_labels": 0.5, "split": "one"}
    for name, roles, options in (
        ("a", {}, {"split": "one"}),
        ("b", {}, {"split": "one"}),
        ("c", {1: "noisy_labels"}, noisy),
        ("d", {}, {"split": "two"}),
    ):
        folder = outputs.run(name, f"m{name}", 1, [0.5], **options)
        split_of(folder, options["split"], roles, server_class_counts=[4, 0, 0])
    shown = collected(outputs)["splits"]
    assert [(one["digest"], one["roles"], one["runs"]) for one in shown] == [
        ("one", {}, 2),
        ("one", {"1": "noisy_labels"}, 1),
        ("two", {}, 1),
    ]
    first = shown[0]
    assert (first["clients"], first["server"], first["server_size"]) == ([[1, 2, 0], [0, 0, 5]], [4, 0, 0], 4)
    assert (first["settings"], first["seeds"], first["domains"]) == ([""], ["1"], [])


def test_splits_beyond_the_limit_are_counted(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2, 3):
        split_of(outputs.run(f"a{seed}", "fedavg", seed, [0.5]), f"s{seed}", {})
    monkeypatch.setattr(splits, "CELLS", 12)
    found = collected(outputs)
    assert [one["digest"] for one in found["splits"]] == ["s1", "s2"]
    assert "Heat maps of 1 of 3 splits are left out, to keep the page small." in found["notes"]


def test_of_very_many_clients_the_first_are_shown(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    split_of(outputs.run("a", "fedavg", 1, [0.5]), "s", {})
    monkeypatch.setattr(splits, "CLIENTS", 1)
    (one,) = collected(outputs)["splits"]
    assert (one["number"], one["clients"]) == (2, [[1, 2, 0]])


def test_a_split_of_an_earlier_version_or_a_damaged_one_is_no_failure(outputs: Outputs) -> None:
    split_of(outputs.run("a", "fedavg", 1, [0.5]), "s1", {})
    (outputs.run("b", "fedavg", 2, [0.5]) / "split.json").write_text('{"digest": ')
    (one,) = collected(outputs)["splits"]
    assert (one["server"], one["server_size"]) == (None, 4)


# --- configs ----------------------------------------------------------------------------------------------------------


def test_shared_and_differing_settings(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5], model={"width": 1}, output_dir="/home/me", data_root="/home/data")
    outputs.run("b", "fedavg", 2, [0.5], model={"width": 1.0}, output_dir="/home/me")
    outputs.run("c", "feddle", 1, [0.5], model={"width": 1}, method__atlas={"size": 4}, ui="plain")
    found = collected(outputs)["configs"]
    shared = dict(found["shared"])
    assert shared["model.width"] == "1"
    assert not {"seed", "output_dir", "data_root", "ui", "digest", "overrides"} & {*shared, *found["keys"]}
    told = [{found["keys"][key]: found["values"][value] for key, value in row} for row in found["rows"]]
    assert "method.atlas.size" not in told[0]
    assert told[1]["method.atlas.size"] == "4"
    assert [run["name"] for run in found["runs"]] == ["a", "b", "c"]


def test_folders_of_this_machine_are_not_told(outputs: Outputs) -> None:
    folder = outputs.run("a", "fedavg", 1, [0.5], data_root="/secret/data")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        config.replace(
            "overrides: baseline=fedavg",
            f"overrides: data_root=/secret/x output_dir={outputs.path} rounds=5 baseline=fedavg",
        )
    )
    text = page(content([outputs.path], "t", warn=lambda _: None))
    assert "rounds=5 baseline=fedavg seed=1" in text
    assert "secret" not in text
    assert str(outputs.path) not in text
