"""A run made again from what is stored of it, wherever its data are now."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import yaml
from cli_helpers import call, done
from export_helpers import SMALL, plan_made, written

from hybridfl.errors import ConfigError
from hybridfl.plan import make_plan
from hybridfl.restored import composed_of
from hybridfl.runs import FACTS, Run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("clients.per_round={0:2,1:3}", "client_optimizer=adam", "clients.tiers=ln0.5_0.4"),
        ("merging=optimal_averaging", "baseline@merging.base=fedprox"),
        ("baseline=oracle", "classes=0-1", "clients.per_round=1.0", "client_optimizer.lr=1e-05"),
        ("baseline=dsgd", "topology=ring", "server_data=none"),
        ("augmentation=mixup", "client_optimizer.schedule.kind=cosine", "start=server", "max_bad_rounds=7"),
    ],
)
def test_what_is_stored_is_the_run(overrides: tuple[str, ...]) -> None:
    plan = helpers.plan(*overrides, "model=cnn", "model.channels=[4]", "model.groups=2")
    config = yaml.safe_load(yaml.safe_dump(plan.stored_config(), sort_keys=False))
    again = make_plan(composed_of(Run(Path(plan.digest), config, {})), helpers.CACHE)
    assert again.digest == plan.digest
    assert again.stored_config() == plan.stored_config()
    options = plan.composed.config[plan.composed.method_key]
    assert config["method"].keys() - options.keys() <= set(FACTS)


def test_data_are_found_where_the_run_found_them_else_where_they_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    for place, shift in (("a", 0), ("b", 0), ("changed", 1)):
        Path(place).mkdir()
        parts = {"x_train": x[:40] // (1 + shift), "x_test": x[40:], "y_train": np.arange(40) % 2}
        np.savez(f"{place}/d.npz", **parts, y_test=np.arange(20) % 2)
    module = (
        "import numpy as np\n"
        "from hybridfl.data.dataset import Dataset, Examples\n"
        "from hybridfl.errors import DataError\n"
        "class Saved:\n"
        "    def load(self, root):\n"
        "        if not (root / 'd.npz').is_file():\n"
        "            raise DataError(f'{root}: no d.npz')\n"
        "        with np.load(root / 'd.npz') as d:\n"
        "            parts = [Examples(d[f'x_{p}'][:, None], d[f'y_{p}']) for p in ('train', 'test')]\n"
        "        return Dataset('saved', *parts, 2, (127.0,), (70.0,))\n"
    )
    Path("saved_data.py").write_text(module)
    Path("conf/dataset").mkdir(parents=True)
    Path("conf/dataset/saved.yaml").write_text("# Saved.\n_target_: saved_data.Saved\n")
    line = ("dataset=saved", "partitioning=iid", "server_data=none", "evaluation.min_test=1", "clients.number=2",
            "clients.per_round=2", "rounds=2", "ui=none", "baseline=fedavg")  # fmt: skip
    folder = done("--config-dir", "conf", *line, "data_root=a")
    try:
        monkeypatch.setenv("HYBRIDFL_DATA", "b")
        assert plan_made(folder).settings.data_root == "a"
        shutil.rmtree("a")
        assert written(folder)["run"] == folder.name
        assert plan_made(folder).settings.data_root == "b"
        answer = call("export", str(folder), "-o", "no.safetensors", "--data-root", "changed")
        assert answer.status == 2
        assert "its data have changed: saved has the fingerprint" in answer.err
        assert "'changed'" in answer.err
        monkeypatch.setenv("HYBRIDFL_DATA", "nowhere")
        answer = call("export", str(folder), "-o", "no.safetensors")
        assert (answer.status, answer.err) == (2, "hybridfl: nowhere: no d.npz\n")
        monkeypatch.setenv("HYBRIDFL_DATA", "b")
        Path("saved_data.py").write_text(module + "# changed\n")
        answer = call("export", str(folder), "-o", "no.safetensors")
        assert answer.status == 2
        assert "code of yours" in answer.err
        assert not Path("no.safetensors").exists()
    finally:
        del sys.modules["saved_data"]


def test_a_device_that_is_not_here_is_no_reason_to_refuse(tmp_path: Path) -> None:
    folder = done(*SMALL, "baseline=fedavg")
    text = (folder / "config.yaml").read_text()
    assert "device: auto" in text
    (folder / "config.yaml").write_text(text.replace("device: auto", "device: cuda:63"))
    assert plan_made(folder).settings.device == "auto"
    (folder / "config.yaml").write_text(text.replace("device: auto", "device: cpu"))
    assert plan_made(folder).settings.device == "cpu"


def test_a_file_that_the_run_started_from_must_be_there() -> None:
    federation = make_plan(helpers._composed(*SMALL, "baseline=fedavg")).federation
    torch.save(federation.start.params, "start.pt")
    folder = done(*SMALL, "baseline=fedavg", "start=start.pt")
    assert written(folder)["run"] == folder.name
    Path("start.pt").rename("other.pt")
    answer = call("export", str(folder), "-o", "no.safetensors")
    assert answer.status == 2
    assert answer.err.startswith(
        f"hybridfl: {folder.name}: cannot be made again from its config.yaml: start: got 'start.pt'."
    )


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^lost: has no config\.yaml of a run"):
        composed_of(Run(tmp_path / "lost", {}, {"status": "done"}))
