"""Figures of a split as PNG. Only here is matplotlib imported, without its global state and without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hybridfl.data.dataset import IntArray

WRITTEN = 20
"""Up to so many clients and classes the heat map also writes the numbers."""
BINS = 30


def heat_map(counts: IntArray, title: str, path: Path, domains: Sequence[str] = ()) -> None:
    """Training examples by client and class ``(clients, classes)``, or by domain if their names are given; none is white."""
    clients, classes = counts.shape
    written = clients <= WRITTEN and classes <= WRITTEN
    figure = _figure(float(np.clip(2.5 + 0.5 * classes, 6, 14)), float(np.clip(1.6 + 0.3 * clients, 3.2, 11)))
    axes = figure.add_subplot()
    # The map begins below zero, so that a single example differs from none, which is white.
    most = int(counts.max())
    cells = np.ma.masked_equal(counts, 0)
    image = axes.imshow(cells, cmap="Blues", vmin=-0.25 * most, vmax=most, aspect="auto", interpolation="nearest")
    if written:
        for (client, label), count in np.ndenumerate(counts):
            colour = "white" if count > most / 2 else "black"
            if count:
                axes.text(label, client, str(count), ha="center", va="center", fontsize=8, color=colour)
    axes.set(title=title, xlabel="domain" if domains else "class", ylabel="client")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=WRITTEN, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=WRITTEN, integer=True, steps=[1, 2, 5, 10]))
    if domains:
        axes.set_xticks(range(len(domains)), domains, rotation=30, ha="right")
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(clients + 1) - 0.5, minor=True)
    if clients <= 200 and classes <= 200:
        axes.grid(which="minor", color="0.85", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, label="training examples (white: none)")
    bar.ax.set_ylim(0, most)
    bar.locator = MaxNLocator(nbins=8, integer=True)
    _save(figure, path)


def histogram(sizes: IntArray, title: str, path: Path) -> None:
    """How many clients have how many training examples, with the median."""
    figure = _figure(6.5, 4)
    axes = figure.add_subplot()
    # Whole numbers of examples in every bin, so that no bin is empty or full by rounding alone.
    width = max(1, -(-(int(sizes.max()) - int(sizes.min()) + 1) // BINS))
    edges = np.arange(sizes.min(), sizes.max() + width + 1, width) - 0.5
    axes.hist(sizes, bins=edges.tolist(), color="#3b6ea5", edgecolor="white", linewidth=0.5)
    median = float(np.median(sizes))
    axes.axvline(median, color="#c44e1f", linestyle="--", label=f"median {median:g}")
    axes.set(title=title, xlabel="training examples of a client", ylabel="clients")
    if len(edges) < 12:  # a few bins in the middle of a wide axis, rather than one that fills it
        middle = (edges[0] + edges[-1]) / 2
        axes.set_xlim(max(-0.5, middle - 6 * width), middle + 6 * width)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.axes[0].title.set_fontsize(10)
    figure.savefig(path, dpi=150)
