"""Server data in another style: the clients' classes, shown differently, so that the server is out of their domain.

Kinds of change as in Hendrycks, Dietterich 2019, arXiv 1903.12261, which measures how far each moves a data set from a model
trained on the original; their strengths and formulas are not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridfl.build import PositiveFloat
from hybridfl.data.conversion import coloured, fitted
from hybridfl.data.dataset import Dataset, Examples, IntArray
from hybridfl.data.server_data import Load, OfTheTask, ServerShare
from hybridfl.errors import ConfigError

Style = Literal["blur", "edges", "grey", "invert", "noise", "rotate"]
Images = NDArray[np.float32]


class _Kind(NamedTuple):
    """A style: its strength if none is given, the largest one, whether it asks what full intensity is, and what it does."""

    default: float
    most: float | None
    needs_white: bool
    apply: Callable[[Images, float, float, np.random.Generator], Images]


def restyled(
    x: NDArray[np.generic], style: Style, strength: float | None, white: float | None, rng: np.random.Generator
) -> NDArray[np.generic]:
    """Images ``(N, C, H, W)`` in another style: of the same shape and type, and within 0 … ``white`` if that is known.

    Args:
        style: ``blur``: Gaussian, σ = strength times the shorter side, borders mirrored (0.05). ``rotate``: by so many
            degrees anticlockwise, bilinear, borders repeated (45). ``noise``: Gaussian, of standard deviation strength
            times white, then cut to the range (0.2). The others are mixed with the original, which has the weight
            1 - strength (1): ``invert``: the negative; ``edges``: magnitude of the Sobel gradient, which is white at a
            straight step from black to white; ``grey``: the luma in every channel.
        strength: ``None`` is the number in brackets.
        white: raw value of full intensity; ``None``: values are no intensities, which only blur and rotate accept.
        rng: draws the noise; the others use no randomness.

    Raises:
        ConfigError: the images have no such style, or the strength is too large; its key is ``style`` or ``strength``.
    """
    kind = _KINDS[style]
    if kind.most is not None and strength is not None and strength > kind.most:
        problem = f"must be at most {kind.most:g} with style={style}; nearest valid value: {kind.most:g}"
        raise ConfigError("strength", f"got {strength:g}: {problem}.")
    if white is None and kind.needs_white:
        problem = f"got {style}, and the clients' values are no intensities"
        raise ConfigError("style", f"{problem}; valid: blur, rotate.")
    if style == "grey" and x.shape[1] != 3:
        problem = f"got grey, which changes images of 3 channels, and the clients' have {x.shape[1]}"
        raise ConfigError("style", f"{problem}; choose another, such as blur.")
    amount = kind.default if strength is None else strength
    changed = kind.apply(x.astype(np.float32), amount, 1.0 if white is None else white, rng)
    if white is not None:
        return fitted(changed, white, x.dtype.name)
    return (np.rint(changed) if x.dtype == np.uint8 else changed).astype(x.dtype)


@dataclass(frozen=True)
class Styled(OfTheTask):
    """A share of the training examples that is shown to the server in another style; nobody has the originals.

    Args:
        style, strength: as in :func:`restyled`. Other options as in :class:`~hybridfl.data.server_data.OfTheTask`.
    """

    style: Style = "blur"
    strength: PositiveFloat | None = None

    def share(self, dataset: Dataset, free: IntArray, load: Load, rng: np.random.Generator) -> ServerShare:
        """As :class:`~hybridfl.data.server_data.ServerData` says."""
        originals = free[self.draw(dataset.train.y[free], dataset.classes, rng)]
        seen = dataset.train.at(originals)
        images = restyled(seen.x, self.style, self.strength, dataset.white, rng)
        domains = tuple(f"{name} ({self.style})" for name in dataset.domains)
        return ServerShare(withheld=originals, own=Examples(images, seen.y, seen.domain), domains=domains)


def _blur(x: Images, strength: float, white: float, rng: np.random.Generator) -> Images:
    from scipy.ndimage import gaussian_filter

    sigma = strength * min(x.shape[2:])
    return np.asarray(gaussian_filter(x, (0, 0, sigma, sigma), mode="reflect"), dtype=np.float32)


def _rotate(x: Images, degrees: float, white: float, rng: np.random.Generator) -> Images:
    from scipy.ndimage import rotate

    return np.asarray(rotate(x, degrees, axes=(2, 3), reshape=False, order=1, mode="nearest"), dtype=np.float32)


def _noise(x: Images, strength: float, white: float, rng: np.random.Generator) -> Images:
    return x + np.float32(strength * white) * rng.standard_normal(x.shape, dtype=np.float32)


def _invert(x: Images, strength: float, white: float, rng: np.random.Generator) -> Images:
    return _mixed(x, white - x, strength)


def _edges(x: Images, strength: float, white: float, rng: np.random.Generator) -> Images:
    from scipy.ndimage import correlate1d

    # scipy's own sobel would also smooth over the channels and from one image to the next.
    across, down = (
        correlate1d(correlate1d(x, [-1, 0, 1], axis=axis), [0.25, 0.5, 0.25], axis=other)
        for axis, other in ((3, 2), (2, 3))
    )
    return _mixed(x, np.hypot(across, down), strength)


def _grey(x: Images, strength: float, white: float, rng: np.random.Generator) -> Images:
    return _mixed(x, coloured(coloured(x, 1), x.shape[1]), strength)


def _mixed(x: Images, other: Images, share: float) -> Images:
    return np.float32(1 - share) * x + np.float32(share) * other


_KINDS: dict[Style, _Kind] = {
    "blur": _Kind(0.05, None, False, _blur),
    "edges": _Kind(1.0, 1.0, True, _edges),
    "grey": _Kind(1.0, 1.0, True, _grey),
    "invert": _Kind(1.0, 1.0, True, _invert),
    "noise": _Kind(0.2, None, True, _noise),
    "rotate": _Kind(45.0, None, False, _rotate),
}
