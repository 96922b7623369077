"""How a command ends: its exit status, and why it failed in one message."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from hybridfl.errors import HybridflError
from hybridfl.rendezvous import INTERRUPTED

PACKAGES = {name: name for name in (
    "filelock", "matplotlib", "numpy", "omegaconf", "pandas", "pooch", "requests", "rich", "safetensors", "scipy", "torch",
)} | {"PIL": "pillow", "hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # fmt: skip
"""What an installation comes with, by the name it is imported by."""


def reported(work: Callable[[], int]) -> int:
    """The exit status of work that may fail; why it did is said on standard error."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except HybridflError as error:
        print(f"hybridfl: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("hybridfl: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone; what Python flushes at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:  # a mistake in the code, the user's or ours: only the traceback tells where
        name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if name in PACKAGES:
            print(
                f"hybridfl: {name}: is not installed, and this needs it: pip install {PACKAGES[name]}", file=sys.stderr
            )
        else:
            traceback.print_exc()
        return 1
