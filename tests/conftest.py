"""What holds for the whole suite."""

import os
import signal
from pathlib import Path

import pytest
from compare_helpers import Outputs

# A shell that starts the suite in the background makes it ignore Ctrl-C, and every process that a test interrupts would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def real() -> Path:
    """The folder with real files, from the environment."""
    root = os.environ.get("HYBRIDFL_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("HYBRIDFL_DATA is not set to a folder with the real files")
    return Path(root)


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    return Outputs(tmp_path / "outputs")
