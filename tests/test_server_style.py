"""The server's examples in another style: exact truths of each, and who has the originals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_helpers import call
from partition_helpers import rng
from PIL import Image
from server_data_helpers import clients, dataset, draw, images, servers

from hybridfl.data.server_data import Share
from hybridfl.data.server_style import Styled, restyled
from hybridfl.errors import ConfigError

STYLES = ["blur", "edges", "grey", "invert", "noise", "rotate"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


# -- another style: exact truths -------------------------------------------------------------------------------------


def changed(x: np.ndarray, style: Any, strength: float | None = None, white: float | None = 255.0) -> np.ndarray:
    return restyled(x, style, strength, white, rng())


@pytest.mark.parametrize("white", [255.0, 16.0])
def test_the_negative_of_the_negative(white: float) -> None:
    x = images(3, (3, 5, 4), white=white)
    once = changed(x, "invert", white=white)
    np.testing.assert_array_equal(once, white - x)
    np.testing.assert_array_equal(changed(once, "invert", white=white), x)
    assert (changed(x.astype(np.float32), "invert", 0.5, white) == white / 2).all(), "half of each leaves no image"


def test_a_blur_keeps_the_mean_and_constants_and_spreads_a_point_as_far_as_said() -> None:
    x = images(2, (1, 12, 10), dtype="float32")
    blurred = changed(x, "blur", 0.2)
    np.testing.assert_allclose(blurred.mean((2, 3)), x.mean((2, 3)), rtol=1e-5)
    assert (blurred.std((2, 3)) < 0.5 * x.std((2, 3))).all()
    np.testing.assert_allclose(changed(np.full_like(x, 77), "blur", 0.2), 77, rtol=1e-6)
    point = np.zeros((1, 3, 61, 81), dtype=np.float32)
    point[0, 1, 30, 40] = 200
    spread = changed(point, "blur")
    assert not spread[:, [0, 2]].any(), "channels are not mixed"
    away = np.arange(61) - 30
    sigma = 0.05 * 61  # the shorter side
    assert (spread[0, 1].sum(1) @ away**2) / 200 == pytest.approx(sigma**2, rel=0.02)


def test_rotations_by_right_angles() -> None:
    x = images(2, (3, 7, 7))
    np.testing.assert_array_equal(changed(x, "rotate", 90), np.rot90(x, axes=(2, 3)))
    np.testing.assert_array_equal(changed(x, "rotate", 360), x)
    np.testing.assert_array_equal(changed(x, "rotate"), changed(x, "rotate", 45))
    np.testing.assert_allclose(changed(np.full_like(x, 9), "rotate", 33), 9)
    wide = images(1, (1, 4, 6), dtype="float32")
    np.testing.assert_allclose(changed(wide, "rotate", 180), wide[:, :, ::-1, ::-1], rtol=1e-4, atol=0.1)


def test_edges_are_the_sobel_gradients_of_torch() -> None:
    x = images(2, (3, 6, 5), dtype="float32", white=100)
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    padded = F.pad(torch.from_numpy(x).reshape(6, 1, 6, 5), (1, 1, 1, 1), mode="replicate")
    across, down = (F.conv2d(padded, k[None, None]) for k in (kernel, kernel.T))
    expected = torch.hypot(across, down).reshape(2, 3, 6, 5).numpy()
    np.testing.assert_allclose(changed(x, "edges"), expected, rtol=1e-4, atol=1e-3)
    assert not changed(np.full((1, 1, 5, 5), 200, dtype=np.uint8), "edges").any()
    step = np.zeros((1, 1, 5, 6), dtype=np.uint8)
    step[..., 3:] = 255
    assert changed(step, "edges")[0, 0].tolist() == [[0, 0, 255, 255, 0, 0]] * 5
    np.testing.assert_array_equal(changed(step, "edges", 0.5)[0, 0, 0], [0, 0, 128, 255, 128, 128])


def test_grey_is_pillows_and_stays_as_it_is() -> None:
    x = images(4, (3, 6, 5))
    grey = changed(x, "grey")
    assert (grey == grey[:, :1]).all()
    pillows = [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L"), dtype=int) for image in x]
    assert np.abs(grey[:, 0] - np.stack(pillows)).max() <= 1
    np.testing.assert_array_equal(changed(grey, "grey"), grey)
    half = changed(x.astype(np.float32), "grey", 0.5)
    np.testing.assert_allclose(half, (x + changed(x.astype(np.float32), "grey")) / 2, rtol=1e-5, atol=1e-3)


def test_noise_has_the_deviation_said_and_comes_from_the_stream_given() -> None:
    x = np.full((4, 3, 60, 60), 8.0, dtype=np.float32)
    noisy = changed(x, "noise", 0.1, white=16.0)
    assert noisy.std() == pytest.approx(1.6, rel=0.02)
    assert noisy.mean() == pytest.approx(8.0, abs=0.05)
    np.testing.assert_array_equal(noisy, changed(x, "noise", 0.1, white=16.0))
    assert (restyled(x, "noise", 0.1, 16.0, rng(1)) != noisy).mean() > 0.99
    np.testing.assert_array_equal(changed(x, "noise"), changed(x, "noise", 0.2))
    assert set(np.unique(changed(images(1, (1, 9, 9)), "noise", 50.0))) == {0, 255}, "what is beyond is cut"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("shape", "dtype", "white"), [((3, 9, 9), "uint8", 255.0), ((3, 8, 9), "float32", 1.0), ((3, 9, 8), "uint8", 16.0)]
)
def test_images_stay_in_range_and_type_and_are_changed(style: Any, shape: Any, dtype: str, white: float) -> None:
    x = images(5, shape, white=white, dtype=dtype)
    before = x.copy()
    seen = changed(x, style, white=white)
    assert (seen.shape, seen.dtype) == (x.shape, x.dtype)
    assert seen.min() >= 0
    assert seen.max() <= white
    assert (seen != x).any()
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_must_make_sense_for_the_images(style: Any) -> None:
    x = images(2, (3, 6, 6), dtype="float32") - 100
    if style in ("blur", "rotate"):
        seen = changed(x, style, white=None)
        assert seen.min() >= x.min()
        assert seen.min() < 0
        whole = changed((x + 100).astype(np.uint8), style, white=None)
        np.testing.assert_allclose(whole, np.rint(seen + 100), atol=1)
        assert whole.dtype == np.uint8
        return
    with pytest.raises(ConfigError, match=f"got {style}, and the clients' values are no intensities") as caught:
        changed(x, style, white=None)
    assert caught.value.key == "style"


@pytest.mark.parametrize(
    ("style", "strength", "shape", "key", "problem"),
    [
        ("grey", None, (1, 4, 4), "style", "got grey, which changes images of 3 channels, and the clients' have 1"),
        ("invert", 1.5, (1, 4, 4), "strength", "got 1.5: must be at most 1 with style=invert; nearest valid value: 1"),
        ("edges", 2, (1, 4, 4), "strength", "got 2: must be at most 1"),
    ],
)
def test_a_style_that_cannot_be(style: Any, strength: float | None, shape: Any, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        draw(dataset(shape=shape), Styled(examples=6, style=style, strength=strength))
    assert caught.value.key == f"server_data.{key}"


# -- another style: who has what -------------------------------------------------------------------------------------


def test_nobody_has_the_originals_of_restyled_examples() -> None:
    data = dataset(domains=("a", "b"))
    drawn = draw(data, Styled(examples=12, style="invert", validation=0.25))
    own = servers(drawn)
    assert sorted(own) == list(range(60, 72))
    originals = np.setdiff1d(np.arange(60), clients(drawn))
    assert len(originals) == 12
    np.testing.assert_array_equal(drawn.pool.x[60:], 255 - data.train.x[originals])
    np.testing.assert_array_equal(drawn.pool.y[60:], data.train.y[originals])
    np.testing.assert_array_equal(drawn.pool.domain[60:], 2 + data.train.domain[originals])
    assert drawn.domains == ("a", "b", "a (invert)", "b (invert)")
    assert drawn.sources == ()
    share = draw(data, Share(examples=12))
    np.testing.assert_array_equal(np.sort(servers(share)), originals)  # the same ones that a plain share takes
    noisy = draw(data, Styled(examples=12, style="noise"))
    np.testing.assert_array_equal(np.sort(clients(noisy)), np.sort(clients(drawn)))
    assert (noisy.pool.x[60:] == draw(data, Styled(examples=12, style="noise")).pool.x[60:]).all()
    assert (noisy.pool.x[60:] != draw(data, Styled(examples=12, style="noise"), seed=1).pool.x[60:]).any()


@pytest.mark.parametrize("server", ["server_data=style", "server_data=share"])
def test_a_split_can_be_given_back(server: str) -> None:
    line = ("split", *cli_helpers.TINY, server, "server_data.validation=0.25")
    first = call(*line, "--out", "out")
    again = call(*line, "partitioning=file", "partitioning.path=out/split.json")
    told = [[text for text in answer.out.splitlines() if text.startswith("split ")] for answer in (first, again)]
    assert told[0] == told[1] != []


def test_what_is_withheld_is_nobodys_without_being_forgotten() -> None:
    """Only what neither the clients nor the server names is a mistake."""
    answer = call("split", *cli_helpers.TINY, "server_data=style", "server_data.examples=30")
    assert "examples   30 to the server (30 that only it has), 170 to 5 clients, 30 to nobody\n" in answer.out
    Path("owners.json").write_text(json.dumps([list(range(client, 150, 5)) for client in range(5)]))
    line = ("partitioning=file", "partitioning.path=owners.json", "server_data=style", "server_data.examples=30")
    answer = call("split", *cli_helpers.TINY, *line)
    assert answer.err.startswith(
        "hybridfl: partitioning.complete: got true, and 20 training examples belong to no client"
    )
    assert call("split", *cli_helpers.TINY, *line, "server_data.examples=50").status == 0
