"""``python -m hybridfl`` and the console script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from hybridfl.cli import main as command_line

    sys.exit(command_line())


if __name__ == "__main__":
    main()
