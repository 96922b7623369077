"""What the scripts of a study take."""

from __future__ import annotations

import argparse
from pathlib import Path


def study_parser(told: str | None) -> argparse.ArgumentParser:
    """With ``scale``, ``output_dir``, ``out``, ``jobs``, ``no_runs`` and ``overrides``."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/feddle"), help="of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of pages")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (more than one needs the extra joblib)")
    parser.add_argument("--no-runs", action="store_true", help="only show what is there")
    parser.add_argument("overrides", nargs="*", help="more overrides, such as device=cuda")
    return parser
