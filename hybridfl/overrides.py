"""The config of a run as it is typed: ``key=value`` after a command's name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridfl.config import Composed

HELP = """\
Overrides are key=value, as in Hydra: rounds=10 merging.search.steps=20 client_optimizer.lr=0.05
  config groups take the name of a choice: model=cnn baseline=fedavg (see `hybridfl list`)
"""


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """What every command takes that composes the config of a run."""
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")


def composed_of(chosen: argparse.Namespace, quiet: bool = False) -> Composed:
    """The config that was typed.

    Args:
        quiet: do not say that a preset's sweep is left out.
    """
    from hybridfl.config import Composer
    from hybridfl.sweep_line import refuse_outside

    refuse_outside(chosen.overrides)
    with Composer(chosen.config_dir) as composer:
        composed = composer.compose(chosen.overrides)
    if composed.has_sweep and not quiet:
        print("hybridfl: the preset brings a sweep, which only train -m runs; it is left out here.", file=sys.stderr)
    return composed
