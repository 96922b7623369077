"""``hybridfl pretrain``: plain training on all the data, written without its classifier, and runs that start from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from cli_helpers import Answer, call, rows, status_of
from safetensors.torch import load_file

from hybridfl.config import Composer
from hybridfl.engine import Engine
from hybridfl.plan import Plan, make_plan
from hybridfl.pretrain_command import EPILOG, METHOD, SETTING
from hybridfl.restored import plan_of
from hybridfl.runs import read_run

DATA = ("dataset=synthetic", "dataset.train=200", "dataset.test=100", "evaluation.min_test=10")
SMALL = (*DATA, "model=cnn", "model.channels=[4,8]", "model.hidden=16", "model.groups=2", "ui=none", "rounds=2")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def pretrained(*overrides: str, status: int = 0) -> Answer:
    answer = call("pretrain", *overrides, "-o", "b.safetensors")
    assert answer.status == status, answer.both
    return answer


def folder_of(answer: Answer) -> Path:
    (line,) = (line for line in answer.out.splitlines() if line.startswith("run: "))
    return Path(line.removeprefix("run: "))


def server_steps(folder: Path) -> list[float]:
    """Steps until each evaluation: of 16 examples, three forward passes' worth each."""
    step = 3 * 16 * plan_of(read_run(folder)).federation.forward_macs
    return [int(row["server_macs"]) / step for row in rows(folder / "metrics.csv") if row["scope"] == "global"]


def composed(*overrides: str) -> Plan:
    with Composer() as composer:
        return make_plan(composer.compose(overrides))


def test_it_is_the_run_of_one_client_that_owns_everything_and_its_rounds_are_epochs() -> None:
    answer = pretrained(*SMALL, "client_optimizer.batch_size=16")
    folder = folder_of(answer)
    plan = plan_of(read_run(folder))
    federation = plan.federation
    assert folder == Path("outputs/runs", plan.digest).resolve()
    assert plan.digest == composed(METHOD, *(f"{k}={v}" for k, v in SETTING.items()), *SMALL).digest
    assert sorted(federation.owned(0).tolist()) == list(range(200))
    assert server_steps(folder) == [13, 26]  # batches of 16 of 200 examples
    (accuracy,) = (r["accuracy"] for r in rows(folder / "metrics.csv") if (r["scope"], r["round"]) == ("global", "2"))
    percent = f"{100 * float(accuracy):.2f} %"
    assert answer.out.splitlines()[-2:] == [
        f"trained on 200 examples for 2 rounds, accuracy {percent} of the server's test set",
        "runs start from it with: model=cnn 'model.channels=[4,8]' model.hidden=16 model.groups=2 start=b.safetensors",
    ]


def test_the_file_is_what_a_step_on_all_examples_leaves() -> None:
    """One batch of everything: the same step in plain torch."""
    line = (*SMALL, "rounds=1", "client_optimizer.batch_size=200", "dtype=float64", "client_optimizer.lr=0.05")
    folder = folder_of(pretrained(*line, "--head"))
    federation = plan_of(read_run(folder)).federation
    net, bench = federation.net, federation.bench
    net.load_state_dict({**federation.start.params})
    loss = F.cross_entropy(net(bench.x[:200]), bench.y[:200])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    loss.backward()
    optimizer.step()
    found = load_file("b.safetensors")
    assert found.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)
    assert float(rows(folder / "metrics.csv")[0]["accuracy"]) == _accuracy(net, federation)


def _accuracy(net: torch.nn.Module, federation: Any) -> float:
    x, y = federation.test
    with torch.no_grad():
        found: float = (net.eval()(x).argmax(1) == y).double().mean().item()
    return found


def test_the_classifier_is_left_out_and_a_run_of_other_classes_gets_a_fresh_one() -> None:
    pretrained(*SMALL, "classes=5-9")
    backbone = load_file("b.safetensors")
    about = yaml.safe_load(Path("b.yaml").read_text())
    assert about["left_out"] == ["head.weight", "head.bias"]
    assert (about["classes"], about["subset"], about["method"]) == (5, "5-9", "oracle")
    pretrained(*SMALL, "classes=5-9", "--head")
    assert load_file("b.safetensors").keys() - backbone.keys() == {"head.weight", "head.bias"}
    assert "left_out" not in yaml.safe_load(Path("b.yaml").read_text())
    for head in ((), ("--head",)):
        pretrained(*SMALL, "classes=5-9", *head)
        line = (*SMALL, "classes=0-2", "baseline=fedavg", "server_data=none", "clients.number=3", "clients.per_round=2")
        fresh, started = composed(*line), composed(*line, "start=b.safetensors")
        for name, tensor in started.federation.start.params.items():
            assert torch.equal(tensor, (fresh.federation.start.params if name.startswith("head.") else backbone)[name])
        answer = call("train", *line, "start=b.safetensors")
        assert answer.status == 0, answer.both
        assert "the head keeps its first weights" in answer.err


def test_the_same_line_again_trains_nothing_and_writes_the_file_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(pretrained(*SMALL))
    before = Path("b.safetensors").read_bytes(), Path("b.yaml").read_bytes()
    Path("b.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("hybridfl.engine.Engine.step", lambda *_: 1 // 0)
        answer = pretrained(*SMALL)
    assert "already done" in answer.err
    assert folder_of(answer) == folder
    assert (Path("b.safetensors").read_bytes(), Path("b.yaml").read_bytes()) == before


def test_one_that_was_stopped_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained(*SMALL, "rounds=4", "output_dir=whole")
    whole = Path("b.safetensors").read_bytes()
    step, seen = Engine.step, []

    def stopped(engine: Engine, snapshot: Any) -> Any:
        seen.append(snapshot.round)
        if snapshot.round == 2:
            raise KeyboardInterrupt
        return step(engine, snapshot)

    Path("b.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopped)
        assert pretrained(*SMALL, "rounds=4", status=130).out == ""
    assert not Path("b.safetensors").exists()
    (folder,) = Path("outputs/runs").iterdir()
    assert (status_of(folder)["status"], status_of(folder)["round"]) == ("interrupted", 2)
    pretrained(*SMALL, "rounds=4")
    assert seen == [0, 1, 2]
    assert Path("b.safetensors").read_bytes() == whole


def test_what_is_typed_comes_before_the_setting() -> None:
    typed = ("client_optimizer=adam", "client_optimizer.epochs=2", "clients.validation=0.25", "augmentation=standard",
             "client_optimizer.schedule.kind=cosine", "partitioning=dirichlet", "partitioning.alpha=1")  # fmt: skip
    answer = pretrained(*SMALL, *typed)
    folder = folder_of(answer)
    assert "trained on 150 examples" in answer.out
    assert read_run(folder).config["overrides"] == " ".join(
        [METHOD, "clients.number=1", "clients.per_round=1", "server_data=none", *SMALL, *typed]
    )
    assert server_steps(folder) == [2 * 10, 4 * 10]
    assert "validation" in {row["scope"] for row in rows(folder / "metrics.csv")}


USERS = """
from torch import nn
class Flat(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.fc = nn.Linear(64, classes)
    def forward(self, x):
        return self.fc(x.flatten(1))
class Head(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.head = nn.Linear(64, classes)
    def forward(self, x):
        return self.head(x.flatten(1))
"""


def test_a_net_without_a_head_is_refused_before_training_and_written_whole_on_request() -> None:
    Path("pre_models.py").write_text(USERS)
    Path("mine/model").mkdir(parents=True)
    for name in ("Flat", "Head"):
        Path(f"mine/model/{name.lower()}.yaml").write_text(f"# Mine.\n_target_: pre_models.{name}\n")
    line = ("--config-dir", "mine", *DATA, "rounds=1", "ui=none")
    try:
        answer = pretrained(*line, "model=flat", status=2)
        assert answer.err == (
            "hybridfl: model: has no tensors named head.* to leave out, but fc; with --head everything is written.\n"
        )
        answer = pretrained(*line, "model=head", status=2)
        assert answer.err == "hybridfl: model: has no tensors but head.*; with --head they are written.\n"
        assert not Path("outputs").exists()
        folder = folder_of(pretrained(*line, "model=flat", "--head"))
        assert sorted(load_file("b.safetensors")) == ["fc.bias", "fc.weight"]
        about = yaml.safe_load(Path("b.yaml").read_text())
        assert about["model"] == {"_target_": "pre_models.Flat"}
        assert about["members"] == [{"prefix": "", "weight": 1.0}]
        before = Path("b.safetensors").read_bytes()
        assert call("export", str(folder), "-o", "b.safetensors").status == 0
        assert Path("b.safetensors").read_bytes() == before
    finally:
        del sys.modules["pre_models"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["-m", "seed=0,1"], "-m: pretrain makes one model and one file"),
        (["baseline=fedavg"], "baseline: pretrain trains one model on all data, as baseline=oracle does"),
        (["+merging.search.steps=3"], "merging.search.steps: pretrain trains one model"),
        (["baseline@merging.base=fedprox"], "baseline: pretrain trains one model"),
        (["experiment=feddle_digits"], "experiment: a preset is of a federation"),
        (["clients.numbr=3"], "clients.numbr: unknown key. Did you mean 'clients.number'?"),
        (["-o", "b.pt"], "--out: got 'b.pt': nearest valid value: b.safetensors."),
    ],
)
def test_what_is_refused(line: list[str], text: str) -> None:
    answer = call("pretrain", "-o", "b.safetensors", *SMALL, *line)
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: {text}")
    assert list(Path().iterdir()) == []


def test_the_lines_of_help_are_read_as_they_stand() -> None:
    lines = [line.split() for line in EPILOG.splitlines() if line.startswith("  hybridfl")]
    assert [line[1] for line in lines] == ["pretrain", "train"]
    with Composer() as composer:
        for line in lines:
            composer.compose([text for text in line[2:] if "=" in text])
