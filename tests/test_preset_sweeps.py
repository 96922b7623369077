"""The sweeps of presets: cells with names, scales, and what is typed beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import TINY, call, rows

from hybridfl.claims import Claim
from hybridfl.config import Composer, choices
from hybridfl.errors import ConfigError
from hybridfl.plan import STARTS, DataCache, make_plan, settings_of
from hybridfl.preset_sweeps import PresetSweep, sweep_at
from hybridfl.study import study_of

PRESET = """\
# @package _global_
# A study with cells.
scale: small
sweeps:
  small:
    each: {baseline: [fedavg, fedbuff], seed: [0, 1]}
    cells:
      base: {}
      two a round: {clients.per_round: 2}
      one class: {server_data.classes: "[0,1]", baseline: server_only}
  large:
    each: {seed: "range(3)", rounds: 2}
claims:
  - {id: all, text: Everywhere., better: fedbuff, than: fedavg}
  - {id: named, text: In two cells., better: fedbuff, than: fedavg, where: [base, two a round]}
  - {id: keys, text: In one of its own., better: fedbuff, than: fedavg, where: {rounds: 9}}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(PRESET)


def write(preset: str) -> None:
    Path("my_conf/experiment").mkdir(parents=True, exist_ok=True)
    Path("my_conf/experiment/study.yaml").write_text(preset)


@pytest.fixture
def composer() -> Iterator[Composer]:
    with Composer(Path("my_conf")) as one:
        yield one


def cells(composer: Composer, *typed: str) -> dict[str, list[list[str]]]:
    return composer.cells(["experiment=study", *typed])


def test_every_cell_is_a_product_of_its_own(composer: Composer) -> None:
    found = cells(composer)
    last = "experiment=study"
    assert found == {
        "base": [[f"baseline={name}", f"seed={seed}", last] for name in ("fedavg", "fedbuff") for seed in (0, 1)],
        "two a round": [
            [f"baseline={name}", f"seed={seed}", "clients.per_round=2", last]
            for name in ("fedavg", "fedbuff")
            for seed in (0, 1)
        ],
        "one class": [["baseline=server_only", f"seed={seed}", "server_data.classes=[0,1]", last] for seed in (0, 1)],
    }
    assert composer.expand(["experiment=study"]) == [job for jobs in found.values() for job in jobs]


def test_the_scale_chooses_the_sweep(composer: Composer) -> None:
    assert cells(composer, "scale=large") == {
        "": [[f"seed={seed}", "rounds=2", "experiment=study", "scale=large"] for seed in (0, 1, 2)]
    }


def test_what_is_typed_takes_the_place_of_the_presets_and_no_job_comes_twice(composer: Composer) -> None:
    jobs = composer.expand(["experiment=study", "seed=7", "clients.per_round=3", "baseline=fedavg"])
    typed = ["experiment=study", "seed=7", "clients.per_round=3", "baseline=fedavg"]
    assert jobs == [typed, ["server_data.classes=[0,1]", *typed]]


def test_a_product_of_hydras_is_part_of_every_cell(composer: Composer) -> None:
    write(PRESET + "hydra:\n  sweeper:\n    params:\n      clients.delay: 0,2\n")
    found = cells(composer, "seed=0", "baseline=fedbuff")
    assert [job[:2] for job in found["two a round"]] == [
        ["clients.delay=0", "clients.per_round=2"],
        ["clients.delay=2", "clients.per_round=2"],
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("scale", "smal", "scale: got 'smal'. Did you mean 'small'?"),
        ("scale", None, "scale: got 'None'."),
        ("sweeps", {"small": {}}, "sweeps.small.each: a sweep needs values to sweep over"),
        ("sweeps", {"small": {"eahc": {}}}, "sweeps.small.eahc: unknown key. Did you mean 'each'?"),
        ("sweeps", {"small": {"cells": {"a": 3}}}, "sweeps.small.cells.a: got 3: expected a mapping"),
        ("sweeps", {"small": {"each": {"seed": 1}, "core_minutes": 0}}, "sweeps.small.core_minutes: got 0: must be"),
        ("sweeps", {}, "scale: got 'small', but there is no preset, or it has no scales"),
    ],
)
def test_what_is_wrong_with_it_is_said_before_the_first_round(key: str, value: Any, problem: str) -> None:
    write("# @package _global_\n" + yaml.safe_dump(yaml.safe_load(PRESET) | {key: value}))
    for line in (["train", "-m"], ["train"]):
        answer = call(*line, "--config-dir", "my_conf", *TINY, "experiment=study")
        assert answer.status == 2
        assert answer.err.splitlines()[-1].startswith(f"hybridfl: {problem}")
    assert not Path("outputs").exists()


def test_a_scale_without_a_preset_is_refused() -> None:
    answer = call("train", *TINY, "scale=cpu")
    assert (answer.status, answer.err.startswith("hybridfl: scale: got 'cpu', but there is no preset")) == (2, True)


def test_one_run_of_the_preset_leaves_the_sweep_out_and_says_so() -> None:
    answer = call("train", "--config-dir", "my_conf", *TINY, "experiment=study", "rounds=1")
    assert answer.status == 0
    assert "brings a sweep, which only train -m runs" in answer.err
    assert "sweeps" not in (answer.folder / "config.yaml").read_text()


def test_the_cells_run_and_their_claims_are_decided() -> None:
    line = ("experiment=study", *TINY, "rounds=1", "dataset.seed=0", "scale=small")
    answer = call("train", "-m", "--config-dir", "my_conf", *line)
    jobs = rows(answer.folder / "runs.csv")
    # clients.per_round is typed in TINY, so that two cells are one
    assert [job["method"] for job in jobs] == [*["fedavg"] * 2, *["fedbuff"] * 2, *["server_only"] * 2]
    assert {job["status"] for job in jobs} == {"done"}
    answer = call("claims", "study", "--config-dir", "my_conf", *line[1:])
    assert answer.status == 0
    assert "missing" in answer.out
    assert answer.out.count("rounds=9") >= 1


def test_claims_name_cells(composer: Composer) -> None:
    one = study_of(composer, ["experiment=study"])
    every, named, own = (one.cells(claim) for claim in one.claims)
    assert one.fixed == ("experiment=study",)
    assert every == [{}, {"clients.per_round": "2"}, {"server_data.classes": "[0,1]"}]
    assert named == every[:2]
    assert own == [{"rounds": "9"}]
    assert one.line("fedavg", every[1], choices("baseline")) == (
        "experiment=study",
        "baseline=fedavg",
        "clients.per_round=2",
    )
    with pytest.raises(ConfigError, match=r"where: got 'bas'. Did you mean 'base'\?"):
        one.cells(Claim("a", "…", "fedavg", "fedbuff", where="bas"))
    plain = study_of(composer, ["experiment=feddle_digits"])
    with pytest.raises(ConfigError, match=r"where: got 'base'. The preset has no cells with names"):
        plain.cells(Claim("a", "…", "fedavg", "fedbuff", where=["base"]))


def test_values_of_a_list_are_alternatives_and_a_text_is_as_typed() -> None:
    sweep = PresetSweep({"a": [1, True, None, "x"], "b": "0,1", "c": {"d": 2}}, {"one": {"b": "[1, 2]"}, "two": {}})
    assert sweep.lines({"c"}) == {"one": ["a=1,true,null,x", "b=[1, 2]"], "two": ["a=1,true,null,x", "b=0,1"]}
    assert sweep_at({}) is None


@pytest.mark.parametrize(
    "brought",
    ["defaults: [{override /hydra/launcher: joblib}]", "hydra: {launcher: {n_jobs: 3}}"],
    ids=["group", "key"],
)
def test_a_launcher_is_named_on_the_line_not_in_a_preset(brought: str) -> None:
    write(f"# @package _global_\n# Mine.\n{brought}\n")
    with Composer(Path("my_conf")) as composer, pytest.raises(ConfigError) as error:
        composer.expand(["experiment=study", "seed=0,1"])
    assert str(error.value).startswith("experiment: a preset cannot bring a launcher or a sweeper; type it on the line")


def test_jobs_with_interpolations_are_as_one_would_type_them(composer: Composer) -> None:
    typed = ["output_dir=${oc.env:NO_SUCH_NAME,a}", "start=random,${output_dir}/x.pt", "device=a\\,b"]
    jobs = composer.expand(typed)
    assert jobs == [[typed[0], f"start={start}", typed[2]] for start in ("random", "${output_dir}/x.pt")]
    assert composer.compose(jobs[1]).config["start"] == "a/x.pt"


# -- the shipped ones ------------------------------------------------------------------------------------------------

SHIPPED = [name for name, file in choices("experiment").items() if "\nsweeps:" in file.read_text()]


@pytest.fixture(scope="module")
def cache() -> DataCache:
    return DataCache()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_smoke_cell_of_a_shipped_preset_can_start(composer: Composer, cache: DataCache, name: str) -> None:
    for jobs in composer.cells([f"experiment={name}", "scale=smoke"]).values():
        assert jobs
        composed = composer.compose(jobs[0])
        if composed.config["start"] in STARTS:  # otherwise a file that has not been made
            make_plan(composed, cache)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_cell_of_a_shipped_preset_has_known_keys_and_values(composer: Composer, name: str) -> None:
    seen: list[set[str]] = []
    for scale in ("cpu", "gpu"):
        found = composer.cells([f"experiment={name}", f"scale={scale}"])
        jobs = [{text for text in job if not text.startswith(("baseline=", "scale="))} for job, *_ in found.values()]
        shared = set.intersection(*jobs)
        for place, (job, *_) in enumerate(found.values()):
            # What all cells of a scale share is composed with its first one; composing takes a twentieth of a second.
            own = jobs[place] - shared
            if not place or (own not in seen and (name != "feddle_tuning" or len(seen) < 3)):
                seen.append(own)
                settings_of(composer.compose(job))
