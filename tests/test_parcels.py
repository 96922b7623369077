"""Parcels of tensors that two processes share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from workers_helpers import same

from hybridfl.executors.parcel import LINE, Opened, Parcel
from hybridfl.types import Model


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def through(item: Any, **options: Any) -> Any:
    parcel = Parcel([item])
    return Opened(parcel.fd, **options).item(0)


@pytest.mark.parametrize("copied", [False, True])
def test_tensors_of_every_kind_arrive_as_they_are(copied: bool) -> None:
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int64, torch.complex64)
    given = [base.to(kind) for kind in kinds]
    given += [
        base.t(),
        base[1:3, ::2],
        base[0, 5],
        base[:, 1:],
        torch.zeros(0, 3),
        torch.zeros(3, 0).t(),
        torch.tensor(7),
    ]
    given += [torch.ones(1).expand(3, 2), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    given += [
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.tensor([1 + 2j, 3j]).conj().imag,
        base.to_sparse(),
        nn.Parameter(base),
        nn.Parameter(base, False),
    ]
    given += [base.clone().requires_grad_(), (base.clone().requires_grad_() * 2)]
    for tensor, arrived in zip(given, through(given, copied=copied), strict=True):
        assert same(tensor, arrived), tensor


def test_a_tensor_has_the_same_place_within_a_line_of_the_cache() -> None:
    flat = torch.arange(100, dtype=torch.float32)
    for tensor, arrived in zip(flat.split(7), through(list(flat.split(7))), strict=True):
        assert arrived.data_ptr() % LINE == tensor.data_ptr() % LINE


def test_what_several_items_hold_is_written_once() -> None:
    start = Model({"w": torch.ones(1000)}, {"n": torch.tensor(3)})
    alone, shared = Parcel([start]), Parcel([start, {"frozen": start.params["w"].detach()}, [start, start]])
    assert len(shared.tensors) == 2
    assert os.fstat(shared.fd).st_size < os.fstat(alone.fd).st_size + 1000
    opened = Opened(shared.fd)
    first, second, third = opened.items()
    assert first.params["w"] is second["frozen"] is third[1].params["w"]
    assert type(first) is Model


def test_what_a_reader_writes_is_its_own_unless_it_is_to_be_shared() -> None:
    parcel = Parcel([torch.zeros(3)])
    Opened(parcel.fd).item(0).add_(1)
    assert Opened(parcel.fd).item(0).tolist() == [0, 0, 0]
    Opened(parcel.fd, written=True).item(0).add_(1)
    assert Opened(parcel.fd).item(0).tolist() == [1, 1, 1]


def test_a_parcel_without_tensors_and_one_without_items() -> None:
    assert through({"a": [1, None]}) == {"a": [1, None]}
    assert Opened(Parcel([]).fd).items() == []


def test_descriptors_are_closed() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(5):
        parcel = Parcel([torch.zeros(5)])
        copy = Opened(parcel.fd, copied=True).item(0)
        del parcel
    assert count() == before
    assert copy.tolist() == [0] * 5
