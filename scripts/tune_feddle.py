"""Tune Feddle and its rivals alike: six settings each, by the accuracy on a part of the server's own examples.

    python scripts/tune_feddle.py                 the preset feddle_tuning, some three core-hours
    python scripts/tune_feddle.py --scale smoke   to see that it works

Prints what was tried, and what was chosen as the `tuned` of conf/experiment/feddle_study.yaml. No test example has a say.
"""

from __future__ import annotations

import sys

from results.arguments import study_parser
from results.cells import grid
from results.page import sweep
from results.tuning import block, sheet

from hybridfl.config import Composer
from hybridfl.formats import markdown
from hybridfl.store import write_text_atomic


def tune() -> int:
    chosen = study_parser(__doc__).parse_intermixed_args()
    line = ["experiment=feddle_tuning", f"scale={chosen.scale}", *chosen.overrides]
    output = chosen.output_dir.resolve()
    if not chosen.no_runs:
        sweep(line, output, chosen.jobs)
    with Composer() as composer:
        found = grid(composer, line, output)
    chosen.out.mkdir(parents=True, exist_ok=True)
    page = ["# Feddle: what was tuned", "", f"    hybridfl train -m {' '.join(line)}", "", markdown(sheet(found)), ""]
    write_text_atomic(chosen.out / "feddle_tuning.md", "\n".join(page))
    print(markdown(sheet(found)))
    print(block(found, "feddle"))
    return 0


if __name__ == "__main__":
    sys.exit(tune())
