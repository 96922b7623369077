"""``hybridfl track``: finished runs sent to a tracker, as they would have been while they worked."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from hybridfl.build import build, of_kind
from hybridfl.config import Composer, choices
from hybridfl.errors import ConfigError
from hybridfl.finding import find_runs
from hybridfl.runs import to_stderr
from hybridfl.trackers import Tracked, Tracker
from hybridfl.trackers.none import NoTracker
from hybridfl.tracking import Tracking

EPILOG = """\
  hybridfl track tracker=tensorboard                          # all finished runs in outputs
  hybridfl track outputs/sweeps/<digest> tracker=mlflow tracker.experiment=digits

What a tracker has already is not sent twice.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl track``."""
    parser.epilog = EPILOG
    parser.add_argument(
        "what", nargs="*", metavar="PATH|tracker…=value", help="run, sweep or output folders (default: outputs)"
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")


def run(args: argparse.Namespace, warn: Callable[[str], None] = to_stderr) -> int:
    """Sends the runs; the exit status is 1 if the tracker failed.

    Raises:
        ConfigError: no tracker is chosen, one that cannot work here, a wrong option, or a path without runs.
    """
    overrides = [word for word in args.what if "=" in word and not Path(word).exists()]
    for word in overrides:
        if word.lstrip("+").partition("=")[0].partition(".")[0] != "tracker":
            raise ConfigError(word, "is no option of the tracker; write tracker=NAME or tracker.KEY=VALUE.")
    with Composer(args.config_dir) as composer:
        node = composer.compose(overrides).config["tracker"]
    tracker: Tracker = of_kind(build(node, "tracker"), Tracker, "tracker")
    if isinstance(tracker, NoTracker):
        names = ", ".join(sorted(choices("tracker", args.config_dir).keys() - {"none"}))
        raise ConfigError("tracker", f"got none, which sends nothing; valid: {names}.")
    tracker.check()
    paths = [Path(word) for word in args.what if word not in overrides] or [Path("outputs")]
    failed = 0
    runs = find_runs(paths, warn)
    for found in runs:
        tracking = Tracking(tracker, Tracked(found.folder, found.config), warn)
        tracking.end("done")
        failed += tracking.failed
    print(f"{len(runs) - failed} of {len(runs)} runs are in {type(tracker).__name__}.")
    return 1 if failed else 0
