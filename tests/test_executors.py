"""Every executor gives what ``sequential`` gives, whatever the method, the net, the optimiser and the augmentation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import helpers
import pytest
import torch
from parity_helpers import LINES, difference, end, reference
from ranks_helpers import Pair

from hybridfl.executors import Executor
from hybridfl.executors.vectorized import Vectorized
from hybridfl.executors.workers import Workers

EXECUTORS: dict[str, Executor] = {"workers": Workers(2), "vectorized": Vectorized()}
"""Those compared with ``sequential``; the same objects, and so the same processes, for all tests."""
TOLERANCE = {"workers": 0.0, "vectorized": 1e-10}
"""The largest difference of any number from ``sequential``; 0 is the same to the bit."""


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    for executor in EXECUTORS.values():
        if isinstance(executor, Workers):
            executor.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as both:
        yield both


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_the_numbers_are_those_of_sequential(name: str, line: tuple[str, ...]) -> None:
    found = end(line, EXECUTORS[name])
    single = "dtype=float32" in line
    assert difference(found, reference(line)) <= TOLERANCE[name] * (1e6 if single else 1)
    assert TOLERANCE[name] or helpers.identical(found, reference(line))


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_the_numbers_of_two_ranks_are_those_of_sequential(pair: Pair, line: tuple[str, ...]) -> None:
    assert helpers.identical(pair.ends(line), [reference(line)] * 2)


@pytest.mark.parametrize("number", [1, 3])
def test_the_number_of_workers_changes_nothing(number: int) -> None:
    with Workers(number) as executor:
        for name in ("momentum", "single precision", "fedprox", "event queue"):
            assert helpers.identical(end(LINES[name], executor), reference(LINES[name])), name


def test_a_difference_is_seen() -> None:
    a = {"x": [torch.ones(3), 1.0], "y": (None, "text", 2)}
    assert difference(a, {"x": [torch.ones(3), 1.0], "y": (None, "text", 2)}) == 0
    assert difference(a, {"x": [torch.ones(3) + 0.25, 1.0], "y": (None, "text", 2)}) == 0.25
    assert difference(a, {"x": [torch.ones(3), 1.5], "y": (None, "text", 2)}) == 0.5
    assert difference(a, {"x": [torch.ones(3), 1.0], "y": (None, "text", 3)}) == math.inf
