"""``hybridfl compare --where``: which runs are kept, and what is said when none is."""

from __future__ import annotations

import re

import pytest
from compare_helpers import Outputs, by_method, table, warnings_of

from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError
from hybridfl.where import parse


@pytest.fixture
def grid(outputs: Outputs) -> Outputs:
    """Three methods, three alphas, two seeds; fedprox alone has mu, and a class-named partitioning."""
    kinds = {0.03: "DirichletMix", 0.1: "Dirichlet", 1: "Dirichlet"}
    for method in ("fedavg", "fedprox", "feddle"):
        for alpha, kind in kinds.items():
            for seed in (0, 1):
                more = {"method__mu": alpha} if method == "fedprox" else {}
                config = {"_target_": f"hybridfl.data.partitioning.{kind}", "alpha": alpha, "seed": None}
                name = f"{method}{alpha}{seed}".replace(".", "")
                outputs.run(
                    name, method, seed, [alpha], partitioning=config, model__hidden=[8, int(10 * alpha)], **more
                )
    return outputs


def kept(grid: Outputs, *where: str) -> list[tuple[str, str, int]]:
    """(method, alpha, runs) of the rows that are left."""
    lines = table(grid.path, rows="method,partitioning.alpha", where=where)
    return [(line["method"], line["partitioning.alpha"], int(line["runs"])) for line in lines]


ALL = [(method, alpha, 2) for method in ("fedavg", "feddle", "fedprox") for alpha in ("0.03", "0.1", "1")]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ([], ALL),
        (["method=feddle"], ALL[3:6]),
        (["method = feddle , fedavg"], ALL[:6]),
        (["baseline=fedavg"], ALL[:3]),
        (["baseline.mu=0.1"], ALL[7:8]),
        (["method!=feddle"], ALL[:3] + ALL[6:]),
        (["method.mu!=0.1"], ALL[:7] + ALL[8:]),
        (["partitioning.alpha>=0.1"], [row for row in ALL if row[1] != "0.03"]),
        (["partitioning.alpha>0.1"], [row for row in ALL if row[1] == "1"]),
        (["partitioning.alpha<=1e-1"], [row for row in ALL if row[1] != "1"]),
        (["partitioning.alpha<0.1"], [row for row in ALL if row[1] == "0.03"]),
        (["partitioning.alpha=1.0,3e-2"], [row for row in ALL if row[1] != "0.1"]),
        (["method.mu>=0.05"], ALL[7:]),
        (["partitioning=dirichlet_mix"], [row for row in ALL if row[1] == "0.03"]),
        (["partitioning=Dirichlet"], [row for row in ALL if row[1] != "0.03"]),
        (["model.hidden=[8,1]"], [row for row in ALL if row[1] == "0.1"]),
        (["model.hidden=[8, 1],[8,10]"], [row for row in ALL if row[1] != "0.03"]),
        (["partitioning.seed=null", "method=fedavg"], ALL[:3]),
        (["seed=1", "method=feddle", "partitioning.alpha<1"], [("feddle", "0.03", 1), ("feddle", "0.1", 1)]),
    ],
)
def test_runs_that_meet_all_conditions(grid: Outputs, where: list[str], wanted: list[tuple[str, str, int]]) -> None:
    assert kept(grid, *where) == wanted


def test_a_filter_is_no_setting_of_a_table(grid: Outputs) -> None:
    """What is left is compared as if there were no other runs."""
    assert set(by_method(grid.path, where=["partitioning.alpha=0.1"])) == {"fedavg", "fedprox", "feddle"}
    assert warnings_of(grid.path, where=["partitioning.alpha=0.1"]) == []


def test_a_value_that_no_run_has_beside_one_that_some_have_is_told(grid: Outputs) -> None:
    assert warnings_of(grid.path, where=["method=feddle,fedavgg", "partitioning.alpha=1"]) == [
        "--where method=feddle,fedavgg: no run has fedavgg. Did you mean 'fedavg'? Valid: fedavg, feddle, fedprox."
    ]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["partitioning.alfa=1"], "no run has the config key 'partitioning.alfa'. Did you mean 'partitioning.alpha'?"),
        (["baseline.my=1"], "no run has the config key 'method.my'. Did you mean 'method.mu'?"),
        (
            ["method=fedavgg"],
            "'method=fedavgg' leaves none of the 18 runs. Did you mean 'fedavg'? Valid: fedavg, feddle",
        ),
        (
            ["partitioning.alpha>1"],
            "'partitioning.alpha>1' leaves none of the 18 runs. Did you mean '1'? Valid: 0.03, ",
        ),
        (
            ["method=feddle", "seed=0", "seed=7"],
            "'seed=7' leaves none of the 3 runs that method=feddle seed=0 leaves. Valid: 0.",
        ),
        (["method>=3"], "got 'method>=3', and no value of method is a number. Valid: method=fedavg, method=feddle, "),
        (["method<feddle"], "got 'method<feddle': < takes one number; nearest valid form: method=feddle."),
        (["seed>=1,2"], "got 'seed>=1,2': >= takes one number; nearest valid form: seed=1,2."),
        (["seed"], "got 'seed': not a condition; nearest valid form: seed=VALUE[,VALUE], or with !=, >=, <=, > or <."),
        (["seed="], "got 'seed=': not a condition; nearest valid form: seed=VALUE"),
        (["=1"], "got '=1': not a condition; nearest valid form: seed=VALUE"),
    ],
)
def test_wrong_conditions(grid: Outputs, where: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--where: {message}")):
        render([grid.path], Options(where=where))


def test_only_names_of_classes_are_compared_loosely(grid: Outputs) -> None:
    with pytest.raises(ConfigError, match=r"'method\.name=FedAvg' leaves none of the 18 runs"):
        kept(grid, "method.name=FedAvg")


def test_parts_of_a_condition() -> None:
    assert (parse("a.b>=1e-3").sign, parse("a.b>=1e-3").values) == (">=", ("1e-3",))
    assert parse("a=[1,2],[3],x").values == ("[1,2]", "[3]", "x")
    assert (parse("a==1").sign, parse("a==1").values) == ("=", ("1",))
