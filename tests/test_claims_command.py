"""``hybridfl claims``: what it says of stored runs, and the claims of shipped presets."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from claims_helpers import claim, write
from cli_helpers import TINY, Answer, call, done

from hybridfl.config import Composer, choices
from hybridfl.runs import Run
from hybridfl.study import Runs, Study, study_of

# --- the command ------------------------------------------------------------------------------------------------------

PRESET = """\
# @package _global_
# A study with claims.
partitioning:
  alpha: 0.1
tuned:
  fedprox: {client_optimizer.lr: 0.05}
claims:
  - {id: good, text: Feddle is better., better: feddle, than: fedavg}
  - {id: bad, text: Feddle is much better., better: feddle, than: fedavg, by: 0.3}
  - id: tuned
    text: FedProx is no worse.
    kind: not_worse
    better: fedprox
    than: fedavg
    where: {partitioning.alpha: [0.1, 10]}
hydra:
  sweeper:
    params:
      baseline: none,fedavg
      seed: range(3)
"""


def keep(root: Path, accuracies: Sequence[float], *line: str) -> None:
    """Stored runs of a line, one a seed, as ``train`` would write their configs."""
    with Composer(Path("my_conf")) as composer:
        composed = composer.compose(["experiment=study", *line])
    left_out = ("merging", "baseline", "tuned", "claims")
    config = {key: value for key, value in composed.config.items() if key not in left_out}
    config["method"] = composed.config[composed.method_key] | {"name": composed.method_name, "moves_raw_data": False}
    for seed, accuracy in enumerate(accuracies):
        name = "-".join([composed.method_name, *line, str(seed)]).replace("=", "").replace(".", "")
        write(root / "runs" / name.replace("-", "_"), [accuracy], f"split{seed}")
        text = yaml.safe_dump(config | {"seed": seed, "overrides": "…", "digest": name})
        (root / "runs" / name.replace("-", "_") / "config.yaml").write_text(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a preset and runs of it: Feddle .2 above FedAvg, FedProx as good as it at one skew."""
    root = tmp_path_factory.mktemp("claims")
    (root / "my_conf" / "experiment").mkdir(parents=True)
    (root / "my_conf" / "experiment" / "study.yaml").write_text(PRESET)
    before = Path.cwd()
    os.chdir(root)
    try:
        keep(root / "outputs", [0.69, 0.50, 0.61])
        keep(root / "outputs", [0.50, 0.30, 0.40], "baseline=fedavg")
        keep(root / "outputs", [0.50, 0.30, 0.40], "baseline=fedprox")
        # none of the preset's: other rounds, another rate
        keep(root / "outputs", [0.1, 0.1, 0.1], "baseline=fedavg", "rounds=7")
        keep(root / "outputs", [0.1, 0.1, 0.1], "baseline=fedprox", "client_optimizer.lr=0.1")
    finally:
        os.chdir(before)
    return root


@pytest.fixture(scope="module")
def composed() -> dict[Any, Any]:
    """What was composed for the preset of ``place``, which many tests ask for again."""
    return {}


@pytest.fixture(autouse=True)
def _remember(request: pytest.FixtureRequest, composed: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if "place" not in request.fixturenames:
        return
    compose = Composer.compose

    def remembered(composer: Composer, overrides: Sequence[str]) -> Any:
        if tuple(overrides) not in composed:
            composed[tuple(overrides)] = compose(composer, overrides)
        return composed[tuple(overrides)]

    monkeypatch.setattr(Composer, "compose", remembered)


def claims(place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Answer:
    monkeypatch.chdir(place)
    return call("claims", "--config-dir", "my_conf", *arguments)


def test_the_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = claims(place, monkeypatch, "study")
    assert answer.status == 0
    table = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert table[2:7] == [
        "good – accuracy: feddle − fedavg > 0 +20.0 [+17.5, +22.5] 3 held",
        "bad – accuracy: feddle − fedavg > +30.0 +20.0 [+17.5, +22.5] 3 failed",
        "tuned all of 2 cells accuracy: fedprox − fedavg ≥ 0 missing",
        "partitioning.alpha=0.1 +0.0 [+0.0, +0.0] 3 held",
        "partitioning.alpha=10 no run of fedprox or fedavg missing",
    ]
    assert "bad: Feddle is much better." in table
    assert table[-1] == (
        "hybridfl train -m --config-dir my_conf experiment=study partitioning.alpha=10 baseline=fedprox,fedavg seed=0,1,2"
    )


def test_as_json_and_strict(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = claims(place, monkeypatch, "study", "--json", "--strict", "--confidence", "0.9")
    assert answer.status == 1
    (report,) = json.loads(answer.out)
    assert (report["preset"], report["confidence"], report["interval"], report["holm"]) == ("study", 0.9, "t", False)
    good, bad, tuned = report["claims"]
    assert [one["verdict"] for one in (good, bad, tuned)] == ["held", "failed", "missing"]
    (cell,) = good["found"]
    # t(.95, 2) = 2.919986
    assert (cell["mean"], cell["low"]) == pytest.approx((0.2, 0.2 - 2.919986 * 0.01 / math.sqrt(3)), abs=1e-6)
    assert (cell["seeds"], cell["margin"], bad["found"][0]["margin"]) == (3, 0.0, 0.3)
    assert [cell["where"] for cell in tuned["found"]] == [{"partitioning.alpha": "0.1"}, {"partitioning.alpha": "10"}]
    assert tuned["found"][1]["low"] is None
    assert (good["commands"], len(tuned["commands"])) == ([], 1)


def test_strict_is_content_when_all_are_held(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = "claims=[{id: good, text: a, better: feddle, than: fedavg}]"
    assert claims(place, monkeypatch, "study", kept, "--strict").status == 0


@pytest.mark.parametrize(
    ("form", "line"),
    [
        # the lowest and highest of 27 resamples have 1/27 each
        ("markdown", "| good | – | accuracy: feddle − fedavg | > 0 | +20.0 [+19.0, +21.0] | 3 | **held** |"),
        # three cells are decided at once: t(1 - .05 / 6, 2) = 7.648813
        ("latex", r"    good & -- & accuracy: feddle $-$ fedavg & $>$ 0 & +20.0 [+15.6, +24.4] & 3 & \textbf{held} \\"),
    ],
)
def test_formats_and_intervals(place: Path, monkeypatch: pytest.MonkeyPatch, form: str, line: str) -> None:
    how = ["--interval", "bootstrap"] if form == "markdown" else ["--holm"]
    answer = claims(place, monkeypatch, "study", "--format", form, *how)
    assert line in answer.out.splitlines()
    assert ("95 % bootstrap interval" in answer.out) == (form == "markdown")
    assert ("(Holm)" in answer.out) == (form == "latex")
    assert ("hybridfl train" in answer.out) == (form == "markdown")


def study(*swept: dict[str, str], fixed: tuple[str, ...] = ("experiment=study",)) -> Study:
    return Study("study", (), fixed, swept or ({},), "0,1", "feddle", Path("outputs"))


def test_the_cells_of_a_claim_are_its_own_in_those_of_the_sweep() -> None:
    swept = study({"partitioning": "iid", "model": "mlp"}, {"partitioning": "shards", "model": "mlp"})
    assert swept.cells(claim()) == [
        {"partitioning": "iid", "model": "mlp"},
        {"partitioning": "shards", "model": "mlp"},
    ]
    # what is named is not swept
    assert swept.cells(claim(where={"partitioning": "classes"})) == [{"model": "mlp", "partitioning": "classes"}]
    assert study().cells(claim(where={"clients.delay": [0, 4], "tasks.mask": False})) == [
        {"clients.delay": "0", "tasks.mask": "false"},
        {"clients.delay": "4", "tasks.mask": "false"},
    ]
    assert study().cells(claim(where=[{}, {"seed": None}])) == [{}, {"seed": "null"}]


def test_the_line_of_a_method_in_a_cell() -> None:
    one, files = study(fixed=("experiment=study", "rounds=3")), {"fedavg": Path(), "ties": Path()}
    assert one.line("feddle", {}, files) == ("experiment=study", "rounds=3", "baseline=none")
    assert one.line("fedavg", {"rounds": "9"}, files) == ("experiment=study", "baseline=fedavg", "rounds=9")
    assert one.line("lorm", {}, files)[2:] == ("merging=lorm", "baseline=none")


def test_the_study_of_a_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    line = ["rounds=3", "experiment=study", "merging=split_mix", "clients.delay=0,4", "seed=7"]
    with Composer(Path("my_conf")) as composer:
        one = study_of(composer, line)
        swept = study_of(composer, ["experiment=study", "merging=feddle,split_mix", "seed=7,9"])
    assert one.fixed == ("experiment=study", "rounds=3", "merging=split_mix")
    assert (one.swept, one.seeds) == (({"clients.delay": "0"}, {"clients.delay": "4"}), "0,1,2,3,4")
    assert one.line("split_mix", {}, {})[-1] == "baseline=none"
    assert (swept.fixed, swept.swept, swept.seeds) == (("experiment=study",), ({},), "7,9")
    assert swept.line("split_mix", {}, {}) == ("experiment=study", "merging=split_mix", "baseline=none")


def test_overrides_ask_for_runs_that_have_them(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = claims(place, monkeypatch, "study", "rounds=7", "outputs")
    assert answer.status == 0
    assert "no run of feddle " in answer.out
    assert "no run of fedavg" not in answer.out
    assert "hybridfl train -m --config-dir my_conf experiment=study rounds=7 baseline=none" in answer.out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["studdy"], "studdy: is no preset and no folder. Did you mean 'study'?"),
        ([], "preset: none is given, and no sweep there has one. Valid: "),
        (["none"], "experiment=none: lists no claims"),
        (["study", "--format", "tex"], "--format: 'tex' is unknown. Did you mean 'latex'?"),
        (["study", "--interval", "boot"], "--interval: 'boot' is unknown."),
        (["study", "--confidence", "95"], "--confidence: got 95: expected a share"),
        (
            ["study", "claims=[{id: a, text: b, better: feddle, than: fedavgg}]"],
            "claims[0].than: got 'fedavgg', which is no method. Did you mean 'fedavg'?",
        ),
        (
            ["study", "claims=[{id: a, text: b, better: feddle, than: fedavg, where: {partitioning.alfa: 1}}]"],
            "claims[0].where.partitioning.alfa: unknown key. Did you mean 'partitioning.alpha'?",
        ),
        (
            ["study", "claims=[{id: a, text: b, better: feddle, than: fedavg, than_where: {model: mpl}}]"],
            "claims[0].than_where.model: got 'mpl'. Did you mean 'mlp'?",
        ),
        (
            ["study", "claims=[{id: a, text: b, better: feddle, than: fedavg, scope: globl}]"],
            "claims[0].scope: got 'globl', which no run of the claim has. Did you mean 'global'?",
        ),
        (
            [
                "study",
                "claims=[{id: a, text: b, better: feddle, than: fedavg},{id: a, text: b, better: feddle, than: ties}]",
            ],
            "claims[1].id: got 'a', as another claim has",
        ),
    ],
)
def test_what_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str) -> None:
    answer = claims(place, monkeypatch, *arguments)
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: {problem}")


def test_the_claims_of_a_sweep_and_of_a_folder_of_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    own = "{id: own, text: two words, better: fedavg, than: fedavg, than_scope: clients}"
    preset = f"# @package _global_\n# One claim.\npartitioning:\n  seed: ${{seed}}\nclaims: [{own}]\n"
    (tmp_path / "my_conf" / "experiment" / "study.yaml").write_text(preset)
    monkeypatch.chdir(tmp_path)
    # a part's seed that is that of the first run by chance, beside one that follows
    line = ("experiment=study", *TINY, "rounds=1", "dataset.seed=0", f"claims=[{own}]")
    sweep = done("-m", "--config-dir", "my_conf", *line, "baseline=fedavg", "seed=0,1")
    (report,) = json.loads(claims(tmp_path, monkeypatch, str(sweep), "--json").out)
    (one,) = report["claims"]
    assert (one["found"][0]["seeds"], one["found"][0]["reason"], one["commands"]) == (2, "", [])
    # the plain preset has 60 rounds, of which there are no runs
    (report,) = json.loads(claims(tmp_path, monkeypatch, "--json").out)
    assert report["claims"][0]["verdict"] == "missing"


CLAIMING = [name for name, file in choices("experiment").items() if "\nclaims:" in file.read_text()]


@pytest.mark.parametrize("name", CLAIMING)
def test_the_claims_of_a_shipped_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    cells = set()
    swept: list[set[str]] = []

    def of(runs: Runs, composer: Composer, line: Sequence[str]) -> list[Run]:
        # Once for all methods of a cell, and not those of the preset's own sweep, which tests/test_preset_sweeps.py composes.
        cell = frozenset(text for text in line if not text.startswith("baseline="))
        swept.extend([] if swept else map(set, composer.expand([f"experiment={name}"])))
        if cell not in cells and not any(cell <= job for job in swept):
            composer.compose(line)
        cells.add(cell)
        return []

    monkeypatch.setattr(Runs, "of", of)
    (report,) = json.loads(call("claims", name, "--json").out)
    assert report["claims"]
    assert cells
    assert {one["verdict"] for one in report["claims"]} == {"missing"}
    assert all(one["commands"] for one in report["claims"])
