"""Is Feddle's theory, as reconstructed, visible in its runs? Six probes that look at a run without changing it.

    python scripts/feddle_theory.py --seeds 2                  all six on the digits, about a quarter of an hour
    python scripts/feddle_theory.py --probes T1 T4 --seeds 5
    python scripts/feddle_theory.py --quick                    toy sizes, to see that it works

The protocol is the preset ``experiment=feddle_digits``. The engine is stepped here, one thread and one client after the
other, and between two rounds the atlas is read from the method's state; gradients on the clients' pooled data are taken
beside the run, and no method ever sees them. See docs/theory.md for formulas and for what was found.
"""

from __future__ import annotations

from theory.command import study

if __name__ == "__main__":
    study(usage=__doc__)
