"""What is remembered of composing changes nothing: the same configs as Hydra's own, and files that change are read again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hybridfl import config_files, config_memory
from hybridfl.config import GROUPS, Composer, choices, conf_dir
from hybridfl.errors import ConfigError


def by_hydra(overrides: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The config of these overrides, and the choices, by Hydra alone; an error's type if it refuses them."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        try:
            config = compose("config", overrides=list(overrides), return_hydra_config=True)
        except Exception as error:
            return type(error), {}
    hydra = config.hydra
    plain = OmegaConf.create(
        OmegaConf.to_container(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    )
    try:
        return OmegaConf.to_container(plain, resolve=True, throw_on_missing=True), dict(hydra.runtime.choices)
    except Exception as error:
        return type(error), {}


def check(overrides: Sequence[str]) -> None:
    """Twice, as the second time nothing but the values is new."""
    config, choices = by_hydra(overrides)
    for _ in range(2):
        with Composer() as composer:
            if isinstance(config, type):
                with pytest.raises(ConfigError):
                    composer.compose(overrides)
                return
            composed = composer._composed(overrides)  # what a preset has tuned is no business of Hydra's
        assert json.dumps(composed.config) == json.dumps(config)  # the order of keys too
        assert composed.method_name == choices[composed.method_key]


FORMS = {
    frozenset(re.findall(r"^\w+", file.read_text(), re.MULTILINE)): name for name, file in choices("experiment").items()
}
"""A shipped preset for each set of keys that one has at its top; values below them are merged alike."""

LINES = [
    "",
    # the last one counts, and an order of choice and value does not
    "dataset.train=200 dataset=synthetic dataset.shape=[1,4,4] seed=1 seed=2 model=cnn model.hidden=[4] model=mlp",
    "model.hidden=[4] model={hidden:[3]} +clients={more:{a:1}} clients={number:7,delay:2} +clients.more={b:2}",
    "dataset=domains +dataset@dataset.sets.more=digits dataset.sets.more.limit=50",
    "server_data=dataset dataset@server_data.dataset=synthetic server_data.dataset.seed=1",
    "partitioning=domains partitioning@partitioning.within=shards",
    "baseline=half_average baseline@baseline.base=fedprox baseline.base.mu=2 executor=ranks executor@executor.inner=vectorized",
    "dataset=digits_five dataset@dataset.sets.street=synthetic dataset.sets.usps.limit=3 merging=optimal_averaging",
    "merging@baseline=optimal_averaging baseline=half_average",
    "dataset=domains dataset.sets=[1]",
    "experiment=feddle_digits partitioning=iid clients.number=4 merging.search.steps=3",
    "+client_optimizer.lr_factors={head.*:0.1} ++seed=4 ++model.more={a:[1,2]} +model.more.deep=1 model.more.deep=2",
    "~tasks ~model ~clients.delay",
    # interpolations between nodes, to the environment, and to nothing
    "rounds=7 start_steps=${rounds} clients.number=${.per_round} output_dir=${oc.env:HOME,'x'}/a seed=${clients.delay}",
    "output_dir='a,b=c' start=\"q'x\" ui='' rounds=1e3 seed=null",
    "seed=${nowhere}",
    "output_dir=${hydra.job.name}",
    "hydra.job.name=x seed=2",
    # refused
    *("seeed=1", "+seed=1", "rounds.foo=1", "seed=1,2", "model=cnn,mlp", "model=nowhere", "nowhere@model=mlp"),
    *("dataset@nowhere=digits", "+model=cnn", "++model=cnn", "~model=cnn", "model=null", "seed=[1", "rounds"),
]
LINES += [f"experiment={name} baseline=fedavg seed=3" for name in FORMS.values()]
LINES += [
    "experiment=feddle_study dataset=digits model=mlp scale=smoke clients.number=10",
    "experiment=feddle_e1_methods",
]
NAMES = [[*choices(group)] for group in GROUPS]
LINES += [
    " ".join(f"{group}={names[k % len(names)]}" for group, names in zip(GROUPS, NAMES, strict=True)) for k in range(5)
]


@pytest.mark.parametrize("line", LINES)
def test_a_config_is_the_one_that_hydra_composes(line: str) -> None:
    check(line.split())


PIECES = [
    *("seed=1", "seed=2", "rounds=${seed}", "model=cnn", "model=mlp", "model={dropout:0.5}", "+model.new=[1]"),
    *("++model.new=[2,3]", "model.new=4", "~model.new", "clients.number=3", "clients={number:4}", "clients=tiers"),
    *("experiment=feddle_digits", "client_optimizer.steps=2", "+client_optimizer.steps=3", "hydra.verbose=true"),
]


@settings(max_examples=6, deadline=None)
@given(line=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
def test_any_line_of_these_is_composed_as_by_hydra(line: list[str]) -> None:
    check(line)


# -- what is remembered ----------------------------------------------------------------------------------------------


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Grows by what Hydra itself is given to compose."""
    config_memory._remembered.cache_clear()
    given: list[list[str]] = []
    plain = config_memory.compose

    def counted(name: str, overrides: list[str], return_hydra_config: bool) -> Any:
        given.append(overrides)
        return plain(name, overrides=overrides, return_hydra_config=return_hydra_config)

    monkeypatch.setattr(config_memory, "compose", counted)
    return given


def test_values_are_no_work_for_hydra_and_choices_are_once(composed: list[list[str]]) -> None:
    further = ["dataset=domains", "+dataset@dataset.sets.more=digits"]
    for number in range(3):
        with Composer() as one:
            assert one.compose([f"seed={number}", *further, "+model.more=1"]).config["seed"] == number
            assert "more" not in one.compose(further).config["model"]
    assert composed == [further]


def test_choices_of_plain_files_are_no_work_for_hydra(composed: list[list[str]]) -> None:
    with Composer() as one:
        assert one.compose(["model=cnn", "baseline=fedavg", "model.hidden=8"]).config["model"]["hidden"] == 8
    assert composed == []


def test_presets_are_no_work_for_hydra(composed: list[list[str]]) -> None:
    with Composer() as one:
        for name in choices("experiment"):
            if name.startswith("feddle"):
                one.compose([f"experiment={name}", "baseline=feddle_joint"])
    assert composed == []


PRESETS = {
    "base": """\
# @package _global_
defaults:
  - override /model: cnn
  - override /dataset: synthetic
rounds: 3
clients: {number: 3, more: {a: 1, list: [1, 2]}}
dataset: {train: 70}
hydra: {sweeper: {params: {seed: "0,1"}}}
""",
    "other": """\
# @package _global_
defaults:
  - override /model: mlp
  - override /client_optimizer: adam
seed: ${rounds}
clients: {more: {list: [3]}}
""",
    "mine": """\
# @package _global_
defaults:
  - base
  - other
  - override /client_optimizer: adamw
  - _self_
rounds: 5
new: {x: null, y: 1e-3}
clients: {number: null}
""",
    "first": """\
# @package _global_
defaults:
  - _self_
  - base
rounds: 7
""",
    "late": "# @package _global_\ndefaults: [override /model: mlp, base]\n",
    "nowhere": "# @package model\nrounds: 7\n",
    "absent": "# @package _global_\ndefaults: [not_there]\n",
    "wrong": "# @package _global_\ndefaults: [override /nowhere: x]\n",
}


TYPED = [(name, "") for name in PRESETS]
TYPED += [
    (name, line) for name in ("base", "mine") for line in ("model=resnet20", "dataset=digits client_optimizer=sgd")
]


@pytest.mark.parametrize(("name", "typed"), TYPED)
def test_a_preset_of_the_users_own_is_put_together_as_by_hydra(tmp_path: Path, name: str, typed: str) -> None:
    (tmp_path / "experiment").mkdir()
    for file, text in PRESETS.items():
        (tmp_path / "experiment" / f"{file}.yaml").write_text(text)
    line = [f"experiment={name}", *typed.split(), "start_steps=7"]

    def found() -> tuple[str, str, bool] | str:
        with Composer(tmp_path) as one:
            try:
                composed = one.compose(line)
            except ConfigError as error:
                return str(error)
            return json.dumps(composed.config), composed.method_name, composed.has_sweep

    plainly = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_memory, "_by_files", lambda *_: None)
        config_memory._remembered.cache_clear()
        assert found() == plainly
    config_memory._remembered.cache_clear()


@pytest.mark.parametrize(
    "contents",
    [
        [{"a": {"b": 2, "new": {"x": None}}, "c": [3]}, {"a": {"b": {"y": 1}}, "c": None, "d": {"e": 1}}],
        [{"c": {"z": 1}, "a": None}, {"c": {"w": "${a}"}, "a": {"k": [{"l": 1}]}}],
        [{"d": {"more": 1}}],  # on top of a text that stands for a node
        [{"e": {"more": 1}}, {"e": 2}],
        [{"a": {"b": "???"}, "new": "???"}],
        [{"new": {"inner": {"x": "???"}}}, {"new": {"inner": {"x": 4}}}],
        [{True: 1, 1.5: {"x": 2}, "true": 3}],
    ],
)
def test_plain_values_are_merged_as_omegaconf_does(contents: list[dict[Any, Any]]) -> None:
    below = {"a": {"b": 1, "f": [1, 2]}, "c": 5, "d": "${a}", "e": "x${c}"}
    merged = OmegaConf.merge(below, *contents)
    expected = {str(key): value for key, value in OmegaConf.to_container(merged).items()}
    before = json.dumps([below, [[*content.items()] for content in contents]])
    assert json.dumps(config_files._merged(below, contents)) == json.dumps(expected)
    assert json.dumps([below, [[*content.items()] for content in contents]]) == before


@pytest.mark.parametrize("content", [{"f": {"x": 1}}, {"a": [1]}])
def test_a_mapping_and_a_list_are_not_merged(content: dict[Any, Any]) -> None:
    with pytest.raises(TypeError):
        config_files._merged({"a": {"b": 1}, "f": [1, 2]}, [content])


def test_wrong_values_are_found_without_hydra(composed: list[list[str]]) -> None:
    with Composer() as one:
        for key in ("seeed", "rounds.foo", "clients.nmber"):
            with pytest.raises(ConfigError, match=f"^{key}: "):
                one.compose([f"{key}=1"])
    assert composed == []


def test_a_file_that_changes_is_read_again(tmp_path: Path, composed: list[list[str]]) -> None:
    (tmp_path / "model").mkdir()

    def model(**files: str) -> Any:
        for name, text in files.items():
            (tmp_path / "model" / f"{name}.yaml").write_text(text)
        with Composer(tmp_path) as one:
            return one.compose(["model=mine", "seed=2"]).config["model"]

    assert model(mine="x: 1\n") == {"x": 1}
    assert model(mine="x: 2\n") == {"x": 2}
    assert composed == []
    assert model(mine="defaults: [base, _self_]\nx: 3\n", base="y: 4\n") == {"y": 4, "x": 3}
    assert model(base="y: 5\n") == {"y": 5, "x": 3}
    assert model() == {"y": 5, "x": 3}
    assert composed == []
    (tmp_path / "model" / "mine.yaml").unlink()
    with Composer(tmp_path) as one, pytest.raises(ConfigError, match=r"^model: got 'mine'"):
        one.compose(["model=mine", "seed=2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# @package model.inner\nx: 1\n", {"x": 1}),
        ("x: ${seed}\ny: 1e-3\nz: ???\n", None),
        ("x: ${seed}\ny: 1e-3\n", {"x": 2, "y": 0.001}),
    ],
)
def test_a_file_of_the_users_own_is_read_as_by_hydra(tmp_path: Path, text: str, expected: Any) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(text)
    with Composer(tmp_path) as one:
        if expected is None:
            with pytest.raises(ConfigError, match="Missing mandatory value"):
                one.compose(["model=mine", "seed=2"])
            return
        found = one.compose(["model=mine", "seed=2"]).config["model"]
    assert found == ({"inner": expected} if "@package" in text else expected)


def test_folders_with_very_many_files_are_composed_anew(
    tmp_path: Path, composed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_memory, "MOST_FILES", 10)
    for seed in range(2):
        with Composer(tmp_path) as one:
            assert one.compose([f"seed={seed}"]).config["seed"] == seed
    assert len(composed) == 2


def test_a_folder_may_be_the_name_of_a_key(tmp_path: Path) -> None:
    """A key is a group where a folder says so, in the user's own too."""
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "one.yaml").write_text("x: 1\n")
    with Composer(tmp_path) as one:
        assert one.compose(["+extra=one", "extra.x=2"]).config["extra"] == {"x": 2}
    with Composer() as one:
        assert one.compose(["+extra=one"]).config["extra"] == "one"
