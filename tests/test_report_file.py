"""``hybridfl report`` on a real sweep, and the file it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import TINY, call, done
from compare_helpers import Outputs

from hybridfl.errors import ConfigError, HybridflError
from hybridfl.report.command import write
from hybridfl.report.content import content
from hybridfl.report.page import page
from hybridfl.store import StoreError

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
