"""Checkpoints: what goes in comes out, damage is seen, and the one before is used."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridfl import checkpoints
from hybridfl.checkpoints import load_latest, pack, save, unpack
from hybridfl.store import StoreError
from hybridfl.types import Model

ROOT = Path(__file__).parent.parent


def round_trip(state: Any, folder: Path) -> Any:
    save(folder, 0, state)
    found = load_latest(folder)
    assert found is not None
    assert (found[0], found[2]) == (0, [])
    return found[1]


def names(folder: Path) -> list[int]:
    return sorted(int(path.name[6:12]) for path in folder.iterdir())


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, types and order of keys included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        as_bytes = [t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*as_bytes)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)  # tells -0.0 from 0.0 and takes NaN for itself


# -- round trip ------------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.uint16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3)], ids=str)
def test_a_tensor_comes_back_exactly(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    assert same(round_trip([tensor], tmp_path), [tensor])


def test_a_state_of_everything_comes_back_exactly(tmp_path: Path) -> None:
    state = {
        "global": Model({"0.weight": torch.randn(3, 2)}, {"0.mean": torch.zeros(2)}),
        "clients": {3: {"model": Model({}, {})}, -1: None, "3": []},
        "atlas": [{"update": torch.tensor([float("nan"), -0.0]), "scale": 0.1}, [[]], {}],
        "numbers": [True, 1, 1.0, -0.0, float("nan"), float("inf"), 2**200, -(2**64), "", "naïve\n\0"],
    }
    assert same(round_trip(state, tmp_path), state)


KEYS = st.one_of(st.text(max_size=4), st.integers())
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
TENSORS = st.lists(st.floats(width=32), max_size=4).map(torch.tensor)
STATES = st.recursive(
    st.one_of(LEAVES, TENSORS, st.dictionaries(st.text(max_size=3), TENSORS, max_size=2).map(lambda d: Model(d, {}))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=30)
@given(STATES)
def test_any_state_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    assert same(round_trip(state, tmp_path_factory.mktemp("checkpoints")), state)


def test_the_file_is_a_plain_torch_file_named_by_its_checksum(tmp_path: Path) -> None:
    path = save(tmp_path, 12, {"model": Model({"w": torch.ones(2)}, {})})
    assert path.name == f"round-000012-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.pt"
    plain = torch.load(path, weights_only=True)
    assert (plain["format"], plain["round"]) == (1, 12)
    assert torch.equal(plain["state"]["model"]["params"]["w"], torch.ones(2))


def test_saving_leaves_the_state_as_it_is(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    state = {"model": Model({"w": weight}, {}), "views": [torch.arange(10)[2:4]]}
    loaded = round_trip(state, tmp_path)
    assert state["model"].params["w"] is weight  # type: ignore[attr-defined]
    assert weight.requires_grad
    assert type(loaded["model"].params["w"]) is torch.Tensor
    assert not loaded["model"].params["w"].requires_grad


# -- sharing and size ------------------------------------------------------------------------------------------------


def test_shared_tensors_are_stored_once_and_come_back_shared(tmp_path: Path) -> None:
    start, base = torch.randn(100_000), torch.randn(2, 100_000)
    state = {
        "start": start,
        "in_flight": [Model({"w": start}, {}), Model({"w": start.detach()}, {})],
        "rows": [base[0], base[0], base[1]],
    }
    path = save(tmp_path, 0, state)
    assert path.stat().st_size < 4 * 300_000 + 10_000
    _, loaded, _ = load_latest(tmp_path) or pytest.fail("nothing found")
    assert loaded["in_flight"][0].params["w"] is loaded["start"]
    assert loaded["in_flight"][1].params["w"] is loaded["start"]
    assert loaded["rows"][0] is loaded["rows"][1]
    assert loaded["rows"][2] is not loaded["rows"][1]
    assert same(loaded, state)


def test_equal_tensors_that_are_not_shared_stay_apart(tmp_path: Path) -> None:
    loaded = round_trip([torch.zeros(3), torch.zeros(3), torch.zeros(0), torch.zeros(0)], tmp_path)
    loaded[0][0] = 1
    assert loaded[1][0] == 0
    assert loaded[2] is not loaded[3]


def test_a_small_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    big = torch.randn(1000, 1000)
    state = {"row": big[3], "column": big[:, 5], "one": big[7, 7], "none": big[:0], "wide": big[0, :1].expand(50)}
    path = save(tmp_path, 0, state)
    assert path.stat().st_size < 20_000
    assert same(round_trip(state, tmp_path), state)


def test_strides_of_dense_tensors_are_kept(tmp_path: Path) -> None:
    # Another memory layout can mean another kernel, and then other last digits after a resume.
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = [image, torch.randn(3, 4).t(), torch.randn(2, 6, 3, 4, 5)[0].permute(2, 0, 3, 1), torch.zeros(1).expand(9)]
    loaded = round_trip(state, tmp_path)
    assert [tensor.stride() for tensor in loaded] == [tensor.stride() for tensor in state]
    assert same(loaded, state)


def test_lazy_conjugates_and_negatives(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    state = [z, z.conj(), z.conj().imag]
    assert same(round_trip(state, tmp_path), state)


def test_unpacking_moves_each_tensor_to_the_device_once() -> None:
    shared = torch.ones(3)
    there = unpack(pack([shared, {"again": shared}]), device="meta")
    assert there[0].device.type == "meta"
    assert there[0] is there[1]["again"]


# -- what is refused -------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: int


class Impostor(NamedTuple):
    params: int


Impostor.__name__ = Impostor.__qualname__ = "Model"  # by name alone it is what may be stored


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"seen": {1, 2}}, r"state\.seen cannot be stored: a set"),
        ({"atlas": [0, 0, 0, {"update": np.zeros(2)}]}, r"state\.atlas\[3\]\.update .* a numpy\.ndarray"),
        ({"scale": np.float64(1)}, r"state\.scale .* a numpy\.float64"),
        ({"pair": (1, 2)}, r"state\.pair .* a tuple"),
        ({"rule": lambda: 0}, r"state\.rule .* a function"),
        ({"point": Point(1)}, r"state\.point .* a test_checkpoints\.Point"),
        ({"model": Impostor(1)}, r"state\.model .* a test_checkpoints\.Model"),
        ({"model": Model({"0.weight": b""}, {})}, r"state\.model\.params\['0\.weight'\] .* a bytes"),  # type: ignore[dict-item]
        ({"clients": {7: {"x": 1j}}}, r"state\.clients\[7\]\.x .* a complex"),
        ({"clients": {(1, 2): 0}}, r"state\.clients cannot be stored: its key \(1, 2\) is a tuple; use str or int"),
        ({"clients": {True: 0}}, r"its key True is a bool"),
        ({"clients": {np.int64(3): 0}}, r"its key .* is a numpy\.int64"),
        ({"clients": {2**3000: 0}}, r"an integer of 3001 bits"),
        ({"net": OrderedDict(a=1)}, r"state\.net .* a collections\.OrderedDict"),
        ({"count": 2**3000}, r"state\.count .* an integer of 3001 bits, more than 2000"),
        ({"a": {checkpoints.MARK: "Model"}}, r"state\.a .* is reserved"),
        ({"sparse": torch.eye(2).to_sparse()}, r"state\.sparse .* torch\.sparse_coo"),
        ({"meta": torch.zeros(2, device="meta")}, r"state\.meta .* on meta"),
        (np.zeros(2), r"state cannot be stored: a numpy\.ndarray"),
    ],
)
def test_what_cannot_be_stored_is_named_by_its_path(tmp_path: Path, state: Any, where: str) -> None:
    save(tmp_path, 0, {"old": 1})
    with pytest.raises(StoreError, match=where):
        save(tmp_path, 1, state)
    assert names(tmp_path) == [0]


def test_a_state_that_contains_itself(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = [state]
    with pytest.raises(StoreError, match="contains itself"):
        save(tmp_path, 0, state)


def test_a_named_tuple_of_another_version() -> None:
    with pytest.raises(StoreError, match="holds a Hologram"):
        unpack({checkpoints.MARK: "Hologram", "x": 1})


# -- several checkpoints and damage ----------------------------------------------------------------------------------


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for round in range(5):
        save(tmp_path, round, {"round": round})
        assert names(tmp_path) == list(range(max(0, round - 1), round + 1))
    assert load_latest(tmp_path) == (4, {"round": 4}, [])


def test_saving_a_round_again_replaces_it(tmp_path: Path) -> None:
    for round, value in ((0, 0), (1, 1), (1, 2), (1, 2)):
        save(tmp_path, round, value)
    assert names(tmp_path) == [0, 1]
    assert load_latest(tmp_path) == (1, 2, [])


def test_nothing_there(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "gone") is None
    (tmp_path / "notes.txt").write_text("x")
    assert load_latest(tmp_path) is None


def test_rounds_sort_as_numbers(tmp_path: Path) -> None:
    for round in (-1, 999_999, 1_000_000):
        save(tmp_path, round, round, keep=9)
    assert load_latest(tmp_path) == (1_000_000, 1_000_000, [])


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flip,
    "cut": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, kind: str) -> None:
    first, second = (save(tmp_path, round, {"w": torch.full((100,), float(round))}) for round in (4, 5))
    second.write_bytes(DAMAGE[kind](second.read_bytes()))
    round, state, notes = load_latest(tmp_path) or pytest.fail("nothing found")
    assert (round, state["w"][0]) == (4, 4.0)
    assert notes == [f"Checkpoint {second} is skipped: it is damaged, its checksum does not match."]
    first.write_bytes(DAMAGE[kind](first.read_bytes()))
    heard: list[str] = []
    assert load_latest(tmp_path, on_note=heard.append) is None
    assert [str(second) in heard[0], str(first) in heard[1], len(heard)] == [True, True, 2]
    assert names(tmp_path) == [4, 5]


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_right_checksum_on_what_torch_cannot_read(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1, 1)
    (tmp_path / f"round-000002-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)
    round, state, notes = load_latest(tmp_path) or pytest.fail("nothing found")
    assert (round, state, len(notes)) == (1, 1, 1)
    assert "torch cannot read it" in notes[0]


def test_a_checkpoint_that_cannot_be_opened(tmp_path: Path) -> None:
    save(tmp_path, 1, 1)
    (tmp_path / "round-000002-0123456789abcdef.pt").mkdir()
    round, _, notes = load_latest(tmp_path) or pytest.fail("nothing found")
    assert round == 1
    assert "cannot be read (Is a directory)" in notes[0]


def test_a_checkpoint_under_the_name_of_another_round(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 1)
    path.rename(path.with_name(path.name.replace("000001", "000009")))
    heard: list[str] = []
    assert load_latest(tmp_path, on_note=heard.append) is None
    assert "another version" in heard[0]


def test_a_damaged_one_does_not_push_out_the_one_to_fall_back_on(tmp_path: Path) -> None:
    save(tmp_path, 4, 4)
    damaged = save(tmp_path, 6, 6)
    damaged.write_bytes(b"")
    newest = save(tmp_path, 8, 8)
    assert names(tmp_path) == [4, 8]
    newest.write_bytes(b"")
    assert (load_latest(tmp_path) or pytest.fail("nothing found"))[:2] == (4, 4)


def test_after_falling_back_the_new_one_counts_though_its_round_is_lower(tmp_path: Path) -> None:
    save(tmp_path, 4, 4)
    save(tmp_path, 8, 8).write_bytes(b"")
    save(tmp_path, 5, 5)
    assert names(tmp_path) == [4, 5]
    assert load_latest(tmp_path) == (5, 5, [])


def test_half_written_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".round-000003-0123456789abcdef.pt.77.tmp").write_bytes(b"half")
    assert load_latest(tmp_path) is None
    save(tmp_path, 4, 4)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_a_disk_that_fills_up_keeps_the_checkpoints_before(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import torch
from hybridfl import checkpoints
from hybridfl.store import StoreError
folder = Path(sys.argv[1])
for round in (0, 1):
    checkpoints.save(folder, round, {"round": round})
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    checkpoints.save(folder, 2, {"w": torch.zeros(10_000)})
except StoreError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "round-000002" in done.stdout
    assert "File too large. Everything written before is kept." in done.stdout
    assert names(tmp_path) == [0, 1]
    assert load_latest(tmp_path) == (1, {"round": 1}, [])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StoreError, match=r"Cannot write .*file/checkpoints: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 0, {})
