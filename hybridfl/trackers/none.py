"""No tracker."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from hybridfl.trackers import Ending, Tracked


class NoTracker:
    """Nothing is sent anywhere: its own session, which has every round already."""

    last = sys.maxsize

    def check(self) -> None:
        """There is nothing to check."""

    def open(self, run: Tracked) -> NoTracker:
        return self

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Says nothing."""

    def close(self, ending: Ending) -> None:
        """There is nothing to close."""
