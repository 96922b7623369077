"""Nested widths: corners of tensors, and means over whoever has an entry."""

from __future__ import annotations

import torch

from hybridfl import params as P
from hybridfl.merging.slices import overlap_mean, sliced


def test_a_slice_is_the_first_corner_and_no_copy() -> None:
    whole = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.arange(3.0), "n": torch.tensor(7)}
    part = sliced(whole, {"w": [2, 3], "b": [2], "n": []})
    assert part["w"].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert part["b"].tolist() == [0, 1]
    assert part["n"] == 7
    assert all(part[name].data_ptr() == whole[name].data_ptr() for name in whole)


def test_an_entry_is_the_mean_over_the_parts_that_have_it() -> None:
    old = {"w": torch.full((2, 3), 9.0), "seen": torch.tensor(4)}
    narrow = {"w": torch.tensor([[1.0]]), "seen": torch.tensor(6)}
    wide = {"w": torch.tensor([[4.0, 8.0], [2.0, 6.0]]), "seen": torch.tensor(5)}
    new = overlap_mean(old, [narrow, wide], [1, 3])
    # (1 · 1 + 3 · 4) / 4 where both are, the wide one where it is alone, the old value where nobody is.
    assert new["w"].tolist() == [[3.25, 8.0, 9.0], [2.0, 6.0, 9.0]]
    assert new["seen"] == 6
    assert (old["w"] == 9).all()


def test_parts_of_full_width_have_the_ordinary_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [{"w": torch.randn(3, 2, generator=generator, dtype=torch.float64)} for _ in range(3)]
    new = overlap_mean({"w": torch.zeros(3, 2, dtype=torch.float64)}, parts, [5, 1, 2])
    torch.testing.assert_close(new["w"], P.mean(parts, [5, 1, 2])["w"], rtol=1e-14, atol=1e-15)


def test_without_parts_everything_stays() -> None:
    old = {"w": torch.tensor([1.0, 2.0]), "seen": torch.tensor(3)}
    new = overlap_mean(old, [], [])
    assert torch.equal(new["w"], old["w"])
    assert torch.equal(new["seen"], old["seen"])
