"""What ``hybridfl report`` collects: numbers by hand, what is left out, and the file it writes."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import TINY, call, done
from compare_helpers import Outputs, two_methods

from hybridfl.errors import ConfigError, HybridflError
from hybridfl.formats import as_sheet
from hybridfl.report import curves, participants, sheets, splits
from hybridfl.report.command import write
from hybridfl.report.content import content
from hybridfl.report.page import as_script, page
from hybridfl.report.rows import rounded, thinned
from hybridfl.runs import find_runs
from hybridfl.store import StoreError
from hybridfl.tabulate import Options, tabulate


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    return Outputs(tmp_path / "outputs")


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


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    own = "{id: own, text: two words, better: feddle, than: fedavg}"
    (folder / "conf" / "experiment").mkdir(parents=True)
    for name, claims in (("study", f"[{own}]"), ("plain", "[]")):
        preset = f"# @package _global_\n# Perhaps a claim (no paper)\nclaims: {claims}\n"
        (folder / "conf" / "experiment" / f"{name}.yaml").write_text(preset)
    line = ("-m", "--config-dir", str(folder / "conf"), *TINY, f"output_dir={folder / 'outputs'}")
    done(*line, "experiment=plain", "baseline=fedavg", "seed=0")
    return done(*line, "experiment=study", "baseline=none,fedavg", "seed=0,1", "clients.random_updates=0.4")


def test_a_real_sweep_has_its_claims_coefficients_and_split(sweep: Path) -> None:
    found = content([sweep], "t", sweep.parents[2] / "conf", lambda _: None)
    (preset,) = found["claims"]
    (claim,) = preset["claims"]
    assert (preset["preset"], claim["compared"], claim["found"][0]["seeds"]) == (
        "study",
        "accuracy: feddle − fedavg",
        2,
    )
    stored = json.loads(call("claims", str(sweep), "--config-dir", str(sweep.parents[2] / "conf"), "--json").out)
    assert (claim["verdict"], claim["found"][0]["mean"]) == (
        stored[0]["claims"][0]["verdict"],
        stored[0]["claims"][0]["found"][0]["mean"],
    )
    assert {one["row"] for one in found["coefficients"]} == {0}
    assert set(found["coefficients"][0]["means"]) == {"honest", "random_updates"}
    first = found["splits"][0]
    assert sum(first["server"]) == first["server_size"] == 40
    assert [value for _, value in sorted(first["roles"].items())] == ["random_updates"] * 2
    # all 200 examples are somebody's
    assert np.sum(first["clients"]) + 40 == 200
    assert {one["run"] for one in found["clients"]["runs"]} == set(range(4))


def test_a_preset_without_claims_has_none_and_an_unknown_one_is_left_out_aloud(sweep: Path) -> None:
    outputs, said = sweep.parents[1], []
    (preset,) = content([outputs], "t", sweep.parents[2] / "conf", said.append)["claims"]
    assert preset["preset"] == "study"
    assert not [text for text in said if "claims" in text]
    found = content([sweep], "t", None, said.append)
    assert "claims" not in found
    assert said[-1].startswith("The claims of experiment=study are left out: ")
    assert found["notes"][-1] == said[-1]


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_command_says_where_the_page_is(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    sweep = outputs.sweep(("a", "done"))
    monkeypatch.chdir(outputs.path.parent)
    here = outputs.path.parent / "report.html"
    for arguments, file in (
        ([], here),
        ([str(sweep)], sweep / "report.html"),
        ([str(sweep), str(outputs.path)], here),
        (["outputs", "--out", "new/folder/page.html"], outputs.path.parent / "new" / "folder" / "page.html"),
    ):
        answer = call("report", *arguments)
        assert (answer.status, answer.out) == (0, f"report: {file}\n")
        assert file.read_text().startswith("<!doctype html>")
        assert [other.name for other in file.parent.glob(".*.tmp")] == []
        file.unlink()


def test_the_title(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    out = outputs.path / "x.html"
    assert "<title>outputs</title>" in write([outputs.path], out).read_text()
    assert "<h1>A &lt;b&gt; &amp; c</h1>" in write([outputs.path], out, "A <b> & c").read_text()


def test_wrong_paths_are_those_of_compare(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    monkeypatch.chdir(outputs.path.parent)
    for path in ("output", str(outputs.path / "runs" / "b")):
        report, compare = call("report", path), call("compare", path)
        assert (report.status, report.err) == (compare.status, compare.err)
        assert report.status == 2
    assert not Path("report.html").exists()
    with pytest.raises(
        ConfigError, match=r"--out: got '.*outputs', which is a folder; nearest valid value: '.*report.html'"
    ):
        write([outputs.path], outputs.path)
    with pytest.raises(ConfigError, match=r"--out: cannot make '.*config.yaml' "):
        write([outputs.path], outputs.path / "runs" / "a" / "config.yaml" / "x.html")


def test_a_folder_of_configs_that_is_none(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    answer = call("report", str(outputs.path), "--config-dir", "nowhere", "--out", str(outputs.path / "x.html"))
    assert answer.status == 2
    assert "nowhere" in answer.err
    assert not (outputs.path / "x.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    out = write([outputs.path], outputs.path / "report.html")
    before = out.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybridfl.store.write_all", full)
    with pytest.raises(StoreError, match="No space left"):
        write([outputs.path], out, "other")
    assert out.read_text() == before


def test_nothing_finished_or_evaluated(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5], status="failed")
    with pytest.raises(HybridflError, match="No finished run"):
        write([outputs.path], outputs.path / "x.html", warn=lambda _: None)
    outputs.run("b", "fedavg", 1, [])
    with pytest.raises(HybridflError, match="None of the finished runs has an evaluation"):
        write([outputs.path], outputs.path / "x.html", warn=lambda _: None)
    assert not (outputs.path / "x.html").exists()


def test_names_cannot_end_the_script_nor_be_filled_in(outputs: Outputs) -> None:
    evil = "</script><!--{{style}}&lt;\u2028"
    outputs.run("a", evil, 1, [0.5])
    text = page(content([outputs.path], "t", warn=lambda _: None))
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert json.loads(data)["rows"][0]["method"] == evil
    assert text.count("</script>") == text.count("<script") == 2
    assert text.count("color-scheme: light dark;") == 1
    assert not re.search(r"\{\{\w+\}\}", text.replace(data, ""))
    assert data.isascii()
    assert not set("<>&") & set(data)


def test_the_page_names_no_address(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5])
    text = page(content([outputs.path], "t", warn=lambda _: None))
    assert set(re.findall(r"\w+://[^\"'`\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\((?!#)|<link (?!rel=\"icon\" href=\"data:,\")|\bsrc=", text)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:;"
    assert f'http-equiv="Content-Security-Policy" content="{policy}' in text


def test_help_knows_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; from hybridfl.cli import main; main(['report', '--help']);"
        "print([name for name in ('pandas', 'numpy', 'torch', 'hydra', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: hybridfl report" in done.stdout


def test_a_report_needs_no_torch(sweep: Path) -> None:
    """Its import would take most of the time."""
    code = "import sys; from hybridfl.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = ["report", str(sweep), "--config-dir", str(sweep.parents[2] / "conf")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"report: {sweep / 'report.html'}", "False"]
    assert "left out" not in done.stderr
