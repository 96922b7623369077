"""Every file in ``conf/``: it composes, two rounds run, and all its options can be overridden."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import SMALL_DATA, call, done, rows
from PIL import Image

from hybridfl.build import build, locate, signature_of
from hybridfl.config import GROUPS, Composer, choices, conf_dir
from hybridfl.describe import describe
from hybridfl.errors import ConfigError
from hybridfl.models.options import ModelOptions
from hybridfl.plan import DataCache, Settings, make_plan

FILES = [(group, name) for group in GROUPS for name in choices(group)]
PEERS = [name for name in choices("topology") if name not in ("auto", "star")]
TARGETS = [(group, name) for group, name in FILES if group != "experiment" and (group, name) != ("baseline", "none")]


def is_alias(group: str, name: str) -> bool:
    """Whether a baseline is a merging method under the same name; tests/test_merging_rounds.py sees to it that it is."""
    return group == "baseline" and name != "none" and name in choices("merging")


SUPPLIED = {"model": {"input_shape", "classes", "num_classes"}}
"""Arguments that the program itself gives to the targets of a group."""
ADDED = {"client_optimizer": {"lr_factors"}}
"""Options left out of the files on purpose: a mapping from names of the net, given as ``+client_optimizer.lr_factors``."""

HANDLED = {"model": ModelOptions}
"""Keys of the nodes of a group that the program handles itself; a file may hold any of them, with their defaults."""
ADAPTED = {
    ("model", "squeezenet"): ["dataset.shape=[1,17,17]", "model.width=0.125"],
    ("model", "resnet18"): ["model.width=0.0625"],
    ("model", "resnet20"): ["model.channels=[4,8]", "model.blocks=[1,1]"],
    ("model", "vit"): ["model.dim=16", "model.depth=2"],
    ("experiment", "dimat_fashion"): ["start_steps=2"],
    ("experiment", "feddle_tuning"): ["server_data.examples=40"],
}
"""What a file needs besides the small data: larger images, or to be made small itself."""

READ = {
    "mnist": "mnist",
    "fashion_mnist": "fashion_mnist",
    "cifar10": "cifar10/cifar-10-batches-py",
    "cifar100": "cifar100/cifar-100-python",
    "usps": "usps",
    "mnist_m": "mnist_m",
    "femnist_digits": "femnist_digits",
    "chars74k_fonts": "chars74k",
    "chars74k_street": "chars74k",
    "pacs": "pacs",
    "digits_five": "mnist_m",
}
"""Data sets that must be there, and their folder below the data root."""
FEW_DIGITS = ["dataset.limit=200", "dataset.sets.usps.limit=200", "dataset.sets.mnist.limit=200"]
FEWER = {
    "femnist_digits": [],
    "chars74k_street": [],
    "pacs": ["dataset.domains=[photo,sketch]", "dataset.size=16"],
    "digits_five": ["dataset.domains=[usps,mnist_m]", *FEW_DIGITS],
    "domains": ["dataset.limit=200"],
}
"""How to read less of a data set that has no limit."""
PRESETS = {
    "split_mix_digits": (["mnist_m"], [*FEW_DIGITS, "model.channels=[4,8]", "model.hidden=16", "evaluation.limit=50"]),
    "lorm_cifar100": (
        ["weights", "cifar100/cifar-100-python"],
        ["classes=0-9", "tasks.number=2", "evaluation.limit=50"],
    ),
}
"""Presets whose data cannot be swapped for others: the folder that must be there, and how to read less."""
DEFAULTS_READ = {
    ("server_data", "dataset"): "mnist",
    ("experiment", "optimal_averaging_fashion"): "fashion_mnist",
    ("experiment", "dimat_fashion"): "fashion_mnist",
    **{("experiment", name): "fashion_mnist" for name in choices("experiment") if name.startswith("feddle_")},
}
del DEFAULTS_READ["experiment", "feddle_digits"]
"""Files of other groups that read real data, unless told otherwise."""
CACHE = DataCache()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def node(group: str, name: str) -> dict[str, Any]:
    """A file with what its defaults list brings in."""
    loaded = yaml.safe_load(choices(group)[name].read_text())
    assert isinstance(loaded, dict)
    whole: dict[str, Any] = {}
    for entry in loaded.pop("defaults", []):
        if isinstance(entry, str):
            whole |= {} if entry == "_self_" else node(group, entry)
            continue
        ((place, choice),) = entry.items()
        other, _, key = place.removeprefix("/").partition("@")
        if key == "_here_":
            whole |= node(other, choice)
            continue
        inside = whole
        *parents, last = key.split(".")
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[last] = node(other, choice)
    return over(whole, loaded)


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, groups of options key by key, as Hydra puts them together."""
    inner = {k: over(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return below | above | inner


def write_images(folder: Path) -> None:
    for kind in range(2):
        (folder / str(kind)).mkdir(parents=True)
        for number in range(150):
            Image.new("RGB", (8, 8), (number, 100 * kind, 0)).save(folder / str(kind) / f"{number:03}.png")


def test_every_folder_is_a_group_and_every_group_has_choices() -> None:
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert folders == set(GROUPS)
    defaults = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
    chosen = {group: name for entry in defaults if isinstance(entry, dict) for group, name in entry.items()}
    assert set(chosen) == set(GROUPS)
    assert all(name in choices(group) for group, name in chosen.items())


# -- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with Composer() as one:
        yield one


def root_with(folder: str) -> Path:
    """The data root; the test is skipped where this folder is not in it."""
    root = Path(os.environ.get("HYBRIDFL_DATA", "~/.cache/hybridfl")).expanduser()
    if not (root / folder).is_dir():
        pytest.skip(f"{folder} is not in {root}; set HYBRIDFL_DATA")
    return root


def needed(group: str, name: str) -> list[str]:
    """What a file cannot do without, whatever the others are, and how to read less of a data set."""
    if (group, name) == ("server_data", "domains"):
        return ["dataset=domains", "+dataset@dataset.sets.more=digits", "server_data.domains=[more]"]
    if (group, name) == ("server_data", "none"):
        return ["baseline=fedavg"]  # Feddle needs server data
    if (group, name) == ("partitioning", "file"):
        Path("owners.json").write_text(json.dumps([list(range(client, 190, 5)) for client in range(5)]))
        line = ["clients.number=5", "partitioning.path=owners.json", "partitioning.complete=false"]
        return [*line, "server_data.examples=10"]
    if (group, name) == ("executor", "workers"):
        return ["device=cpu"]
    if group == "tracker":
        try:
            build(node(group, name), group).check()
        except ConfigError as error:
            pytest.skip(str(error))
    if group == "topology" and name in PEERS:
        return ["baseline=dsgd", f"clients.number={9 if name == 'torus' else 5}"]  # Feddle needs a server
    if group == "experiment" and name in PRESETS:
        for folder in PRESETS[name][0]:
            root_with(folder)
        return PRESETS[name][1]
    if group == "dataset" and name == "image_folder":
        write_images(Path("data/images"))
        return ["data_root=data", "dataset.size=8"]
    if group == "dataset" and name in READ:
        root_with(READ[name])
        return FEWER.get(name, ["dataset.limit=500"])
    return FEWER.get(name, []) if group == "dataset" else []


# The two rounds of a data set have the other groups at their defaults too.
TOLD = ("partitioning", "server_data", "clients")
"""Groups of whose files a dry run tells each time something else."""
CHECKED = [(group, name) for group, name in FILES if group != "dataset" and not is_alias(group, name)]


@pytest.mark.parametrize(("group", "name"), CHECKED, ids=[f"{group}={name}" for group, name in CHECKED])
def test_every_file_passes_all_checks_with_the_other_groups_at_their_defaults(
    composer: Composer, group: str, name: str
) -> None:
    line = needed(group, name)
    if (group, name) in DEFAULTS_READ:
        root_with(DEFAULTS_READ[group, name])
    if (group, name) == ("model", "squeezenet"):
        line += ["dataset=domains"]  # larger images than those of the digits
    plan = make_plan(composer.compose([f"{group}={name}", *line]), CACHE)
    if group not in TOLD and name != next(iter(choices(group))):
        return  # all of such a group are told of in the same words
    told = describe(plan)
    assert plan.digest in told
    assert "checked: it can start" in told


# Every method runs in tests/test_resume.py.
RUN = [(group, name) for group, name in FILES if group not in ("merging", "baseline") or name in ("feddle", "none")]
RUN = [(group, name) for group, name in RUN if not is_alias(group, name)]


@pytest.mark.parametrize(("group", "name"), RUN, ids=[f"{group}={name}" for group, name in RUN])
def test_two_rounds_of_every_file(group: str, name: str) -> None:
    line = [f"{group}={name}", "rounds=2", "clients.number=5", "clients.per_round=2", "client_optimizer.steps=2"]
    if (group, name) == ("server_data", "dataset"):
        line += [*SMALL_DATA, "dataset@server_data.dataset=synthetic", "server_data.dataset.seed=1"]
    elif group != "dataset" and (group, name) != ("server_data", "domains") and name not in PRESETS:
        line += [*SMALL_DATA, *ADAPTED.get((group, name), [])]
    line += needed(group, name)
    if group not in ("merging", "experiment"):
        line += ["merging.search.steps=2"]  # of Feddle, the default
    if (group, name) == ("clients", "event_queue"):
        line += ["clients.concurrency=3"]  # Feddle is asynchronous
    run = done(*line, "ui=none")
    metrics = rows(run / "metrics.csv")
    assert metrics[-1]["round"] == "2"
    assert all(0 <= float(row["accuracy"]) <= 1 for row in metrics)


@pytest.mark.parametrize("name", PEERS)
def test_a_graph_of_peers_is_refused_by_a_method_with_a_server(name: str) -> None:
    answer = call("train", *SMALL_DATA, f"topology={name}")
    assert answer.status == 2
    assert answer.err == "hybridfl: topology: got peers, but merging=feddle needs star; valid: auto, star.\n"


# -- options ---------------------------------------------------------------------------------------------------------


def expect_keys(given: Mapping[str, Any], target: Callable[..., Any], left_out: set[str], place: str) -> None:
    """The keys of a node, and of the groups of options in it, are those of the signature."""
    parameters, hints = signature_of(target)
    kinds = {parameter.kind for parameter in parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{place}: a signature with ** is no schema"
    assert set(given) - {"_target_"} == set(parameters) - left_out, place
    for name, value in given.items():
        kind = hints.get(name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            expect_keys(value, kind, set(), f"{place}.{name}")


@pytest.mark.parametrize(("group", "name"), TARGETS, ids=[f"{group}={name}" for group, name in TARGETS])
def test_the_keys_are_those_of_the_signature(group: str, name: str) -> None:
    given = node(group, name)
    if handled := HANDLED.get(group):
        defaults = dataclasses.asdict(handled())
        for key in given.keys() & defaults.keys():
            assert given.pop(key) == defaults[key]
    target = locate(given["_target_"], group)
    expect_keys(given, target, SUPPLIED.get(group, set()) | ADDED.get(group, set()), f"{group}/{name}.yaml")


def test_the_keys_at_the_top_are_those_of_the_settings() -> None:
    top = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert set(top) - {"defaults"} == fields - set(GROUPS)
    hints = typing.get_type_hints(Settings)
    assert set(top["evaluation"]) == {field.name for field in dataclasses.fields(hints["evaluation"])}


def test_nested_options_without_a_value_are_noticed() -> None:
    feddle = node("merging", "feddle")
    target = locate(feddle["_target_"], "merging")
    del feddle["search"]["steps"]
    with pytest.raises(AssertionError, match=r"feddle\.search"):
        expect_keys(feddle, target, set(), "feddle")


def test_a_documented_option_that_is_left_out_of_the_file() -> None:
    (extra,) = ADDED["client_optimizer"]
    assert call("train", "--dry-run", *SMALL_DATA, f"+client_optimizer.{extra}={{head.*:0.1}}").status == 0


# -- first lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_list_tells_what_every_file_is(group: str) -> None:
    _, *lines = call("list", group).out.splitlines()
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert set(told) == set(choices(group))
    for name, text in told.items():
        text = text.partition(" [")[0]  # claims and tuned methods of a preset
        assert choices(group)[name].read_text().replace("# @package _global_\n", "").startswith(f"# {text}\n")


@pytest.mark.parametrize("name", [name for name in choices("experiment") if name != "none"])
def test_a_presets_own_values_win_over_the_defaults(name: str) -> None:
    preset = yaml.safe_load(choices("experiment")[name].read_text())
    wanted = {k: v for k, v in preset.items() if k not in ("defaults", "hydra", "tuned") and "${" not in str(v)}
    with Composer() as composer:
        composed = composer.compose([f"experiment={name}", "tuned=null"]).config

    def check(node: Any, there: Any, where: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                check(value, there[key], f"{where}.{key}")
        else:
            assert there == node, where

    check(wanted, composed, name)
