"""Augmentation: what each part does to the pixels, what is refused, and one of a user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from augmentation_helpers import fitted, images, rng, standardised
from cli_helpers import TINY, call, rows

from hybridfl.data.augmentation import Augmentation, cropped, erased, rectangles
from hybridfl.data.dataset import Dataset, Examples
from hybridfl.errors import ConfigError

# -- crop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_crop_is_a_window_of_the_raw_image_with_a_black_margin(dtype: torch.dtype) -> None:
    """To the bit: what is padded before it is standardised, as papers do, is the same as afterwards with our black."""
    dataset, padding = images(200), 2
    x = standardised(dataset.train.x, dtype)
    before = x.clone()
    out, partners, share = fitted(dataset, crop=padding)(x, rng())
    assert (partners, share, out.dtype) == (None, 1.0, dtype)
    assert torch.equal(x, before)
    margin = np.pad(dataset.train.x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    seen = set()
    for i in range(200):
        windows = {
            (top, left): standardised(margin[i : i + 1, :, top : top + 6, left : left + 9], dtype)[0]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        }
        (where,) = [place for place, window in windows.items() if torch.equal(window, out[i])]
        seen.add(where)
    assert len(seen) == 25


def test_windows_at_given_places() -> None:
    x = torch.arange(2.0 * 1 * 2 * 3).reshape(2, 1, 2, 3)  # 0 1 2 / 3 4 5 and 6 7 8 / 9 10 11
    black = torch.tensor([[[-1.0]]])
    out = cropped(x, 1, np.array([1, 2]), np.array([1, 0]), black)
    assert out[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert out[1, 0].tolist() == [[-1, 9, 10], [-1, -1, -1]]


# -- flip ------------------------------------------------------------------------------------------------------------


def test_flipping_everything_twice_changes_nothing() -> None:
    dataset = images(20)
    x = standardised(dataset.train.x)
    flip = fitted(dataset, flip=1.0)
    once = flip(x, rng()).x
    assert torch.equal(once, x[..., torch.arange(8, -1, -1)])
    assert torch.equal(flip(once, rng()).x, x)


def test_a_flip_of_a_half_flips_half_of_the_examples() -> None:
    dataset = images(4000, 2, 3)
    x = standardised(dataset.train.x)
    out = fitted(dataset, flip=0.5)(x, rng()).x
    flipped = (out == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(out[~flipped], x[~flipped])
    assert 1850 < flipped.sum() < 2150  # five standard deviations


# -- erase -----------------------------------------------------------------------------------------------------------


def test_an_erased_rectangle_is_within_bounds_and_the_rest_stays() -> None:
    dataset = images(3000, 20, 30)
    x = standardised(dataset.train.x, torch.float64)
    x[x == 0] = 1.0  # nothing but what is erased is 0
    out = fitted(dataset, erase=0.4)(x, rng()).x
    gone = out == 0
    assert torch.equal(out[~gone], x[~gone])
    assert torch.equal(gone.all(1), gone.any(1))  # in all channels the same
    holes = gone[:, 0].numpy()
    hit = holes.any((1, 2))
    assert 1065 < hit.sum() < 1335  # five standard deviations
    corners = []
    for hole in holes[hit]:
        across, along = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        tall, wide = len(across), len(along)
        assert hole[across[0] : across[-1] + 1, along[0] : along[-1] + 1].all()
        assert hole.sum() == tall * wide
        corners.append([across[0], along[0], 20 - across[-1], 30 - along[-1], tall, wide])
        if tall < 20:
            # Sides that round to these may have an area and an aspect as the paper has them.
            assert (tall - 0.5) * (wide - 0.5) <= 0.33 * 600
            assert (tall + 0.5) * (wide + 0.5) >= 0.02 * 600
            assert (tall - 0.5) / (wide + 0.5) <= 1 / 0.3
            assert (tall + 0.5) / (wide - 0.5) >= 0.3
    top, left, bottom, right, tall, wide = np.array(corners).T
    assert (top.min(), left.min(), bottom.min(), right.min()) == (0, 0, 1, 1)
    share = tall * wide / 600
    assert share.min() < 0.04 and share.max() > 0.3
    assert abs(share.mean() - 0.175) < 0.02
    assert (tall / wide).min() < 0.45 and (tall / wide).max() > 2.5
    assert 1.6 < (tall / wide).mean() < 2.1  # upright more often than not, as in the paper


def test_rectangles_lie_within_images_of_any_shape() -> None:
    for height, width in ((1, 1), (1, 40), (40, 2), (3, 3)):
        top, left, tall, wide = rectangles(500, height, width, rng())
        assert tall.min() >= 1 and wide.min() >= 1 and top.min() >= 0 and left.min() >= 0
        assert (top + tall).max() == height and (left + wide).max() == width


def test_erasing_at_given_places() -> None:
    x = torch.ones(3, 2, 2, 3)
    zero, one, two = (np.full(3, value) for value in (0, 1, 2))
    out = erased(x, one, one, one, two, np.array([True, False, True]))
    assert out[0].tolist() == [[[1, 1, 1], [1, 0, 0]]] * 2
    assert out[1].tolist() == [[[1, 1, 1], [1, 1, 1]]] * 2
    assert torch.equal(out[2], out[0])
    assert erased(x, zero, zero, two, one, np.array([True] * 3))[0, 0].tolist() == [[0, 1, 1], [0, 1, 1]]


# -- what is refused, and one's own -----------------------------------------------------------------------------------


WRONG = [
    ("crop=4", "crop", "got 4: of images of 4 × 4 pixels nothing might be left; nearest valid value: 3"),
    ("crop=-1", "crop", "got -1: must be at least 0; nearest valid value: 0"),
    ("flip=1.5", "flip", "got 1.5: must be at most 1; nearest valid value: 1"),
    ("erase=yes", "erase", "got 'yes': expected a number"),
    ("mixup=-0.1", "mixup", "got -0.1: must be at least 0; nearest valid value: 0"),
    ("mixup=inf", "mixup", "got inf: must be finite"),
]


@pytest.mark.parametrize(("typed", "key", "text"), WRONG, ids=[typed for typed, _, _ in WRONG])
def test_wrong_options_are_refused(typed: str, key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^augmentation\.{key}: {text}"):
        helpers.plan(f"augmentation.{typed}")


@pytest.mark.parametrize("option", ["crop", "flip", "erase"])
def test_what_is_no_image_is_only_mixed(option: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    examples = Examples(x, np.zeros(6, dtype=np.int64))
    flat = Dataset("flat", examples, examples, 2, (0.0,), (1.0,))
    with pytest.raises(ConfigError, match=rf"^{option}: got 1: .* shape \(5,\); nearest valid value: 0"):
        Augmentation(**{option: 1}).fitted(flat)
    assert fitted(flat, mixup=1.0)(torch.from_numpy(x), rng()).x.shape == (6, 5)


OWN = """
import torch
from hybridfl.build import PositiveFloat
from hybridfl.data.augmentation import Augmented


class Noise:
    def __init__(self, sd: PositiveFloat = 0.1):
        self.sd = sd

    def fitted(self, dataset):
        return self.noisy

    def noisy(self, x, rng):
        return Augmented(x + self.sd * torch.from_numpy(rng.standard_normal(tuple(x.shape))).to(x))


class Nothing:
    pass
"""


def test_an_augmentation_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noise_of_mine.py").write_text(OWN)
    folder = tmp_path / "conf" / "augmentation"
    folder.mkdir(parents=True)
    (folder / "noise.yaml").write_text("_target_: noise_of_mine.Noise\nsd: 0.1\n")
    (folder / "nothing.yaml").write_text("_target_: noise_of_mine.Nothing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    line = ("--config-dir", "conf", *TINY, "baseline=fedavg", "rounds=1", "augmentation=noise")
    losses = {}
    for sd in ("0.1", "1e-9"):
        answer = call("train", *line, f"augmentation.sd={sd}")
        assert answer.status == 0, answer.both
        losses[sd] = float(rows(answer.folder / "metrics.csv")[-1]["loss"])
    plain = call("train", *TINY, "baseline=fedavg", "rounds=1")
    assert losses["1e-9"] == pytest.approx(float(rows(plain.folder / "metrics.csv")[-1]["loss"]), abs=1e-5)
    assert abs(losses["0.1"] - losses["1e-9"]) > 1e-5
    assert "augmentation.sd: got -1: must be above 0" in call("train", *line, "augmentation.sd=-1").err
    assert "Nothing is no Augmenter: it lacks fitted" in call("train", *line, "augmentation=nothing").err
