"""``hybridfl split``: who owns what under a config, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridfl.overrides import HELP, add_overrides, composed_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl split``."""
    parser.epilog = HELP
    add_overrides(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write figures (PNG) and split.json there")
    parser.add_argument("--all", action="store_true", help="show every client, not only the first 20")


def run(chosen: argparse.Namespace) -> int:
    """Prints the split and returns the exit status."""
    composed = composed_of(chosen)
    from hybridfl.split import show

    print(show(composed, chosen.out, chosen.all))
    return 0
