"""What tests of exported models share: configs, the two files, and the model run from them in plain torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from cli_helpers import SMALL_DATA, call
from safetensors.torch import load_file
from torch import Tensor

from hybridfl.exported import MARK
from hybridfl.plan import Plan
from hybridfl.restored import plan_of
from hybridfl.runs import read_run

SMALL = (
    *SMALL_DATA,
    "clients.number=5",
    "clients.per_round=2",
    "client_optimizer.epochs=1",
    "server_data=none",
    "rounds=2",
    "ui=none",
)
CNN = (*SMALL, "model=cnn", "model.channels=[4,8]", "model.hidden=16", "model.groups=2")
NORM = (*SMALL, "model=resnet20", "model.norm=batch", "model.channels=[4]", "model.blocks=[1]")
MIX = ("merging=split_mix", "merging.base_width=0.25", "merging.serve_widths=[0.25,0.5]", "server_data=none")
SHORT = ("clients.number=4", "clients.per_round=3", "client_optimizer.epochs=1", "rounds=2", "ui=none",
         "evaluate_every=2", "model.channels=[8,16]", "model.hidden=32")  # fmt: skip


def written(folder: Path, *options: str) -> dict[str, Any]:
    """What model.yaml says after an export that must succeed."""
    answer = call("export", str(folder), "-o", "model.safetensors", *options)
    assert (answer.status, answer.err) == (0, ""), answer.both
    text = Path("model.yaml").read_text()
    assert text.startswith(MARK)
    about: dict[str, Any] = yaml.safe_load(text)
    return about


def last(folder: Path, scope: str) -> dict[str, str]:
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["scope"] == scope][-1]


def plan_made(folder: Path) -> Plan:
    return plan_of(read_run(folder))


def plain(about: dict[str, Any], x: Tensor) -> Tensor:
    """Mixed logits from the two files, whatever the class and its type."""
    module, _, name = about["model"]["_target_"].rpartition(".")
    options = {key: value for key, value in about["model"].items() if key != "_target_"}
    stored = load_file("model.safetensors")
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    mixed = torch.zeros(())
    for member in about["members"]:
        scaled = {key: member[key] for key in ("width",) if key in member}
        net = getattr(import_module(module), name)(
            input_shape=about["input_shape"], classes=about["classes"], **options | scaled
        )
        prefix = member["prefix"]
        own = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
        net.load_state_dict(own)
        with torch.no_grad():
            mixed = mixed + member["weight"] * net.eval()((x - mean) / std)
    return mixed


def agrees(row: dict[str, str], logits: Tensor, y: Tensor) -> None:
    assert float(row["accuracy"]) == (logits.argmax(1) == y).double().mean().item()
    assert float(row["loss"]) == pytest.approx(F.cross_entropy(logits.double(), y).item(), rel=1e-5)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal names, numbers and types, in any order."""
    return one.keys() == other.keys() and all(
        torch.equal(t, other[name]) and t.dtype == other[name].dtype for name, t in one.items()
    )


def raw_test(plan: Plan) -> tuple[Tensor, Tensor]:
    """Raw images and labels of the test part."""
    test = plan.federation.dataset.test
    return torch.from_numpy(test.x).float(), torch.from_numpy(test.y)
