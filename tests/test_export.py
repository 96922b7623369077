"""``hybridfl export``: the file holds what the run was scored with, and the lines of --help run it in plain torch."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import yaml
from cli_helpers import call, checkpoint_rounds, done
from export_helpers import CNN, MIX, NORM, SHORT, SMALL, agrees, last, plain, plan_made, raw_test, same, written
from safetensors import safe_open
from safetensors.torch import load_file

from hybridfl import export_command
from hybridfl.plan import make_plan


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


# -- the lines of --help ----------------------------------------------------------------------------------------------


def documented() -> tuple[str, str]:
    """The lines for one model, and those for an ensemble, word for word."""
    blocks = re.findall(r"(?:^    .*\n|(?<=\n)\n(?=    ))+", export_command.EPILOG, flags=re.MULTILINE)
    one, other = (textwrap.dedent(block).strip() + "\n" for block in blocks)
    assert "the last three lines are" in export_command.EPILOG
    return one, "".join(one.splitlines(keepends=True)[:-3]) + other


def test_the_documented_lines_reproduce_the_accuracy_of_one_model() -> None:
    folder = done("dataset=digits", "model=cnn", "baseline=fedavg", *SHORT)
    written(folder)
    x, y = raw_test(plan_made(folder))
    names: dict[str, Any] = {"x": x}
    exec(documented()[0], names)
    assert names["logits"].shape == (len(y), 10)
    agrees(last(folder, "global"), names["logits"].detach(), y)
    assert "hybridfl" not in documented()[0].replace("from hybridfl.models.cnn import CNN", "")


def test_the_documented_lines_reproduce_the_accuracy_of_an_ensemble() -> None:
    folder = done("dataset=digits", *MIX, "model=cnn", *SHORT)
    x, y = raw_test(plan_made(folder))
    for options, scope, number in (((), "global", 4), (("--width", "0.5"), "global/width=0.5", 2)):
        about = written(folder, *options)
        assert [m["prefix"] for m in about["members"]] == [f"{k}/" for k in range(number)]
        assert [m["weight"] for m in about["members"]] == [1 / number] * number
        assert {m["width"] for m in about["members"]} == {0.25} == {about["model"]["width"]}
        names: dict[str, Any] = {"x": x}
        exec(documented()[1], names)
        agrees(last(folder, scope), names["logits"].detach(), y)


def test_help_shows_them() -> None:
    shown = call("export", "--help").out
    assert textwrap.indent(documented()[0], "    ") in shown


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_files_tell_what_the_model_is() -> None:
    folder = done(*CNN, "baseline=fedavg", "classes=[1,3,5,7]")
    about = written(folder)
    federation = plan_made(folder).federation
    assert about == {
        "run": folder.name,
        "method": "fedavg",
        "round": 2,
        "participant": "server",
        "dataset": "synthetic",
        "subset": [1, 3, 5, 7],
        "input_shape": [1, 8, 8],
        "classes": 4,
        "mean": list(federation.dataset.mean),
        "std": list(federation.dataset.std),
        "dtype": "float32",
        "batch_norm": "average",
        "model": {"_target_": "hybridfl.models.cnn.CNN", "channels": [4, 8], "hidden": 16, "groups": 2, "kernel": 3, "halving": "pool",
                  "width": 1.0},
        "members": [{"prefix": "", "weight": 1.0, "width": 1.0}],
    }  # fmt: skip
    with safe_open("model.safetensors", "pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == sorted(federation.net.state_dict())
    assert json.loads(metadata["hybridfl"]) == about
    before = Path("model.safetensors").read_bytes()
    written(folder)
    assert Path("model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "options", "scope"),
    [
        (("baseline=heterofl", "clients.tiers=[0.5,1.0]", "baseline.serve_widths=[0.5,1.0]"), (), "global"),
        (("baseline=heterofl", "clients.tiers=[0.5,1.0]", "baseline.serve_widths=[0.5,1.0]"), ("--width", "0.5"),
         "global/width=0.5"),
        (("baseline=fedavg", "+model.input={mean:[0.5],std:[2.0]}"), (), "global"),
    ],
)  # fmt: skip
def test_the_global_model_scores_as_in_the_table(
    overrides: tuple[str, ...], options: tuple[str, ...], scope: str
) -> None:
    folder = done(*CNN, *overrides)
    about = written(folder, *options)
    x, y = raw_test(plan_made(folder))
    agrees(last(folder, scope), plain(about, x), y)


def test_a_client_exports_its_own_model() -> None:
    folder = done(*CNN, "baseline=local_only")
    with open(folder / "clients.csv", newline="") as file:
        rows = {int(row["client"]): row for row in csv.DictReader(file) if row["round"] == "2"}
    x, y = raw_test(plan_made(folder))
    for client in (0, 3):
        about = written(folder, "--participant", str(client))
        assert about["participant"] == client
        own = torch.from_numpy(plan_made(folder).federation.split.clients_test[client])
        agrees(rows[client], plain(about, x[own]), y[own])


@pytest.mark.parametrize("policy", ["local", "reestimate"])
def test_batch_norm_is_as_it_is_deployed(policy: str) -> None:
    folder = done(*NORM, "baseline=fedavg", f"model.batch_norm={policy}", "clients.per_round=5")
    x, y = raw_test(plan_made(folder))
    if policy == "reestimate":
        about = written(folder)
        agrees(last(folder, "global"), plain(about, x), y)
    else:
        answer = call("export", str(folder), "-o", "model.safetensors")
        assert answer.status == 2
        assert answer.err == (
            "hybridfl: --participant: is needed: this run has no global model, but one for each client. Valid: 0 to 4.\n"
        )
    with open(folder / "clients.csv", newline="") as file:
        rows = {int(row["client"]): row for row in csv.DictReader(file) if row["round"] == "2"}
    for client in (1, 4):
        about = written(folder, "--participant", str(client))
        own = torch.from_numpy(plan_made(folder).federation.split.clients_test[client])
        agrees(rows[client], plain(about, x[own]), y[own])


def test_statistics_of_the_batch_are_not_in_the_file_and_a_run_starts_without_them() -> None:
    line = (*NORM, "baseline=fedavg", "model.batch_norm=batch")
    about = written(done(*line))
    tensors = load_file("model.safetensors")
    assert about["batch_norm"] == "batch"
    assert not [name for name in tensors if "running" in name]
    started = make_plan(helpers._composed(*line, "start=model.safetensors")).federation.start
    assert same({**started.params, **started.buffers}, tensors)
    answer = call("train", *NORM, "baseline=fedavg", "start=model.safetensors")
    assert answer.status == 2
    assert "missing" in answer.err
    assert "running_mean" in answer.err


def test_a_start_from_the_file_is_the_model_and_merge_reads_it() -> None:
    folder = done(*CNN, "baseline=fedavg", "dtype=float64")
    written(folder)
    tensors = load_file("model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float64}
    started = make_plan(helpers._composed(*CNN, "baseline=fedavg", "dtype=float64", "start=model.safetensors"))
    assert same(started.federation.start.params, tensors)
    shutil.copy("model.safetensors", "copy.safetensors")
    assert call("merge", "model.safetensors", "copy.safetensors", "-o", "mean.safetensors").status == 0
    assert same(load_file("mean.safetensors"), tensors)


def test_a_run_that_was_stopped_gives_its_last_checkpoint() -> None:
    folder = done(*CNN, "baseline=fedavg", "rounds=3", "checkpoint_seconds=0", "client_optimizer.lr=0.5")
    assert checkpoint_rounds(folder) == [2, 3]
    (newest,) = (folder / "checkpoints").glob("round-000003-*.pt")
    newest.unlink()
    answer = call("export", str(folder), "-o", "model.safetensors")
    with open(folder / "metrics.csv", newline="") as file:
        _, row, later = (row for row in csv.DictReader(file) if row["scope"] == "global")
    assert row["accuracy"] != later["accuracy"]
    percent = f"{100 * float(row['accuracy']):.2f} %"
    assert answer.out.splitlines()[1] == (
        f"the global model of fedavg after round 2 of 3, accuracy {percent} of the server's test set"
    )
    x, y = raw_test(plan_made(folder))
    agrees(row, plain(yaml.safe_load(Path("model.yaml").read_text()), x), y)
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    answer = call("export", folder.name[:6], "-o", "none.safetensors")
    assert answer.status == 1
    assert answer.err.startswith(f"hybridfl: {folder.name}: has no checkpoint, so there is no model yet")
    assert not Path("none.safetensors").exists()


def test_classes_that_a_stream_has_not_shown_are_told() -> None:
    folder = done(*CNN, "baseline=fedavg", "tasks.number=2", "tasks.order=shuffled", "rounds=3", "checkpoint_seconds=0")
    assert "seen" not in written(folder)
    stream = plan_made(folder).federation.tasks
    for file in (folder / "checkpoints").glob("round-000003-*.pt"):
        file.unlink()
    assert stream.at(1) == 0
    assert written(folder)["seen"] == list(stream.classes[0])


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    folder = done(*SMALL, *MIX[:3], "model.hidden=[16]")
    found = set(Path().iterdir())
    for options, text in (
        (("--width", "0.3"), "--width: got 0.3: nearest valid value: 0.25. Valid: 0.25, 0.5."),
        (("--participant", "5"), "--participant: got 5: the clients are 0 to 4; nearest valid value: 4."),
        (("--participant", "x"), "--participant: got 'x': expected server or the number of a client, such as 7."),
        (("-o", "model.pt"), "--out: got 'model.pt': nearest valid value: model.safetensors."),
    ):
        answer = call("export", str(folder), "-o", "model.safetensors", *options)
        assert (answer.status, answer.err) == (2, f"hybridfl: {text}\n")
    assert set(Path().iterdir()) == found
    Path("model.yaml").write_text("mine: 1\n")
    answer = call("export", str(folder), "-o", "model.safetensors")
    assert answer.status == 2
    assert "'model.yaml', which would tell about it, is something else" in answer.err
    assert Path("model.yaml").read_text() == "mine: 1\n"
    assert not Path("model.safetensors").exists()
    other = done(*SMALL, "baseline=fedavg")
    answer = call("export", str(other), "-o", "a.safetensors", "--width", "0.5")
    assert answer.err == "hybridfl: --width: got 0.5: fedavg serves one width only; leave it out.\n"
