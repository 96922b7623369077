"""Files with models for ``hybridfl merge``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from cli_helpers import SMALL_DATA
from safetensors.torch import load_file, save_file
from torch import Tensor

ON = ("--on", *SMALL_DATA, "model.hidden=[4]")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def saved(name: str, tensors: Mapping[str, Tensor]) -> str:
    if name.endswith(".safetensors"):
        save_file(dict(tensors), name)
    else:
        torch.save({"state_dict": dict(tensors)}, name)
    return name


def loaded(name: str) -> dict[str, Tensor]:
    found = load_file(name) if name.endswith(".safetensors") else torch.load(name, weights_only=True)
    assert isinstance(found, dict)
    return found
